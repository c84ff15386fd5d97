// MLA decode on Hopper for more than 32 query rows, or 64 where there are many short requests: a cluster of two thread blocks
// attends 64 or 128 query rows of a request to a share of its cached tokens.
//
// The 576 numbers of a token are divided between the blocks: each has 256 latent ones, which are keys and values, and 32
// rotary ones. So a cached number enters one multiprocessor only, a tile of 64 tokens takes 36.9 kB of shared memory,
// several of them are on their way at a time, and the accumulator of the output, 64 rows x 256 columns, fits the
// registers of a warpgroup. The price is that scores are sums over both blocks. Warpgroup g of one block and warpgroup g of
// the other work on the same rows and tile; each finishes the scores of 32 of the 64 tokens with what the other sends,
// computes their probabilities, and sends these back, all through the cluster's shared memory. In both, a thread holds the
// same rows and columns, so that what is sent needs no layout: thread t sends to thread t. In each block the tokens that it
// finishes are the first 32 rows of a tile.
//
// The two warpgroups of a block have different rows where there are 128, and take turns with the tiles where there are 64;
// then they add up their results at the end. While one computes a softmax, the other keeps the tensor cores busy.
//
// With 128 rows it also serves caches of float8 numbers, which become bfloat16 or float16 before (csrc/sm90/converted.cuh).
#pragma once

#include "converted.cuh"
#include "wide_thread.cuh"

namespace mla_backend::sm90 {

constexpr int kBlockRope = kRopeDim / 2;
constexpr int kLatentBlocks = kBlockLatent / 64;
constexpr int kHalfTokens = kTileTokens / 2;
constexpr int kTurnBarrier = kQueriesBarrier + 1;  // and the next one: it is warpgroup 0's or 1's turn

// A block of query rows in shared memory. Over a quantised cache there is no room for all: of kHeldBlocks blocks of latent columns,
// the first, and of the rotary ones, what registers can hold comes to them from memory, and the last 16 columns to `last_held`.
template <typename Element, int kRows, bool kQuantized>
struct WideQuery {
  static constexpr int kHeldBlocks = 0;
  Element latent[kLatentBlocks][kRows][64];
  Element rope[kRows][kBlockRope];
  __device__ Element* rope_rows() { return rope[0]; }
};

template <typename Element, int kRows>
struct WideQuery<Element, kRows, true> {
  static constexpr int kHeldBlocks = kLatentBlocks / 2;
  Element latent[kLatentBlocks - kHeldBlocks][kRows][64];
  Element last_held[kRows][16];
  __device__ Element* rope_rows() { return nullptr; }  // nobody asks for them
};

// This block's half of a tile's columns, as the mathematics takes them or as they are cached.
template <typename Number>
struct HalfTile {
  static constexpr int kBlockColumns = 128 / sizeof(Number), kBlocks = kBlockLatent / kBlockColumns;
  ColumnBlock<Number> latent[kBlocks];
  Number rope[kTileTokens][kBlockRope];
};

// Tiles of a quantised cache, which are converted. A base of what is shared, as where there are none that takes no room.
template <typename Cached>
struct QuantizedTiles {
  HalfTile<Cached> quantized[2];
};

template <typename Element_, typename Cached_, int kRows>
struct alignas(1024) WideShared : std::conditional_t<sizeof(Cached_) == 1, QuantizedTiles<Cached_>, Nothing> {
  using Element = Element_;
  using Cached = Cached_;
  static constexpr bool kQuantized = sizeof(Cached) == 1;
  static constexpr int kStages = kRows == 128 ? 3 : 4;
  WideQuery<Element, kRows, kQuantized> query;
  HalfTile<Element> tile[kStages];
  // What the same warpgroups of the other block send: scores, probabilities and what they are relative to, and two numbers
  // of which both need to know the other's. Scores and probabilities take turns, so that whoever sends either has read those
  // of the other kind but the last: two of each are enough.
  uint4 scores[2][2][3][128];
  struct {
    uint4 probability[2][128];
    float2 reference[128];
  } probabilities[2][2];
  float2 exchanged[2][128];
  uint64_t scores_full[2][2], probabilities_full[2][2], exchanged_full[2], met;
  Piece work[1];
  SplitPieces split;
  // Converted tiles have two parts: the first blocks of the columns whose queries registers hold and of the others, and the rest.
  // Products begin when the first is there.
  Pipeline<kStages, kQuantized ? 2 : 1> tiles;
  Pipeline<1> queries;
  struct Converting {
    Pipeline<2> tiles;   // that have not been converted
    int tokens[2];       // of the tile in a stage, to be converted: 64 or more, fewer or, when there are no more tiles, none
    uint64_t announced;  // that `work` says what the next piece is
  };
  std::conditional_t<kQuantized, Converting, Nothing> converting;

