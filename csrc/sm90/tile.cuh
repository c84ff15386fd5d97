// What the decode kernels share: tiles and queries in shared memory, the warps that bring them, and where results go.
#pragma once

#include "ptx.cuh"
#include "work.cuh"

namespace mla_backend::sm90 {

// A thread block's threads: two warpgroups do the mathematics; of a third, one or two warps bring tiles, or one brings and two
// convert them, and another one brings queries.
constexpr int kMathThreads = 256;
constexpr int kThreads = kMathThreads + 128;
constexpr int kGroupBarrier = 1;  // and the next one: named barriers of one mathematics warpgroup each
constexpr int kQueriesBarrier = 3;  // of the warps that bring something
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Columns of a tile, 64 of two bytes or 128 of one: 64 rows of 128 bytes.
template <typename Cached>
using ColumnBlock = Cached[kTileTokens][128 / sizeof(Cached)];

// Byte offset of 16-byte chunk `chunk` of row `row` in rows of 128 bytes with the copy engine's 128-byte swizzle.
__device__ __forceinline__ uint32_t swizzled_128(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// The same in rows of 64 bytes with the 64-byte swizzle.
__device__ __forceinline__ uint32_t swizzled_64(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4); }

// And in rows of 32 bytes with the 32-byte swizzle.
__device__ __forceinline__ uint32_t swizzled_32(int row, int chunk) { return row * 32 + ((chunk ^ (row >> 2 & 1)) << 4); }

// How the copy engine reads the cache, [pages, page_size, 576], and the queries, [tokens, heads, 512] and [tokens, heads, 64].
// `latent` reads 128 bytes of columns at a time; those of `rope` are for kernels that read fewer rotary columns at a time.
struct TensorMaps {
  CUtensorMap latent, rope, latent_query, rope_query;

  __device__ void prefetch() const {
    ptx::prefetch_tensor_map(&latent);
    ptx::prefetch_tensor_map(&rope);
    ptx::prefetch_tensor_map(&latent_query);
    ptx::prefetch_tensor_map(&rope_query);
  }
};

// The stages that tiles or queries lie in, and the barriers that say when one is full, of which each of its parts has its own, and
// when it is empty again. Parts that the copy engine brings are equally large. `number` counts what has been brought so far.
template <int kStages_, int kParts_ = 1>
struct Pipeline {
  static constexpr int kStages = kStages_, kParts = kParts_;
  uint64_t full[kStages][kParts], empty[kStages];

  __device__ static int stage(int number) { return number % kStages; }

  // Of what is brought: its stage, and which of two rounds of all stages it is in. Loops that would wait for the division keep one.
  struct Place {
    int stage;
    uint32_t round;

    __device__ Place(int number) : stage(Pipeline::stage(number)), round(number / kStages & 1) {}

    __device__ void advance(int by) {
      stage += by;
      if (stage >= kStages) stage -= kStages, round ^= 1;
    }
  };

  // How many threads say that a part is full and that a stage is empty.
  __device__ void initialise(int producers, int consumers) {
    for (int i = 0; i < kStages; ++i) {
      for (uint64_t& part : full[i]) ptx::mbarrier_init(&part, producers);
      ptx::mbarrier_init(&empty[i], consumers);
    }
  }

