// MLA decode on Hopper for more than 32 query rows: a cluster of two thread blocks attends 64 or 128 query rows of a
// request to a share of its cached tokens.
//
// The 576 numbers of a token are divided between the blocks: each has 256 latent ones, which are keys and values, and 32
// rotary ones. So a cached number enters one multiprocessor only, a tile of 64 tokens takes 36.9 kB of shared memory,
// several of them are on their way at a time, and the accumulator of the output, 64 rows x 256 columns, fits the
// registers of a warpgroup. The price is that scores are sums over both blocks: of every 64 rows, the `owner`, a
// warpgroup of one block, gets the other half of the sums from the `helper`, a warpgroup of the other block, computes the
// softmax, and sends back the probabilities, all through the cluster's shared memory. In both, a thread holds the same
// rows and columns, so that what is sent needs no layout: thread t sends to thread t.
//
// In each block one warpgroup is an owner and the other a helper, of different rows with 128 rows, of every other tile
// with 64. In the latter case they add up their results at the end.
#pragma once

#include "tile.cuh"

namespace mla_backend::sm90 {

constexpr int kBlockLatent = kLatentDim / 2, kBlockRope = kRopeDim / 2;
constexpr int kLatentBlocks = kBlockLatent / 64;

template <typename Element, int kRows>
struct alignas(1024) WideShared {
  struct {
    Element latent[kLatentBlocks][kRows][64];
    Element rope[kRows][kBlockRope];
  } query;
  struct {
    ColumnBlock<Element> latent[kLatentBlocks];
    Element rope[kTileTokens][kBlockRope];
  } tile[kRows == 128 ? 3 : 4];
  // From the other block: its helper's scores; its owner's probabilities and factors; its owner's peaks and sums.
  float4 scores[2][8][128];
  uint4 probabilities[4][128];
  float2 factors[128];
  float4 statistics[128];
  uint64_t scores_full[2], scores_free[2], probabilities_full, probabilities_free, statistics_full;
  Piece work[2];
  Pipeline<kRows == 128 ? 3 : 4> tiles;
  Pipeline<1> queries;
};

template <typename Element, int kRows>
class WideConsumer {
  using Shared = WideShared<Element, kRows>;
  static constexpr bool kSharesRows = kRows == 64;  // both warpgroups have the same rows, and take turns with the tiles
  static constexpr int kScoreBytes = sizeof(Shared::scores) / 2, kFactorBytes = sizeof(Shared::factors);
  static constexpr int kProbabilityBytes = sizeof(Shared::probabilities) + kFactorBytes;

 public:
  __device__ __forceinline__ WideConsumer(const DecodeParams& params, Shared& shared)
      : params(params),
        shared(shared),
        rank(ptx::cluster_rank()),
        other(1 - rank),
        group(__shfl_sync(~0u, threadIdx.x / 128, 0)),
        thread(threadIdx.x % 128),
        lane(threadIdx.x % 32),
        own_row(thread / 32 * 16 + lane / 4),
        own_column(lane % 4 * 2),
        scale_log2(params.softmax_scale * kLog2E) {}

  __device__ __forceinline__ void run() {
    for (;; ++pieces_done) {
      shared.queries.wait_full(pieces_done);
      if (piece().tiles() == 0) break;
      group_row = kSharesRows ? 0 : group * 64;
      first_row = blockIdx.y * params.block_rows + group_row;
      tiles = kSharesRows ? (piece().tiles() + 1 - group) / 2 : piece().tiles();
      tokens = piece().seq_len - piece().first_tile * kTileTokens;

      float out[128];
      float factor[2];
      if (group == rank) {
        own(out, factor);
      } else {
        help(out, factor);
      }
      if constexpr (kSharesRows) {
        merge(out, factor);
      } else {
        store<0, 128>(out, factor);
      }
      tiles_before += piece().tiles();
      tiles_done += tiles;
    }
  }