  // What the copy engine brings tiles to.
  __device__ auto& brought_tile(int stage) {
    if constexpr (kQuantized) {
      return this->quantized[stage];
    } else {
      return tile[stage];
    }
  }
  __device__ auto& brought_tiles() {
    if constexpr (kQuantized) {
      return converting.tiles;
    } else {
      return tiles;
    }
  }
};

// Of scores the upper 24 bits are sent, because the way from block to block is narrow: four in three words, of which each holds
// one, and in its lowest byte a byte of the fourth.
__device__ __forceinline__ void pack_scores(uint32_t* packed, const float* score) {
  const uint32_t last = __float_as_uint(score[3]);
  packed[0] = __byte_perm(__float_as_uint(score[0]), last, 0x3215);
  packed[1] = __byte_perm(__float_as_uint(score[1]), last, 0x3216);
  packed[2] = __byte_perm(__float_as_uint(score[2]), last, 0x3217);
}

// Takes the middle of what the missing byte leaves open, and not the byte that lies there: that is of another token and another
// row, and no result may depend on it. So a partial score is right to 2^-16 of itself, and a probability to as many times
// that as the partial score is large: 2^-11, float16's own rounding, for partial scores of 32. NaN stays NaN.
__device__ __forceinline__ void add_packed_scores(float* score, const uint32_t* packed) {
  const uint32_t last = __byte_perm(__byte_perm(packed[0], packed[1], 0x0040), packed[2], 0x4100);
#pragma unroll
  for (int j = 0; j < 4; ++j) score[j] += __uint_as_float(__byte_perm(j < 3 ? packed[j] : last, 0x80, 0x3214));
}

template <typename Element, typename Cached, int kRows>
class WideConsumer : WideThread<Element, kRows> {
  using Shared = WideShared<Element, Cached, kRows>;
  using Thread = WideThread<Element, kRows>;
  using Thread::kGroups, Thread::kSharesRows;
  using Thread::params, Thread::rank, Thread::group, Thread::thread;
  using Thread::first_row, Thread::group_row, Thread::over_there, Thread::own_column, Thread::own_lane, Thread::own_row;
  static constexpr int kTilesApart = kSharesRows ? 2 : 1;  // of a warpgroup
  using Place = typename decltype(Shared::tiles)::Place;
  using Part = typename Thread::Part;

 public:
  __device__ __forceinline__ WideConsumer(const DecodeParams& params, Shared& shared)
      : Thread(params, &shared),
        shared(shared),
        scale_log2(Shared::kQuantized ? never_zero(params.softmax_scale * kLog2E * *params.kv_scale)
                                      : params.softmax_scale * kLog2E) {}

  __device__ __forceinline__ void run() {
    if (!kSharesRows && group == 1) give_turn();
    for (;; ++pieces_done) {
      if constexpr (Shared::kQuantized) {
        ptx::mbarrier_wait(&shared.converting.announced, pieces_done & 1);
        if (piece().tiles() > 0) hold_queries_from_memory();
      }
      shared.queries.wait_full(pieces_done);
      const int piece_tiles = piece().tiles();
      if (piece_tiles == 0) break;
      tiles = kSharesRows ? (piece_tiles + 1 - group) / 2 : piece_tiles;
      tokens = piece().seq_len - piece().first_tile * kTileTokens;
      attend();
      tiles_before += piece_tiles;
      if (kSharesRows) tiles_done += tiles;
    }
    if (!kSharesRows && group == 0) take_turn();  // the last one given
    // What they add up goes where this warpgroup's scores were: all that have been sent are there.
    static_assert(sizeof(WarpSums<Part>) <= sizeof(shared.scores[0]));
    combine_split<Element, Part, kGroups>(params, shared.split, rank * 2 + group, kGroupBarrier + group,
                                          reinterpret_cast<WarpSums<Part>&>(shared.scores[group]));
  }

 private:
  // Read anew where it is needed once: registers are scarce.
  __device__ __forceinline__ const Piece& piece() const { return shared.work[0]; }

