// What the decode kernels share: tiles and queries in shared memory, and the producer that brings tiles.
#pragma once

#include "ptx.cuh"
#include "work.cuh"

namespace mla_backend::sm90 {

constexpr int kMathThreads = 256;
constexpr int kThreads = kMathThreads + 128;
constexpr int kMathBarrier = 1;  // named barrier of the two mathematics warpgroups
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// 64 columns of a tile: 64 rows of 128 bytes.
template <typename Element>
using ColumnBlock = Element[kTileTokens][64];

// Byte offset of 16-byte chunk `chunk` of row `row` in rows of 128 bytes with the copy engine's 128-byte swizzle.
__device__ __forceinline__ uint32_t swizzled_128(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// The same in rows of 64 bytes with the 64-byte swizzle.
__device__ __forceinline__ uint32_t swizzled_64(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4); }

// The stages that tiles lie in, and the barriers that say when one is full of a tile and when it is empty again.
template <int kStages_>
struct Pipeline {
  static constexpr int kStages = kStages_;
  uint64_t full[kStages], empty[kStages];

  __device__ static int stage(int tile) { return tile % kStages; }

  __device__ void initialise(int consumers) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], consumers);
    }
  }

  // `tile` counts the tiles of this block so far.
  __device__ void wait_full(int tile) { ptx::mbarrier_wait(&full[stage(tile)], tile / kStages & 1); }
  __device__ void wait_empty(int tile) { ptx::mbarrier_wait(&empty[stage(tile)], (tile / kStages & 1) ^ 1); }
  __device__ void release(int tile) { ptx::mbarrier_arrive(&empty[stage(tile)]); }
};

// The producer warp: bring the tiles of this worker's share, stage after stage, as consumers empty them. `load(stage,
// tile_row, page, page_row)` starts the copies of a box of tokens, `token_bytes` for each of them.
template <typename Pipeline, typename Load>
__device__ void produce(const DecodeParams& params, int worker, Pipeline& pipeline, int token_bytes, Load load) {
  const int lane = threadIdx.x % 32;
  const int box_tokens = min(params.page_size, kTileTokens), tile_boxes = kTileTokens / box_tokens;
  int number = 0;
  Piece piece;
  for (Pieces pieces(params, worker); pieces.take(piece);) {
    // The lanes hold the page numbers of the next 64 boxes. They do not wait for the length where a box is a tile.
    const int32_t* pages = params.block_table + piece.request * params.block_table_stride;
    const int first_box = piece.first_tile * tile_boxes;
    int boxes = piece.last_tile * tile_boxes;
    const int seq_len = params.seq_lens[piece.request];
    if (tile_boxes > 1) boxes = min(boxes, (seq_len + box_tokens - 1) / box_tokens);
    const auto page_of = [&](int box) { return box < boxes ? pages[box * box_tokens / params.page_size] : 0; };
    int page = page_of(first_box + lane), next_page = page_of(first_box + 32 + lane);

    const int queries = params.query_start_loc[piece.request + 1] - params.query_start_loc[piece.request];
    if (static_cast<int>(blockIdx.y) * params.block_rows >= queries * params.heads) continue;
    for (int tile = piece.first_tile; tile < piece.last_tile; ++tile, ++number) {
      const int index = (tile - piece.first_tile) * tile_boxes;
      if (index % 32 == 0 && index > 0) {
        page = next_page;
        next_page = page_of(first_box + index + 32 + lane);
      }
      const int first = tile * kTileTokens, stage = pipeline.stage(number);
      const int tokens = min(kTileTokens, (seq_len - first + box_tokens - 1) / box_tokens * box_tokens);
      pipeline.wait_empty(number);
      if (lane == 0) ptx::mbarrier_arrive_expect_tx(&pipeline.full[stage], tokens * token_bytes);
      for (int row = 0, box = index; row < tokens; row += box_tokens, ++box) {
        const int box_page = __shfl_sync(~0u, page, box % 32);
        if (lane == 0) load(stage, row, box_page, (first + row) % params.page_size);
      }
      __syncwarp();
    }
  }
}

// Bring kChunks x 8 columns of a block of query rows, [tokens, heads, columns] from `from` on, to where place(row, chunk)
// says; rows past the request's become zeros. All are under way at once where they can be.
template <int kRows, int kChunks, typename Element, typename Place>
__device__ __forceinline__ void copy_rows(const DecodeParams& params, const Element* from, int64_t token_stride,
                                          int64_t head_stride, int first_row, int rows, Place place) {
  constexpr int kStep = kMathThreads / kChunks;  // rows at a time
  const int chunk = threadIdx.x % kChunks;
  from += chunk * 8;
  // Division by the number of heads is slow: from one step to the next only additions are left.
  int row = threadIdx.x / kChunks, token = (first_row + row) / params.heads, head = (first_row + row) % params.heads;
  const int token_step = kStep / params.heads, head_step = kStep % params.heads;
  const auto advance = [&] {
    row += kStep, token += token_step, head += head_step;
    if (head >= params.heads) head -= params.heads, ++token;
  };
  if (params.queries_are_vectors) {
#pragma unroll
    for (int step = 0; step < (kRows + kStep - 1) / kStep; ++step, advance()) {
      const bool exists = first_row + row < rows;
      if (kRows % kStep == 0 || row < kRows) {
        ptx::copy_async(place(row, chunk), exists ? from + token * token_stride + head * head_stride : from, exists ? 16 : 0);
      }
    }
  } else {
#pragma unroll 1
    for (; row < kRows; advance()) {
      Element elements[8] = {};
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (first_row + row < rows) elements[e] = from[token * token_stride + head * head_stride + e];
      }
      ptx::store_shared(place(row, chunk), reinterpret_cast<const uint4&>(elements));
    }
  }
}