 private:
  // Read anew where it is needed once: registers are scarce.
  __device__ __forceinline__ const Piece& piece() const { return shared.work[pieces_done & 1]; }

  // This warpgroup's tiles are counted from 0; number() counts those of the block, token() is the first of a tile. Tokens
  // are counted from the first one of the piece.
  __device__ __forceinline__ int in_piece(int tile) const { return kSharesRows ? 2 * tile + group : tile; }
  __device__ __forceinline__ int number(int tile) const { return tiles_before + in_piece(tile); }
  __device__ __forceinline__ int token(int tile) const { return in_piece(tile) * kTileTokens; }

  // Both warpgroups have to. With the same rows they still need the place of the queries, to add up their results.
  __device__ __forceinline__ void release_queries() {
    if (!kSharesRows && thread == 0) shared.queries.release(pieces_done);
  }

  // Query of one of this warpgroup's rows, the last one for rows past it.
  __device__ __forceinline__ int query_of(int row) const {
    return min(query_of_row(params, first_row + row), piece().queries - 1);
  }

  // How often the owner has sent factors before those of a tile: once per tile, and once at the end of a piece.
  __device__ __forceinline__ int factors_before(int tile) const { return tiles_done + pieces_done + tile; }

  __device__ __forceinline__ void await(int tile) { shared.tiles.wait_full(number(tile)); }

  // Scores of this warpgroup's rows with a tile, over the numbers that this block has of both.
  __device__ __forceinline__ void start_scores(float (&score)[32], int tile) {
    auto& keys = shared.tile[shared.tiles.stage(number(tile))];
    const ptx::Matrix q(ptx::shared_address(shared.query.latent) + group_row * 128, 0, 1024);
    const ptx::Matrix k(ptx::shared_address(keys.latent), 0, 1024);
    const ptx::Matrix q_rope(ptx::shared_address(shared.query.rope) + group_row * 64, 0, 512, ptx::Swizzle::k64Bytes);
    const ptx::Matrix k_rope(ptx::shared_address(keys.rope), 0, 512, ptx::Swizzle::k64Bytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kBlockLatent / 16; ++step) {
      const uint32_t inner = step % 4 * 32;
      ptx::wgmma<Element>(score, q.at(step / 4 * sizeof(shared.query.latent[0]) + inner),
                          k.at(step / 4 * sizeof(keys.latent[0]) + inner), step > 0);
    }
#pragma unroll
    for (int step = 0; step < kBlockRope / 16; ++step) {
      ptx::wgmma<Element>(score, q_rope.at(step * 32), k_rope.at(step * 32), 1);
    }
    ptx::wgmma_commit();
  }

  // Add probabilities times values of a tile to the output.
  __device__ __forceinline__ void start_values(float (&out)[128], const uint32_t (&probability)[16],
                                               int tile) {
    auto& latent = shared.tile[shared.tiles.stage(number(tile))].latent;
    if (const int valid = tokens - token(tile); valid < kTileTokens) {
      clear_rows_from(valid, latent, kMathBarrier + 1 + group);
    }
    const ptx::Matrix values(ptx::shared_address(latent), sizeof(ColumnBlock<Element>), 1024);
    ptx::keep(out);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTileTokens / 16; ++step) {
      ptx::wgmma_transposed_b<Element>(out, probability + step * 4, values.at(step * 16 * 128), step > 0 || tile > 0);
    }
    ptx::wgmma_commit();
  }

  // kPending products were started after it.
  template <int kPending>
  __device__ __forceinline__ void finish_values(float (&out)[128], int tile) {
    ptx::wgmma_wait<kPending>();
    ptx::keep(out);
    if (thread == 0) shared.tiles.release(number(tile));
  }

  __device__ __forceinline__ void rescale(float (&out)[128], const float (&decay)[2]) {
    if (!__all_sync(~0u, decay[0] == 1 && decay[1] == 1)) {
#pragma unroll
      for (int j = 0; j < 128; ++j) out[j] *= decay[j / 2 % 2];
    }
  }