  // This warpgroup's tiles are counted from 0; token() is the first of a tile. Tokens are counted from the first one of the piece.
  __device__ __forceinline__ int in_piece(int tile) const { return kSharesRows ? 2 * tile + group : tile; }
  __device__ __forceinline__ int token(int tile) const { return in_piece(tile) * kTileTokens; }

  // How many tokens a row of this warpgroup sees.
  __device__ __forceinline__ int visible_to(int row) const {
    const int query = min(query_of_row(params, first_row() + row), piece().queries - 1);
    return params.causal ? tokens - (piece().queries - 1 - query) : tokens;
  }

  __device__ __forceinline__ void attend() {
    all_visible = visible_to(0);
    keys_place = values_place = tiles_before + in_piece(0);
    if constexpr (!Shared::kQuantized) hold_queries();
#pragma unroll
    for (int i = 0; i < 2; ++i) reference[i] = -INFINITY, sum[i] = 0;

    float out[128] = {};
    uint32_t probability[16];  // of the own tokens first
    if constexpr (kSharesRows) {
      // Bytes decide here: a stage is emptied before the next one is waited for.
      for (int tile = 0; tile < tiles; ++tile) {
        float score[32];
        compute_scores(score, tile);
        softmax(score, probability, tile);
        receive(probability, out, tile);
        start_values(out, probability, tile);
        finish_values(out);
      }
    } else {
      // What is sent is on its way while this warpgroup multiplies: scores during the product with the values of the tile
      // before, probabilities during the product with the keys of the next one.
      {
        float score[32];
        compute_scores(score, 0);
        softmax(score, probability, 0);
      }
      for (int tile = 0; tile + 1 < tiles; ++tile) {
        float score[32];  // declared here, or the compiler makes the products wait for each other
        uint32_t next_probability[8];
        compute_scores(score, tile + 1);
        receive(probability, out, tile);
        start_values(out, probability, tile);
        softmax(score, next_probability, tile + 1);
        finish_values(out);
        ptx::keep(probability);
#pragma unroll
        for (int j = 0; j < 8; ++j) probability[j] = next_probability[j];
      }
    }
    // Nothing is read of the piece after its queries are given back.
    const Rows<Element> results(params, piece(), blockIdx.y);
    if constexpr (!kSharesRows) {
      shared.queries.release(pieces_done);
      receive(probability, out, tiles - 1);
      start_values(out, probability, tiles - 1);
      finish_values(out);
    }
    const float value_scale = Shared::kQuantized ? ptx::load_anew(params.kv_scale) : 1;
    if (tiles > 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) sum[i] = quad_sum(sum[i]);
      const float2 theirs = exchange(make_float2(sum[0], sum[1]), 1);
      sum[0] += theirs.x, sum[1] += theirs.y;
    }

    if constexpr (kSharesRows) {
      merge(out);
    } else {
      float factor[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) factor[i] = sum[i] > 0 ? value_scale * ptx::reciprocal(sum[i]) : 0;
#pragma unroll
      for (int j = 0; j < 128; ++j) out[j] *= factor[j / 2 % 2];
    }
    float log2_sum[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) log2_sum[i] = sum[i] > 0 ? reference[i] + ptx::log2(sum[i]) : -INFINITY;
    if constexpr (!kSharesRows) {
      this->template finish<0, 128>(out, log2_sum, results);
    } else if (group == 0) {
      this->template finish<0, 64>(out, log2_sum, results);
    } else {
      this->template finish<64, 128>(out, log2_sum, results);
    }
  }

  // Scores are products of 16 latent or rotary numbers at a time. With both factors in shared memory a product of 64 columns leaves
  // no bandwidth there for anybody else, so registers hold the queries of both rotary steps, and of as many latent ones as there
  // are registers for with 128 rows. No two of the others follow each other, but near the end over a quantised cache, and a rotary
  // one is last.
  static constexpr int kHeldBlocks = decltype(Shared::query)::kHeldBlocks;
  static constexpr int kLatentSteps = kBlockLatent / 16, kHeldSteps = kHeldBlocks > 0 ? kHeldBlocks * 4 : 9;
  static constexpr int kInRegisters = Shared::kQuantized ? kHeldSteps - 1 : kHeldSteps;  // of them
  __device__ static constexpr int not_held_before(int step) {
    return (step * (kLatentSteps - kHeldSteps) + kLatentSteps / 4) / kLatentSteps;
  }
  __device__ static constexpr bool is_held(int step) { return not_held_before(step) == not_held_before(step + 1); }
  __device__ static constexpr int held_before(int step) { return step - not_held_before(step); }

