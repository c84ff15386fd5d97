#include "launch.h"

#include <cudaTypedefs.h>

#include "sm90/combine.cuh"
#include "sm90/decode_narrow.cuh"
#include "sm90/decode_wide.cuh"
#include "sm90/plan.cuh"

namespace mla_backend {
namespace {

std::string describe(const char* what, cudaError_t error) {
  return error == cudaSuccess ? "" : std::string(what) + ": " + cudaGetErrorString(error);
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

template <typename Element>
std::string encode_cache(const Cache& cache, int page_size, CUtensorMapDataType type, CUtensorMap* map) {
  const cuuint64_t sizes[] = {kHeadDim, static_cast<cuuint64_t>(page_size), static_cast<cuuint64_t>(cache.pages)};
  const cuuint64_t strides[] = {cache.token_stride * sizeof(Element), cache.page_stride * sizeof(Element)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(page_size < kTileTokens ? page_size : kTileTokens), 1};
  const cuuint32_t steps[] = {1, 1, 1};
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled; it needs CUDA 12 or later";
  const CUresult result =
      encode(map, type, 3, const_cast<void*>(cache.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? "" : "cuTensorMapEncodeTiled failed with " + std::to_string(result);
}

template <typename Shared, typename Kernel>
std::string decode(Kernel kernel, const DecodeParams& params, const CUtensorMap& map, cudaStream_t stream) {
  constexpr size_t kSharedBytes = sizeof(Shared) + alignof(Shared);
  // Per device and cheap, so it is simply asked for each time.
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return describe("shared memory for the decode kernel", error);
  kernel<<<dim3(params.workers, params.row_blocks), sm90::kThreads, kSharedBytes, stream>>>(params, map);
  return describe("decode kernel", cudaGetLastError());
}

template <typename Element, typename Shape>
std::string combine(const DecodeParams& params, cudaStream_t stream) {
  // Its blocks find their work while the decode kernel ends, and wait for its results then.
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((params.heads + Shape::kRows - 1) / Shape::kRows, params.tokens);
  config.blockDim = Shape::kThreads;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return describe("combine kernel", cudaLaunchKernelEx(&config, sm90::combine_kernel<Element, Shape>, params));
}

template <typename Element>
std::string launch(const DecodeParams& params, const Cache& cache, CUtensorMapDataType type, cudaStream_t stream) {
  CUtensorMap map;
  if (auto wrong = encode_cache<Element>(cache, params.page_size, type, &map); !wrong.empty()) return wrong;

  std::string problem;
  if (const int rows = params.max_rows; rows <= 16) {
    problem = decode<sm90::NarrowShared<Element, 16>>(sm90::decode_narrow_kernel<Element, 16>, params, map, stream);
  } else if (rows <= 32) {
    problem = decode<sm90::NarrowShared<Element, 32>>(sm90::decode_narrow_kernel<Element, 32>, params, map, stream);
  } else {
    problem = decode<sm90::WideShared<Element>>(sm90::decode_wide_kernel<Element>, params, map, stream);
  }
  if (!problem.empty()) return problem;
  if (static_cast<int64_t>(params.tokens) * params.heads >= sm90::kManyRows) {
    return combine<Element, sm90::CombineManyRows>(params, stream);
  }
  return combine<Element, sm90::CombineFewRows>(params, stream);
}

}  // namespace

std::string launch_decode(const DecodeParams& params, const Cache& cache, ElementType type, cudaStream_t stream) {
  if (type == ElementType::kBFloat16) {
    return launch<__nv_bfloat16>(params, cache, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, stream);
  }
  return launch<__half>(params, cache, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, stream);
}

std::string launch_plan(const int32_t* seq_lens, int requests, int32_t* request_tiles, cudaStream_t stream) {
  sm90::plan_kernel<<<1, sm90::kPlanThreads, 0, stream>>>(seq_lens, requests, request_tiles);
  return describe("plan kernel", cudaGetLastError());
}

}  // namespace mla_backend
