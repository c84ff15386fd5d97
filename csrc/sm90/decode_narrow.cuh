// MLA decode on Hopper for at most 64 query rows at a time: cached tokens take the 64-row side of wgmma.
//
// With few rows the time goes into reading the cache, and padding the rows to 64 would only keep tiles in shared memory
// for longer. So everything is transposed: scores are tile x queries (64 tokens x N rows), and the output is values x
// probabilities (512 columns x N rows), with the tile as the first operand both times, K-major and then M-major. (The
// idea is published as ETAP, arXiv 2506.01969.) Of the output each of the two warpgroups computes half of the columns, and of
// the probabilities those of half of the rows, for both. With up to 48 rows each computes the scores of all rows over half of the
// 576 numbers, and they exchange halves, so that each can add up those of its own rows; with 64, when shared memory has no room for
// scores, each computes those of its own rows over all numbers.
//
// With 64 rows it also serves caches of float8 numbers (csrc/sm90/quantized.cuh), whose tiles leave room for scores.
#pragma once

#include "quantized.cuh"

namespace mla_backend::sm90 {

template <typename Element, typename Cached, int kN>
struct alignas(1024) NarrowShared {
  static constexpr bool kQuantized = sizeof(Cached) == 1;
  using Factor = std::conditional_t<kQuantized, __half, Element>;  // what is multiplied
  static constexpr int kRows = kN / 2;         // that a warpgroup finds the probabilities of
  static constexpr bool kByColumns = kQuantized || kN < 64;  // whether it computes all scores over half of the numbers
  static constexpr int kQueryStages = kN == 16 ? 2 : 1;  // what there is room for
  static constexpr int kTileStages = kQuantized ? 3 : 2;
  static constexpr int kBlockColumns = 128 / sizeof(Cached), kTileBlocks = (kHeadDim - 1) / kBlockColumns + 1;
  static constexpr int kOwnBlocks = kTileBlocks / 2;  // with the output columns of a warpgroup
  using Tile = ColumnBlock<Cached>[kTileBlocks];

  // threadIdx.x, anew where registers are scarce.
  __device__ static __forceinline__ uint32_t thread() { return kQuantized ? ptx::thread_index() : threadIdx.x; }

  Tile tile[kTileStages];
  Element query[kQueryStages][kColumnBlocks][kN][64];
  Factor probabilities[kN][64];
  std::conditional_t<kByColumns, float4[2][kRows / 8][128], Nothing> scores;  // that a warpgroup hands the other one
  float exchange[2][4][kRows];  // per warpgroup and warp: maxima of its rows, at the end their sums
  alignas(8) float factor[kN];  // what both warpgroups multiply a row's results by
  float log2_sum[kN];           // a row's reference at the end, then the logarithm of its denominator
  Piece work[kQueryStages];
  SplitPieces split;
  static constexpr int kTileParts = kQuantized ? 1 : kTileBlocks;
  Pipeline<kTileStages, kTileParts> tiles;
  Pipeline<kQueryStages> queries;
  std::conditional_t<kQuantized, Piece, Nothing> attended;       // the piece at hand, for which there are no registers
  std::conditional_t<kQuantized, float[kN], Nothing> row_scale;  // what a row's scores are multiplied by
};

// Write rows of the output. A thread has neighbours in a column: transposed, of two groups of eight columns it
// has two columns each, and stores four of one.
template <typename Element, int kN>
__device__ __forceinline__ void store_transposed(const Rows<Element>& results, const float (&out)[kGroupBlocks][kN / 2],
                                                 int group) {
  const Place at(threadIdx.x);
  const int column = group * kGroupBlocks * 64 + at.warp * 16 + at.lane % 2 * 8 + at.lane % 4 / 2 * 4;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const int row = j * 8 + at.lane / 4;
    Element* to = results.out(row) + column;
#pragma unroll
    for (int b = 0; b < kGroupBlocks; ++b) {
      const float* four = &out[b][j * 4];
      const uint32_t low = ptx::transposed(pack<Element>(four[0], four[1]));
      const uint32_t high = ptx::transposed(pack<Element>(four[2], four[3]));
      const uint32_t received = __shfl_xor_sync(~0u, at.lane % 2 ? low : high, 1);
      if (row >= results.last_row) continue;
      *reinterpret_cast<uint2*>(to + b * 64) = at.lane % 2 ? make_uint2(received, high) : make_uint2(low, received);
    }
  }
}

