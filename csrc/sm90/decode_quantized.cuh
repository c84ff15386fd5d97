// MLA decode on Hopper over a cache of float8 numbers, for at most 32 query rows per request: cached tokens take the 64-row
// side of wgmma, as in the narrow kernel, and come from registers, where they have been made float16 (csrc/sm90/quantized.cuh).
//
// The two warpgroups take tiles in turn, each for itself, and in the end add up what they have found. A warp that hands the tensor
// cores a product waits for them; meanwhile the other warpgroup converts, or finds probabilities.
#pragma once

#include "quantized.cuh"

namespace mla_backend::sm90 {

constexpr int kLatentColumnBlocks = kLatentDim / 64;

template <typename Element, int kN>
struct alignas(1024) QuantizedShared {
  static constexpr int kTileStages = 4, kQueryStages = kN == 16 ? 2 : 1;  // what there is room for

  // threadIdx.x, anew, as registers are scarce.
  __device__ static __forceinline__ uint32_t thread() { return ptx::thread_index(); }

  QuantizedTile tile[kTileStages];
  Element query[kQueryStages][kColumnBlocks][kN][64];
  // Of each warpgroup, and two of them in turn, as not all warps have multiplied by the last ones when the next ones are written.
  union {
    __half probabilities[2][2][kN][64];
    float4 results[2][kN / 8][128];  // 64 columns that a warpgroup hands the other one
  };
  float exchange[2][4][kN];           // of each warpgroup and warp: maxima of rows, at the end their sums
  alignas(8) float reference[2][kN];  // what the probabilities of a warpgroup are relative to
  alignas(8) float factor[2][kN];     // what its results are multiplied by
  alignas(8) float row_scale[kN];     // what a row's scores are multiplied by
  float log2_sum[kN];                 // the logarithm of a row's denominator
  Piece work[kQueryStages];
  SplitPieces split;
  Pipeline<kTileStages> tiles;
  Pipeline<kQueryStages> queries;
  // Of both warpgroups. A named barrier takes 1 to 3 % less, but where they have passed others unevenly often, racecheck sees none.
  uint64_t meeting;
};

// Multiply the tokens of tile `number` by the query rows.
template <typename Element, int kN, int kCount>
__device__ __forceinline__ void find_scores(float (&score)[kCount], QuantizedShared<Element, kN>& shared, const QuantizedTile& tile,
                                            int number, int query_stage) {
  constexpr int kTogether = kN == 16 ? 3 : 1;  // what there are registers for
  // Not to be computed before the loop over tiles, and 36 of them kept.
  const ptx::Matrix queries(ptx::shared_address(shared.query[query_stage]) + ptx::opaque_zero(), 0, 1024);
  const CachedKeys keys(tile, ptx::thread_index());
  shared.tiles.wait_full(number);
  // Of four blocks in turn, so that they have the same address but for a constant.
  const auto block = [](int load) { return load < 16 ? load % 4 : kQuantizedBlocks - 1; };
  const auto column = [](int load) { return (load < 16 ? load / 4 : load - 16) * 32; };
  multiply_converted<CachedKeys, kHeadDim / 32, kTogether>(
      [&](int load, uint32_t(&raw)[4]) { keys.load(block(load), column(load), raw); },
      [&](int load, const uint32_t(&steps)[2][4]) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const int all = block(load) * kQuantizedColumns + column(load) + s * 16;
          ptx::wgmma<__half>(score, steps[s], queries.at(all / 64 * kN * 128 + all % 64 * 2), load + s > 0);
        }
      });
  ptx::keep(score);
}

