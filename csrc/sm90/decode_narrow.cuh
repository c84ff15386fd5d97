// MLA decode on Hopper for at most 32 query rows per request: cached tokens take the 64-row side of wgmma.
//
// With few rows the time goes into reading the cache, and padding the rows to 64 would only keep tiles in shared memory
// for longer. So everything is transposed: scores are tile x queries (64 tokens x N rows), and the output is values x
// probabilities (512 columns x N rows), with the tile as the first operand both times, K-major and then M-major. (The
// idea is published as ETAP, arXiv 2506.01969.) Output and scores are small enough that each of the two warpgroups keeps
// its own, attends to every other tile by itself, and meets the other only at the end of a request.
#pragma once

#include "tile.cuh"

namespace mla_backend::sm90 {

constexpr int kColumnBlocks = kHeadDim / 64, kValueBlocks = kLatentDim / 64;
constexpr int kMergeFloats = 8192;  // accumulators that the warpgroups exchange at a time: 32 kB

template <typename Element, int kN>
struct alignas(1024) NarrowShared {
  ColumnBlock<Element> tile[2][kColumnBlocks];
  Element query[kColumnBlocks][kN][64];
  Element probabilities[2][kN][64];  // per warpgroup
  float merge[kMergeFloats];
  float exchange[2][4][kN];  // per warpgroup and warp: column maxima, at the end column sums
  float peaks[2][kN], sums[2][kN];
  Pipeline<2> pipeline;
};

// Over the eight lanes that hold a column of an accumulator.
__device__ __forceinline__ float column_max(float x) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

__device__ __forceinline__ float column_sum(float x) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

template <typename Element, int kN>
__device__ void consume_narrow(const DecodeParams& params, NarrowShared<Element, kN>& shared) {
  constexpr int kColumns = kN / 4;  // columns of an accumulator that a thread holds a part of
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int own_row = warp * 16 + lane / 4;                                            // and the row 8 further on
  const auto own_column = [&](int c) { return c / 2 * 8 + lane % 4 * 2 + c % 2; };      // of 0 to kColumns - 1
  const int own_barrier = kMathBarrier + 1 + warpgroup;
  const float scale_log2 = params.softmax_scale * kLog2E;

  const uint32_t probabilities = ptx::shared_address(shared.probabilities[warpgroup]);
  ColumnBlock<Element>(&tile)[kColumnBlocks] = shared.tile[warpgroup];
  int tiles_before = 0;  // of this block: warpgroup w takes those whose number modulo 2 is w, and they lie in stage w
  Piece piece;
  for (Pieces pieces(params, blockIdx.x); pieces.take(piece);) {
    const int first_token = params.query_start_loc[piece.request];
    const int queries = params.query_start_loc[piece.request + 1] - first_token;
    const int rows = queries * params.heads;
    if (rows == 0) continue;
    const int seq_len = params.seq_lens[piece.request];
    load_queries<Element, kN, kLatentDim, kRopeDim>(
        params, first_token, 0, rows, 0, 0,
        [&](int row, int chunk) { return ptx::shared_address(shared.query[chunk / 8]) + swizzled_128(row, chunk % 8); },
        [&](int row, int chunk) { return ptx::shared_address(shared.query[kValueBlocks]) + swizzled_128(row, chunk); });

    const int all_visible = params.causal ? seq_len - queries + 1 : seq_len;

    float out[kValueBlocks][kN / 2] = {};
    float peak[kColumns], sum[kColumns] = {};
#pragma unroll
    for (int c = 0; c < kColumns; ++c) peak[c] = -INFINITY;

    const int skipped = (tiles_before + warpgroup) % 2;
    for (int t = piece.first_tile + skipped; t < piece.last_tile; t += 2) {
      const int first = t * kTileTokens;
      const int number = tiles_before + t - piece.first_tile;
      shared.pipeline.wait_full(number);
      if (seq_len - first < kTileTokens) clear_rows_from(seq_len - first, tile, own_barrier);

      float score[kN / 2];
      const ptx::Matrix keys(ptx::shared_address(tile), 0, 1024), query(ptx::shared_address(shared.query), 0, 1024);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        const uint32_t inner = step % 4 * 32;
        ptx::wgmma<Element>(score, keys.at(step / 4 * sizeof(ColumnBlock<Element>) + inner),
                            query.at(step / 4 * sizeof(shared.query[0]) + inner), step > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::keep(score);

      // score[4 * j + 2 * i + e] is token own_row + 8 * i and query row own_column(2 * j + e).
      if (first + kTileTokens > all_visible) {
#pragma unroll
        for (int k = 0; k < kN / 2; ++k) {
          const int query_index = min(own_column(k / 4 * 2 + k % 2) / params.heads, queries - 1);
          const int last_visible = params.causal ? seq_len - queries + query_index : seq_len - 1;
          if (first + own_row + k / 2 % 2 * 8 > last_visible) score[k] = -INFINITY;
        }
      }
      float tile_peak[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        tile_peak[c] = column_max(fmaxf(score[c / 2 * 4 + c % 2], score[c / 2 * 4 + 2 + c % 2]));
        if (lane < 4) shared.exchange[warpgroup][warp][own_column(c)] = tile_peak[c];
      }
      ptx::named_barrier_sync<128>(own_barrier);
      float shift[kColumns], decay[kColumns];
      bool unchanged = true;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        float new_peak = peak[c];
#pragma unroll
        for (int w = 0; w < 4; ++w) new_peak = fmaxf(new_peak, shared.exchange[warpgroup][w][own_column(c)]);
        // A row that has seen no token yet has the peak -inf, and -inf - -inf would be NaN.
        shift[c] = new_peak == -INFINITY ? 0 : new_peak * scale_log2;
        decay[c] = ptx::exp2(peak[c] * scale_log2 - shift[c]);
        unchanged &= decay[c] == 1;
        sum[c] *= decay[c];
        peak[c] = new_peak;
      }
#pragma unroll
      for (int k = 0; k < kN / 2; ++k) {
        const int c = k / 4 * 2 + k % 2;
        score[k] = ptx::exp2(score[k] * scale_log2 - shift[c]);
        sum[c] += score[k];
      }
      // Transposed on the way, so that a query row's probabilities lie side by side: 8 x 8 matrices of two groups of
      // query rows and two of tokens at a time.
#pragma unroll
      for (int j = 0; j < kN / 8; j += 2) {
        const int row = (j + lane / 16) * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
        ptx::stmatrix_x4_trans(probabilities + swizzled_128(row, chunk), pack<Element>(score[j * 4], score[j * 4 + 1]),
                               pack<Element>(score[j * 4 + 2], score[j * 4 + 3]),
                               pack<Element>(score[j * 4 + 4], score[j * 4 + 5]),
                               pack<Element>(score[j * 4 + 6], score[j * 4 + 7]));
      }
      ptx::fence_proxy_async();
      if (!__all_sync(~0u, unchanged)) {
#pragma unroll
        for (int b = 0; b < kValueBlocks; ++b) {
#pragma unroll
          for (int k = 0; k < kN / 2; ++k) out[b][k] *= decay[k / 4 * 2 + k % 2];
        }
      }
      ptx::named_barrier_sync<128>(own_barrier);

#pragma unroll
      for (int b = 0; b < kValueBlocks; ++b) ptx::keep(out[b]);
      const ptx::Matrix values(ptx::shared_address(tile), sizeof(ColumnBlock<Element>), 1024), weights(probabilities, 0, 1024);
      ptx::wgmma_fence();
#pragma unroll
      for (int b = 0; b < kValueBlocks; ++b) {
#pragma unroll
        for (int step = 0; step < kTileTokens / 16; ++step) {
          ptx::wgmma<Element, 1>(out[b], values.at(b * sizeof(ColumnBlock<Element>) + step * 16 * 128),
                                 weights.at(step * 32), 1);
        }
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int b = 0; b < kValueBlocks; ++b) ptx::keep(out[b]);
      if (threadIdx.x % 128 == 0) shared.pipeline.release(number);
    }
    tiles_before += piece.tiles();

    // Denominators of this warpgroup, then of both.
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      sum[c] = column_sum(sum[c]);
      if (lane < 4) shared.exchange[warpgroup][warp][own_column(c)] = sum[c];
      if (lane < 4 && warp == 0) shared.peaks[warpgroup][own_column(c)] = peak[c];
    }
    ptx::named_barrier_sync<kMathThreads>(kMathBarrier);
    float factor[kColumns];
    const int64_t first_partial_row = partial_row(params, 0, blockIdx.x, piece.begins_share);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = own_column(c);
      const float other = shared.peaks[1 - warpgroup][column], both = fmaxf(peak[c], other);
      const float shift = both == -INFINITY ? 0 : both * scale_log2;
      float own_sum = 0, other_sum = 0;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        own_sum += shared.exchange[warpgroup][w][column];
        other_sum += shared.exchange[1 - warpgroup][w][column];
      }
      const float own_weight = ptx::exp2(peak[c] * scale_log2 - shift);
      const float total = own_sum * own_weight + other_sum * ptx::exp2(other * scale_log2 - shift);
      factor[c] = total > 0 ? own_weight / total : 0;
      if (threadIdx.x >= 4 || column >= rows) continue;
      const float log2_sum = total > 0 ? shift + log2f(total) : -INFINITY;
      if (!piece.whole()) {
        params.partial_lse[first_partial_row + column] = log2_sum;
      } else if (params.lse != nullptr) {
        const int64_t token = first_token + column / params.heads, head = column % params.heads;
        params.lse[token * params.lse_token_stride + head * params.lse_head_stride] = log2_sum * kLn2;
      }
    }

    int query_of[kColumns];  // looked up once, because dividing by the heads is slow