// The same where rows may start anywhere.
template <typename Element, int kN>
__device__ __forceinline__ void store_elements(const Rows<Element>& results, const float (&out)[kGroupBlocks][kN / 2], int group) {
  const Place at(threadIdx.x);
#pragma unroll
  for (int c = 0; c < kN / 4; ++c) {
    const int row = at.column(c);
    if (row >= results.last_row) continue;
    Element* to = results.out(row) + group * kGroupBlocks * 64 + at.warp * 16 + at.lane / 4;
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

// A tile whose numbers the tensor cores take from shared memory, for one of the two warpgroups.
template <typename Shared>
class SharedTile {
 public:
  using Element = typename Shared::Factor;
  static constexpr int kConsumers = 2;  // that release it
  static constexpr bool kClearedFirst = false;

  __device__ __forceinline__ SharedTile(Shared& shared, int number, int group)
      : shared_(shared), number_(number), group_(group), tile_(shared.tile[ptx::uniform(shared.tiles.stage(number))]) {}

  // Cached tokens times queries: all rows and half of every column block, or the own rows and all columns.
  template <int kCount>
  __device__ __forceinline__ void multiply_by_queries(float (&product)[kCount], int query_stage) {
    constexpr bool kByColumns = Shared::kByColumns;
    constexpr int kBlockSteps = kByColumns ? 2 : 4;
    const uint32_t half = kByColumns ? group_ * 64 : 0, own_rows = kByColumns ? 0 : group_ * Shared::kRows * 128;  // in bytes
    const ptx::Matrix keys(ptx::shared_address(tile_) + half, 0, 1024);
    const ptx::Matrix query(ptx::shared_address(shared_.query[query_stage]) + own_rows + half, 0, 1024);
#pragma unroll
    for (int step = 0; step < kColumnBlocks * kBlockSteps; ++step) {
      const uint32_t block = step / kBlockSteps, inner = step % kBlockSteps * 32;
      if (step % kBlockSteps == 0) {  // products begin before all of the tile is there
        shared_.tiles.wait_full(number_, block);
        ptx::wgmma_fence();  // without it the compiler adds it, and says so
      }
      ptx::wgmma<Element>(product, keys.at(block * sizeof(ColumnBlock<Element>) + inner),
                          query.at(block * sizeof(shared_.query[0][0]) + inner), step > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::keep(product);
  }

  // The columns that this warpgroup multiplies are its own to clear.
  __device__ __forceinline__ void clear_from(int token, int own_barrier) {
    using OwnBlocks = ColumnBlock<Element>[Shared::kOwnBlocks];
    clear_rows_from(token, reinterpret_cast<OwnBlocks&>(tile_[group_ * Shared::kOwnBlocks]), own_barrier);
  }

  // Add values times probabilities, and release the tile.
  template <int kCount>
  __device__ __forceinline__ void add_values(float (&out)[kGroupBlocks][kCount]) {
#pragma unroll
    for (int b = 0; b < kGroupBlocks; ++b) ptx::keep(out[b]);
    const ptx::Matrix values(ptx::shared_address(tile_[group_ * Shared::kOwnBlocks]), sizeof(ColumnBlock<Element>), 1024);
    const ptx::Matrix weights(ptx::shared_address(shared_.probabilities), 0, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int b = 0; b < kGroupBlocks; ++b) {
#pragma unroll
      for (int step = 0; step < kTileTokens / 16; ++step) {
        ptx::wgmma<Element, 1>(out[b], values.at(b * sizeof(ColumnBlock<Element>) + step * 16 * 128), weights.at(step * 32), 1);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < kGroupBlocks; ++b) ptx::keep(out[b]);
    if (threadIdx.x % 128 == 0) shared_.tiles.release(number_);
  }

 private:
  Shared& shared_;
  const int number_, group_;
  typename Shared::Tile& tile_;
};

template <typename Element, typename Cached, int kN>
__device__ void consume_narrow(const DecodeParams& params, NarrowShared<Element, Cached, kN>& shared) {
  using Shared = NarrowShared<Element, Cached, kN>;
  using Factor = typename Shared::Factor;
  using Part = std::conditional_t<Shared::kQuantized, Part16ByBlocks, Part32>;
  static_assert(!Shared::kQuantized || kN > 32, "add_parts() takes parts in float32");
  constexpr int kScores = Shared::kRows / 2, kColumns = Shared::kRows / 4;  // that a thread holds: scores, and parts of rows
  const int group = ptx::uniform(threadIdx.x / 128);
  const int first_row = group * Shared::kRows;  // that the warpgroup finds the probabilities of
  const int own_barrier = kGroupBarrier + group;
  const float kv_scale = Shared::kQuantized ? *params.kv_scale : 1;
  const float step_scale_log2 = params.softmax_scale * kLog2E * kv_scale;
  using Numbers = std::conditional_t<Shared::kQuantized, RegisterTile<Shared>, SharedTile<Shared>>;
  const auto meet = [] { ptx::named_barrier_sync<kMathThreads>(kMathBarrier); };

  const uint32_t probabilities = ptx::shared_address(shared.probabilities);
  int number = 0;  // of tiles so far
  for (int pieces = 0;; ++pieces) {
    const int query_stage = ptx::uniform(shared.queries.stage(pieces));
    shared.queries.wait_full(pieces);
    const Piece piece = shared.work[query_stage];
    if (piece.tiles() == 0) break;
    if constexpr (Shared::kQuantized) {
      prepare_queries(shared.query[query_stage], shared.row_scale, step_scale_log2);
      if (threadIdx.x == 0) shared.attended = piece;
      meet();
    }
    const auto attended = [&] {
      if constexpr (Shared::kQuantized) return shared.attended;
      return piece;
    };
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
      Numbers numbers(shared, number, group);
      const Place at(Shared::thread());
      const auto scale_log2 = [&](int c) {
        if constexpr (Shared::kQuantized) return shared.row_scale[first_row + at.column(c)];
        return step_scale_log2;
      };
      if (Numbers::kClearedFirst && seq_len - first < kTileTokens) numbers.clear_from(seq_len - first, own_barrier);
      // product[4 * j + 2 * i + e] is token at.row() + 8 * i and query row at.column(2 * j + e), counted from the first of all
      // rows or of the own ones.
      float product[Shared::kByColumns ? kN / 2 : kScores];
      numbers.multiply_by_queries(product, query_stage);
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
          const int row = first_row + at.column(k / 4 * 2 + k % 2);
          const int query_index = min(query_of_row(params, row), queries - 1);
          const int last_visible = params.causal ? seq_len - queries + query_index : seq_len - 1;
          if (first + at.row() + k / 2 % 2 * 8 > last_visible) score[k] = -INFINITY;
        }
        if (!Numbers::kClearedFirst && seq_len - first < kTileTokens) numbers.clear_from(seq_len - first, own_barrier);
      }
      // Probabilities relative to the references. Transposed on the way, so that a query row's lie side by side: 8 x 8
      // matrices of two groups of tokens and, where there are as many, two of query rows at a time.
      float power[kScores];
      const auto weigh = [&] {
#pragma unroll
        for (int k = 0; k < kScores; ++k) {
          // A row that has seen no token yet has the reference -inf, and -inf - -inf would be NaN.
          const float relative_to = reference[k / 4 * 2 + k % 2];
          power[k] = ptx::exp2(score[k] * scale_log2(k / 4 * 2 + k % 2) - (relative_to == -INFINITY ? 0 : relative_to));
        }
#pragma unroll
        for (int j = 0; j < Shared::kRows / 8; j += 2) {
          const int row = first_row + (j + at.lane / 16) * 8 + at.lane % 8, chunk = at.warp * 2 + at.lane / 8 % 2;
          const uint32_t to = probabilities + swizzled_128(row, chunk);
          const auto two = [&](int k) { return pack<Factor>(power[k], power[k + 1]); };
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
          own_outgrown |= power[k] > (reference[k / 4 * 2 + k % 2] == -INFINITY ? 0 : kMostProbability<Factor>);
        }
        outgrown = ptx::named_barrier_any<kMathThreads>(kMathBarrier, own_outgrown);
      }
      if (outgrown) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const float tile_peak = column_max(fmaxf(score[c / 2 * 4 + c % 2], score[c / 2 * 4 + 2 + c % 2]));
          if (at.lane < 4) shared.exchange[group][at.warp][at.column(c)] = tile_peak;
        }
        ptx::named_barrier_sync<128>(own_barrier);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          float tile_peak = -INFINITY;
#pragma unroll
          for (int w = 0; w < 4; ++w) tile_peak = fmaxf(tile_peak, shared.exchange[group][w][at.column(c)]);
          tile_peak = tile_peak * scale_log2(c) - kReferenceBelow<Factor>;
          const float followed = tile_peak - reference[c] > kPatience ? tile_peak : reference[c];
          const float decay = ptx::exp2(reference[c] - (followed == -INFINITY ? 0 : followed));
          reference[c] = followed;
          sum[c] *= decay;
          if (at.warp == 0 && at.lane < 4) shared.factor[first_row + at.column(c)] = decay;
        }
        if (t > piece.first_tile) {  // else there is nothing to scale
          meet();
#pragma unroll
          for (int c = 0; c < kN / 4; ++c) scale(c, shared.factor[at.column(c)]);
        }
        weigh();
        meet();
      }
#pragma unroll
      for (int k = 0; k < kScores; ++k) sum[k / 4 * 2 + k % 2] += power[k];

      numbers.add_values(out);
    }

    // Denominators: over the lanes, then over the warps.
    const Place at(Shared::thread());
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      sum[c] = column_sum(sum[c]);
      if (at.lane < 4) shared.exchange[group][at.warp][at.column(c)] = sum[c];
      if (at.warp == 0 && at.lane < 4) shared.log2_sum[first_row + at.column(c)] = reference[c];
    }
    meet();
    const Rows<Element> results(params, attended(), 0);
    if (const int row = Shared::thread(); row < kN) {
      float total = 0;
#pragma unroll
      for (int w = 0; w < 4; ++w) total += shared.exchange[row / Shared::kRows][w][row % Shared::kRows];
      shared.factor[row] = total > 0 ? kv_scale * ptx::reciprocal(total) : 0;
      const float log2_sum = total > 0 ? shared.log2_sum[row] + ptx::log2(total) : -INFINITY;
      shared.log2_sum[row] = log2_sum;
      if (row < results.last_row) {
        if (!results.complete) results.store_partial_lse(row, log2_sum);
        if (results.parts == 0) results.store_lse(row, log2_sum);
      }
    }
    meet();