  // --- the owner ----------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void own(float (&out)[128], float (&factor)[2]) {
    // Position of the last token that each own row sees, and the last one that all of them see.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      last_visible[i] = tokens - 1;
      if (params.causal) last_visible[i] -= piece().queries - 1 - query_of(own_row + 8 * i);
      peak[i] = -INFINITY, sum[i] = 0;
    }
    all_visible = tokens;
    if (params.causal) all_visible -= piece().queries - 1 - query_of(0);

    float score[32], decay[2];
    uint32_t probability[16];
    // While this warpgroup computes a softmax, the other one keeps the tensor cores busy.
    if (tiles > 0) {
      await(0);
      start_scores(score, 0);
      softmax(score, decay, probability, 0);
      for (int tile = 1; tile < tiles; ++tile) {
        start_values(out, probability, tile - 1);
        if constexpr (kSharesRows) {
          // Bytes decide here: a stage is emptied before the next one is waited for.
          finish_values<0>(out, tile - 1);
          await(tile);
          start_scores(score, tile);
        } else {
          await(tile);
          start_scores(score, tile);
          finish_values<1>(out, tile - 1);
        }
        softmax(score, decay, probability, tile);
        rescale(out, decay);
      }
      release_queries();
      start_values(out, probability, tiles - 1);
      finish_values<0>(out, tiles - 1);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[i] = quad_sum(sum[i]);

    float total[2] = {sum[0], sum[1]}, both_peak[2] = {peak[0], peak[1]}, weight[2] = {1, 1};
    if constexpr (kSharesRows) {
      const float4 theirs = exchange_statistics();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float their_peak = i == 0 ? theirs.x : theirs.y, their_sum = i == 0 ? theirs.z : theirs.w;
        both_peak[i] = fmaxf(peak[i], their_peak);
        weight[i] = ptx::exp2(peak[i] * scale_log2 - shift_of(both_peak[i], scale_log2));
        total[i] = sum[i] * weight[i] + their_sum * ptx::exp2(their_peak * scale_log2 - shift_of(both_peak[i], scale_log2));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) factor[i] = total[i] > 0 ? weight[i] / total[i] : 0;
    send_factors(factor, begin_message(tiles));
    if (lane % 4 == 0 && (group == 0 || !kSharesRows)) {
      const Rows<Element> results(params, piece(), blockIdx.y, blockIdx.x / 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + own_row + 8 * i;
        if (row >= results.last_row) continue;
        results.store_lse(row, total[i] > 0 ? both_peak[i] * scale_log2 + log2f(total[i]) : -INFINITY);
      }
    }
  }

  // From this block's half of the scores to probabilities, which are sent to the helper too.
  __device__ __forceinline__ void softmax(float (&score)[32], float (&decay)[2], uint32_t (&probability)[16], int tile) {
    ptx::wgmma_wait<0>();
    ptx::keep(score);
    const int message = tiles_done + tile, slot = message & 1;
    if (thread == 0) ptx::mbarrier_arrive_expect_tx(&shared.scores_full[slot], kScoreBytes);
    ptx::mbarrier_wait_cluster(&shared.scores_full[slot], message >> 1 & 1);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float4 theirs = shared.scores[slot][j][thread];
      score[j * 4] += theirs.x, score[j * 4 + 1] += theirs.y, score[j * 4 + 2] += theirs.z, score[j * 4 + 3] += theirs.w;
    }
    __syncwarp();
    if (lane == 0) ptx::arrive_in_block(&shared.scores_free[slot], other);

    const int first = token(tile);
    if (first + kTileTokens > all_visible) {
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        if (first + j / 4 * 8 + own_column + j % 2 > last_visible[j / 2 % 2]) score[j] = -INFINITY;
      }
    }
    float tile_peak[2] = {score[0], score[2]}, shift[2];
