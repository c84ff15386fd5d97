#include "launch.h"

#include <cudaTypedefs.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "sm90/decode_narrow.cuh"
#include "sm90/decode_quantized.cuh"
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
// memory with the swizzle of that width, if that is 64 or 128 bytes. Strides count elements.
CUtensorMap encode(CUtensorMapDataType type, const void* data, int64_t columns, int64_t rows, int64_t outer,
                   int64_t row_stride, int64_t outer_stride, int box_columns, int box_rows, int box_outer) {
  const int bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;  // of an element
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(outer)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_stride * bytes), static_cast<cuuint64_t>(outer_stride * bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows),
                            static_cast<cuuint32_t>(box_outer)};
  const cuuint32_t steps[] = {1, 1, 1};
  const auto encoder = tensor_map_encoder();
  if (encoder == nullptr) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled; it needs CUDA 12 or later");
  CUtensorMap map;
  const CUresult result =
      encoder(&map, type, 3, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
              box_columns * bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
              : box_columns * bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                          : CU_TENSOR_MAP_SWIZZLE_NONE,
              // Without promotion: 256 bytes at a time cost 5 to 8 % where bytes decide.
              CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled failed with " + std::to_string(result));
  return map;
}

// The decode kernels, and what each means for the schedule: how many query rows of a request a worker attends at a time, how many
// thread blocks a worker is, and the numbers of sm90::PlanParams, as measured (docs/performance/notes.md, "What shares cost",
// "Short requests stay whole", "Completed by the first worker", "One launch for many rows", "Parts in float16", "Float16
// for 33 to 64 rows, too", "Workers of their own", "48 rows for many short requests", "Who gets tiles"), and whether it is for
// many short requests only: for more of them than there are clusters, none of which has more than kShortRequest cached tokens.
enum class Kernel {
  kNarrow16, kNarrow32, kNarrow48, kNarrow64, kWide64, kWide128,
  kQuantized16, kQuantized32, kQuantized64, kQuantized128
};

struct Choice {
  Kernel kernel;
  int rows, cluster;
  int least_share, begin_cost, uneven_cost, whole_cost, split_cost, most_parts;
  bool many_short = false;
};

constexpr Choice kChoices[] = {
    // Few rows: bytes decide, and padding rows to 64 would only keep tiles in shared memory for longer.
    {Kernel::kNarrow16, 16, 1, 1, 1, 4, 13, 1, 4},
    {Kernel::kNarrow32, 32, 1, 1, 1, 4, 13, 1, 4},
    // Twice the workers of the one after them, for many short requests (padding counted, as a captured step has it), hardly ever
    // split.
    {Kernel::kNarrow48, 48, 1, 1, 2, 4, 4, 3, 0, true},
    {Kernel::kNarrow64, 64, 1, 1, 2, 4, 4, 3, 0, true},
    // A thread block has registers for the results of 64 rows and half of the columns.
    {Kernel::kWide64, 64, 2, 2, 3, 10, 10, 2, 4},
    {Kernel::kWide128, 128, 2, 2, 3, 5, 5, 2, 4},
};
// Over a quantised cache. The numbers for the schedule are those of kernels with as many rows above, but where others were measured
// to be better ("A cache of float8 numbers").
constexpr Choice kQuantizedChoices[] = {
    {Kernel::kQuantized16, 16, 1, 1, 3, 4, 13, 1, 4},
    {Kernel::kQuantized32, 32, 1, 1, 5, 4, 13, 1, 4},
    {Kernel::kQuantized64, 64, 1, 1, 2, 4, 4, 3, 0},
    // Numbers are converted once for all rows, in shared memory; the kernels above do so in registers.
    {Kernel::kQuantized128, 128, 2, 2, 3, 5, 5, 2, 4},
};
template <typename Condition>
constexpr bool all_choices(Condition holds) {
  for (const Choice& choice : kChoices) {
    if (!holds(choice)) return false;
  }
  for (const Choice& choice : kQuantizedChoices) {
    if (!holds(choice)) return false;
  }
  return true;
}
static_assert(all_choices([](const Choice& choice) { return kTileTokens / choice.cluster >= kLeastBox; }));
static_assert(all_choices([](const Choice& c) { return c.cluster > 1 || c.rows <= 32 || c.most_parts == 0; }),
              "narrow kernels with more than 32 rows complete no requests");
