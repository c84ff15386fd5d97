// What the kernels share that have cached tokens on the 64-row side of wgmma: accumulators of tokens x query rows, and of output
// columns x query rows, of which each of two warpgroups has half of the columns.
#pragma once

#include "combine.cuh"

namespace mla_backend::sm90 {

constexpr int kColumnBlocks = kHeadDim / 64;
constexpr int kGroupBlocks = kLatentDim / 64 / 2;  // blocks of 64 output columns of a warpgroup
constexpr int kMathBarrier = kQueriesBarrier + 1;  // named barrier of both warpgroups

// Which tokens or output columns and which query rows of an accumulator are a thread's.
struct Place {
  int warp, lane;

  // `thread` is threadIdx.x.
  __device__ __forceinline__ explicit Place(uint32_t thread) : warp(thread / 32 % 4), lane(thread % 32) {}

  __device__ __forceinline__ int row() const { return warp * 16 + lane / 4; }  // and the one 8 further on
  __device__ __forceinline__ int column(int c) const { return c / 2 * 8 + lane % 4 * 2 + c % 2; }  // number `c` of them
};

// The query warp of a kernel that attends all query rows of a request at a time: all columns of them.
template <typename Element, typename Shared>
__device__ __forceinline__ void bring_whole_queries(const DecodeParams& params, Pieces& pieces, Shared& shared,
                                                    const TensorMaps& maps) {
  bring_queries<1>(
      params, pieces, shared.queries, shared.work, shared.split, params.block_rows * kHeadDim * sizeof(Element),
      [&](int stage, int token) {
        const int block = Shared::thread() % 32;
        if (block < kColumnBlocks) {
          const bool rope = block == kLatentDim / 64;
          ptx::tma_load(&shared.query[stage][block], rope ? &maps.rope_query : &maps.latent_query, rope ? 0 : block * 64, 0, token,
                        shared.queries.full[stage]);
        }
      },
      [&](int stage, const Piece& piece) {
        const auto place = [&](int row, int chunk) {
          return ptx::shared_address(shared.query[stage][chunk / 8]) + swizzled_128(row, chunk % 8);
        };
        const int rows = piece.rows(params);
        copy_rows<kLatentDim / 8>(params, query_latent<Element>(params, piece), params.q_nope_token_stride,
                                  params.q_nope_head_stride, 0, rows, place);
        copy_rows<kRopeDim / 8>(params, query_rope<Element>(params, piece), params.q_pe_token_stride, params.q_pe_head_stride,
                                0, rows, [&](int row, int chunk) { return place(row, kLatentDim / 8 + chunk); });
      });
}

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

// Write a partial result, or part of it: half number `half` of the columns.
template <typename Element, int kCount>
__device__ __forceinline__ void store_part(const Rows<Element>& results, const float (&out)[kGroupBlocks][kCount], int half,
                                           const Place& at) {
#pragma unroll
  for (int c = 0; c < kCount / 2; ++c) {
    const int row = at.column(c);
    if (row >= results.last_row) continue;
    float2* to = reinterpret_cast<float2*>(results.partial_out(row) + half * kGroupBlocks * 64 + at.warp * 16) + at.lane / 4;
#pragma unroll
    for (int b = 0; b < kGroupBlocks; ++b) {
      const float* two = &out[b][c / 2 * 4 + c % 2];
      to[b * 32] = make_float2(two[0], two[2]);
    }
  }
}

// The same in float16, with scales, where a thread's two numbers of a block are neighbours, as store_pairs() has them. Called by
// whole warps.
template <typename Element, int kCount>
__device__ __forceinline__ void store_part16(const Rows<Element>& results, const float (&out)[kGroupBlocks][kCount], int half,
                                             const Place& at) {
  static_assert(2 * kGroupBlocks == Part16ByBlocks::kColumns);
  const int place = half * 32 + at.warp * 8 + at.lane / 4;
#pragma unroll
  for (int c = 0; c < kCount / 2; ++c) {
    const int row = at.column(c);
    const bool exists = row < results.last_row;
    const auto two = [&](int b) { return &out[b][c / 2 * 4 + c % 2]; };
    uint32_t packed[kGroupBlocks];
    __half2 largest = {};
#pragma unroll
    for (int b = 0; b < kGroupBlocks; ++b) {
      packed[b] = pack<__half>(two(b)[0], two(b)[2]);
      largest = __hmax2(largest, __habs2(reinterpret_cast<const __half2&>(packed[b])));
    }
    float scale = 1;
    // Nearly always all is well as it is. To look at several rows at a time takes 0.3 us longer, though it is less code.
    if (__any_sync(~0u, exists && !fits_half(largest))) {
      float peak = 0;
#pragma unroll
      for (int b = 0; b < kGroupBlocks; ++b) peak = fmaxf(peak, fmaxf(fabsf(two(b)[0]), fabsf(two(b)[2])));
      const HalfScale fitted(column_max(peak));
      scale = fitted.scale;
#pragma unroll
      for (int b = 0; b < kGroupBlocks; ++b) {
        packed[b] = pack<__half>(two(b)[0] * fitted.reciprocal, two(b)[2] * fitted.reciprocal);
      }
    }
    if (!exists) continue;
    float* to = results.partial_out(row);
    reinterpret_cast<uint4*>(to)[place] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    if (at.lane < 4) to[kScales + place * Part16ByBlocks::kColumns / Part16ByBlocks::kScaleColumns] = scale;
  }
}

// Write rows of the output, half number `half` of the columns.
template <typename Element, int kCount>
__device__ __forceinline__ void store_pairs(const Rows<Element>& results, const float (&out)[kGroupBlocks][kCount], int half,
                                            const Place& at) {
#pragma unroll
  for (int c = 0; c < kCount / 2; ++c) {
    const int row = at.column(c);
    if (row >= results.last_row) continue;
    Element* to = results.out(row) + half * kGroupBlocks * 64 + at.warp * 16 + at.lane / 4 * 2;
#pragma unroll
    for (int b = 0; b < kGroupBlocks; ++b) {
      const float* two = &out[b][c / 2 * 4 + c % 2];
      store_two(results.params, to + b * 64, two[0], two[2]);
    }
  }
}

// Add what other workers have found for the rows of a request that this one completes.
template <typename Element, int kCount>
__device__ __forceinline__ void add_parts(const Rows<Element>& results, float (&out)[kGroupBlocks][kCount],
                                          float (&log2_sums)[kCount / 2], int half, const Place& at) {
  constexpr int kColumns = kCount / 2;  // that a thread holds parts of
#pragma unroll 1
  for (int part = 1; part < results.parts; ++part) {
    float other[kColumns];
    float2 two[kColumns][kGroupBlocks] = {};
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = at.column(c);
      const bool exists = row < results.last_row;
      const float* from = results.partial_out(row, part) + half * kGroupBlocks * 64 + at.warp * 16 + at.lane / 4 * 2;
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

}  // namespace mla_backend::sm90