  // Which 16 columns a step multiplies: in their order or, where whole blocks are held, theirs and the others' by turns.
  __device__ static constexpr int sixteen_of(int step) {
    if (kHeldBlocks == 0) return step;
    return is_held(step) ? held_before(step) : kHeldSteps + not_held_before(step);
  }

  __device__ __forceinline__ void hold_queries() {
    // The first factor of a product as wgmma wants it of a thread: two rows, and in each two neighbours of every eight columns.
    const int row = group_row() + own_row(), column = own_column();
    const auto hold = [&](uint32_t* held, const void* rows, int first_chunk, auto swizzled) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t chunk = swizzled(row + i % 2 * 8, first_chunk + i / 2);
        held[i] = *reinterpret_cast<const uint32_t*>(static_cast<const char*>(rows) + chunk + column * sizeof(Element));
      }
    };
#pragma unroll
    for (int step = 0; step < kBlockRope / 16; ++step) hold(&held_rope[step * 4], shared.query.rope, step * 2, swizzled_64);
#pragma unroll
    for (int step = 0; step < kLatentSteps; ++step) {
      if (is_held(step)) hold(&held_latent[held_before(step) * 4], shared.query.latent[step / 4], step % 4 * 2, swizzled_128);
    }
  }

  // The same where they come from memory. All are asked for before any is needed; rows past the request's are zeros.
  __device__ __forceinline__ void hold_queries_from_memory() {
    const Piece& piece = this->piece();
    const int last_row = min(static_cast<int>(blockIdx.y + 1) * params.block_rows, piece.rows(params));
    uint32_t last[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row() + own_row() + 8 * i, query = query_of_row(params, row), head = row - query * params.heads;
      const bool exists = row < last_row;
      const auto hold = [&](uint32_t* held, const Element* from) {
#pragma unroll
        for (int half = 0; half < 2; ++half) held[i + half * 2] = exists ? load_pair(from + half * 8) : 0;
      };
      const Element* latent = query_latent<Element>(params, piece) + query * params.q_nope_token_stride +
                              head * params.q_nope_head_stride + rank * kBlockLatent + own_column();
      const Element* rope = query_rope<Element>(params, piece) + query * params.q_pe_token_stride +
                            head * params.q_pe_head_stride + rank * kBlockRope + own_column();
#pragma unroll
      for (int step = 0; step < kBlockRope / 16; ++step) hold(&held_rope[step * 4], rope + step * 16);
#pragma unroll
      for (int step = 0; step < kInRegisters; ++step) hold(&held_latent[step * 4], latent + step * 16);
      hold(last, latent + kInRegisters * 16);
    }
    char* const columns = reinterpret_cast<char*>(shared.query.last_held) + own_column() * sizeof(Element);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      *reinterpret_cast<uint32_t*>(columns + swizzled_32(group_row() + own_row() + i % 2 * 8, i / 2)) = last[i];
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync<128>(kGroupBarrier + group);
  }

  __device__ __forceinline__ uint64_t last_held_queries() const {
    if constexpr (Shared::kQuantized) {
      return ptx::Matrix(ptx::shared_address(shared.query.last_held) + group_row() * 32, 0, 256, ptx::Swizzle::k32Bytes).at(0);
    } else {
      return 0;
    }
  }

  // Two neighbours in a row, which may start anywhere.
  __device__ __forceinline__ uint32_t load_pair(const Element* from) const {
    if (params.queries_are_vectors) return *reinterpret_cast<const uint32_t*>(from);
    const uint16_t* elements = reinterpret_cast<const uint16_t*>(from);
    return elements[0] | static_cast<uint32_t>(elements[1]) << 16;
  }

  // The warpgroups compute scores in turn, in both blocks in the same order, so that none waits for scores that the other
  // block has put off.
  __device__ __forceinline__ void take_turn() { ptx::named_barrier_sync<kMathThreads>(kTurnBarrier + group); }
  __device__ __forceinline__ void give_turn() { ptx::named_barrier_arrive<kMathThreads>(kTurnBarrier + 1 - group); }

  // Scores of this warpgroup's rows with a tile, over the numbers that this block has of both, the own tokens' first. The
  // other tokens' are sent: the other block completes them.
  __device__ __forceinline__ void compute_scores(float (&score)[32], int tile) {
    auto& keys = shared.tile[ptx::uniform(keys_place.stage)];
    const ptx::Matrix q(ptx::shared_address(shared.query.latent) + group_row() * 128, 0, 1024);
    const ptx::Matrix k(ptx::shared_address(keys.latent), 0, 1024);
    const ptx::Matrix k_rope(ptx::shared_address(keys.rope), 0, 512, ptx::Swizzle::k64Bytes);
    const Place place = keys_place;
    shared.tiles.wait_full(place);
    keys_place.advance(kTilesApart);
    if (!kSharesRows) take_turn();
    ptx::wgmma_fence();
    const auto rotary = [&](int step) { ptx::wgmma<Element>(score, held_rope + step * 4, k_rope.at(step * 32), 1); };
#pragma unroll
    for (int step = 0; step < kLatentSteps; ++step) {
      if (Shared::kQuantized && step == kLatentSteps / 2) {
        shared.tiles.wait_full(place, 1);
        ptx::wgmma_fence();
      }
      const int sixteen = sixteen_of(step), block = sixteen / 4;
      const uint32_t inner = sixteen % 4 * 32;
      const uint64_t key = k.at(block * sizeof(keys.latent[0]) + inner);
      if (is_held(step) && held_before(step) < kInRegisters) {
        ptx::wgmma<Element>(score, held_latent + held_before(step) * 4, key, step > 0);
      } else if (is_held(step)) {
        ptx::wgmma<Element>(score, last_held_queries(), key, step > 0);
      } else {
        ptx::wgmma<Element>(score, q.at((block - kHeldBlocks) * sizeof(shared.query.latent[0]) + inner), key, step > 0);
      }
      if (!Shared::kQuantized && step % 8 == 7) rotary(step / 8);
    }
    if constexpr (Shared::kQuantized) rotary(0), rotary(1);
    ptx::wgmma_commit();
    if (!kSharesRows) give_turn();
    ptx::wgmma_wait<0>();
    ptx::keep(score);
    ptx::keep(held_rope);
    ptx::keep(held_latent);
    const int slot = message(tile) & 1;
    const uint32_t full = over_there(&shared.scores_full[group][slot]);
    uint32_t packed[12];
#pragma unroll
    for (int j = 0; j < 4; ++j) pack_scores(packed + j * 3, score + 16 + j * 4);
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const uint32_t* four = packed + j * 4;
      ptx::store_async(over_there(&shared.scores[group][slot][j][thread]), make_uint4(four[0], four[1], four[2], four[3]), full);
    }
  }

  // Add probabilities times values of a tile to the output.
  __device__ __forceinline__ void start_values(float (&out)[128], const uint32_t (&probability)[16], int tile) {
    auto& latent = shared.tile[ptx::uniform(values_place.stage)].latent;
    if (const int valid = tokens - token(tile); !Shared::kQuantized && valid < kTileTokens) {
      clear_rows_from(valid, latent, kGroupBarrier + group, rank * kHalfTokens);
    }
    const ptx::Matrix values(ptx::shared_address(latent), sizeof(ColumnBlock<Element>), 1024);
    ptx::keep(out);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTileTokens / 16; ++step) {
      ptx::wgmma_transposed_b<Element>(out, probability + step * 4, values.at(step * 16 * 128), 1);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void finish_values(float (&out)[128]) {
    ptx::wgmma_wait<0>();
    ptx::keep(out);
    if (thread == 0) shared.tiles.release(values_place);
    values_place.advance(kTilesApart);
  }

  __device__ __forceinline__ int message(int tile) const { return (kSharesRows ? tiles_done : tiles_before) + tile; }

  // From this block's part of the own tokens' scores to their probabilities, which are sent too.
  __device__ __forceinline__ void softmax(float (&score)[32], uint32_t* probability, int tile) {
    const int slot = message(tile) & 1;
    if (thread == 0) ptx::mbarrier_arrive_expect_tx(&shared.scores_full[group][slot], sizeof(shared.scores[0][0]));
    ptx::mbarrier_wait(&shared.scores_full[group][slot], message(tile) >> 1 & 1);
    uint32_t packed[12];
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const uint4 four = shared.scores[group][slot][j][thread];
      packed[j * 4] = four.x, packed[j * 4 + 1] = four.y, packed[j * 4 + 2] = four.z, packed[j * 4 + 3] = four.w;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) add_packed_scores(score + j * 4, packed + j * 3);
    const int first = token(tile);
    if (first + kTileTokens > all_visible) {
      const int row = own_row(), column = own_column();
      const int visible[2] = {visible_to(row), visible_to(row + 8)};
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int position = first + rank * kHalfTokens + j / 4 * 8 + column + j % 2;
        if (position >= visible[j / 2 % 2]) score[j] = -INFINITY;
      }
    }

    float peak[2] = {score[0], score[2]}, shift[2];