  __device__ void wait_full(Place place, int part = 0) { ptx::mbarrier_wait(&full[place.stage][part], place.round); }
  __device__ void wait_empty(Place place) { ptx::mbarrier_wait(&empty[place.stage], place.round ^ 1); }
  __device__ void release(Place place) { ptx::mbarrier_arrive(&empty[place.stage]); }
};

// Clocks that pass after a block's first tile has been asked for and before the next is. Asked for together by all blocks, they
// share the bandwidth, and everybody waits for the first until nearly all have come. (To count from the first order on would cost
// a look at the clock before every tile, which 128 rows feel.)
constexpr int kHeadStart = 1000;

// What a kernel does not have: a member, or something to call.
struct Nothing {
  template <typename... Arguments>
  __device__ void operator()(Arguments...) const {}
};

// A tile warp: bring the tiles of this worker's share, stage after stage, as consumers empty them. `load(stage, token, page,
// page_row, tma_load)` starts the copies of a box of tokens with that function, each by a lane of its own, `token_bytes` for each
// token. This is number `warp` of kWarps tile warps, which bring boxes in turn, as to start a copy takes a warp about 80 clocks.
//
// Every instruction up to the first copy is waited for, as nobody has needed it before, so there are as few as can be: the code
// has one copy for all lanes, with either policy, and nothing is unrolled.
//
// For those who need to know, `announce(stage, tokens)` says how many tokens of the request there are from a tile on. Returns how
// many tiles there were.
template <int kWarps, typename Pipeline, typename Load, typename Announce = Nothing>
__device__ __forceinline__ int bring_tiles(const DecodeParams& params, Pieces& pieces, Pipeline& pipeline, int token_bytes,
                                           Load load, int warp = 0, Announce announce = {}) {
  const bool evict_first = pieces.read_little_once();
  const int lane = threadIdx.x % 32;
  const int shift = params.box_shift, box_tokens = 1 << shift, tile_boxes = kTileTokens >> shift;
  const auto page_index = [&](int box) { return quotient(box, params.boxes_per_page, params.boxes_reciprocal); };
  int number = 0;
  Piece piece;
#pragma unroll 1
  while (pieces.take(piece)) {
    // The lanes hold the page numbers of 32 boxes, and from the first of their tiles on those of the next 32. They are asked for
    // before all else, and do not wait for the length where a tile lies in one page.
    const int32_t* pages = params.block_table + piece.request * params.block_table_stride;
    const int first_box = piece.first_tile * tile_boxes;
    int boxes = piece.last_tile * tile_boxes;
    const int seq_len = piece.seq_len;
    if (params.page_size < kTileTokens) boxes = min(boxes, seq_len + box_tokens - 1 >> shift);
    const auto page_of = [&](int box) { return box < boxes ? pages[page_index(box)] : 0; };
    int page = page_of(first_box + lane), next_page = 0;
    pieces.find_queries(piece);
    if (static_cast<int>(blockIdx.y) * params.block_rows >= piece.rows(params)) continue;
#pragma unroll 1
    for (int tile = piece.first_tile; tile < piece.last_tile; ++tile, ++number) {
      const int index = (tile - piece.first_tile) * tile_boxes;
      if (index % 32 == 0 && index > 0) page = next_page;
      const int first = tile * kTileTokens, stage = pipeline.stage(number);
      const int tokens = min(kTileTokens, seq_len - first + box_tokens - 1 >> shift << shift);
      pipeline.wait_empty(number);
      if (number == 0) ptx::named_barrier_sync<32 * (1 + kWarps)>(kQueriesBarrier);  // the copy engine's first queries come first
      announce(stage, seq_len - first);
      // Both warps arrive, even where one has no box to bring, or it could fall behind by a round of stages.
      if (lane < Pipeline::kParts) {
        uint64_t* const full = &pipeline.full[stage][lane];
        warp == 0 ? ptx::mbarrier_arrive_expect_tx(full, tokens * (token_bytes / Pipeline::kParts)) : ptx::mbarrier_arrive(full);
      }
#pragma unroll 1
      for (int box = warp, row = box << shift; row < tokens; box += kWarps, row = box << shift) {
        const int box_page = __shfl_sync(~0u, page, (index + box) % 32);
        const int all_boxes = first_box + index + box, page_box = all_boxes - page_index(all_boxes) * params.boxes_per_page;
        // To ask for the usual policy in words, as the other is asked for, takes 5 % longer.
        if (evict_first) {
          load(stage, row, box_page, page_box << shift, [](auto... copy) { ptx::tma_load_evict_first(copy...); });
        } else {
          load(stage, row, box_page, page_box << shift, [](auto... copy) { ptx::tma_load(copy...); });
        }
      }
      __syncwarp();
      if (index % 32 == 0) next_page = page_of(first_box + index + 32 + lane);
      if (number == 0) ptx::wait_clocks(kHeadStart);
    }
  }
  return number;
}

template <typename Element>
__device__ __forceinline__ const Element* query_latent(const DecodeParams& params, const Piece& piece) {
  return static_cast<const Element*>(params.q_nope) + piece.first_token * params.q_nope_token_stride;
}

template <typename Element>
__device__ __forceinline__ const Element* query_rope(const DecodeParams& params, const Piece& piece) {
  return static_cast<const Element*>(params.q_pe) + piece.first_token * params.q_pe_token_stride;
}

// Bring kChunks x 8 columns of a block of query rows, [tokens, heads, columns] from `from` on, to where place(row, chunk)
// says, without the copy engine, which cannot read rows that begin anywhere. Called by a warp.
template <int kChunks, typename Element, typename Place>
__device__ void copy_rows(const DecodeParams& params, const Element* from, int64_t token_stride, int64_t head_stride,
                          int first_row, int last_row, Place place) {
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < (last_row - first_row) * kChunks; i += 32) {
    const int block_row = i / kChunks, chunk = i % kChunks, row = first_row + block_row;
    const int query = query_of_row(params, row), head = row - query * params.heads;
    Element elements[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) elements[e] = from[query * token_stride + head * head_stride + chunk * 8 + e];
    ptx::store_shared(place(block_row, chunk), reinterpret_cast<const uint4&>(elements));
  }
}

