// MLA decode on Hopper for at most 64 query rows per request: cached tokens take the 64-row side of wgmma.
//
// With few rows the time goes into reading the cache, and padding the rows to 64 would only keep tiles in shared memory
// for longer. So everything is transposed: scores are tile x queries (64 tokens x N rows), and the output is values x
// probabilities (512 columns x N rows), with the tile as the first operand both times, K-major and then M-major. (The
// idea is published as ETAP, arXiv 2506.01969.) Of the output each of the two warpgroups computes half of the columns, and of
// the probabilities those of half of the rows, for both. With up to 48 rows each computes the scores of all rows over half of the
// 576 numbers, and they exchange halves, so that each can add up those of its own rows; with 64, when shared memory has no room for
// scores, each computes those of its own rows over all numbers.
#pragma once

#include "combine.cuh"

namespace mla_backend::sm90 {

constexpr int kColumnBlocks = kHeadDim / 64;
constexpr int kGroupBlocks = kLatentDim / 64 / 2;  // blocks of 64 output columns of a warpgroup
constexpr int kMathBarrier = kQueriesBarrier + 1;  // named barrier of both warpgroups

template <typename Element, int kN>
struct alignas(1024) NarrowShared {
  static constexpr int kRows = kN / 2;         // that a warpgroup finds the probabilities of
  static constexpr bool kByColumns = kN < 64;  // whether it computes all scores over half of the numbers
  static constexpr int kQueryStages = kN == 16 ? 2 : 1;  // what there is room for
  ColumnBlock<Element> tile[2][kColumnBlocks];
  Element query[kQueryStages][kColumnBlocks][kN][64];
  Element probabilities[kN][64];
  struct Nothing {};
  std::conditional_t<kByColumns, float4[2][kRows / 8][128], Nothing> scores;  // that a warpgroup hands the other one
  float exchange[2][4][kRows];  // per warpgroup and warp: maxima of its rows, at the end their sums
  alignas(8) float factor[kN];  // what both warpgroups multiply a row's results by
  float log2_sum[kN];           // a row's reference at the end, then the logarithm of its denominator
  Piece work[kQueryStages];
  SplitPieces split;
  Pipeline<2, kColumnBlocks> tiles;
  Pipeline<kQueryStages> queries;
};

// The query row that is a thread's column `c` of any accumulator.
__device__ __forceinline__ int own_column(int c) { return c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2; }

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

// Write a partial result.
template <typename Element, int kN>
__device__ __forceinline__ void store_part(const Rows<Element>& results, const float (&out)[kGroupBlocks][kN / 2], int group) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < kN / 4; ++c) {
    const int row = own_column(c);
    if (row >= results.last_row) continue;
    float2* to = reinterpret_cast<float2*>(results.partial_out(row) + group * kGroupBlocks * 64 + warp * 16) + lane / 4;
#pragma unroll
    for (int b = 0; b < kGroupBlocks; ++b) {
      const float* two = &out[b][c / 2 * 4 + c % 2];
      to[b * 32] = make_float2(two[0], two[2]);
    }
  }
}

// Write rows of the output. A thread has neighbours in a column: transposed, of two groups of eight columns it
// has two columns each, and stores four of one.
template <typename Element, int kN>
__device__ __forceinline__ void store_transposed(const Rows<Element>& results, const float (&out)[kGroupBlocks][kN / 2],
                                                 int group) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int column = group * kGroupBlocks * 64 + warp * 16 + lane % 2 * 8 + lane % 4 / 2 * 4;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const int row = j * 8 + lane / 4;
    Element* to = results.out(row) + column;
#pragma unroll
    for (int b = 0; b < kGroupBlocks; ++b) {
      const float* four = &out[b][j * 4];
      const uint32_t low = ptx::transposed(pack<Element>(four[0], four[1]));
      const uint32_t high = ptx::transposed(pack<Element>(four[2], four[3]));
      const uint32_t received = __shfl_xor_sync(~0u, lane % 2 ? low : high, 1);
      if (row >= results.last_row) continue;
      *reinterpret_cast<uint2*>(to + b * 64) = lane % 2 ? make_uint2(received, high) : make_uint2(low, received);
    }
  }
}