constexpr int kClusters = 66;       // of two multiprocessors, on the largest Hopper GPU
constexpr int kShortRequest = 512;  // cached tokens

// How a request's query rows are handled: by which kernel, in how many blocks of how many tokens.
struct Blocks {
  Choice choice;
  int tokens, count;

  // The first kernel that takes all rows at once, or the last one. A batch-invariant step takes that always, because what other
  // requests there are may not choose.
  explicit Blocks(const StepBounds& bounds) {
    const int queries = std::max(1, bounds.max_query_len);
    const int rows = bounds.batch_invariant ? kMaxHeads : bounds.heads * queries;
    const bool many_short = bounds.requests > kClusters && bounds.max_seq_len <= kShortRequest;
    const auto takes_all = [=](const Choice& choice) { return rows <= choice.rows && (many_short || !choice.many_short); };
    const auto first_of = [&](const auto& choices) {
      return *std::find_if(std::begin(choices), std::end(choices) - 1, takes_all);
    };
    choice = bounds.quantized ? first_of(kQuantizedChoices) : first_of(kChoices);
    tokens = std::min(choice.rows / bounds.heads, queries);
    count = (queries + tokens - 1) / tokens;
  }
};

template <typename Shared, typename Kernel>
void decode(Kernel kernel, const Choice& choice, const DecodeParams& params, const Cache& cache, CUtensorMapDataType type,
            CUtensorMapDataType cache_type, cudaStream_t stream) {
  const int box_tokens = 1 << params.box_shift;
  const auto of_cache = [&](int columns) {
    return encode(cache_type, cache.data, kHeadDim, params.page_size, cache.pages, cache.token_stride, cache.page_stride, columns,
                  box_tokens, 1);
  };
  const auto of_queries = [&](const void* data, int columns, int64_t token_stride, int64_t head_stride, int box_columns) {
    return encode(type, data, columns, params.heads, params.tokens, head_stride, token_stride, box_columns,
                  params.heads, params.block_rows / params.heads);
  };
  const int rope_columns = kRopeDim / choice.cluster;
  sm90::TensorMaps maps = {};
  maps.latent = of_cache(cache_type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 128 : 64);
  maps.rope = rope_columns == 64 ? maps.latent : of_cache(rope_columns);
  if (params.queries_are_vectors) {
    maps.latent_query = of_queries(params.q_nope, kLatentDim, params.q_nope_token_stride, params.q_nope_head_stride, 64);
    maps.rope_query = of_queries(params.q_pe, kRopeDim, params.q_pe_token_stride, params.q_pe_head_stride, rope_columns);
  }

  constexpr size_t kSharedBytes = sizeof(Shared);
  static_assert(kSharedBytes <= 227 * 1024);
  // Per device and cheap, so it is simply asked for each time.
  check("shared memory for the decode kernel",
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<dim3(params.workers * choice.cluster, params.row_blocks), sm90::kThreads, kSharedBytes, stream>>>(params, maps);
  check("decode kernel", cudaGetLastError());
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

template <typename T>
struct Type {
  using type = T;
};

// What quotient() takes.
uint32_t reciprocal(int divisor) { return static_cast<uint32_t>((0x1'0000'0000 + divisor - 1) / divisor); }

template <typename Element>
void launch(DecodeParams params, const Blocks& blocks, const Cache& cache, CUtensorMapDataType type, cudaStream_t stream) {
  using namespace sm90;
  params.max_query_len = std::max(1, params.max_query_len);
  params.block_rows = blocks.tokens * params.heads;
  params.row_blocks = blocks.count;
  params.box_shift = __builtin_ctz(std::min(params.page_size, kTileTokens / blocks.choice.cluster));
  params.boxes_per_page = params.page_size >> params.box_shift;
  params.heads_reciprocal = reciprocal(params.heads), params.boxes_reciprocal = reciprocal(params.boxes_per_page);
  using Float8 = __nv_fp8_e4m3;
  const auto run = [&](auto shared, auto kernel, CUtensorMapDataType cache_type) {
    decode<typename decltype(shared)::type>(kernel, blocks.choice, params, cache, type, cache_type, stream);
  };
  const auto narrow = [&](auto rows) {
    run(Type<NarrowShared<Element, Element, rows>>{}, decode_narrow_kernel<Element, Element, rows>, type);
  };
  const auto wide = [&](auto rows) {
    run(Type<WideShared<Element, Element, rows>>{}, decode_wide_kernel<Element, Element, rows>, type);
  };
  const auto run_quantized = [&](auto shared, auto kernel) { run(shared, kernel, CU_TENSOR_MAP_DATA_TYPE_UINT8); };
  const auto quantized = [&](auto rows) {
    run_quantized(Type<QuantizedShared<Element, rows>>{}, decode_quantized_kernel<Element, rows>);
  };
  switch (blocks.choice.kernel) {
    case Kernel::kNarrow16: return narrow(Constant<16>{});
    case Kernel::kNarrow32: return narrow(Constant<32>{});
    case Kernel::kNarrow48: return narrow(Constant<48>{});
    case Kernel::kNarrow64: return narrow(Constant<64>{});
    case Kernel::kWide64: return wide(Constant<64>{});
    case Kernel::kWide128: return wide(Constant<128>{});
    case Kernel::kQuantized16: return quantized(Constant<16>{});
    case Kernel::kQuantized32: return quantized(Constant<32>{});
    case Kernel::kQuantized64:
      return run_quantized(Type<NarrowShared<Element, Float8, 64>>{}, decode_narrow_kernel<Element, Float8, 64>);
    case Kernel::kQuantized128:
      return run_quantized(Type<WideShared<Element, Float8, 128>>{}, decode_wide_kernel<Element, Float8, 128>);
  }
}

}  // namespace

void launch_decode(const DecodeParams& params, const StepBounds& bounds, const Cache& cache, ElementType type,
                   cudaStream_t stream) {
  const Blocks blocks(bounds);
  if (type == ElementType::kBFloat16) {
    launch<__nv_bfloat16>(params, blocks, cache, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, stream);
  } else {
    launch<__half>(params, blocks, cache, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, stream);
  }
}

int64_t partial_rows(int workers, const StepBounds& bounds) {
  if (workers == 1) return 0;  // nothing is split
  const Blocks blocks(bounds);
  return int64_t{2} * workers * blocks.count * blocks.tokens * bounds.heads;
}

int64_t arrival_counters(int workers, const StepBounds& bounds) {
  return workers == 1 ? 0 : workers * Blocks(bounds).count;
}

int launch_plan(const int32_t* seq_lens, const StepBounds& bounds, int multiprocessors, Share* shares, int32_t* splits,
                cudaStream_t stream) {
  const Blocks blocks(bounds);
  const Choice& choice = blocks.choice;
  const int64_t multiprocessors_each = blocks.count * choice.cluster;
  const int workers = std::max(1, static_cast<int>(std::min(multiprocessors, sm90::kPlanThreads) / multiprocessors_each));
  const sm90::PlanParams params = {seq_lens,          bounds.requests,    workers,           choice.least_share,
                                   choice.begin_cost, choice.uneven_cost, choice.whole_cost, choice.split_cost,
                                   choice.most_parts, bounds.batch_invariant};
  sm90::plan_kernel<<<1, sm90::kPlanThreads, 0, stream>>>(params, shares, splits);
  check("plan kernel", cudaGetLastError());
  return workers;
}

}  // namespace mla_backend
