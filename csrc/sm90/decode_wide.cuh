// MLA decode on Hopper for more than 32 query rows: one thread block attends 64 query rows of a request to a share of its cached tokens.
//
// A producer warp brings tiles of 64 cached tokens (64 x 576) into one of two stages with the copy engine. Two
// warpgroups do the mathematics side by side: each computes the scores of half of a tile's tokens (64 x 32), they
// exchange row maxima and probabilities through shared memory, and each adds half of the output's columns (64 x 256),
// because a whole 64 x 512 accumulator fits no warpgroup's registers. The tile serves twice, as keys (K-major) and, its
// first 512 columns, as values (MN-major), without a copy.
#pragma once

#include "tile.cuh"

namespace mla_backend::sm90 {

template <typename Element>
struct alignas(1024) WideShared {
  ColumnBlock<Element> query[kColumnBlocks];
  ColumnBlock<Element> tile[kStages][kColumnBlocks];
  ColumnBlock<Element> probabilities;
  float row_exchange[2][kBlockRows];  // per warpgroup: row maxima, at the end row sums
  uint64_t full[kStages], empty[kStages];
};

template <typename Element>
__device__ void consume_wide(const DecodeParams& params, WideShared<Element>& shared) {
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  // A thread holds two rows of every accumulator, and in each group of 8 columns two neighbouring ones.
  const int own_row = threadIdx.x / 32 % 4 * 16 + lane / 4, own_column = lane % 4 * 2;
  const float scale_log2 = params.softmax_scale * 1.4426950408889634f;  // scores in base 2: exp2 is one instruction

  const uint32_t query = ptx::shared_address(shared.query), probabilities = ptx::shared_address(shared.probabilities);
  Stage stage;
  Piece piece;
  for (Pieces pieces(params, blockIdx.x); pieces.take(piece);) {
    const int first_token = params.query_start_loc[piece.request];
    const int queries = params.query_start_loc[piece.request + 1] - first_token;
    const int rows = queries * params.heads, first_row = blockIdx.y * kBlockRows;
    if (first_row >= rows) continue;
    const int seq_len = params.seq_lens[piece.request];
    load_queries(params, first_token, first_row, rows, shared.query);

    // Position of the last token that each own row sees.
    int last_visible[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query_index = (first_row + own_row + 8 * i) / params.heads;
      last_visible[i] = params.causal ? seq_len - queries + min(query_index, queries - 1) : seq_len - 1;
    }
    const int all_visible = params.causal ? seq_len - queries + first_row / params.heads + 1 : seq_len;

    float out[128];
    float peak[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

    for (int tile = piece.first_tile; tile < piece.last_tile; ++tile, stage.advance()) {
      const int first = tile * kTileTokens;
      ColumnBlock<Element>(&keys)[kColumnBlocks] = shared.tile[stage.index];
      ptx::mbarrier_wait(&shared.full[stage.index], stage.phase);
      if (seq_len - first < kTileTokens) clear_rows_from<kMathThreads>(seq_len - first, keys, kMathBarrier);

      float score[16];
      const uint32_t own_keys = ptx::shared_address(keys) + warpgroup * 32 * 128;
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        const uint32_t offset = step / 4 * sizeof(ColumnBlock<Element>) + step % 4 * 32;
        ptx::wgmma<Element>(score, ptx::matrix_descriptor(query + offset, 0, 1024),
                                      ptx::matrix_descriptor(own_keys + offset, 0, 1024), step > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::keep(score);

      if (first + kTileTokens > all_visible) {
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          const int position = first + warpgroup * 32 + j / 4 * 8 + own_column + j % 2;
          if (position > last_visible[j / 2 % 2]) score[j] = -INFINITY;
        }
      }

      float tile_peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
      for (int j = 0; j < 16; ++j) tile_peak[j / 2 % 2] = fmaxf(tile_peak[j / 2 % 2], score[j]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        tile_peak[i] = quad_max(tile_peak[i]);
        if (lane % 4 == 0) shared.row_exchange[warpgroup][own_row + 8 * i] = tile_peak[i];
      }
      ptx::named_barrier_sync<kMathThreads>(kMathBarrier);

      float shift[2], decay[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float other = shared.row_exchange[1 - warpgroup][own_row + 8 * i];
        const float new_peak = fmaxf(peak[i], fmaxf(tile_peak[i], other));
        // A row that has seen no token yet has the peak -inf, and -inf - -inf would be NaN.
        shift[i] = new_peak == -INFINITY ? 0 : new_peak * scale_log2;
        decay[i] = ptx::exp2(peak[i] * scale_log2 - shift[i]);
        sum[i] *= decay[i];
        peak[i] = new_peak;
      }
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        score[j] = ptx::exp2(score[j] * scale_log2 - shift[j / 2 % 2]);
        sum[j / 2 % 2] += score[j];
      }
      // stmatrix stores 8 x 8 matrices whose rows 0 to 31 the 32 lanes point at: here rows +0 and +8 of two groups of
      // 8 columns at a time.
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int row = threadIdx.x / 32 % 4 * 16 + lane % 16;
        const int chunk = warpgroup * 4 + pair * 2 + lane / 16;
        ptx::stmatrix_x4(probabilities + swizzled(row, chunk), pack<Element>(score[pair * 8], score[pair * 8 + 1]),
                         pack<Element>(score[pair * 8 + 2], score[pair * 8 + 3]),
                         pack<Element>(score[pair * 8 + 4], score[pair * 8 + 5]),
                         pack<Element>(score[pair * 8 + 6], score[pair * 8 + 7]));
      }
      ptx::fence_proxy_async();
      const bool unchanged = decay[0] == 1 && decay[1] == 1;
      if (tile > piece.first_tile && !__all_sync(~0u, unchanged)) {
#pragma unroll
        for (int j = 0; j < 128; ++j) out[j] *= decay[j / 2 % 2];
      }
      ptx::named_barrier_sync<kMathThreads>(kMathBarrier);

      const uint32_t own_values = ptx::shared_address(keys[warpgroup * 4]);
      ptx::keep(out);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kTileTokens / 16; ++step) {
        ptx::wgmma_transposed_b<Element>(
            out, ptx::matrix_descriptor(probabilities + step * 32, 0, 1024),
            ptx::matrix_descriptor(own_values + step * 16 * 128, sizeof(ColumnBlock<Element>), 1024),
            step > 0 || tile > piece.first_tile);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::keep(out);
      if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(&shared.empty[stage.index]);
    }

    // The denominators: each warpgroup summed over its half of the tokens.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] = quad_sum(sum[i]);
      if (lane % 4 == 0) shared.row_exchange[warpgroup][own_row + 8 * i] = sum[i];
    }
    ptx::named_barrier_sync<kMathThreads>(kMathBarrier);
    const int64_t slot = partial_slot(params, blockIdx.y, blockIdx.x, piece.begins_share);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = own_row + 8 * i;
      sum[i] += shared.row_exchange[1 - warpgroup][row];
      if (first_row + row >= rows) continue;
      const float factor = sum[i] > 0 ? 1 / sum[i] : 0;
      const float log2_sum = sum[i] > 0 ? peak[i] * scale_log2 + log2f(sum[i]) : -INFINITY;
      const bool writes_lse = warpgroup == 0 && lane % 4 == 0;
      const int column = warpgroup * 256 + own_column;
      if (piece.whole()) {
        const int64_t token = first_token + (first_row + row) / params.heads, head = (first_row + row) % params.heads;
        Element* to = static_cast<Element*>(params.out) + token * params.out_token_stride + head * params.out_head_stride;
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          const uint32_t two = pack<Element>(out[j * 4 + i * 2] * factor, out[j * 4 + i * 2 + 1] * factor);
          if (params.output_is_pairs) {
            *reinterpret_cast<uint32_t*>(to + column + j * 8) = two;
          } else {
            to[column + j * 8] = reinterpret_cast<const Element(&)[2]>(two)[0];
            to[column + j * 8 + 1] = reinterpret_cast<const Element(&)[2]>(two)[1];
          }
        }
        if (writes_lse && params.lse != nullptr) {
          params.lse[token * params.lse_token_stride + head * params.lse_head_stride] = log2_sum * 0.6931471805599453f;
        }
      } else {
        float* to = params.partial_out + (slot * kBlockRows + row) * kLatentDim;
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          *reinterpret_cast<float2*>(to + column + j * 8) =
              make_float2(out[j * 4 + i * 2] * factor, out[j * 4 + i * 2 + 1] * factor);
        }
        if (writes_lse) params.partial_lse[slot * kBlockRows + row] = log2_sum;
      }
    }
    // Before the next piece overwrites queries and row_exchange.
    ptx::named_barrier_sync<kMathThreads>(kMathBarrier);
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, 1)
    decode_wide_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ CUtensorMap map) {
  run_roles<Element, WideShared<Element>>(params, &map, 2, [&](auto& shared) { consume_wide<Element>(params, shared); });
}

}  // namespace mla_backend::sm90