#pragma unroll
    for (int c = 0; c < kN / 4; ++c) scale(c, shared.factor[at.column(c)]);
    // In this order in the machine code, too: where there is little work, parts are what is stored, with code that nobody has
    // needed before.
    int complete = results.complete;
    if (!complete) {
      if constexpr (Shared::kQuantized) {
        store_part16(results, out, group, at);
      } else {
        store_part(results, out, group, at);
      }
      results.announce(own_barrier);
    }
    asm volatile("" : "+r"(complete));
    if (complete) {
      if constexpr (kN <= 32) {  // with more rows there are no registers for it, and no schedule asks for it
        if (results.template wait_for_others<2>(own_barrier)) {
          float log2_sums[kN / 4];
#pragma unroll
          for (int c = 0; c < kN / 4; ++c) log2_sums[c] = shared.log2_sum[at.column(c)];
          add_parts(results, out, log2_sums, group, at);
#pragma unroll
          for (int c = 0; c < kN / 4; ++c) {
            const int row = at.column(c);
            if (threadIdx.x < 4 && row < results.last_row) results.store_lse(row, log2_sums[c]);
          }
        }
      }
      if constexpr (Shared::kQuantized) {
        store_pairs(results, out, group, at);
      } else if (params.output_is_vectors) {
        store_transposed<Element, kN>(results, out, group);
      } else {
        store_elements<Element, kN>(results, out, group);
      }
    }
    meet();  // before the next piece overwrites the sums
  }
  // What they add up goes where probabilities were.
  static_assert(sizeof(WarpSums<Part>[2]) <= sizeof(shared.probabilities));
  auto& sums = reinterpret_cast<WarpSums<Part>(&)[2]>(shared.probabilities);
  combine_split<Element, Part, 2>(params, shared.split, group, own_barrier, sums[group]);
}

