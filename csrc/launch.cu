#include "launch.h"

#include <cudaTypedefs.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "sm90/combine.cuh"
#include "sm90/decode_narrow.cuh"
#include "sm90/decode_wide.cuh"
#include "sm90/plan.cuh"

namespace mla_backend {
namespace {

void check(const char* what, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// The driver's encoder of tensor maps, found at run time so that the library needs no link to the driver.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

// How the copy engine reads [outer, rows, columns]: `box_columns` x box_rows x box_outer at a time, laid down in shared
// memory with the swizzle of that width. Strides count elements.
CUtensorMap encode(CUtensorMapDataType type, const void* data, int64_t columns, int64_t rows, int64_t outer,
                   int64_t row_stride, int64_t outer_stride, int box_columns, int box_rows, int box_outer) {
  constexpr int kBytes = 2;  // of an element
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(outer)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_stride * kBytes), static_cast<cuuint64_t>(outer_stride * kBytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows),
                            static_cast<cuuint32_t>(box_outer)};
  const cuuint32_t steps[] = {1, 1, 1};
  const auto encoder = tensor_map_encoder();
  if (encoder == nullptr) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled; it needs CUDA 12 or later");
  CUtensorMap map;
  const CUresult result =
      encoder(&map, type, 3, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
              box_columns * kBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
              // Without promotion: 256 bytes at a time cost 5 to 8 % where bytes decide.
              CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled failed with " + std::to_string(result));
  return map;
}

// Launch a decode kernel whose workers are clusters of kCluster thread blocks and handle kRows query rows each.
template <typename Shared, int kRows, int kCluster, typename Kernel>
void decode(Kernel kernel, DecodeParams& params, const Cache& cache, CUtensorMapDataType type, cudaStream_t stream) {
  const int block_tokens = std::min(kRows / params.heads, params.max_query_len);
  params.block_rows = block_tokens * params.heads;
  params.row_blocks = (params.max_query_len + block_tokens - 1) / block_tokens;
  params.workers = std::max(1, params.multiprocessors / (params.row_blocks * kCluster));
  const int box_tokens = std::min(params.page_size, kTileTokens / kCluster);
  params.box_shift = __builtin_ctz(box_tokens);
  params.boxes_per_page = params.page_size >> params.box_shift;

  const auto of_cache = [&](int columns) {
    return encode(type, cache.data, kHeadDim, params.page_size, cache.pages, cache.token_stride, cache.page_stride, columns,
                  box_tokens, 1);
  };
  const auto of_queries = [&](const void* data, int columns, int64_t token_stride, int64_t head_stride, int box_columns) {
    return encode(type, data, columns, params.heads, params.tokens, head_stride, token_stride, box_columns, params.heads,
                  block_tokens);
  };
  constexpr int kRopeColumns = kRopeDim / kCluster;
  sm90::TensorMaps maps = {};
  maps.latent = of_cache(64);
  maps.rope = kRopeColumns == 64 ? maps.latent : of_cache(kRopeColumns);
  if (params.queries_are_vectors) {
    maps.latent_query = of_queries(params.q_nope, kLatentDim, params.q_nope_token_stride, params.q_nope_head_stride, 64);
    maps.rope_query = of_queries(params.q_pe, kRopeDim, params.q_pe_token_stride, params.q_pe_head_stride, kRopeColumns);
  }

  constexpr size_t kSharedBytes = sizeof(Shared);
  static_assert(kSharedBytes <= 227 * 1024);
  // Per device and cheap, so it is simply asked for each time.
  check("shared memory for the decode kernel",
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<dim3(params.workers * kCluster, params.row_blocks), sm90::kThreads, kSharedBytes, stream>>>(params, maps);
  check("decode kernel", cudaGetLastError());
}

template <typename Element, typename Shape>
void combine(const DecodeParams& params, cudaStream_t stream) {
  // It need not wait until all that the decode kernel wrote is there: its blocks find their work first.
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((params.heads + Shape::kRows - 1) / Shape::kRows * Shape::kColumnParts, params.tokens);
  config.blockDim = Shape::kThreads;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  check("combine kernel", cudaLaunchKernelEx(&config, sm90::combine_kernel<Element, Shape>, params));
}

template <typename Element>
void launch(DecodeParams params, const Cache& cache, CUtensorMapDataType type, cudaStream_t stream) {
  using namespace sm90;
  params.max_query_len = std::max(1, params.max_query_len);
  if (const int rows = params.batch_invariant ? 128 : params.max_query_len * params.heads; rows <= 16) {
    decode<NarrowShared<Element, 16>, 16, 1>(decode_narrow_kernel<Element, 16>, params, cache, type, stream);
  } else if (rows <= 32) {
    decode<NarrowShared<Element, 32>, 32, 1>(decode_narrow_kernel<Element, 32>, params, cache, type, stream);
  } else if (rows <= 64) {
    decode<WideShared<Element, 64>, 64, 2>(decode_wide_kernel<Element, 64>, params, cache, type, stream);
  } else {
    decode<WideShared<Element, 128>, 128, 2>(decode_wide_kernel<Element, 128>, params, cache, type, stream);
  }
  const int64_t all_rows = static_cast<int64_t>(params.tokens) * params.heads;
  if (all_rows < kSomeRows) {
    combine<Element, CombineFewRows>(params, stream);
  } else if (all_rows < kManyRows) {
    combine<Element, CombineSomeRows>(params, stream);
  } else {
    combine<Element, CombineManyRows>(params, stream);
  }
}

}  // namespace

void launch_decode(const DecodeParams& params, const Cache& cache, ElementType type, cudaStream_t stream) {
  if (type == ElementType::kBFloat16) {
    launch<__nv_bfloat16>(params, cache, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, stream);
  } else {
    launch<__half>(params, cache, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, stream);
  }
}

void launch_plan(const int32_t* seq_lens, int requests, int32_t* request_tiles, cudaStream_t stream) {
  sm90::plan_kernel<<<1, sm90::kPlanThreads, 0, stream>>>(seq_lens, requests, request_tiles);
  check("plan kernel", cudaGetLastError());
}

}  // namespace mla_backend