#pragma unroll
    for (int j = 0; j < 16; ++j) peak[j / 2 % 2] = fmaxf(peak[j / 2 % 2], score[j]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      peak[i] = peak[i] * scale_log2 - kReferenceBelow<Element>, own_reference[i] = reference[i], own_sum[i] = 0;
    }
    // A vote is much faster than the shuffles that find the maximum of a row.
    const bool outgrown = peak[0] - reference[0] > kPatience || peak[1] - reference[1] > kPatience;
    if (tile == 0 || __any_sync(~0u, outgrown)) {
#pragma unroll
      for (int i = 0; i < 2; ++i) peak[i] = quad_max(peak[i]);
      if (tile == 0) {
        const float2 theirs = exchange(make_float2(peak[0], peak[1]), 0);
        reference[0] = fmaxf(peak[0], theirs.x), reference[1] = fmaxf(peak[1], theirs.y);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // From here on the own tokens and the others may follow their scores by different powers of two for a while.
        own_reference[i] = reference[i];
        if (peak[i] - reference[i] > kPatience) {
          own_reference[i] = reference[i] == -INFINITY ? peak[i] : reference[i] + ceilf(peak[i] - reference[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) shift[i] = own_reference[i] == -INFINITY ? 0 : own_reference[i];
    const uint32_t full = over_there(&shared.probabilities_full[group][slot]);
    ptx::store_async(over_there(&shared.probabilities[group][slot].reference[thread]),
                     make_float2(own_reference[0], own_reference[1]), full);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = half * 8; j < half * 8 + 8; ++j) {
        score[j] = ptx::exp2(score[j] * scale_log2 - shift[j / 2 % 2]);
        own_sum[j / 2 % 2] += score[j];
      }
      uint32_t* four = probability + half * 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) four[j] = pack<Element>(score[half * 8 + j * 2], score[half * 8 + j * 2 + 1]);
      ptx::store_async(over_there(&shared.probabilities[group][slot].probability[half][thread]),
                       make_uint4(four[0], four[1], four[2], four[3]), full);
    }
  }

  // The other tokens' probabilities. `out` is what the tiles before add up to.
  __device__ __forceinline__ void receive(uint32_t (&probability)[16], float (&out)[128], int tile) {
    const int slot = message(tile) & 1;
    auto& theirs = shared.probabilities[group][slot];
    uint64_t* full = &shared.probabilities_full[group][slot];
    if (thread == 0) ptx::mbarrier_arrive_expect_tx(full, sizeof(theirs));
    ptx::mbarrier_wait(full, message(tile) >> 1 & 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 four = theirs.probability[half][thread];
      probability[8 + half * 4] = four.x, probability[9 + half * 4] = four.y;
      probability[10 + half * 4] = four.z, probability[11 + half * 4] = four.w;
    }
    const float2 their_reference = theirs.reference[thread];
    // References only grow. Rows past the request's may have NaN, which is greater than nothing.
    const bool changed = own_reference[0] > reference[0] || own_reference[1] > reference[1] ||
                         their_reference.x > reference[0] || their_reference.y > reference[1];
    if (__any_sync(~0u, changed)) {
      // Make everything relative to the greater reference, by powers of two.
      float decay[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float their = i == 0 ? their_reference.x : their_reference.y;
        const float both = fmaxf(own_reference[i], their), shift = both == -INFINITY ? 0 : both;
        const float own_factor = ptx::exp2(own_reference[i] - shift), their_factor = ptx::exp2(their - shift);
        decay[i] = ptx::exp2(reference[i] - shift);
        reference[i] = both;
        sum[i] *= decay[i], own_sum[i] *= own_factor;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          probability[j * 2 + i] = scale_pair<Element>(probability[j * 2 + i], own_factor);
          probability[8 + j * 2 + i] = scale_pair<Element>(probability[8 + j * 2 + i], their_factor);
        }
      }
#pragma unroll
      for (int j = 0; j < 128; ++j) out[j] *= decay[j / 2 % 2];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[i] += own_sum[i];
  }

  // Two numbers against the other block's, the first (0) or second (1) time for a piece.
  __device__ __forceinline__ float2 exchange(float2 ours, int time) {
    ptx::store_async(over_there(&shared.exchanged[group][thread]), ours, over_there(&shared.exchanged_full[group]));
    if (thread == 0) ptx::mbarrier_arrive_expect_tx(&shared.exchanged_full[group], sizeof(shared.exchanged[0]));
    ptx::mbarrier_wait(&shared.exchanged_full[group], time);
    return shared.exchanged[group][thread];
  }

  // All mathematics threads. By an mbarrier, because compute-sanitizer's racecheck does not follow a named barrier of two
  // warpgroups in a cluster.
  __device__ __forceinline__ void meet() {
    ptx::mbarrier_arrive(&shared.met);
    ptx::mbarrier_wait(&shared.met, meetings++ & 1);
  }

  // Add up the results of both warpgroups, for the same rows and different tiles: each hands half of the columns to the
  // other, 32 numbers of a thread at a time, where the queries were.
  __device__ __forceinline__ void merge(float (&out)[128]) {
    float factor[2];
    float4(*buffer)[kMathThreads] = reinterpret_cast<float4(*)[kMathThreads]>(&shared.query);
    meet();
    buffer[8][threadIdx.x] = make_float4(reference[0], reference[1], sum[0], sum[1]);
    meet();
    const float4 other = buffer[8][threadIdx.x ^ 128];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float their_reference = i == 0 ? other.x : other.y, their_sum = i == 0 ? other.z : other.w;
      const float both = fmaxf(reference[i], their_reference), shift = both == -INFINITY ? 0 : both;
      const float weight = ptx::exp2(reference[i] - shift);
      sum[i] = sum[i] * weight + their_sum * ptx::exp2(their_reference - shift);
      reference[i] = both;
      factor[i] = sum[i] > 0 ? weight * ptx::reciprocal(sum[i]) : 0;
    }
