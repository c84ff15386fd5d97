// A quantised cache, of float8 numbers (e4m3), for the wide kernel: tiles become what queries are on the way to the tensor cores.
//
// Every float8 number is a bfloat16 and a float16 one. The blocks of a cluster have half of a token's numbers each, for 128 query
// rows, so a number is converted once for all of them, by warps that do nothing else: from stages that the copy engine fills to
// stages that the mathematics empties, as if the copy engine had filled those.
#pragma once

#include "tile.cuh"

namespace mla_backend::sm90 {

constexpr int kConvertingWarps = 2;

// Two float16 numbers are one instruction away from float8, two bfloat16 ones four: loads come further ahead, for which the
// mathematics hands over registers, which it has with bfloat16.
template <typename Element>
constexpr bool kLongConversion = !std::is_same_v<Element, __half>;
template <typename Element>
constexpr int kLoadsAhead = kLongConversion<Element> ? 4 : 2;

// Two float16 numbers as Element.
template <typename Element>
__device__ __forceinline__ uint32_t from_half(uint32_t two) {
  if constexpr (std::is_same_v<Element, __half>) return two;
  const float2 wide = __half22float2(reinterpret_cast<const __half2&>(two));
  return pack<Element>(wide.x, wide.y);
}

// Sixteen float8 numbers as Element, to two chunks of shared memory.
template <typename Element>
__device__ __forceinline__ void store_converted(uint32_t first, uint32_t second, const uint4& numbers) {
  const uint32_t four[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
  uint32_t two[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    ptx::half_of_fp8(four[i], two[i * 2], two[i * 2 + 1]);
    two[i * 2] = from_half<Element>(two[i * 2]), two[i * 2 + 1] = from_half<Element>(two[i * 2 + 1]);
  }
  ptx::store_shared(first, make_uint4(two[0], two[1], two[2], two[3]));
  ptx::store_shared(second, make_uint4(two[4], two[5], two[6], two[7]));
}

// The warp that brings tiles says to those that convert them: how many tokens the one in this stage has.
template <typename Shared>
__device__ void announce_tile(Shared& shared, int stage, int tokens) {
  if (threadIdx.x % 32 == 0) shared.converting.tokens[stage] = tokens;
}

// And that there are no more than `count` tiles.
template <typename Shared>
__device__ void end_tiles(Shared& shared, int count) {
  auto& tiles = shared.converting.tiles;
  tiles.wait_empty(count);
  announce_tile(shared, tiles.stage(count), 0);
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(tiles.full[tiles.stage(count)]);
}

// A converting warp, number `warp` of kConvertingWarps: convert half of the latent columns, and half of the tokens' rotary ones, of
// all tiles that are brought to this block. Values past a request's last token become zeros, as they would meet probability 0,
// and 0 x NaN is NaN.
//
// A lane converts a chunk of 16 numbers at a time, a warp 64 latent columns of 8 tokens, or all rotary ones of 16. Eight lanes
// beside each other load from all banks of shared memory, and store to all: they have two tokens, in rows whose numbers differ in
// their lowest bit and in that of 4.
template <typename Shared>
__device__ void convert_tiles(Shared& shared, int warp, uint32_t rank) {
  using Element = typename Shared::Element;
  constexpr int kEight = 8 * 128, kBlock = sizeof(ColumnBlock<Element>);  // bytes of 8 rows of a block of columns, and of it
  constexpr int kEights = kTileTokens / 8, kRounds = 2 * kEights + 2;
  // Read anew, as there are few registers.
  const auto lane = [] { return static_cast<uint32_t>(ptx::thread_index()) % 32; };
#pragma unroll 1
  for (int number = 0;; ++number) {
    const int from_stage = shared.converting.tiles.stage(number), to_stage = shared.tiles.stage(number);
    const auto& from = shared.quantized[from_stage];
    auto& to = shared.tile[to_stage];
    const uint32_t row = lane() / 8 ^ lane() / 4 % 2 * 5, chunk = lane() % 4;
    const uint32_t from_latent = ptx::shared_address(from.latent[warp]) + swizzled_128(row, chunk);
    const uint32_t to_latent = ptx::shared_address(to.latent[warp * 2]) + swizzled_128(row, chunk * 2);
    const auto load = [&](int round) {
      if (round < 2 * kEights) return ptx::load_shared((from_latent ^ round / kEights * 64) + round % kEights * kEight);
      return ptx::load_shared(ptx::shared_address(from.rope[warp * (kTileTokens / 2)]) + lane() * 16 +
                              (round - 2 * kEights) * 16 * sizeof(from.rope[0]));
    };
    const auto store = [&](int round, const uint4& numbers) {
      if (round < 2 * kEights) {
        const uint32_t offset = round / kEights * kBlock + round % kEights * kEight;
        store_converted<Element>(to_latent + offset, (to_latent ^ 16) + offset, numbers);
      } else {
        const uint32_t rope = ptx::shared_address(to.rope[warp * (kTileTokens / 2)]) + swizzled_64(lane() / 2, lane() % 2 * 2);
        const uint32_t offset = (round - 2 * kEights) * 16 * sizeof(to.rope[0]);
        store_converted<Element>(rope + offset, (rope ^ 16) + offset, numbers);
      }
    };
    uint4 numbers[kLoadsAhead<Element>];
    shared.converting.tiles.wait_full(number);
    // By the lane that releases the stage: only that it has read is known to who writes.
    const int tokens = ptx::uniform(lane() == 0 ? shared.converting.tokens[from_stage] : 0);
    if (tokens == 0) break;
#pragma unroll
    for (int i = 0; i < kLoadsAhead<Element>; ++i) numbers[i] = load(i);
    shared.tiles.wait_empty(number);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      uint4& those = numbers[round % kLoadsAhead<Element>];
      store(round, those);
      if (round + kLoadsAhead<Element> < kRounds) those = load(round + kLoadsAhead<Element>);
      if (round == kEights - 1 || round == kRounds - 1) {
        if (tokens < kTileTokens) {
#pragma unroll 1
          for (uint32_t to_row = row; to_row < kTileTokens; to_row += 8) {
            if ((to_row ^ rank * (kTileTokens / 2)) < tokens) continue;
            const uint32_t first = to_latent + (round == kRounds - 1) * kBlock + to_row / 8 * kEight;
            ptx::store_shared(first, make_uint4(0, 0, 0, 0)), ptx::store_shared(first ^ 16, make_uint4(0, 0, 0, 0));
          }
        }
        ptx::fence_proxy_async();
        ptx::mbarrier_arrive(&shared.tiles.full[to_stage][round == kRounds - 1]);
      }
    }
    __syncwarp();
    if (lane() == 0) shared.converting.tiles.release(number);
  }
}

}  // namespace mla_backend::sm90
