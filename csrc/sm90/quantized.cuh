// A quantised cache, of float8 numbers (e4m3), for the narrow kernels: as the tensor cores take it, in float16 and in registers.
//
// wgmma multiplies float8 numbers by such only, and queries and probabilities would lose what the cache's have kept. Every float8
// number is a float16 one, and cached tokens are the first operand of both products, which may come from registers: so a thread
// loads its numbers of a tile and converts them. Where they lie in a row of registers is wgmma's to say, but the order of columns
// is free: in scores, as long as queries have the same one, and in results, where it follows.
#pragma once

#include "transposed.cuh"

namespace mla_backend::sm90 {

constexpr int kQuantizedColumns = 128, kQuantizedBlockBytes = kTileTokens * kQuantizedColumns;  // of a block of columns

// Of a unit of 16 columns of a query row, two chunks of 16 bytes, the order that threads have cached numbers in: a thread has four
// neighbours, of which wgmma takes two for the first eight columns and two for the others.
__device__ __forceinline__ void reorder_unit(uint4& low, uint4& high) {
  const uint4 first = low, second = high;
  low = make_uint4(first.x, first.z, second.x, second.z);
  high = make_uint4(first.y, first.w, second.y, second.w);
}

// The bits of a power of two that brings a row's largest absolute value into [2^14, 2^15), and of its reciprocal. `largest` has the
// bits of a bfloat16. A row of smaller ones than 2^-112 is as good as zeros; NaN and infinity stay what they are.
__device__ __forceinline__ void row_powers(uint32_t largest, uint32_t& power, uint32_t& reciprocal) {
  constexpr int kLeast = 15, kTop = 268;
  const uint32_t exponent = max(largest >> 7, uint32_t{kLeast});
  power = kTop - exponent << 23, reciprocal = exponent - (kLeast - 1) << 23;
}

// Two bfloat16 numbers, times a power of two, as float16.
__device__ __forceinline__ uint32_t half_of_bfloat16(uint32_t two, float power) {
  return pack<__half>(__uint_as_float(two << 16) * power, __uint_as_float(two & 0xFFFF0000) * power);
}

// Make queries that have arrived float16 in that order, where they lie. bfloat16 has a larger range, so each row of such is
// multiplied by a power of two, and its scores' `scale` divided. Called by both mathematics warpgroups, which meet then.
//
// Eight lanes have a row: four of them the units of a block of columns, every other block. Of those that access shared memory at
// the same time four have one row and four the next, whose chunks lie in other banks.
template <typename Element, int kN, int kBlocks>
__device__ __forceinline__ void prepare_queries(Element (&query)[kBlocks][kN][64], float (&scales)[kN], float scale) {
  constexpr int kWarps = kMathThreads / 32, kWarpRows = 4, kOwnBlocks = (kBlocks + 1) / 2, kTwoBlocks = 2 * sizeof(query[0]);
  static_assert(kBlocks % 2 == 1);
  constexpr bool kScaled = std::is_same_v<Element, __nv_bfloat16>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, odd = lane / 8 % 2;
#pragma unroll 1
  for (int first = warp * kWarpRows; first < kN; first += kWarps * kWarpRows) {
    const int row = first + lane / 4 % 2 + lane / 16 * 2;
    const uint32_t low = ptx::shared_address(query[odd]) + swizzled_128(row, lane % 4 * 2), high = low ^ 16;
    const auto exists = [&](int b) { return b + 1 < kOwnBlocks || odd == 0; };
    uint4 chunks[kOwnBlocks][2];
#pragma unroll
    for (int b = 0; b < kOwnBlocks; ++b) {
      if (!exists(b)) continue;
      chunks[b][0] = ptx::load_shared(low + b * kTwoBlocks), chunks[b][1] = ptx::load_shared(high + b * kTwoBlocks);
    }
    uint32_t power = 0, reciprocal = 0x3F800000;
    if constexpr (kScaled) {
      uint32_t largest = 0;
#pragma unroll
      for (int b = 0; b < kOwnBlocks; ++b) {
        if (!exists(b)) continue;
#pragma unroll
        for (const uint4& c : chunks[b]) {
          const auto absolute = [](uint32_t two) { return two & 0x7FFF7FFF; };
          largest = __vmaxu2(largest, __vmaxu2(__vmaxu2(absolute(c.x), absolute(c.y)), __vmaxu2(absolute(c.z), absolute(c.w))));
        }
      }
#pragma unroll
      for (int offset : {1, 2, 8}) largest = __vmaxu2(largest, __shfl_xor_sync(~0u, largest, offset));
      row_powers(max(largest & 0xFFFF, largest >> 16), power, reciprocal);
    }
#pragma unroll
    for (int b = 0; b < kOwnBlocks; ++b) {
      if (!exists(b)) continue;
      reorder_unit(chunks[b][0], chunks[b][1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint4 c = chunks[b][i];
        if constexpr (kScaled) {
          const float factor = __uint_as_float(power);
          c = make_uint4(half_of_bfloat16(c.x, factor), half_of_bfloat16(c.y, factor), half_of_bfloat16(c.z, factor),
                         half_of_bfloat16(c.w, factor));
        }
        ptx::store_shared((i == 0 ? low : high) + b * kTwoBlocks, c);
      }
    }
    if (lane % 4 == 0 && odd == 0) scales[row] = never_zero(scale * __uint_as_float(reciprocal));
  }
  ptx::fence_proxy_async();
}

// A tile, in blocks of columns; the last one has the rotary columns, and zeros.
constexpr int kQuantizedBlocks = (kHeadDim - 1) / kQuantizedColumns + 1;
using QuantizedTile = ColumnBlock<__nv_fp8_e4m3>[kQuantizedBlocks];

// The numbers of a tile that a thread multiplies by queries: those of 16 tokens for each warp of a warpgroup.
class CachedKeys {
 public:
  // `thread` is threadIdx.x.
  __device__ __forceinline__ CachedKeys(const QuantizedTile& tile, uint32_t thread) {
    // Lanes point at eight tokens of a chunk of 16 columns, at the next eight, and at both of the next chunk.
    const uint32_t token = (thread / 2 & 16 * 3) + thread % 16;  // 16 for each warp
    tokens_ = ptx::shared_address(tile) + token * 128, chunk_ = (thread & 16) ^ thread % 8 * 16;
  }

  // 32 columns of a block, two steps of the product.
  __device__ __forceinline__ void load(int block, int column, uint32_t (&raw)[4]) const {
    ptx::ldmatrix_x4(raw, tokens_ + block * kQuantizedBlockBytes + (column ^ chunk_));
  }

  __device__ static __forceinline__ void convert(const uint32_t (&raw)[4], uint32_t (&steps)[2][4]) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      ptx::half_of_fp8(raw[s * 2], steps[s][0], steps[s][2]);
      ptx::half_of_fp8(raw[s * 2 + 1], steps[s][1], steps[s][3]);
    }
  }