#pragma unroll
    for (int c = 0; c < kColumns; ++c) query_of[c] = own_column(c) / params.heads;

    // Each warpgroup finishes half of the columns and hands the other half over; the same thread of the other warpgroup
    // holds the same places of an accumulator.
    constexpr int kBlocksAtOnce = kMergeFloats / (kMathThreads * (kN / 2));
#pragma unroll
    for (int round = 0; round < kValueBlocks / 2 / kBlocksAtOnce; ++round) {
#pragma unroll
      for (int i = 0; i < kBlocksAtOnce; ++i) {
#pragma unroll
        for (int k = 0; k < kN / 2; ++k) {
          // Both are indexed by constants, so that the accumulators stay in registers.
          const int near = round * kBlocksAtOnce + i, far = near + kValueBlocks / 2;
          const float handed_over = (warpgroup == 0 ? out[far][k] : out[near][k]) * factor[k / 4 * 2 + k % 2];
          shared.merge[(i * (kN / 2) + k) * kMathThreads + threadIdx.x] = handed_over;
        }
      }
      ptx::named_barrier_sync<kMathThreads>(kMathBarrier);
#pragma unroll
      for (int i = 0; i < kBlocksAtOnce; ++i) {
#pragma unroll
        for (int k = 0; k < kN / 2; ++k) {
          const int near = round * kBlocksAtOnce + i, far = near + kValueBlocks / 2;
          const int c = k / 4 * 2 + k % 2;
          const float received = shared.merge[(i * (kN / 2) + k) * kMathThreads + (threadIdx.x ^ 128)];
          const float value = (warpgroup == 0 ? out[near][k] : out[far][k]) * factor[c] + received;
          const int column = (warpgroup == 0 ? near : far) * 64 + own_row + k / 2 % 2 * 8;
          const int query_row = own_column(c);
          if (query_row < rows) {
            if (piece.whole()) {
              const int64_t token = first_token + query_of[c], head = query_row - query_of[c] * params.heads;
              const uint32_t rounded = pack<Element>(value, 0);
              static_cast<Element*>(params.out)[token * params.out_token_stride + head * params.out_head_stride + column] =
                  reinterpret_cast<const Element&>(rounded);
            } else {
              params.partial_out[(first_partial_row + query_row) * kLatentDim + column] = value;
            }
          }
        }
      }
      ptx::named_barrier_sync<kMathThreads>(kMathBarrier);
    }
  }
}

template <typename Element, int kN>
__global__ void __launch_bounds__(kThreads, 1)
    decode_narrow_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ CUtensorMap map) {
  auto& shared = shared_memory<NarrowShared<Element, kN>>();
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&map);
    shared.pipeline.initialise(1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  run_roles(
      [&] {
        produce(params, blockIdx.x, shared.pipeline, kHeadDim * sizeof(Element),
                [&](int stage, int tile_row, int page, int page_row) {
#pragma unroll
                  for (int block = 0; block < kColumnBlocks; ++block) {
                    ptx::tma_load(&shared.tile[stage][block][tile_row], &map, block * 64, page_row, page,
                                  &shared.pipeline.full[stage]);
                  }
                });
      },
      [&] { consume_narrow<Element, kN>(params, shared); });
}

}  // namespace mla_backend::sm90