// The same where rows may start anywhere.
template <typename Element, int kN>
__device__ __forceinline__ void store_elements(const Rows<Element>& results, const float (&out)[kGroupBlocks][kN / 2], int group) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < kN / 4; ++c) {
    const int row = own_column(c);
    if (row >= results.last_row) continue;
    Element* to = results.out(row) + group * kGroupBlocks * 64 + warp * 16 + lane / 4;
#pragma unroll
    for (int b = 0; b < kGroupBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t rounded = pack<Element>(out[b][c / 2 * 4 + i * 2 + c % 2], 0);
        to[b * 64 + i * 8] = reinterpret_cast<const Element&>(rounded);
      }
    }
  }
}

// Add what other workers have found for the rows of a request that this one completes.
template <typename Element, int kN>
__device__ __forceinline__ void add_parts(const Rows<Element>& results, float (&out)[kGroupBlocks][kN / 2],
                                          float (&log2_sums)[kN / 4], int group) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  constexpr int kColumns = kN / 4;  // that a thread holds parts of
#pragma unroll 1
  for (int part = 1; part < results.parts; ++part) {
    float other[kColumns];
    float2 two[kColumns][kGroupBlocks] = {};
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = own_column(c);
      const bool exists = row < results.last_row;
      const float* from = results.partial_out(row, part) + group * kGroupBlocks * 64 + warp * 16 + lane / 4 * 2;
      other[c] = -INFINITY;
      ptx::load_if(exists, other[c], results.params.partial_lse + results.partial_row_of(row, part));
#pragma unroll
      for (int b = 0; b < kGroupBlocks; ++b) ptx::load_if(exists, two[c][b], reinterpret_cast<const float2*>(from + b * 64));
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const Weights weights(log2_sums[c], other[c]);
#pragma unroll
      for (int b = 0; b < kGroupBlocks; ++b) {
        float* own = &out[b][c / 2 * 4 + c % 2];
        own[0] = own[0] * weights.own + two[c][b].x * weights.other;
        own[2] = own[2] * weights.own + two[c][b].y * weights.other;
      }
    }
  }
}