template <typename Element, int kN>
__device__ void consume_quantized(const DecodeParams& params, QuantizedShared<Element, kN>& shared) {
  using Shared = QuantizedShared<Element, kN>;
  constexpr int kScores = kN / 2, kColumns = kN / 4;  // that a thread holds: scores, and parts of rows
  const int group = ptx::uniform(threadIdx.x / 128);
  const int own_barrier = kGroupBarrier + group;
  // They meet evenly often for each piece, so whether it is an even or an odd time is known everywhere.
  const auto meet = [&](int odd) {
    ptx::mbarrier_arrive(&shared.meeting);
    ptx::mbarrier_wait(&shared.meeting, odd);
    __syncwarp();
  };

  int first_number = 0;  // of the tiles so far
  for (int pieces = 0;; ++pieces) {
    const int query_stage = ptx::uniform(shared.queries.stage(pieces));
    shared.queries.wait_full(pieces);
    const Piece piece = shared.work[query_stage];
    if (piece.tiles() == 0) break;
    prepare_queries(shared.query[query_stage], shared.row_scale, params.softmax_scale * kLog2E * *params.kv_scale);
    meet(0);
    const int queries = piece.queries, seq_len = piece.seq_len;
    const int all_visible = params.causal ? seq_len - queries + 1 : seq_len;

    float out[kLatentColumnBlocks][kN / 2] = {};
    const auto scale = [&](int c, float factor) {
#pragma unroll
      for (auto& block : out) block[c / 2 * 4 + c % 2] *= factor, block[c / 2 * 4 + 2 + c % 2] *= factor;
    };
    float sum[kColumns] = {};
    if (const Place at(ptx::thread_index()); at.warp == 0 && at.lane < 4) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) shared.reference[group][at.column(c)] = -INFINITY;
    }

    const int own_first_tile = piece.first_tile + group;
    if (own_first_tile >= piece.last_tile) shared.queries.release(pieces);
    for (int t = own_first_tile; t < piece.last_tile; t += 2) {
      const int number = first_number + t - piece.first_tile, first = t * kTileTokens;
      QuantizedTile& tile = shared.tile[ptx::uniform(shared.tiles.stage(number))];
      const uint32_t probabilities = ptx::shared_address(shared.probabilities[group][t / 2 % 2]);
      // score[4 * j + 2 * i + e] is token at.row() + 8 * i and query row at.column(2 * j + e).
      float score[kScores];
      find_scores(score, shared, tile, number, query_stage);
      if (t + 2 >= piece.last_tile) shared.queries.release(pieces);

      const Place at(ptx::thread_index());
      if (first + kTileTokens > all_visible) {
#pragma unroll
        for (int k = 0; k < kScores; ++k) {
          const int row = at.column(k / 4 * 2 + k % 2);
          const int query_index = min(query_of_row(params, row), queries - 1);
          const int last_visible = params.causal ? seq_len - queries + query_index : seq_len - 1;
          if (first + at.row() + k / 2 % 2 * 8 > last_visible) score[k] = -INFINITY;
        }
        if (seq_len - first < kTileTokens) {
          ptx::named_barrier_sync<128>(own_barrier);  // nobody loads keys any more
          clear_rows_from(seq_len - first, tile, own_barrier);
        }
      }
      float reference[kColumns], tile_sum[kColumns];
      bool outgrown = false;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) reference[c] = t == own_first_tile ? -INFINITY : shared.reference[group][at.column(c)];
#pragma unroll
      for (int k = 0; k < kScores; ++k) score[k] *= shared.row_scale[at.column(k / 4 * 2 + k % 2)];
      // Probabilities relative to the references. Transposed on the way, so that a query row's lie side by side: four 8 x 8
      // matrices of two groups of tokens and two of query rows at a time.
      const auto weigh = [&] {
        float power[kScores];
#pragma unroll
        for (int k = 0; k < kScores; ++k) {
          // A row that has seen no token yet has the reference -inf, and -inf - -inf would be NaN.
          const float relative_to = reference[k / 4 * 2 + k % 2];
          power[k] = ptx::exp2(score[k] - (relative_to == -INFINITY ? 0 : relative_to));
        }
#pragma unroll
        for (int j = 0; j < kN / 8; j += 2) {
          const int row = (j + at.lane / 16) * 8 + at.lane % 8, chunk = at.warp * 2 + at.lane / 8 % 2;
          const auto two = [&](int k) { return pack<__half>(power[k], power[k + 1]); };
          ptx::stmatrix_x4_trans(probabilities + swizzled_128(row, chunk), two(j * 4), two(j * 4 + 2), two(j * 4 + 4),
                                 two(j * 4 + 6));
        }
        ptx::fence_proxy_async();
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const float first_power = power[c / 2 * 4 + c % 2], second_power = power[c / 2 * 4 + 2 + c % 2];
          tile_sum[c] = first_power + second_power;
          outgrown |= fmaxf(first_power, second_power) > (reference[c] == -INFINITY ? 0 : kMostProbability<__half>);
        }
      };
      // First as if the references could stay, which they nearly always can.
      if (t > own_first_tile) weigh();
      if (ptx::named_barrier_any<128>(own_barrier, outgrown || t == own_first_tile)) {
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
          tile_peak -= kReferenceBelow<__half>;
          const float followed = tile_peak - reference[c] > kPatience ? tile_peak : reference[c];
          const float decay = ptx::exp2(reference[c] - (followed == -INFINITY ? 0 : followed));
          reference[c] = followed;
          if (at.warp == 0 && at.lane < 4) shared.reference[group][at.column(c)] = followed;
          sum[c] *= decay;
          scale(c, decay);
        }
        weigh();
        ptx::named_barrier_sync<128>(own_barrier);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[c] += tile_sum[c];
      constexpr int kTogether = kN == 16 ? 4 : 2;  // what there are registers for
      add_values<kTogether>(out, tile, probabilities, group, [&] { shared.tiles.release(number); });
    }
    first_number += piece.tiles();

    // Denominators: over the lanes, then over the warps and the warpgroups.
    const Place at(ptx::thread_index());
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      sum[c] = column_sum(sum[c]);
      if (at.lane < 4) shared.exchange[group][at.warp][at.column(c)] = sum[c];
    }
    meet(1);
    const Rows<Element> results(params, piece, 0);
    if (const int row = ptx::thread_index(); row < kN) {
      const float peak = fmaxf(shared.reference[0][row], shared.reference[1][row]);
      float total = 0, weight[2];
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        weight[g] = ptx::exp2(shared.reference[g][row] - (peak == -INFINITY ? 0 : peak));
#pragma unroll
        for (int w = 0; w < 4; ++w) total += weight[g] * shared.exchange[g][w][row];
      }
      const float factor = total > 0 ? *params.kv_scale * ptx::reciprocal(total) : 0;