 private:
  uint32_t tokens_, chunk_;
};

// Those that it multiplies by probabilities, transposed: all tokens, and of each 64 columns 16 for each warp.
class CachedValues {
 public:
  __device__ __forceinline__ CachedValues(const QuantizedTile& tile, uint32_t thread) {
    const uint32_t column = thread / 2 & 16 * 3;
    tokens_ = ptx::shared_address(tile) + thread % 32 * 128, chunk_ = column ^ thread % 8 * 16;
  }

  // Of 64 columns, block number `block` of four in either half, the tokens of two steps of the product. A thread has two
  // neighbouring columns.
  static constexpr int kBlockLoads = kTileTokens / 32;

  __device__ __forceinline__ void load(int half, int block, int load, uint32_t (&raw)[4]) const {
    const uint32_t tokens = tokens_ + (half * 2 + block / 2) * kQuantizedBlockBytes + load * 32 * 128;
    ptx::ldmatrix_x4_trans(raw, tokens + (block % 2 * 64 ^ chunk_));
  }

  __device__ static __forceinline__ void convert(const uint32_t (&raw)[4], uint32_t (&steps)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Of two columns of a token and of the next one: two tokens of a column and of the next one.
      const uint32_t by_column = __byte_perm(raw[i], 0, 0x3120);
      ptx::half_of_fp8(by_column, steps[i / 2][i % 2 * 2], steps[i / 2][i % 2 * 2 + 1]);
    }
  }

 private:
  uint32_t tokens_, chunk_;
};

// Load kLoads times, convert, and multiply, kTogether loads at a time: `load(i, raw)` and `multiply(i, steps)` for each. What is
// loaded is asked for a round before, and the tensor cores work at one round while the next is converted.
template <typename Cached, int kLoads, int kTogether, typename Load, typename Multiply>
__device__ __forceinline__ void multiply_converted(Load load, Multiply multiply) {
  constexpr int kStages = kLoads > kTogether ? 2 : 1;
  static_assert(kLoads % kTogether == 0);
  uint32_t raw[kTogether][4], stages[kStages][kTogether][2][4];
  const auto keep = [](uint32_t(&steps)[kTogether][2][4]) {
#pragma unroll
    for (auto& two : steps) ptx::keep(two[0]), ptx::keep(two[1]);
  };
#pragma unroll
  for (int i = 0; i < kTogether; ++i) load(i, raw[i]);
#pragma unroll
  for (int first = 0; first < kLoads; first += kTogether) {
    auto& steps = stages[first / kTogether % kStages];
    if (first / kTogether >= kStages) ptx::wgmma_wait<kStages - 1>(), keep(steps);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) Cached::convert(raw[i], steps[i]);
    if (first + kTogether < kLoads) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) load(first + kTogether + i, raw[i]);
    }
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTogether; ++i) multiply(first + i, steps[i]);
    ptx::wgmma_commit();
  }
  ptx::wgmma_wait<0>();