template <typename Element, int kN>
__device__ void consume_narrow(const DecodeParams& params, NarrowShared<Element, kN>& shared) {
  using Shared = NarrowShared<Element, kN>;
  constexpr int kScores = Shared::kRows / 2, kColumns = Shared::kRows / 4;  // that a thread holds: scores, and parts of rows
  const int group = ptx::uniform(threadIdx.x / 128), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int own_token = warp * 16 + lane / 4;   // of a tile, and the one 8 further on
  const int first_row = group * Shared::kRows;  // that the warpgroup finds the probabilities of
  const int own_barrier = kGroupBarrier + group;
  const float scale_log2 = params.softmax_scale * kLog2E;
  const auto meet = [] { ptx::named_barrier_sync<kMathThreads>(kMathBarrier); };

  const uint32_t probabilities = ptx::shared_address(shared.probabilities);
  int number = 0;  // of tiles so far
  for (int pieces = 0;; ++pieces) {
    const int query_stage = ptx::uniform(shared.queries.stage(pieces));
    shared.queries.wait_full(pieces);
    const Piece piece = shared.work[query_stage];
    if (piece.tiles() == 0) break;
    const int queries = piece.queries, seq_len = piece.seq_len;
    const int all_visible = params.causal ? seq_len - queries + 1 : seq_len;

    float out[kGroupBlocks][kN / 2] = {};
    const auto scale = [&](int c, float factor) {
#pragma unroll
      for (int b = 0; b < kGroupBlocks; ++b) out[b][c / 2 * 4 + c % 2] *= factor, out[b][c / 2 * 4 + 2 + c % 2] *= factor;
    };
    float reference[kColumns], sum[kColumns] = {};
#pragma unroll
    for (int c = 0; c < kColumns; ++c) reference[c] = -INFINITY;

    for (int t = piece.first_tile; t < piece.last_tile; ++t, ++number) {
      const int first = t * kTileTokens;
      ColumnBlock<Element>(&tile)[kColumnBlocks] = shared.tile[ptx::uniform(shared.tiles.stage(number))];
      const uint32_t own_values = ptx::shared_address(tile[group * kGroupBlocks]);

      // product[4 * j + 2 * i + e] is token own_token + 8 * i and query row own_column(2 * j + e), counted from the first of all
      // rows or of the own ones.
      float product[Shared::kByColumns ? kN / 2 : kScores];
      constexpr int kBlockSteps = Shared::kByColumns ? 2 : 4;  // half of every column block, or all of it
      const uint32_t half = Shared::kByColumns ? group * 64 : 0, own_rows = Shared::kByColumns ? 0 : first_row * 128;  // in bytes
      const ptx::Matrix keys(ptx::shared_address(tile) + half, 0, 1024);
      const ptx::Matrix query(ptx::shared_address(shared.query[query_stage]) + own_rows + half, 0, 1024);
#pragma unroll
      for (int step = 0; step < kColumnBlocks * kBlockSteps; ++step) {
        const uint32_t block = step / kBlockSteps, inner = step % kBlockSteps * 32;
        if (step % kBlockSteps == 0) {  // products begin before all of the tile is there
          shared.tiles.wait_full(number, block);
          ptx::wgmma_fence();  // without it the compiler adds it, and says so
        }
        ptx::wgmma<Element>(product, keys.at(block * sizeof(ColumnBlock<Element>) + inner),
                            query.at(block * sizeof(shared.query[0][0]) + inner), step > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::keep(product);
      if (t + 1 == piece.last_tile) shared.queries.release(pieces);
      float score[kScores];  // of the own rows
      if constexpr (Shared::kByColumns) {
        float other[4];
#pragma unroll
        for (int k = 0; k < kScores; ++k) {
          const float low = product[k], high = product[kScores + k];
          score[k] = group ? high : low, other[k % 4] = group ? low : high;
          if (k % 4 == 3) shared.scores[group][k / 4][threadIdx.x % 128] = make_float4(other[0], other[1], other[2], other[3]);
        }
      } else {
#pragma unroll
        for (int k = 0; k < kScores; ++k) score[k] = product[k];
      }
      meet();  // from here on nobody reads the tile's keys, and the probabilities of the tile before
      if constexpr (Shared::kByColumns) {
#pragma unroll
        for (int j = 0; j < Shared::kRows / 8; ++j) {
          const float4 theirs = shared.scores[1 - group][j][threadIdx.x % 128];
          score[j * 4] += theirs.x, score[j * 4 + 1] += theirs.y, score[j * 4 + 2] += theirs.z, score[j * 4 + 3] += theirs.w;
        }
      }

      if (first + kTileTokens > all_visible) {
#pragma unroll
        for (int k = 0; k < kScores; ++k) {
          const int query_index = min(query_of_row(params, first_row + own_column(k / 4 * 2 + k % 2)), queries - 1);
          const int last_visible = params.causal ? seq_len - queries + query_index : seq_len - 1;
          if (first + own_token + k / 2 % 2 * 8 > last_visible) score[k] = -INFINITY;
        }
        if (seq_len - first < kTileTokens) {
          // The columns that this warpgroup multiplies are its own to clear.
          clear_rows_from(seq_len - first, *reinterpret_cast<ColumnBlock<Element>(*)[kGroupBlocks]>(&tile[group * kGroupBlocks]),
                          own_barrier);
        }
      }
      // Probabilities relative to the references. Transposed on the way, so that a query row's lie side by side: 8 x 8
      // matrices of two groups of tokens and, where there are as many, two of query rows at a time.
      float power[kScores];
      const auto weigh = [&] {
#pragma unroll
        for (int k = 0; k < kScores; ++k) {
          // A row that has seen no token yet has the reference -inf, and -inf - -inf would be NaN.
          const float relative_to = reference[k / 4 * 2 + k % 2];
          power[k] = ptx::exp2(score[k] * scale_log2 - (relative_to == -INFINITY ? 0 : relative_to));
        }
#pragma unroll
        for (int j = 0; j < Shared::kRows / 8; j += 2) {
          const int row = first_row + (j + lane / 16) * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
          const uint32_t to = probabilities + swizzled_128(row, chunk);
          const auto two = [&](int k) { return pack<Element>(power[k], power[k + 1]); };
          if (j + 1 == Shared::kRows / 8) {
            ptx::stmatrix_x2_trans(to, two(j * 4), two(j * 4 + 2));
          } else {
            ptx::stmatrix_x4_trans(to, two(j * 4), two(j * 4 + 2), two(j * 4 + 4), two(j * 4 + 6));
          }
        }
        ptx::fence_proxy_async();
      };
      // First as if the references could stay, which they nearly always can.
      bool outgrown = t == piece.first_tile;
      if (!outgrown) {
        weigh();
        bool own_outgrown = false;
#pragma unroll
        for (int k = 0; k < kScores; ++k) {
          own_outgrown |= power[k] > (reference[k / 4 * 2 + k % 2] == -INFINITY ? 0 : kPatienceFactor);
        }
        outgrown = ptx::named_barrier_any<kMathThreads>(kMathBarrier, own_outgrown);
      }
      if (outgrown) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const float tile_peak = column_max(fmaxf(score[c / 2 * 4 + c % 2], score[c / 2 * 4 + 2 + c % 2]));
          if (lane < 4) shared.exchange[group][warp][own_column(c)] = tile_peak;
        }
        ptx::named_barrier_sync<128>(own_barrier);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          float tile_peak = -INFINITY;
#pragma unroll
          for (int w = 0; w < 4; ++w) tile_peak = fmaxf(tile_peak, shared.exchange[group][w][own_column(c)]);
          tile_peak *= scale_log2;
          const float followed = tile_peak - reference[c] > kPatience ? tile_peak : reference[c];
          const float decay = ptx::exp2(reference[c] - (followed == -INFINITY ? 0 : followed));
          reference[c] = followed;
          sum[c] *= decay;
          if (threadIdx.x % 128 < 4) shared.factor[first_row + own_column(c)] = decay;
        }
        if (t > piece.first_tile) {  // else there is nothing to scale
          meet();
#pragma unroll
          for (int c = 0; c < kN / 4; ++c) scale(c, shared.factor[own_column(c)]);
        }
        weigh();
        meet();
      }
#pragma unroll
      for (int k = 0; k < kScores; ++k) sum[k / 4 * 2 + k % 2] += power[k];

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

    // Denominators: over the lanes, then over the warps.
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      sum[c] = column_sum(sum[c]);
      if (lane < 4) shared.exchange[group][warp][own_column(c)] = sum[c];
      if (threadIdx.x % 128 < 4) shared.log2_sum[first_row + own_column(c)] = reference[c];
    }
    meet();
    const Rows<Element> results(params, piece, 0);
    if (const int row = threadIdx.x; row < kN) {
      float total = 0;
#pragma unroll
      for (int w = 0; w < 4; ++w) total += shared.exchange[row / Shared::kRows][w][row % Shared::kRows];
      shared.factor[row] = total > 0 ? ptx::reciprocal(total) : 0;
      const float log2_sum = total > 0 ? shared.log2_sum[row] + ptx::log2(total) : -INFINITY;
      shared.log2_sum[row] = log2_sum;
      if (row < results.last_row && !results.complete) results.store_partial_lse(row, log2_sum);
      if (row < results.last_row && results.parts == 0) results.store_lse(row, log2_sum);
    }
    meet();
#pragma unroll
    for (int c = 0; c < kN / 4; ++c) scale(c, shared.factor[own_column(c)]);
    // In this order in the machine code, too: where there is little work, parts are what is stored, with code that nobody has
    // needed before.
    int complete = results.complete;
    if (!complete) {
      store_part<Element, kN>(results, out, group);
      results.announce(own_barrier);
    }
    asm volatile("" : "+r"(complete));
    if (complete) {
      if constexpr (kN <= 32) {  // with more rows there are no registers for it, and no schedule asks for it
        if (results.template wait_for_others<2>(own_barrier)) {
          float log2_sums[kN / 4];
#pragma unroll
          for (int c = 0; c < kN / 4; ++c) log2_sums[c] = shared.log2_sum[own_column(c)];
          add_parts<Element, kN>(results, out, log2_sums, group);
#pragma unroll
          for (int c = 0; c < kN / 4; ++c) {
            if (const int row = own_column(c); threadIdx.x < 4 && row < results.last_row) results.store_lse(row, log2_sums[c]);
          }
        }
      }
      if (params.output_is_vectors) {
        store_transposed<Element, kN>(results, out, group);
      } else {
        store_elements<Element, kN>(results, out, group);
      }
    }
    meet();  // before the next piece overwrites the sums
  }
  // What they add up goes where probabilities were.
  static_assert(sizeof(WarpSums<Part32>[2]) <= sizeof(shared.probabilities));
  auto& sums = reinterpret_cast<WarpSums<Part32>(&)[2]>(shared.probabilities);
  combine_split<Element, Part32, 2>(params, shared.split, group, own_barrier, sums[group]);
}