#pragma unroll
    for (int j = 0; j < 128; ++j) out[j] *= factor[j / 2 % 2];
#pragma unroll
    for (int round = 0; round < 2; ++round) {
      if (round > 0) meet();
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int near = round * 32 + j * 4, far = near + 64;
        buffer[j][threadIdx.x] = group == 0 ? make_float4(out[far], out[far + 1], out[far + 2], out[far + 3])
                                            : make_float4(out[near], out[near + 1], out[near + 2], out[near + 3]);
      }
      meet();
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
    ptx::fence_proxy_async();  // the copy engine writes where these threads have written
    shared.queries.release(pieces_done);
  }

  Shared& shared;
  const float scale_log2;  // scores in base 2: exp2 is one instruction

  uint32_t held_rope[kBlockRope / 4], held_latent[kInRegisters * 4];
  int tokens;            // of the request, from the piece's first on
  int all_visible;       // of them, to all of this warpgroup's rows
  int tiles;             // the warpgroup's of this piece
  Place keys_place = 0, values_place = 0;  // of the tile whose keys come next, and values
  int tiles_before = 0;  // the block's of all pieces before
  int tiles_done = 0, pieces_done = 0, meetings = 0;  // by this warpgroup so far
  // In base 2: what the own rows' probabilities are relative to, and their sums; the same of a tile's own tokens.
  float reference[2], sum[2], own_reference[2], own_sum[2];
};