#pragma unroll
      for (int g = 0; g < 2; ++g) shared.factor[g][row] = weight[g] * factor;
      const float log2_sum = total > 0 ? peak + ptx::log2(total) : -INFINITY;
      shared.log2_sum[row] = log2_sum;
      if (row < results.last_row) {
        if (!results.complete) results.store_partial_lse(row, log2_sum);
        if (results.parts == 0) results.store_lse(row, log2_sum);
      }
    }
    meet(0);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) scale(c, shared.factor[group][at.column(c)]);
    auto& own_half = reinterpret_cast<float(&)[kGroupBlocks][kN / 2]>(out[0]);
    auto& other_half = reinterpret_cast<float(&)[kGroupBlocks][kN / 2]>(out[kGroupBlocks]);
    const int thread = at.warp * 32 + at.lane;
#pragma unroll
    for (int b = 0; b < kGroupBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < kN / 8; ++i) {
        shared.results[group][i][thread] = reinterpret_cast<const float4&>(other_half[b][i * 4]);
      }
      meet(1);
#pragma unroll
      for (int i = 0; i < kN / 8; ++i) {
        const float4 theirs = shared.results[1 - group][i][thread];
        float* const own = &own_half[b][i * 4];
        own[0] += theirs.x, own[1] += theirs.y, own[2] += theirs.z, own[3] += theirs.w;
      }
      meet(0);
    }
    // Where there is little work, parts are what is stored: in this order in the machine code, too.
    int complete = results.complete;
    if (!complete) {
      store_part(results, own_half, group, at);
      results.announce(own_barrier);
    }
    asm volatile("" : "+r"(complete));
    if (complete) {
      if (results.template wait_for_others<2>(own_barrier)) {
        float log2_sums[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) log2_sums[c] = shared.log2_sum[at.column(c)];
        add_parts(results, own_half, log2_sums, group, at);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int row = at.column(c);
          if (threadIdx.x < 4 && row < results.last_row) results.store_lse(row, log2_sums[c]);
        }
      }
      store_pairs(results, own_half, group, at);
    }
    meet(1);  // before the next piece overwrites the sums
  }
  // What they add up goes where probabilities were.
  static_assert(sizeof(WarpSums<Part32InOrder>[2]) <= sizeof(shared.probabilities));
  auto& sums = reinterpret_cast<WarpSums<Part32InOrder>(&)[2]>(shared.probabilities);
  combine_split<Element, Part32InOrder, 2>(params, shared.split, group, own_barrier, sums[group]);
}

template <typename Element, int kN>
__global__ void __launch_bounds__(kThreads, 1)
    decode_quantized_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ TensorMaps maps) {
  auto& shared = shared_memory<QuantizedShared<Element, kN>>();
  run_roles<240, 24>(  // 168 for each of 384 threads
      params, blockIdx.x,
      [&](Pieces& pieces, int warp) {
        if (warp > 0) return;
        bring_tiles<1>(params, pieces, shared.tiles, kQuantizedBlocks * kQuantizedColumns,
                       [&](int stage, int tile_row, int page, int page_row, auto tma_load) {
                         const int block = threadIdx.x % 32;
                         if (block < kQuantizedBlocks) {
                           tma_load(&shared.tile[stage][block][tile_row], &maps.latent, block * kQuantizedColumns, page_row, page,
                                    shared.tiles.full[stage]);
                         }
                       });
      },
      [&](Pieces& pieces) { bring_whole_queries<Element>(params, pieces, shared, maps); },
      [&] {
        maps.prefetch();
        shared.tiles.initialise(1, 4);  // the warps of the warpgroup that has a tile
        shared.queries.initialise(32, kMathThreads);
        ptx::mbarrier_init(&shared.meeting, kMathThreads);
      },
      [&] { consume_quantized<Element, kN>(params, shared); }, [] { __syncthreads(); },
      [&] { clear_rows<Element>(params); });
}

}  // namespace mla_backend::sm90
