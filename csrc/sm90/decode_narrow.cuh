// MLA decode on Hopper for at most 32 query rows per request: cached tokens take the 64-row side of wgmma.
//
// With few rows the time goes into reading the cache, and padding the rows to 64 would only keep tiles in shared memory
// for longer. So everything is transposed: scores are tile x queries (64 tokens x N rows), and the output is values x
// probabilities (512 columns x N rows), with the tile as the first operand both times, K-major and then M-major. (The
// idea is published as ETAP, arXiv 2506.01969.) Each of the two warpgroups computes the scores over half of the 576 numbers,
// adds what the other has found over its half, and then computes half of the output's columns.
#pragma once

#include "tile.cuh"

namespace mla_backend::sm90 {

constexpr int kColumnBlocks = kHeadDim / 64;
constexpr int kGroupBlocks = kLatentDim / 64 / 2;  // blocks of 64 output columns of a warpgroup

template <typename Element, int kN>
struct alignas(1024) NarrowShared {
  static constexpr int kQueryStages = kN == 16 ? 2 : 1;  // what there is room for
  ColumnBlock<Element> tile[2][kColumnBlocks];
  Element query[kQueryStages][kColumnBlocks][kN][64];
  Element probabilities[2][kN][64];  // per warpgroup
  float4 scores[2][2][kN / 8][128];  // for every other tile, per warpgroup: what it has found over its half
  float exchange[2][4][kN];          // per warpgroup and warp: column maxima, at the end column sums
  Piece work[2];
  Pipeline<2> tiles;
  Pipeline<kQueryStages> queries;
  uint64_t scores_full;
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
  const int group = ptx::uniform(threadIdx.x / 128), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int own_row = warp * 16 + lane / 4;                                        // and the row 8 further on
  const auto own_column = [&](int c) { return c / 2 * 8 + lane % 4 * 2 + c % 2; };  // of 0 to kColumns - 1
  const int own_barrier = kGroupBarrier + group;
  const float scale_log2 = params.softmax_scale * kLog2E;