// Bring a block of query rows into shared memory: kLatent columns from first_latent on and kRope from first_rope on.
template <typename Element, int kRows, int kLatent, int kRope, typename PlaceLatent, typename PlaceRope>
__device__ __forceinline__ void load_queries(const DecodeParams& params, int first_token, int first_row, int rows,
                                             int first_latent, int first_rope, PlaceLatent latent, PlaceRope rope) {
  copy_rows<kRows, kLatent / 8>(
      params, static_cast<const Element*>(params.q_nope) + first_token * params.q_nope_token_stride + first_latent,
      params.q_nope_token_stride, params.q_nope_head_stride, first_row, rows, latent);
  copy_rows<kRows, kRope / 8>(
      params, static_cast<const Element*>(params.q_pe) + first_token * params.q_pe_token_stride + first_rope,
      params.q_pe_token_stride, params.q_pe_head_stride, first_row, rows, rope);
  ptx::wait_for_copies();
  ptx::fence_proxy_async();
  ptx::named_barrier_sync<kMathThreads>(kMathBarrier);
}

// What lies in a tile past the request's last token would meet probability 0, and 0 x NaN is NaN: make it zeros.
// Called by a warpgroup, which meets at its named barrier.
template <int kBlocks, typename Element>
__device__ void clear_rows_from(int row, ColumnBlock<Element> (&tile)[kBlocks], int barrier) {
  const int chunks = (kTileTokens - row) * 8;  // whole rows of 128 bytes, so the swizzle does not matter
  for (int i = threadIdx.x % 128; i < chunks * kBlocks; i += 128) {
    reinterpret_cast<uint4*>(&tile[i / chunks][row])[i % chunks] = make_uint4(0, 0, 0, 0);
  }
  ptx::fence_proxy_async();
  ptx::named_barrier_sync<128>(barrier);
}

// The peak that a row's probabilities are relative to follows the scores only when they have outgrown it by this power of
// two: factors up to 256 cost no precision, and the accumulators are hardly ever scaled. (FlashAttention-4 does the same.)
constexpr float kPatience = 8;

// What is taken from scores before exp2: a row that has seen no token yet has the peak -inf, and -inf - -inf would be NaN.
__device__ __forceinline__ float shift_of(float peak, float scale_log2) {
  return peak == -INFINITY ? 0 : peak * scale_log2;
}

// Where the results of a piece go: to the output if it is a whole request, else to its worker's partial results. Rows count
// from the request's first one.
template <typename Element>
struct Rows {
  const DecodeParams& params;
  bool whole;
  int first_token, block_row;
  int64_t first_partial_row;

  __device__ Rows(const DecodeParams& params, const Piece& piece, int first_token, int row_block, int worker)
      : params(params),
        whole(piece.whole()),
        first_token(first_token),
        block_row(row_block * params.block_rows),
        first_partial_row(partial_row(params, row_block, worker, piece.begins_share)) {}

  // `query` is row / heads, which is slow to compute.
  __device__ __forceinline__ Element* out(int query, int row) const {
    return static_cast<Element*>(params.out) + (first_token + query) * params.out_token_stride +
           (row - query * params.heads) * params.out_head_stride;
  }

  __device__ __forceinline__ float* partial_out(int row) const {
    return params.partial_out + (first_partial_row + row - block_row) * kLatentDim;
  }

  __device__ __forceinline__ void store_lse(int query, int row, float log2_sum) const {
    if (!whole) {
      params.partial_lse[first_partial_row + row - block_row] = log2_sum;
    } else if (params.lse != nullptr) {
      params.lse[(first_token + query) * params.lse_token_stride + (row - query * params.heads) * params.lse_head_stride] =
          log2_sum * kLn2;
    }
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

template <typename Shared>
__device__ Shared& shared_memory() {
  extern __shared__ char memory[];
  return *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(memory) + 1023) & ~1023ull);
}

// Divide the block's threads into a producer warp and two mathematics warpgroups. Together they can have at most the
// registers that the block was started with (168 for each of 384 threads), or the increase waits for ever.
template <typename Produce, typename Consume>
__device__ void run_roles(Produce produce_tiles, Consume consume) {
  if (threadIdx.x >= kMathThreads) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x < kMathThreads + 32) produce_tiles();
  } else {
    ptx::setmaxnreg_inc<232>();
    consume();
  }
}

}  // namespace mla_backend::sm90
