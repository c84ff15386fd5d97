// What the decode kernels share: tiles and queries in shared memory, and the producer that brings tiles.
#pragma once

#include "ptx.cuh"
#include "work.cuh"

namespace mla_backend::sm90 {

constexpr int kColumnBlocks = kHeadDim / 64;  // a tile lies in shared memory as 9 blocks of 64 rows x 128 bytes
constexpr int kStages = 2;
constexpr int kMathThreads = 256;
constexpr int kThreads = kMathThreads + 128;
constexpr int kMathBarrier = 1;  // named barrier of the two mathematics warpgroups

template <typename Element>
using ColumnBlock = Element[64][64];

// Byte offset of 16-byte chunk `chunk` of row `row` in a column block: the 128-byte swizzle of the copy engine.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

struct Stage {
  int index = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++index == kStages) index = 0, phase ^= 1;
  }
};

// The producer warp: bring the tiles of this block's share, stage after stage, as consumers empty them.
template <typename Element, typename Shared>
__device__ void produce(const DecodeParams& params, const CUtensorMap* map, Shared& shared) {
  Stage stage;
  Piece piece;
  const int box_rows = min(params.page_size, kTileTokens);
  for (Pieces pieces(params, blockIdx.x); pieces.take(piece);) {
    const int queries = params.query_start_loc[piece.request + 1] - params.query_start_loc[piece.request];
    if (static_cast<int>(blockIdx.y) * kBlockRows >= queries * params.heads) continue;
    const int32_t* pages = params.block_table + piece.request * params.block_table_stride;
    const int seq_len = params.seq_lens[piece.request];
    for (int tile = piece.first_tile; tile < piece.last_tile; ++tile, stage.advance()) {
      ptx::mbarrier_wait(&shared.empty[stage.index], stage.phase ^ 1);
      if (threadIdx.x % 32 == 0) {
        const int first = tile * kTileTokens;
        const int boxes = (min(kTileTokens, seq_len - first) + box_rows - 1) / box_rows;
        ptx::mbarrier_arrive_expect_tx(&shared.full[stage.index], boxes * box_rows * kHeadDim * sizeof(Element));
        for (int box = 0; box < boxes; ++box) {
          const int token = first + box * box_rows;
          const int page = pages[token / params.page_size], row = token % params.page_size;
#pragma unroll
          for (int block = 0; block < kColumnBlocks; ++block) {
            ptx::tma_load(&shared.tile[stage.index][block][box * box_rows], map, block * 64, row, page,
                          &shared.full[stage.index]);
          }
        }
      }
      __syncwarp();
    }
  }
}

// Bring a block of query rows into shared memory; rows past the request's become zeros.
template <typename Element, int kRows>
__device__ void load_queries(const DecodeParams& params, int first_token, int first_row, int rows,
                             Element (&query)[kColumnBlocks][kRows][64]) {
  constexpr int kChunks = kHeadDim / 8;
  int begin = threadIdx.x;
  asm volatile("" : "+r"(begin));  // or addresses are kept in registers from one request to the next, and others spill
  for (int i = begin; i < kRows * kChunks; i += kMathThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (first_row + row < rows) {
      const int64_t token = first_token + (first_row + row) / params.heads, head = (first_row + row) % params.heads;
      const Element* from = chunk < kLatentDim / 8
                                ? static_cast<const Element*>(params.q_nope) + token * params.q_nope_token_stride +
                                      head * params.q_nope_head_stride + chunk * 8
                                : static_cast<const Element*>(params.q_pe) + token * params.q_pe_token_stride +
                                      head * params.q_pe_head_stride + (chunk * 8 - kLatentDim);
      if (params.queries_are_vectors) {
        value = *reinterpret_cast<const uint4*>(from);
      } else {
        Element* elements = reinterpret_cast<Element*>(&value);
#pragma unroll
        for (int e = 0; e < 8; ++e) elements[e] = from[e];
      }
    }
    ptx::store_shared(ptx::shared_address(query[chunk / 8]) + swizzled(row, chunk % 8), value);
  }
  ptx::fence_proxy_async();
  ptx::named_barrier_sync<kMathThreads>(kMathBarrier);
}

// What lies in a tile past the request's last token would meet probability 0, and 0 x NaN is NaN: make it zeros.
// Called by kClearers consecutive threads, which meet at the named barrier.
template <int kClearers, typename Element>
__device__ void clear_rows_from(int row, ColumnBlock<Element> (&tile)[kColumnBlocks], int barrier) {
  const int chunks = (kTileTokens - row) * 8;  // whole rows of 128 bytes, so the swizzle does not matter
  for (int i = threadIdx.x % kClearers; i < chunks * kColumnBlocks; i += kClearers) {
    reinterpret_cast<uint4*>(&tile[i / chunks][row])[i % chunks] = make_uint4(0, 0, 0, 0);
  }
  ptx::fence_proxy_async();
  ptx::named_barrier_sync<kClearers>(barrier);
}

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

// What every decode kernel begins with: barriers, and who is who. `consume` runs in the mathematics warpgroups.
template <typename Element, typename Shared, typename Consume>
__device__ void run_roles(const DecodeParams& params, const CUtensorMap* map, int arrivals_to_empty, Consume consume) {
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(memory) + 1023) & ~1023ull);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(map);
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], arrivals_to_empty);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  // Together at most what the block was started with (168 for each of 384 threads), or the increase waits for ever.
  if (threadIdx.x >= kMathThreads) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x < kMathThreads + 32) produce<Element>(params, map, shared);
  } else {
    ptx::setmaxnreg_inc<232>();
    consume(shared);
  }
}

}  // namespace mla_backend::sm90