#pragma unroll
    for (int j = 0; j < 32; ++j) tile_peak[j / 2 % 2] = fmaxf(tile_peak[j / 2 % 2], score[j]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      tile_peak[i] = quad_max(tile_peak[i]);
      decay[i] = 1;
      if ((tile_peak[i] - peak[i]) * scale_log2 > kPatience) {
        decay[i] = ptx::exp2((peak[i] - tile_peak[i]) * scale_log2);
        peak[i] = tile_peak[i];
        sum[i] *= decay[i];
      }
      shift[i] = shift_of(peak[i], scale_log2);
    }
    const uint32_t full = begin_message(tile);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
#pragma unroll
      for (int j = quarter * 8; j < quarter * 8 + 8; ++j) {
        score[j] = ptx::exp2(score[j] * scale_log2 - shift[j / 2 % 2]);
        sum[j / 2 % 2] += score[j];
      }
#pragma unroll
      for (int j = quarter * 4; j < quarter * 4 + 4; ++j) probability[j] = pack<Element>(score[j * 2], score[j * 2 + 1]);
      const uint32_t* four = probability + quarter * 4;
      ptx::store_async(ptx::in_block(&shared.probabilities[quarter][thread], other),
                       make_uint4(four[0], four[1], four[2], four[3]), full);
    }
    send_factors(decay, full);
  }

  // Wait until the helper has read the message before this one, and return the barrier that counts its bytes.
  __device__ __forceinline__ uint32_t begin_message(int tile) {
    ptx::mbarrier_wait_cluster(&shared.probabilities_free, (factors_before(tile) & 1) ^ 1);
    return ptx::in_block(&shared.probabilities_full, other);
  }

  __device__ __forceinline__ void send_factors(const float (&factor)[2], uint32_t full) {
    ptx::store_async(ptx::in_block(&shared.factors[thread], other), make_float2(factor[0], factor[1]), full);
  }

  // The peaks and sums of the other owner, for the same rows and the other tiles.
  __device__ __forceinline__ float4 exchange_statistics() {
    const float4 ours = make_float4(peak[0], peak[1], sum[0], sum[1]);
    ptx::store_async(ptx::in_block(&shared.statistics[thread], other), reinterpret_cast<const uint4&>(ours),
                     ptx::in_block(&shared.statistics_full, other));
    if (thread == 0) ptx::mbarrier_arrive_expect_tx(&shared.statistics_full, sizeof(shared.statistics));
    ptx::mbarrier_wait_cluster(&shared.statistics_full, pieces_done & 1);
    return shared.statistics[thread];
  }

  // --- the helper ---------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void help(float (&out)[128], float (&factor)[2]) {
    float decay[2];
    uint32_t probability[16];
    float score[32];
    // Where arithmetic decides, scores are sent a tile ahead, so that the owner never waits for them. Where bytes do, that
    // would keep a stage for longer.
    constexpr int kAhead = kSharesRows ? 0 : 1;
    if (kAhead > 0) send_scores(0);
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile + kAhead < tiles) send_scores(tile + kAhead);
      if (tile == tiles - 1) release_queries();
      receive<true>(decay, probability, tile);
      if (tile > 0) rescale(out, decay);
      start_values(out, probability, tile);
      finish_values<0>(out, tile);
    }
    receive<false>(factor, probability, tiles);
  }

  __device__ __forceinline__ void send_scores(int tile) {
    float score[32];
    await(tile);
    start_scores(score, tile);
    ptx::wgmma_wait<0>();
    ptx::keep(score);
    const int message = tiles_done + tile, slot = message & 1;
    ptx::mbarrier_wait_cluster(&shared.scores_free[slot], (message >> 1 & 1) ^ 1);
    const uint32_t full = ptx::in_block(&shared.scores_full[slot], other);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float4 four = make_float4(score[j * 4], score[j * 4 + 1], score[j * 4 + 2], score[j * 4 + 3]);
      ptx::store_async(ptx::in_block(&shared.scores[slot][j][thread], other), reinterpret_cast<const uint4&>(four), full);
    }
  }

  template <bool kProbabilities>
  __device__ __forceinline__ void receive(float (&factor)[2], uint32_t (&probability)[16], int tile) {
    if (thread == 0) {
      ptx::mbarrier_arrive_expect_tx(&shared.probabilities_full, kProbabilities ? kProbabilityBytes : kFactorBytes);
    }
    ptx::mbarrier_wait_cluster(&shared.probabilities_full, factors_before(tile) & 1);
    if constexpr (kProbabilities) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint4 four = shared.probabilities[j][thread];
        probability[j * 4] = four.x, probability[j * 4 + 1] = four.y;
        probability[j * 4 + 2] = four.z, probability[j * 4 + 3] = four.w;
      }
    }
    const float2 two = shared.factors[thread];
    factor[0] = two.x, factor[1] = two.y;
    __syncwarp();
    if (lane == 0) ptx::arrive_in_block(&shared.probabilities_free, other);
  }

  // --- results ------------------------------------------------------------------------------------------------------

  // Each warpgroup hands half of the columns to the other, 32 numbers of a thread at a time, where the queries were.
  __device__ __forceinline__ void merge(float (&out)[128], const float (&factor)[2]) {
#pragma unroll
    for (int j = 0; j < 128; ++j) out[j] = tiles > 0 ? out[j] * factor[j / 2 % 2] : 0;
    float4(*buffer)[kMathThreads] = reinterpret_cast<float4(*)[kMathThreads]>(&shared.query);
#pragma unroll
    for (int round = 0; round < 2; ++round) {
      ptx::named_barrier_sync<kMathThreads>(kMathBarrier);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int near = round * 32 + j * 4, far = near + 64;
        buffer[j][threadIdx.x] = group == 0 ? make_float4(out[far], out[far + 1], out[far + 2], out[far + 3])
                                            : make_float4(out[near], out[near + 1], out[near + 2], out[near + 3]);
      }
      ptx::named_barrier_sync<kMathThreads>(kMathBarrier);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int near = round * 32 + j * 4, far = near + 64;
        const float4 four = buffer[j][threadIdx.x ^ 128];
        if (group == 0) {
          out[near] += four.x, out[near + 1] += four.y, out[near + 2] += four.z, out[near + 3] += four.w;
        } else {
          out[far] += four.x, out[far + 1] += four.y, out[far + 2] += four.z, out[far + 3] += four.w;
        }
      }
    }
    ptx::named_barrier_sync<128>(kMathBarrier + 1 + group);
    if (thread == 0) shared.queries.release(pieces_done);
    const float one[2] = {1, 1};
    if (group == 0) {
      store<0, 64>(out, one);
    } else {
      store<64, 128>(out, one);
    }
  }

  // Write accumulators kBegin to kEnd (not included) of the own rows, times their factors.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void store(const float (&out)[128], const float (&factor)[2]) {
    const Rows<Element> results(params, piece(), blockIdx.y, blockIdx.x / 2);
    const int column = rank * kBlockLatent + own_column;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + own_row + 8 * i;
      if (row >= results.last_row) continue;
      if (!results.whole) {
        float* to = results.partial_out(row) + column;
#pragma unroll
        for (int j = kBegin; j < kEnd; j += 4) {
          *reinterpret_cast<float2*>(to + j * 2) = make_float2(out[j + i * 2] * factor[i], out[j + i * 2 + 1] * factor[i]);
        }
        continue;
      }
      Element* to = results.out(row) + column;
