// Combines the partial results of requests that several workers shared, and writes the rows that no worker has.
#pragma once

#include "tile.cuh"

namespace mla_backend::sm90 {

// How a thread block is spread over query rows. A row's 512 columns are held by `kRowThreads` threads, its partial
// results are divided among `kGroups` such sets of threads, and a block has `kRows` rows.
template <int kRowThreads_, int kGroups_, int kRows_>
struct CombineShape {
  static constexpr int kRowThreads = kRowThreads_, kGroups = kGroups_, kRows = kRows_;
  static constexpr int kThreads = kRowThreads * kGroups * kRows;
  static constexpr int kVectors = kLatentDim / (4 * kRowThreads);  // of four columns, per thread
};

// Few rows: each may have a partial result of every multiprocessor, which many threads read side by side.
using CombineFewRows = CombineShape<128, 4, 1>;
// Many rows: most have two partial results, and what counts is how many rows are under way at a time.
using CombineManyRows = CombineShape<32, 1, 8>;
constexpr int kManyRows = 1024;

template <typename Element>
__device__ __forceinline__ void store_four(Element* to, float4 value) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    to[0] = __float2bfloat16_rn(value.x), to[1] = __float2bfloat16_rn(value.y);
    to[2] = __float2bfloat16_rn(value.z), to[3] = __float2bfloat16_rn(value.w);
  } else {
    to[0] = __float2half_rn(value.x), to[1] = __float2half_rn(value.y);
    to[2] = __float2half_rn(value.z), to[3] = __float2half_rn(value.w);
  }
}

__device__ __forceinline__ void add(float4& sum, float4 value, float weight) {
  sum.x += weight * value.x, sum.y += weight * value.y, sum.z += weight * value.z, sum.w += weight * value.w;
}

template <typename Element, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) combine_kernel(const __grid_constant__ DecodeParams params) {
  __shared__ float4 sums[Shape::kGroups][Shape::kVectors][Shape::kRowThreads];
  const int lane = threadIdx.x % 32;
  const int column = threadIdx.x % Shape::kRowThreads;
  const int group = threadIdx.x / Shape::kRowThreads % Shape::kGroups;
  const int token = blockIdx.y;
  const int head = blockIdx.x * Shape::kRows + threadIdx.x / (Shape::kRowThreads * Shape::kGroups);

  // Everything up to the wait depends on the schedule only.
  const bool owned = token < params.query_start_loc[params.requests];
  const int request = owned ? find_owner(params.query_start_loc, params.requests, token) : 0;
  const int begin = owned ? params.request_tiles[request] : 0, end = owned ? params.request_tiles[request + 1] : 0;
  const Shares shares(params);
  const int first = begin < end ? shares.worker_of(begin) : 0, last = begin < end ? shares.worker_of(end - 1) : 0;
  if (begin < end && (first == last || params.batch_invariant)) return;  // written by its only worker
  if (head >= params.heads) return;  // a whole warp: rows with several groups have a block for themselves

  Element* to = static_cast<Element*>(params.out) + token * params.out_token_stride + head * params.out_head_stride;
  float* lse = params.lse == nullptr ? nullptr
                                     : params.lse + token * params.lse_token_stride + head * params.lse_head_stride;
  if (begin == end) {  // no request owns the row, or its request is empty
    if (group > 0) return;
#pragma unroll
    for (int v = 0; v < Shape::kVectors; ++v) {
      store_four<Element>(to + (v * Shape::kRowThreads + column) * 4, make_float4(0, 0, 0, 0));
    }
    if (column == 0 && lse != nullptr) *lse = -INFINITY;
    return;
  }
  const int row = (token - params.query_start_loc[request]) * params.heads + head;
  const int row_block = row / params.block_rows, block_row = row % params.block_rows;
  const bool first_begins_share = shares.begin(first) == begin;
  const auto part_of = [&](int worker) {
    return partial_row(params, row_block, worker, worker > first || first_begins_share) + block_row;
  };
  ptx::wait_for_previous_kernel();

  float peak = -INFINITY;
  for (int worker = first + lane; worker <= last; worker += 32) {
    peak = fmaxf(peak, params.partial_lse[part_of(worker)]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, offset));
  // A row that sees no token in any part has the peak -inf, and -inf - -inf would be NaN.
  const float shift = peak == -INFINITY ? 0 : peak;

  float total = 0;
  float4 sum[Shape::kVectors] = {};
#pragma unroll 4
  for (int worker = first + group; worker <= last; worker += Shape::kGroups) {
    const int64_t row_of_part = part_of(worker);
    const float weight = ptx::exp2(params.partial_lse[row_of_part] - shift);
    const float4* part = reinterpret_cast<const float4*>(params.partial_out + row_of_part * kLatentDim) + column;
    total += weight;
#pragma unroll
    for (int v = 0; v < Shape::kVectors; ++v) add(sum[v], part[v * Shape::kRowThreads], weight);
  }
  if constexpr (Shape::kGroups > 1) {
    __shared__ float totals[Shape::kGroups];
#pragma unroll
    for (int v = 0; v < Shape::kVectors; ++v) sums[group][v][column] = sum[v];
    if (column == 0) totals[group] = total;
    __syncthreads();
    if (group > 0) return;
#pragma unroll
    for (int g = 1; g < Shape::kGroups; ++g) {
      total += totals[g];
#pragma unroll
      for (int v = 0; v < Shape::kVectors; ++v) add(sum[v], sums[g][v][column], 1);
    }
  }
  const float factor = total > 0 ? 1 / total : 0;
#pragma unroll
  for (int v = 0; v < Shape::kVectors; ++v) {
    const float4 result = make_float4(sum[v].x * factor, sum[v].y * factor, sum[v].z * factor, sum[v].w * factor);
    store_four<Element>(to + (v * Shape::kRowThreads + column) * 4, result);
  }
  if (column == 0 && lse != nullptr) *lse = total > 0 ? (peak + log2f(total)) * kLn2 : -INFINITY;
}

}  // namespace mla_backend::sm90
