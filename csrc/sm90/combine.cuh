// Combines the partial results of requests that several workers shared, and writes the rows that no worker has.
#pragma once

#include "tile.cuh"

namespace mla_backend::sm90 {

// How a thread block is spread over query rows: it has `kRows` of them, and of each kVectors x 4 columns for each of
// `kRowThreads` threads. The row's partial results are divided among `kGroups` such sets of threads, each of which asks for
// `kAtOnce` of them before it looks at the first.
template <int kRowThreads_, int kVectors_, int kGroups_, int kRows_, int kAtOnce_>
struct CombineShape {
  static constexpr int kRowThreads = kRowThreads_, kVectors = kVectors_, kGroups = kGroups_, kRows = kRows_;
  static constexpr int kAtOnce = kAtOnce_;
  static constexpr int kThreads = kRowThreads * kGroups * kRows;
  static constexpr int kColumns = kRowThreads * kVectors * 4, kColumnParts = kLatentDim / kColumns;
};

// Few rows: each may have a partial result of every multiprocessor, and all of them are asked for at once, by as many thread
// blocks as there are multiprocessors for 16 rows.
using CombineFewRows = CombineShape<16, 1, 16, 1, 9>;
using CombineSomeRows = CombineShape<128, 1, 4, 1, 4>;
// Many rows: most have two partial results, and what counts is how many rows are under way at a time.
using CombineManyRows = CombineShape<32, 4, 1, 8, 2>;
constexpr int kSomeRows = 128, kManyRows = 1024;

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

__device__ __forceinline__ void scale(float4& sum, float factor) {
  sum.x *= factor, sum.y *= factor, sum.z *= factor, sum.w *= factor;
}

// a / b for a < 2^20, in a third of the instructions: these are cold in the caches when a kernel begins. (a + 1/2) / b is
// 1 / 2b or more from any whole number, and its error less than that.
__device__ __forceinline__ int divide(int a, int b) { return __float2int_rz(__fdividef(a + 0.5f, b)); }

// Index of the last entry of the ascending `starts` [count + 1] that is <= value, so that value lies in
// starts[i]:starts[i + 1]. All 32 lanes search together: two reads for a thousand entries.
__device__ __forceinline__ int find_owner(const int32_t* starts, int count, int value) {
  const int lane = threadIdx.x % 32;
  int low = 0;  // starts[low] <= value
  for (int span = count; span > 1;) {
    const int step = (span + 31) / 32;
    const int probe = low + lane * step;
    const bool below = probe < low + span && probe < count && starts[probe] <= value;
    const int last = 31 - __clz(__ballot_sync(~0u, below) | 1u);
    low += last * step;
    span = min(step, span - last * step);
  }
  return low;
}

template <typename Element, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) combine_kernel(const __grid_constant__ DecodeParams params) {
  constexpr int kGroups = Shape::kGroups, kVectors = Shape::kVectors, kAtOnce = Shape::kAtOnce;
  const int column = threadIdx.x % Shape::kRowThreads;
  const int group = threadIdx.x / Shape::kRowThreads % kGroups;
  const int token = blockIdx.y;
  const int head = blockIdx.x / Shape::kColumnParts * Shape::kRows + threadIdx.x / (Shape::kRowThreads * kGroups);
  const int first_column = blockIdx.x % Shape::kColumnParts * Shape::kColumns;

  // Everything up to the wait depends on the schedule only. That is there: the decode kernel itself starts when all before it
  // is done. The row's request is guessed, as if all had equally many tokens, so that all can be asked for at once.
  int request = 0, first_token = 0, end_token = 0, seq_len = 0, first_slot = 0, parts = 0;
  const auto look_up = [&] {
    first_token = params.query_start_loc[request], end_token = params.query_start_loc[request + 1];
    seq_len = params.seq_lens[request];
    first_slot = params.splits[request], parts = params.splits[request + 1] - first_slot;
  };
  if (params.requests > 0) {
    request = min(divide(token, params.max_query_len), params.requests - 1);
    look_up();
    if (token < first_token || token >= end_token) {
      request = find_owner(params.query_start_loc, params.requests, token);
      look_up();
    }
  }
  const bool attends = token < end_token && seq_len > 0;  // a request owns the row and has tokens
  const int row = (token - first_token) * params.heads + head;
  const int row_block = params.row_blocks == 1 ? 0 : row / params.block_rows;
  const int64_t first_partial_row = partial_row(params, first_slot, row_block) + row - row_block * params.block_rows;
  const int part_rows = params.row_blocks * params.block_rows;
  Element* to = static_cast<Element*>(params.out) + token * params.out_token_stride + head * params.out_head_stride +
                first_column;
  float* lse = params.lse == nullptr || first_column > 0
                   ? nullptr
                   : params.lse + token * params.lse_token_stride + head * params.lse_head_stride;
  // All blocks wait, or the next kernel might start when this one is done and the decode kernel is not.
  ptx::wait_for_previous_kernel();
  if (attends && parts == 0) return;  // written by its only worker
  if (head >= params.heads) return;   // a whole warp: rows with several groups have a block for themselves
  if (!attends) {
    if (group > 0) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      store_four<Element>(to + (v * Shape::kRowThreads + column) * 4, make_float4(0, 0, 0, 0));
    }
    if (column == 0 && lse != nullptr) *lse = -INFINITY;
    return;
  }

  // Relative to the greatest denominator so far, as in an online softmax, so that nothing waits for the greatest of all.
  // A row that sees no token in any part has the peak -inf, and -inf - -inf would be NaN.
  const auto exponent = [](float peak) { return peak == -INFINITY ? 0 : peak; };
  float peak = -INFINITY, total = 0;
  float4 sum[kVectors] = {};
  for (int next = group; next < parts; next += kGroups * kAtOnce) {
    float part_lse[kAtOnce];
    float4 part[kAtOnce][kVectors];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      part_lse[i] = -INFINITY;
      if (next + i * kGroups >= parts) continue;
      const int64_t row_of_part = first_partial_row + static_cast<int64_t>(next + i * kGroups) * part_rows;
      part_lse[i] = params.partial_lse[row_of_part];
      const float* from = params.partial_out + row_of_part * kLatentDim + first_column;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) part[i][v] = reinterpret_cast<const float4*>(from)[v * Shape::kRowThreads + column];
    }
    const float before = peak;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) peak = fmaxf(peak, part_lse[i]);
    const float decay = ptx::exp2(before - exponent(peak));
    total *= decay;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) scale(sum[v], decay);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (next + i * kGroups >= parts) continue;
      const float weight = ptx::exp2(part_lse[i] - exponent(peak));
      total += weight;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) add(sum[v], part[i][v], weight);
    }
  }
  if constexpr (kGroups > 1) {
    __shared__ float peaks[kGroups], totals[kGroups];
    __shared__ float4 sums[kGroups][kVectors][Shape::kRowThreads];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) sums[group][v][column] = sum[v];
    if (column == 0) peaks[group] = peak, totals[group] = total;
    __syncthreads();
    if (group > 0) return;
#pragma unroll
    for (int g = 1; g < kGroups; ++g) peak = fmaxf(peak, peaks[g]);
    const float weight = ptx::exp2(peaks[0] - exponent(peak));
    total *= weight;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) scale(sum[v], weight);
#pragma unroll
    for (int g = 1; g < kGroups; ++g) {
      const float weight = ptx::exp2(peaks[g] - exponent(peak));
      total += weight * totals[g];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) add(sum[v], sums[g][v][column], weight);
    }
  }
  const float factor = total > 0 ? ptx::reciprocal(total) : 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    scale(sum[v], factor);
    store_four<Element>(to + (v * Shape::kRowThreads + column) * 4, sum[v]);
  }
  if (column == 0 && lse != nullptr) *lse = total > 0 ? (peak + ptx::log2(total)) * kLn2 : -INFINITY;
}

}  // namespace mla_backend::sm90