// The counter of a request's parts. First ones are two slots or more apart.
__device__ __forceinline__ uint32_t* arrivals(const DecodeParams& params, int first_slot) {
  return params.arrivals + first_slot / 2 * params.row_blocks + blockIdx.y;
}

// What a counter begins with if the worker with a request's first part had started when nobody had stored a part yet.
constexpr uint32_t kAllStarted = 1 << 20;

// The query warp: bring a block of query rows for every piece of this worker's share, and with it say in its stage of `work` what
// the piece is; after the last a piece without tiles. `load(stage, token)` starts the copies of the block that begins with this
// query token, `bytes` in all, each by a lane of its own; `copy(stage, piece)` does the same without the copy engine, and all lanes
// write. So all arrive at the barrier. Rows past the request's are whatever lies there, and nobody looks at what becomes of them.
// `split` gets the pieces that are parts of requests which all of their workers combine, or the request that a helper combines.
//
// The first queries that the copy engine brings are asked for before the first tile. Behind it they would come as late as it,
// nearly 2 us later. For those that this warp copies no tile waits.
//
// All lanes call `announce` when `work` says what the piece is, before its queries have come.
template <int kTileWarps, int kStages, typename Load, typename Copy, typename Announce = Nothing>
__device__ void bring_queries(const DecodeParams& params, Pieces& pieces, Pipeline<kStages>& pipeline, Piece (&work)[kStages],
                              SplitPieces& split, int bytes, Load load, Copy copy, Announce announce = {}) {
  const int lane = threadIdx.x % 32;
  int number = 0, split_pieces = 0;
  Piece piece;
  if (pieces.any()) pieces.ask_for_queries();
  // Before this worker's own parts can be counted.
  if (lane == 0 && pieces.begins_combined()) ptx::set_zero_to(arrivals(params, pieces.begun_slot()), kAllStarted);
  while (pieces.take(piece)) {
    pieces.find_queries(piece);
    const int first_row = blockIdx.y * params.block_rows;
    if (first_row >= piece.rows(params)) {
      if (piece.combined() && piece.part == 0 && lane == 0) *arrivals(params, piece.slot) = 0;  // as nobody will
      continue;
    }
    const int stage = pipeline.stage(number);
    pipeline.wait_empty(number);
    if (params.queries_are_vectors) {
      load(stage, piece.first_token + query_of_row(params, first_row));
      __syncwarp();
    }
    if (number == 0) ptx::named_barrier_arrive<32 * (1 + kTileWarps)>(kQueriesBarrier);
    if (lane == 0) work[stage] = piece;
    announce();
    if (piece.combined()) {
      if (lane == 0) split.piece[split_pieces] = piece;
      ++split_pieces;
    }
    if (!params.queries_are_vectors) {
      copy(stage, piece);
      ptx::fence_proxy_async();
    }
    if (params.queries_are_vectors && lane == 0) {
      ptx::mbarrier_arrive_expect_tx(pipeline.full[stage], bytes);
    } else {
      ptx::mbarrier_arrive(pipeline.full[stage]);
    }
    ++number;
  }
  if (pieces.take_helped(piece)) {
    pieces.find_queries(piece);
    if (lane == 0) split.piece[0] = piece;
    split_pieces = static_cast<int>(blockIdx.y) * params.block_rows < piece.rows(params);
  }
  const int stage = pipeline.stage(number);
  pipeline.wait_empty(number);
  if (lane == 0) work[stage] = {};
  if (lane == 0) split.count = split_pieces;
  announce();
  ptx::mbarrier_arrive(pipeline.full[stage]);
}