  const uint32_t probabilities = ptx::shared_address(shared.probabilities[group]);
  int number = 0;  // of tiles so far
  for (int pieces = 0;; ++pieces) {
    const int query_stage = ptx::uniform(shared.queries.stage(pieces));
    shared.queries.wait_full(pieces);
    const Piece piece = shared.work[pieces & 1];
    if (piece.tiles() == 0) break;
    const int queries = piece.queries, seq_len = piece.seq_len;
    const int all_visible = params.causal ? seq_len - queries + 1 : seq_len;

    float out[kGroupBlocks][kN / 2] = {};
    float reference[kColumns], sum[kColumns] = {};
#pragma unroll
    for (int c = 0; c < kColumns; ++c) reference[c] = -INFINITY;

    for (int t = piece.first_tile; t < piece.last_tile; ++t, ++number) {
      const int first = t * kTileTokens;
      ColumnBlock<Element>(&tile)[kColumnBlocks] = shared.tile[ptx::uniform(shared.tiles.stage(number))];
      const uint32_t own_values = ptx::shared_address(tile[group * kGroupBlocks]);
      shared.tiles.wait_full(number);

      float score[kN / 2];
      // Half of every column block.
      const ptx::Matrix keys(ptx::shared_address(tile) + group * 64, 0, 1024);
      const ptx::Matrix query(ptx::shared_address(shared.query[query_stage]) + group * 64, 0, 1024);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kHeadDim / 32; ++step) {
        const uint32_t inner = step % 2 * 32;
        ptx::wgmma<Element>(score, keys.at(step / 2 * sizeof(ColumnBlock<Element>) + inner),
                            query.at(step / 2 * sizeof(shared.query[0][0]) + inner), step > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::keep(score);
      auto& halves = shared.scores[number & 1];
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        halves[group][j][threadIdx.x % 128] = make_float4(score[j * 4], score[j * 4 + 1], score[j * 4 + 2], score[j * 4 + 3]);
      }
      ptx::mbarrier_arrive(&shared.scores_full);
      ptx::mbarrier_wait(&shared.scores_full, number & 1);
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        const float4 other = halves[1 - group][j][threadIdx.x % 128];
        score[j * 4] += other.x, score[j * 4 + 1] += other.y, score[j * 4 + 2] += other.z, score[j * 4 + 3] += other.w;
      }

      // score[4 * j + 2 * i + e] is token own_row + 8 * i and query row own_column(2 * j + e).
      if (first + kTileTokens > all_visible) {
#pragma unroll
        for (int k = 0; k < kN / 2; ++k) {
          const int query_index = min(query_of_row(params, own_column(k / 4 * 2 + k % 2)), queries - 1);
          const int last_visible = params.causal ? seq_len - queries + query_index : seq_len - 1;
          if (first + own_row + k / 2 % 2 * 8 > last_visible) score[k] = -INFINITY;
        }
        if (seq_len - first < kTileTokens) {
          // The columns that this warpgroup multiplies are its own to clear.
          clear_rows_from(seq_len - first, *reinterpret_cast<ColumnBlock<Element>(*)[kGroupBlocks]>(&tile[group * kGroupBlocks]),
                          own_barrier);
        }
      }
      // Probabilities relative to the references. Transposed on the way, so that a query row's lie side by side: 8 x 8
      // matrices of two groups of query rows and two of tokens at a time.
      float power[kN / 2];
      const auto weigh = [&] {
#pragma unroll
        for (int k = 0; k < kN / 2; ++k) {
          // A row that has seen no token yet has the reference -inf, and -inf - -inf would be NaN.
          const float relative_to = reference[k / 4 * 2 + k % 2];
          power[k] = ptx::exp2(score[k] * scale_log2 - (relative_to == -INFINITY ? 0 : relative_to));
        }
#pragma unroll
        for (int j = 0; j < kN / 8; j += 2) {
          const int row = (j + lane / 16) * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
          ptx::stmatrix_x4_trans(probabilities + swizzled_128(row, chunk), pack<Element>(power[j * 4], power[j * 4 + 1]),
                                 pack<Element>(power[j * 4 + 2], power[j * 4 + 3]),
                                 pack<Element>(power[j * 4 + 4], power[j * 4 + 5]),
                                 pack<Element>(power[j * 4 + 6], power[j * 4 + 7]));
        }
        ptx::fence_proxy_async();
      };
      // First as if the references could stay, which they nearly always can.
      bool outgrown = t == piece.first_tile;
      if (!outgrown) {
        weigh();
        bool own_outgrown = false;
#pragma unroll
        for (int k = 0; k < kN / 2; ++k) {
          own_outgrown |= power[k] > (reference[k / 4 * 2 + k % 2] == -INFINITY ? 0 : kPatienceFactor);
        }
        outgrown = ptx::named_barrier_any<128>(own_barrier, own_outgrown);
      }
      if (outgrown) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const float tile_peak = column_max(fmaxf(score[c / 2 * 4 + c % 2], score[c / 2 * 4 + 2 + c % 2]));
          if (lane < 4) shared.exchange[group][warp][own_column(c)] = tile_peak;
        }
        ptx::named_barrier_sync<128>(own_barrier);
        float decay[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          float tile_peak = -INFINITY;
#pragma unroll
          for (int w = 0; w < 4; ++w) tile_peak = fmaxf(tile_peak, shared.exchange[group][w][own_column(c)]);
          tile_peak *= scale_log2;
          const float followed = tile_peak - reference[c] > kPatience ? tile_peak : reference[c];
          decay[c] = ptx::exp2(reference[c] - (followed == -INFINITY ? 0 : followed));
          reference[c] = followed;
          sum[c] *= decay[c];
        }
#pragma unroll
        for (int b = 0; b < kGroupBlocks; ++b) {
#pragma unroll
          for (int k = 0; k < kN / 2; ++k) out[b][k] *= decay[k / 4 * 2 + k % 2];
        }
        weigh();
        ptx::named_barrier_sync<128>(own_barrier);
      }
#pragma unroll
      for (int k = 0; k < kN / 2; ++k) sum[k / 4 * 2 + k % 2] += power[k];

#pragma unroll
      for (int b = 0; b < kGroupBlocks; ++b) ptx::keep(out[b]);
      const ptx::Matrix values(own_values, sizeof(ColumnBlock<Element>), 1024), weights(probabilities, 0, 1024);
      ptx::wgmma_fence();
#pragma unroll
      for (int b = 0; b < kGroupBlocks; ++b) {
#pragma unroll
        for (int step = 0; step < kTileTokens / 16; ++step) {
          ptx::wgmma<Element, 1>(out[b], values.at(b * sizeof(ColumnBlock<Element>) + step * 16 * 128),
                                 weights.at(step * 32), 1);
        }
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int b = 0; b < kGroupBlocks; ++b) ptx::keep(out[b]);
      if (threadIdx.x % 128 == 0) shared.tiles.release(number);
    }

    shared.queries.release(pieces);

    // Denominators: over the lanes, then over the warps.
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      sum[c] = column_sum(sum[c]);
      if (lane < 4) shared.exchange[group][warp][own_column(c)] = sum[c];
    }
    ptx::named_barrier_sync<128>(own_barrier);
    const Rows<Element> results(params, piece, 0);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = own_column(c);
      if (row >= results.last_row) continue;
      float total = 0;