// A block is started with as many registers for each thread as if it had kThreads of them. With 168 for all, which none of them
// needs, steps with 16 rows took 0.1 to 0.5 us longer; why is not known.
template <typename Cached, int kN>
struct NarrowRegisters {
  static constexpr bool kQuantized = sizeof(Cached) == 1;  // numbers on their way to the tensor cores take many
  static constexpr int kThreads = kQuantized || kN > 32 ? 384 : kN == 16 ? 640 : 512;      // 168, 96 or 128 registers each,
  static constexpr int kMath = kQuantized ? 240 : kN == 16 ? 104 : kN == 32 ? 152 : 224;  // and what the roles make of them
  static constexpr int kOther = kQuantized ? 24 : kN > 32 ? 56 : 80;
};

template <typename Element, typename Cached, int kN>
__global__ void __launch_bounds__(NarrowRegisters<Cached, kN>::kThreads, 1)
    decode_narrow_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ TensorMaps maps) {
  using Shared = NarrowShared<Element, Cached, kN>;
  using Registers = NarrowRegisters<Cached, kN>;
  auto& shared = shared_memory<Shared>();
  run_roles<Registers::kMath, Registers::kOther>(
      params, blockIdx.x,
      [&](Pieces& pieces, int warp) {
        if (warp > 0) return;
        bring_tiles<1>(params, pieces, shared.tiles, Shared::kTileBlocks * 128,
                       [&](int stage, int tile_row, int page, int page_row, auto tma_load) {
                         const int block = threadIdx.x % 32;
                         if (block < Shared::kTileBlocks) {
                           tma_load(&shared.tile[stage][block][tile_row], &maps.latent, block * Shared::kBlockColumns, page_row,
                                    page, &shared.tiles.full[stage][Shared::kQuantized ? 0 : block]);
                         }
                       });
      },
      [&](Pieces& pieces) { bring_whole_queries<Element>(params, pieces, shared, maps); },
      [&] {
        maps.prefetch();
        shared.tiles.initialise(1, Shared::kQuantized ? RegisterTile<Shared>::kConsumers : SharedTile<Shared>::kConsumers);
        shared.queries.initialise(32, kMathThreads);
      },
      [&] { consume_narrow<Element, Cached, kN>(params, shared); }, [] { __syncthreads(); },
      [&] { clear_rows<Element>(params); });
}

}  // namespace mla_backend::sm90