// What lies in a tile past the request's last token would meet probability 0, and 0 x NaN is NaN: make it zeros.
// Token t lies in row t ^ `swapped`. Called by a warpgroup, which meets at its named barrier.
template <int kBlocks, typename Cached>
__device__ void clear_rows_from(int token, ColumnBlock<Cached> (&tile)[kBlocks], int barrier, int swapped = 0) {
  constexpr int kChunks = 8 * kBlocks;  // of 16 bytes, in a row
#pragma unroll 1
  for (int i = token * kChunks + threadIdx.x % 128; i < kTileTokens * kChunks; i += 128) {
    const int row = i / kChunks ^ swapped, chunk = i % kChunks;  // whole rows, so the swizzle does not matter
    reinterpret_cast<uint4*>(&tile[chunk / 8][row])[chunk % 8] = make_uint4(0, 0, 0, 0);
  }
  ptx::fence_proxy_async();
  ptx::named_barrier_sync<128>(barrier);
}

// What a row's probabilities are relative to, its reference, follows the scores only when they have outgrown it by this
// power of two: factors up to 256 cost no precision, and the accumulators are hardly ever scaled. (FlashAttention-4 does
// the same.)
//
// float16 has no numbers below 2^-24 for what counts little beside the largest, and some to spare above: with it a reference lies
// this power of two below what it follows.
constexpr float kPatience = 8;
template <typename Factor>
constexpr float kReferenceBelow = std::is_same_v<Factor, __half> ? 7 : 0;
template <typename Factor>
constexpr float kMostProbability = 1 << static_cast<int>(kPatience + kReferenceBelow<Factor>);

// A scale of scores, of which some are -inf because nobody sees them, and 0 x -inf is NaN. It would be 0 where it is too small for
// float32, or where that of a quantised cache is 0.
__device__ __forceinline__ float never_zero(float scale) { return fmaxf(scale, __uint_as_float(1)); }

// A row of the output and its lse, which there must be.
template <typename Element>
__device__ __forceinline__ Element* output_row(const DecodeParams& params, int token, int head) {
  return static_cast<Element*>(params.out) + token * params.out_token_stride + head * params.out_head_stride;
}

__device__ __forceinline__ float& output_lse(const DecodeParams& params, int token, int head) {
  return params.lse[token * params.lse_token_stride + head * params.lse_head_stride];
}

// Where the results of a piece go: to the output if it is all of a request, or if its worker completes the request with what
// others have found; else to its worker's partial results. Rows count from the request's first one.
template <typename Element>
struct Rows {
  const DecodeParams& params;
  bool complete;  // they are, or will be when the other parts are added, the output
  int parts;      // of the request, 0 if this is all of it
  int first_slot;  // of the request's first part
  int first_token;
  int first_row, last_row;  // of this block's rows, and past them
  int first_partial_row;

  __device__ Rows(const DecodeParams& params, const Piece& piece, int row_block)
      : params(params),
        complete(piece.completes()),
        parts(piece.parts),
        first_slot(piece.first_slot()),
        first_token(piece.first_token),
        first_row(row_block * params.block_rows),
        last_row(min(first_row + params.block_rows, piece.rows(params))),
        first_partial_row(partial_row(params, piece.slot, row_block)) {}

  __device__ __forceinline__ Element* out(int row) const {
    const int query = query_of_row(params, row);
    return output_row<Element>(params, first_token + query, row - query * params.heads);
  }

  // Of a partial result (csrc/decode.h says how its columns lie).
  __device__ __forceinline__ float* partial_out(int row, int part = 0) const {
    return params.partial_out + static_cast<int64_t>(partial_row_of(row, part)) * kLatentDim;
  }

  // Of a part that is stored: tell those who wait for it. Called by each of a worker's mathematics warpgroups.
  __device__ __forceinline__ void announce(int barrier) const {
    ptx::named_barrier_sync<128>(barrier);
    if (threadIdx.x % 128 == 0) ptx::count_release(arrivals(params, first_slot));
  }

  // Of what will be the output: whether there are other parts to be added, which then are there. A worker has kGroups warpgroups.
  template <int kGroups>
  __device__ __forceinline__ bool wait_for_others(int barrier) const {
    if (parts == 0) return false;
    if (threadIdx.x % 128 == 0) {
      uint32_t* const counter = arrivals(params, first_slot);
      while (ptx::load_acquire(counter) < kGroups * (parts - 1)) continue;
      ptx::count(counter, kGroups * parts - 1);
    }
    ptx::named_barrier_sync<128>(barrier);
    return true;
  }

  // Index of a row in the partial results of this part or another one, counted from this one.
  __device__ __forceinline__ int partial_row_of(int row, int part = 0) const {
    return first_partial_row + part * params.row_blocks * params.block_rows + row - first_row;
  }