// A block is started with as many registers for each thread as if it had kThreads of them. With 168 for all, which none of them
// needs, steps with 16 rows took 0.1 to 0.5 us longer; why is not known.
template <int kN>
struct NarrowRegisters {
  static constexpr int kThreads = kN == 16 ? 640 : kN == 32 ? 512 : 384;                        // 96, 128 or 168 registers each
  static constexpr int kMath = kN == 16 ? 104 : kN == 32 ? 152 : 224, kOther = kN > 32 ? 56 : 80;  // what the roles make of them
};

template <typename Element, int kN>
__global__ void __launch_bounds__(NarrowRegisters<kN>::kThreads, 1)
    decode_narrow_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ TensorMaps maps) {
  auto& shared = shared_memory<NarrowShared<Element, kN>>();
  run_roles<NarrowRegisters<kN>::kMath, NarrowRegisters<kN>::kOther>(
      params, blockIdx.x,
      [&](Pieces& pieces, int warp) {
        if (warp > 0) return;
        bring_tiles<1>(params, pieces, shared.tiles, kHeadDim * sizeof(Element),
                       [&](int stage, int tile_row, int page, int page_row, auto tma_load) {
                         const int block = threadIdx.x % 32;
                         if (block < kColumnBlocks) {
                           tma_load(&shared.tile[stage][block][tile_row], &maps.latent, block * 64, page_row, page,
                                    &shared.tiles.full[stage][block]);
                         }
                       });
      },
      [&](Pieces& pieces) {
        bring_queries<1>(
            params, pieces, shared.queries, shared.work, shared.split, params.block_rows * kHeadDim * sizeof(Element),
            [&](int stage, int token) {
              const int block = threadIdx.x % 32;
              if (block < kColumnBlocks) {
                const bool rope = block == kLatentDim / 64;
                ptx::tma_load(&shared.query[stage][block], rope ? &maps.rope_query : &maps.latent_query,
                              rope ? 0 : block * 64, 0, token, shared.queries.full[stage]);
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
      [&] {
        maps.prefetch();
        shared.tiles.initialise(1, 2);
        shared.queries.initialise(32, kMathThreads);
      },
      [&] { consume_narrow<Element, kN>(params, shared); }, [] { __syncthreads(); },
      [&] { clear_rows<Element>(params); });
}

}  // namespace mla_backend::sm90