#pragma unroll
      for (int j = kBegin; j < kEnd; j += 4) {
        const uint32_t two = pack<Element>(out[j + i * 2] * factor[i], out[j + i * 2 + 1] * factor[i]);
        if (params.output_is_pairs) {
          *reinterpret_cast<uint32_t*>(to + j * 2) = two;
        } else {
          to[j * 2] = reinterpret_cast<const Element(&)[2]>(two)[0];
          to[j * 2 + 1] = reinterpret_cast<const Element(&)[2]>(two)[1];
        }
      }
    }
  }

  const DecodeParams& params;
  Shared& shared;
  const int rank, other, group, thread, lane;
  // A thread holds rows own_row and own_row + 8 of every accumulator, and in each group of 8 columns two neighbours.
  const int own_row, own_column;
  const float scale_log2;  // scores in base 2: exp2 is one instruction

  int group_row, first_row;                 // the warpgroup's first row in the block of rows, and in the request
  int tokens;                               // of the request, from the piece's first on
  int tiles, tiles_before = 0;              // the warpgroup's of this piece; the block's of all pieces before
  int last_visible[2], all_visible;
  float peak[2], sum[2];
  int tiles_done = 0, pieces_done = 0;  // by this warpgroup, before this piece
};

template <typename Element, int kRows>
__global__ void __cluster_dims__(2) __launch_bounds__(kThreads, 1)
    decode_wide_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ TensorMaps maps) {
  auto& shared = shared_memory<WideShared<Element, kRows>>();
  if (threadIdx.x == 0) {
    maps.prefetch();
    shared.tiles.initialise(kRows / 64);
    shared.queries.initialise(2);
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(&shared.scores_full[i], 1);
      ptx::mbarrier_init(&shared.scores_free[i], 4);  // a lane of each of the warpgroup's warps
    }
    ptx::mbarrier_init(&shared.probabilities_full, 1);
    ptx::mbarrier_init(&shared.probabilities_free, 4);
    ptx::mbarrier_init(&shared.statistics_full, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  const int rank = ptx::cluster_rank(), worker = blockIdx.x / 2;
  run_roles(
      [&] {
        bring_tiles(params, worker, shared.tiles, (kBlockLatent + kBlockRope) * sizeof(Element),
                    [&](int stage, int tile_row, int page, int page_row) {
                      auto& tile = shared.tile[stage];
                      uint64_t* full = &shared.tiles.full[stage];
#pragma unroll
                      for (int block = 0; block < kLatentBlocks; ++block) {
                        ptx::tma_load(&tile.latent[block][tile_row], &maps.latent, rank * kBlockLatent + block * 64,
                                      page_row, page, full);
                      }
                      ptx::tma_load(&tile.rope[tile_row], &maps.rope, kLatentDim + rank * kBlockRope, page_row, page, full);
                    });
      },
      [&] {
        bring_queries(
            params, worker, shared.queries, shared.work, params.block_rows * (kBlockLatent + kBlockRope) * sizeof(Element),
            [&](int, int token) {
#pragma unroll
              for (int block = 0; block < kLatentBlocks; ++block) {
                ptx::tma_load(&shared.query.latent[block], &maps.latent_query, rank * kBlockLatent + block * 64, 0, token,
                              &shared.queries.full[0]);
              }
              ptx::tma_load(&shared.query.rope, &maps.rope_query, rank * kBlockRope, 0, token, &shared.queries.full[0]);
            },
            [&](int, const Piece& piece) {
              const int first_row = blockIdx.y * params.block_rows;
              const int last_row = min(first_row + params.block_rows, piece.rows(params));
              copy_rows<kBlockLatent / 8>(
                  params, query_latent<Element>(params, piece) + rank * kBlockLatent, params.q_nope_token_stride,
                  params.q_nope_head_stride, first_row, last_row, [&](int row, int chunk) {
                    return ptx::shared_address(shared.query.latent[chunk / 8]) + swizzled_128(row, chunk % 8);
                  });
              copy_rows<kBlockRope / 8>(
                  params, query_rope<Element>(params, piece) + rank * kBlockRope, params.q_pe_token_stride,
                  params.q_pe_head_stride, first_row, last_row,
                  [&](int row, int chunk) { return ptx::shared_address(shared.query.rope) + swizzled_64(row, chunk); });
            });
      },
      [&] { WideConsumer<Element, kRows>(params, shared).run(); });
  ptx::cluster_sync();  // until then the other block may still store into this one
}

}  // namespace mla_backend::sm90