#pragma unroll
      for (int w = 0; w < 4; ++w) total += shared.exchange[group][w][row];
      const float factor = total > 0 ? ptx::reciprocal(total) : 0;
      const int column = group * kGroupBlocks * 64 + own_row;
      if (piece.whole()) {
        Element* to = results.out(row) + column;
#pragma unroll
        for (int b = 0; b < kGroupBlocks; ++b) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t rounded = pack<Element>(out[b][c / 2 * 4 + i * 2 + c % 2] * factor, 0);
            to[b * 64 + i * 8] = reinterpret_cast<const Element&>(rounded);
          }
        }
      } else {
        float* to = results.partial_out(row) + column;
#pragma unroll
        for (int b = 0; b < kGroupBlocks; ++b) {
#pragma unroll
          for (int i = 0; i < 2; ++i) to[b * 64 + i * 8] = out[b][c / 2 * 4 + i * 2 + c % 2] * factor;
        }
      }
      if (threadIdx.x < 4) {
        results.store_lse(row, total > 0 ? reference[c] + ptx::log2(total) : -INFINITY);
      }
    }
    ptx::named_barrier_sync<128>(own_barrier);  // before the next piece overwrites the sums
  }
}

// A block is started with as many registers for each thread as if it had kThreads of them. They are few enough to leave room
// for two blocks of the combine kernel, or for one with 32 rows, which so can look up their work before this kernel is done.
template <int kN>
struct NarrowRegisters {
  static constexpr int kThreads = kN == 16 ? 640 : 512;            // 96 or 128 registers each
  static constexpr int kMath = kN == 16 ? 104 : 152, kOther = 80;  // what the roles make of them
};

template <typename Element, int kN>
__global__ void __launch_bounds__(NarrowRegisters<kN>::kThreads, 1)
    decode_narrow_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ TensorMaps maps) {
  auto& shared = shared_memory<NarrowShared<Element, kN>>();
  if (threadIdx.x == 0) {
    maps.prefetch();
    shared.tiles.initialise(1, 2);
    shared.queries.initialise(32, kMathThreads);
    ptx::mbarrier_init(&shared.scores_full, kMathThreads);
    ptx::fence_mbarrier_init();
  }
  Pieces pieces(params);
  if (brings_something()) pieces.find(blockIdx.x);
  __syncthreads();
  ptx::let_next_kernel_start();
  run_roles<NarrowRegisters<kN>::kMath, NarrowRegisters<kN>::kOther>(
      [&](int warp) {
        if (warp > 0) return;
        bring_tiles(params, pieces, shared.tiles, kHeadDim * sizeof(Element),
                    [&](int stage, int tile_row, int page, int page_row, auto tma_load) {
#pragma unroll
                      for (int block = 0; block < kColumnBlocks; ++block) {
                        tma_load(&shared.tile[stage][block][tile_row], &maps.latent, block * 64, page_row, page,
                                 &shared.tiles.full[stage]);
                      }
                    });
      },
      [&] {
        bring_queries(
            params, pieces, shared.queries, shared.work, params.block_rows * kHeadDim * sizeof(Element),
            [&](int stage, int token) {
#pragma unroll
              for (int block = 0; block < kColumnBlocks; ++block) {
                const bool rope = block == kLatentDim / 64;
                ptx::tma_load(&shared.query[stage][block], rope ? &maps.rope_query : &maps.latent_query,
                              rope ? 0 : block * 64, 0, token, &shared.queries.full[stage]);
              }
            },
            [&](int stage, const Piece& piece) {
              const auto place = [&](int row, int chunk) {
                return ptx::shared_address(shared.query[stage][chunk / 8]) + swizzled_128(row, chunk % 8);
              };
              copy_rows<kLatentDim / 8>(params, query_latent<Element>(params, piece), params.q_nope_token_stride,
                                        params.q_nope_head_stride, 0, piece.rows(params), place);
              copy_rows<kRopeDim / 8>(
                  params, query_rope<Element>(params, piece), params.q_pe_token_stride, params.q_pe_head_stride, 0,
                  piece.rows(params), [&](int row, int chunk) { return place(row, kLatentDim / 8 + chunk); });
            });
      },
      [&] { consume_narrow<Element, kN>(params, shared); });
}

}  // namespace mla_backend::sm90