  __device__ __forceinline__ void store_lse(int row, float log2_sum) const {
    if (params.lse == nullptr) return;
    const int query = query_of_row(params, row);
    output_lse(params, first_token + query, row - query * params.heads) = log2_sum * kLn2;
  }

  __device__ __forceinline__ void store_partial_lse(int row, float log2_sum) const {
    params.partial_lse[partial_row_of(row)] = log2_sum;
  }
};

// What two results of the same row count for when they are added, from the logarithms of their denominators. `log2_sum` becomes
// that of both.
struct Weights {
  float own, other;

  __device__ __forceinline__ Weights(float& log2_sum, float other_log2_sum) {
    const float peak = fmaxf(log2_sum, other_log2_sum), shift = peak == -INFINITY ? 0 : peak;  // -inf - -inf would be NaN
    own = ptx::exp2(log2_sum - shift), other = ptx::exp2(other_log2_sum - shift);
    const float sum = own + other, factor = sum > 0 ? ptx::reciprocal(sum) : 0;
    own *= factor, other *= factor;
    log2_sum = sum > 0 ? peak + ptx::log2(sum) : -INFINITY;
  }
};

// Over the four lanes that hold a row of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <typename Element>
__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, float factor) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    const __nv_bfloat162 scaled = __hmul2(reinterpret_cast<const __nv_bfloat162&>(pair), __float2bfloat162_rn(factor));
    return reinterpret_cast<const uint32_t&>(scaled);
  } else {
    // The factor may be too small for float16 where the product is not.
    const float2 wide = __half22float2(reinterpret_cast<const __half2&>(pair));
    return pack<Element>(wide.x * factor, wide.y * factor);
  }
}

template <typename Shared>
__device__ Shared& shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  static_assert(alignof(Shared) <= 1024);
  return *reinterpret_cast<Shared*>(memory);
}

// Bring the kernel's code to L2, 32 lines for each of the first blocks. Other kernels have driven it out since the last time, and
// every block would wait for memory where it comes to code that nobody has run yet. Called by a warp of each block.
__device__ __forceinline__ void prefetch_code() {
  constexpr int kLine = 128;
  const int warp = blockIdx.y * gridDim.x + blockIdx.x;
  const uint64_t line = ptx::code_begin() + (warp * 32 + threadIdx.x % 32) * kLine;
  if (line < ptx::code_end()) ptx::prefetch_l2(line);
}

// Divide the block's threads into their roles: mathematics, two warps that bring tiles, one that brings queries, and the rest.
// Together they can have at most the registers that the block was started with, or the increase waits for ever.
//
// As little as can be comes before: instructions that nobody has run yet come from memory, and those up to the first copy are what
// everybody waits for. One thread runs `initialise`, for the mbarriers, while whoever brings something looks up the schedule; then
// all `meet`, a barrier of all threads that use those.
//
// With kThreeTileWarps there is a third one for tiles, which does what is left for the rest when it has nothing else to do.
template <int kMathRegisters, int kOtherRegisters, bool kThreeTileWarps = false, typename Tiles, typename Queries,
          typename Initialise, typename Consume, typename Meet, typename Rest>
__device__ void run_roles(const DecodeParams& params, int share, Tiles tiles, Queries queries, Initialise initialise,
                          Consume consume, Meet meet, Rest rest) {
  static_assert(2 * kMathRegisters + kOtherRegisters <= 3 * (65536 / kThreads / 8 * 8), "more than a block can start with");
  const int warp = ptx::uniform(threadIdx.x / 32) - kMathThreads / 32;
  Pieces pieces(params);
  if (warp >= 0 && warp < 3) pieces.find(share);
  if (threadIdx.x == 0) initialise(), ptx::fence_mbarrier_init();
  if (warp == 3) prefetch_code();
  meet();
  if (warp < 0) {
    ptx::setmaxnreg_inc<kMathRegisters>();
    consume();
  } else {
    ptx::setmaxnreg_dec<kOtherRegisters>();
    // In the machine code tiles come first, next to what all have run: they are what everybody waits for.
    if constexpr (kThreeTileWarps) {
      if (warp == 2) return queries(pieces);
      tiles(pieces, min(warp, 2));
      if (warp == 3) rest();
    } else if (warp >= 2) {
      warp == 2 ? queries(pieces) : rest();
    } else {
      tiles(pieces, warp);
    }
  }
}

}  // namespace mla_backend::sm90