template <typename Element, typename Cached, int kRows>
__global__ void __cluster_dims__(2) __launch_bounds__(kThreads, 1)
    decode_wide_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ TensorMaps maps) {
  using Shared = WideShared<Element, Cached, kRows>;
  constexpr bool kQuantized = Shared::kQuantized;
  auto& shared = shared_memory<Shared>();
  const int rank = ptx::cluster_rank();
  constexpr bool kHandsOver = kQuantized && kLongConversion<Element>;
  run_roles<kHandsOver ? 232 : 240, kHandsOver ? 40 : 24, kQuantized>(  // 168 for each of 384 threads
      params, blockIdx.x / 2,
      [&](Pieces& pieces, int warp) {
        if constexpr (kQuantized) {
          if (warp > 0) return convert_tiles(shared, warp - 1, rank);
        }
        using Tile = HalfTile<Cached>;
        const int end = bring_tiles<kQuantized ? 1 : 2>(
            params, pieces, shared.brought_tiles(), (kBlockLatent + kBlockRope) * sizeof(Cached),
            [&](int stage, int token, int page, int page_row, auto tma_load) {
              auto& tile = shared.brought_tile(stage);
              const int tile_row = token ^ rank * kHalfTokens;  // the own tokens first
              uint64_t* full = shared.brought_tiles().full[stage];
              const int block = threadIdx.x % 32;
              if (block <= Tile::kBlocks) {
                const bool rope = block == Tile::kBlocks;
                tma_load(rope ? &tile.rope[tile_row][0] : &tile.latent[block][tile_row][0], rope ? &maps.rope : &maps.latent,
                         rope ? kLatentDim + rank * kBlockRope : rank * kBlockLatent + block * Tile::kBlockColumns, page_row, page,
                         full);
              }
            },
            warp,
            [&](int stage, int tokens) {
              if constexpr (kQuantized) announce_tile(shared, stage, tokens);
            });
        if constexpr (kQuantized) end_tiles(shared, end);
      },
      [&](Pieces& pieces) {
        constexpr int kHeldBlocks = decltype(Shared::query)::kHeldBlocks, kBlocks = kLatentBlocks - kHeldBlocks;
        constexpr int kFirst = kHeldBlocks * 64, kRope = kQuantized ? 0 : kBlockRope;
        const auto announce = [&] {
          if constexpr (kQuantized) ptx::mbarrier_arrive(&shared.converting.announced);
        };
        bring_queries<kQuantized ? 1 : 2>(
            params, pieces, shared.queries, shared.work, shared.split,
            params.block_rows * (kBlockLatent - kFirst + kRope) * sizeof(Element),
            [&](int, int token) {
              const int block = ptx::thread_index() % 32;  // read anew, as this warp has few registers
              if (block < kBlocks + (kRope > 0)) {
                const bool rope = block == kBlocks;
                ptx::tma_load(rope ? shared.query.rope_rows() : &shared.query.latent[block][0][0],
                              rope ? &maps.rope_query : &maps.latent_query,
                              rank * (rope ? kBlockRope : kBlockLatent) + (rope ? 0 : kFirst + block * 64), 0, token,
                              shared.queries.full[0]);
              }
            },
            [&](int, const Piece& piece) {
              const int first_row = blockIdx.y * params.block_rows;
              const int last_row = min(first_row + params.block_rows, piece.rows(params));
              copy_rows<kBlocks * 8>(
                  params, query_latent<Element>(params, piece) + rank * kBlockLatent + kFirst, params.q_nope_token_stride,
                  params.q_nope_head_stride, first_row, last_row, [&](int row, int chunk) {
                    return ptx::shared_address(shared.query.latent[chunk / 8]) + swizzled_128(row, chunk % 8);
                  });
              if constexpr (kRope > 0) {
                copy_rows<kBlockRope / 8>(
                    params, query_rope<Element>(params, piece) + rank * kBlockRope, params.q_pe_token_stride,
                    params.q_pe_head_stride, first_row, last_row,
                    [&](int row, int chunk) { return ptx::shared_address(shared.query.rope) + swizzled_64(row, chunk); });
              }
            },
            announce);
      },
      [&] {
        maps.prefetch();
        // By two warps: of those that bring them a lane arrives, of those that convert them all do, as all have written.
        shared.tiles.initialise(kQuantized ? 32 * kConvertingWarps : 2, kRows / 64);
        if constexpr (kQuantized) {
          shared.converting.tiles.initialise(1, kConvertingWarps);
          ptx::mbarrier_init(&shared.converting.announced, 32);
        }
        shared.queries.initialise(32, kMathThreads);
        for (int i = 0; i < 2; ++i) {
          for (int slot = 0; slot < 2; ++slot) {
            ptx::mbarrier_init(&shared.scores_full[i][slot], 1);
            ptx::mbarrier_init(&shared.probabilities_full[i][slot], 1);
          }
          ptx::mbarrier_init(&shared.exchanged_full[i], 1);
        }
        ptx::mbarrier_init(&shared.met, kMathThreads);
      },
      [&] { WideConsumer<Element, Cached, kRows>(params, shared).run(); }, [] { ptx::cluster_sync(); },
      [&] { clear_rows<Element>(params); });
  ptx::cluster_sync();  // until then the other block may still store into this one
}

}  // namespace mla_backend::sm90