#pragma unroll
  for (auto& steps : stages) keep(steps);
}

// Add a tile's values times the probabilities at a shared address: half number `half` of the columns and then, where there are
// results for it, the other one. A lane of each warp calls `release` when that has in registers what it needs of the tile.
template <int kTogether, int kBlocks, int kCount, typename Release>
__device__ __forceinline__ void add_values(float (&out)[kBlocks][kCount], const QuantizedTile& tile, uint32_t probabilities,
                                           int half, Release release) {
  constexpr int kBlockLoads = CachedValues::kBlockLoads, kLoads = kBlocks * kBlockLoads;
  const ptx::Matrix weights(probabilities, 0, 1024);
  const CachedValues values(tile, ptx::thread_index());
#pragma unroll
  for (auto& block : out) ptx::keep(block);
  multiply_converted<CachedValues, kLoads, kTogether>(
      [&](int i, uint32_t(&raw)[4]) {
        const int b = i / kBlockLoads;
        if constexpr (kBlocks == kGroupBlocks) {
          values.load(half, b, i % kBlockLoads, raw);
        } else {
          values.load(b < kGroupBlocks ? half : 1 - half, b % kGroupBlocks, i % kBlockLoads, raw);
        }
        if (i + 1 == kLoads) {
          __syncwarp();
          if (threadIdx.x % 32 == 0) release();
        }
      },
      [&](int i, const uint32_t(&steps)[2][4]) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          ptx::wgmma<__half>(out[i / kBlockLoads], steps[s], weights.at((i % kBlockLoads * 2 + s) * 32), 1);
        }
      });
#pragma unroll
  for (auto& block : out) ptx::keep(block);
}

// A tile whose numbers the tensor cores take from registers, for one of the two warpgroups of a narrow kernel: each has half of the
// columns.
template <typename Shared>
class RegisterTile {
 public:
  static constexpr int kConsumers = kMathThreads / 32;  // that release it
  static constexpr bool kClearedFirst = true;           // before its numbers are in registers

  __device__ __forceinline__ RegisterTile(Shared& shared, int number, int group)
      : shared_(shared), number_(number), group_(group), tile_(shared.tile[ptx::uniform(shared.tiles.stage(number))]) {}

  __device__ __forceinline__ void clear_from(int token, int own_barrier) {
    shared_.tiles.wait_full(number_);
    using OwnBlocks = std::remove_reference_t<decltype(tile_[0])>[Shared::kOwnBlocks];
    clear_rows_from(token, reinterpret_cast<OwnBlocks&>(tile_[group_ * Shared::kOwnBlocks]), own_barrier);
  }

  // Cached tokens times queries, over the own latent columns and half of the rotary ones.
  template <int kCount>
  __device__ __forceinline__ void multiply_by_queries(float (&product)[kCount], int query_stage) {
    constexpr int kLoads = kHeadDim / 2 / 32, kRotary = kLoads - 1;
    constexpr uint32_t kQueryBlock = sizeof(shared_.query[0][0]);
    // Not to be computed before the loop over tiles, and all of them kept.
    const uint32_t queries = ptx::shared_address(shared_.query[query_stage]) + ptx::opaque_zero();
    const ptx::Matrix latent(queries + group_ * (kLatentDim / 2 / 64) * kQueryBlock, 0, 1024);
    const ptx::Matrix rotary(queries + kLatentDim / 64 * kQueryBlock + group_ * 64, 0, 1024);
    const CachedKeys keys(tile_, ptx::thread_index());
    shared_.tiles.wait_full(number_);
    multiply_converted<CachedKeys, kLoads, 1>(
        [&](int load, uint32_t(&raw)[4]) {
          // Of both blocks in turn, so that they have the same address but for a constant.
          load < kRotary ? keys.load(group_ * Shared::kOwnBlocks + load % 2, load / 2 * 32, raw)
                         : keys.load(2 * Shared::kOwnBlocks, group_ * 32, raw);
        },
        [&](int load, const uint32_t(&steps)[2][4]) {
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            const int column = load % 2 * kQuantizedColumns + load / 2 * 32 + s * 16;
            const uint64_t query = load < kRotary ? latent.at(column / 64 * kQueryBlock + column % 64 * 2) : rotary.at(s * 32);
            ptx::wgmma<__half>(product, steps[s], query, load + s > 0);
          }
        });
    ptx::keep(product);
  }

  template <int kCount>
  __device__ __forceinline__ void add_values(float (&out)[kGroupBlocks][kCount]) {
    const uint32_t probabilities = ptx::shared_address(shared_.probabilities);
    sm90::add_values<1>(out, tile_, probabilities, group_, [&] { shared_.tiles.release(number_); });
  }

 private:
  Shared& shared_;
  const int number_, group_;
  QuantizedTile& tile_;
};

}  // namespace mla_backend::sm90
