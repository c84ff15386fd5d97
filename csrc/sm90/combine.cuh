// Combines the partial results of requests that several workers shared, at the end of the decode kernel, where the worker with
// their first part has not done so: all workers with a part, and helpers, divide this between them. And clears the rows that
// attend to nothing.
#pragma once

#include "tile.cuh"

namespace mla_backend::sm90 {

// The work of a warpgroup is cut into units of a query row's columns, of which a team of eight threads reads a line of 128 bytes of
// each part.
constexpr int kCombineThreads = 128, kCombineWarps = kCombineThreads / 32;
constexpr int kTeamThreads = 8, kTeams = kCombineThreads / kTeamThreads;

// a / b, for a < 2^20 in a third of the instructions: these are cold in the caches when a kernel begins. (a + 1/2) / b is
// 1 / 2b or more from any whole number, and its error less than that.
__device__ __forceinline__ int divide(int a, int b) {
  return a < 1 << 20 ? __float2int_rz(__fdividef(a + 0.5f, b)) : a / b;
}

// Index of the last entry of the ascending `starts` [count + 1] that is <= value, so that value lies in starts[i]:starts[i + 1];
// 0 if all are larger.
__device__ __forceinline__ int find_owner(const int32_t* starts, int count, int value) {
  int low = 0, high = count;  // starts[low] <= value < starts[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts[middle] <= value ? low : high) = middle;
  }
  return low;
}

// Two neighbours of an output row, from the element at `to` on.
template <typename Element>
__device__ __forceinline__ void store_two(const DecodeParams& params, Element* to, float first, float second) {
  const uint32_t two = pack<Element>(first, second);
  if (params.output_is_vectors) {
    *reinterpret_cast<uint32_t*>(to) = two;
  } else {
    to[0] = reinterpret_cast<const Element(&)[2]>(two)[0], to[1] = reinterpret_cast<const Element(&)[2]>(two)[1];
  }
}

// What a thread reads at a time of a part in float32: sixteen bytes at `place` of a row, four of its team's 32 columns, which lie
// as csrc/decode.h says.
struct Part32 {
  static constexpr int kColumns = 4;
  float4 values = {};

  __device__ __forceinline__ void load_if(bool exists, const float* row, int place) {
    ptx::load_if(exists, values, reinterpret_cast<const float4*>(row) + place);
  }

  __device__ __forceinline__ void add_to(float (&sum)[kColumns], float weight) const {
    sum[0] += weight * values.x, sum[1] += weight * values.z, sum[2] += weight * values.y, sum[3] += weight * values.w;
  }

  // The first of a pair of neighbours.
  __device__ static int column(int place, int i) { return place / 4 * 16 + i * 8 + place % 4 * 2; }
};

// The same where columns lie in order.
struct Part32InOrder : Part32 {
  __device__ __forceinline__ void add_to(float (&sum)[kColumns], float weight) const {
    sum[0] += weight * values.x, sum[1] += weight * values.y, sum[2] += weight * values.z, sum[3] += weight * values.w;
  }

  __device__ static int column(int place, int i) { return place * kColumns + i * 2; }
};

// Where a row of a part in float16 has the powers of two that its columns were divided by.
constexpr int kScales = kLatentDim / 2;

// In float16, eight numbers; kScaled numbers side by side have the same scale.
template <int kScaled>
struct ScaledPart16 {
  static constexpr int kColumns = 8, kScaleColumns = kScaled;
  float4 values = {};  // eight
  float scale = 0;

  // `neighbour`, if there is one, is at another place of the row that has the same scale.
  __device__ __forceinline__ void load_if(bool exists, const float* row, int place, const ScaledPart16* neighbour = nullptr) {
    ptx::load_if(exists, values, reinterpret_cast<const float4*>(row) + place);
    if (neighbour == nullptr) {
      ptx::load_if(exists, scale, row + kScales + place * kColumns / kScaleColumns);
    } else {
      scale = neighbour->scale;
    }
  }

  __device__ __forceinline__ void add_to(float (&sum)[kColumns], float weight) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = __half22float2(reinterpret_cast<const __half2(&)[4]>(values)[i]);
      sum[i * 2] += weight * scale * two.x, sum[i * 2 + 1] += weight * scale * two.y;
    }
  }
};

// The wide kernels': two neighbours of every eight of 32 columns.
struct Part16 : ScaledPart16<128> {
  __device__ static int column(int place, int i) { return place / 4 * 32 + i * 8 + place % 4 * 2; }
};

// The narrow kernel's over a quantised cache: two neighbours of every 64 columns of a half. A warp has 64 numbers.
struct Part16ByBlocks : ScaledPart16<64> {
  __device__ static int column(int place, int i) { return place / 32 * (kLatentDim / 2) + i * 64 + place % 32 * 2; }
};

// The largest of a thread's results in float16 lies between these, or they are scaled. Numbers 2^6 times smaller than the least of
// it have all significant bits.
constexpr float kLeastHalf = 1.f / 256, kMostHalf = 32768;

__device__ __forceinline__ bool fits_half(__half2 largest) {
  const float either = fmaxf(__low2float(largest), __high2float(largest));
  return either >= kLeastHalf && either < kMostHalf;
}

// A power of two by which numbers up to `peak` are divided so that this becomes 2^14 or a little more.
struct HalfScale {
  float scale, reciprocal;

  __device__ __forceinline__ explicit HalfScale(float peak) {
    const int exponent = max(static_cast<int>(__float_as_uint(peak) >> 23) - 127 - 14, -100);
    scale = __uint_as_float(127 + exponent << 23), reciprocal = __uint_as_float(127 - exponent << 23);
  }
};

// A weighted sum of parts and the sum of their weights, both relative to 2^peak: an online softmax over parts.
template <typename Part>
struct PartialSum {
  float values[Part::kColumns] = {};
  float total = 0, peak = -INFINITY;

  // A row that sees no token in any part has the peak -inf, and -inf - -inf would be NaN.
  __device__ __forceinline__ float weight(float part_peak) const { return ptx::exp2(part_peak - (peak == -INFINITY ? 0 : peak)); }

  __device__ __forceinline__ void rescale(float factor) {
#pragma unroll
    for (int i = 0; i < Part::kColumns; ++i) values[i] *= factor;
    total *= factor;
  }

  __device__ __forceinline__ void raise(float part_peak) {
    const float before = peak;
    peak = fmaxf(peak, part_peak);
    rescale(weight(before));
  }

  __device__ __forceinline__ void add(const Part& part, float part_peak) {
    const float factor = weight(part_peak);
    part.add_to(values, factor), total += factor;
  }

  // What others have, whose peak is no greater.
  __device__ __forceinline__ void add(const PartialSum& other) {
    const float factor = weight(other.peak);
#pragma unroll
    for (int i = 0; i < Part::kColumns; ++i) values[i] += factor * other.values[i];
    total += factor * other.total;
  }

  // Of the lanes whose numbers differ in the bit `offset`.
  __device__ __forceinline__ void merge_lanes(int offset) {
    PartialSum theirs;
#pragma unroll
    for (int i = 0; i < Part::kColumns; ++i) theirs.values[i] = __shfl_xor_sync(~0u, values[i], offset);
    theirs.total = __shfl_xor_sync(~0u, total, offset), theirs.peak = __shfl_xor_sync(~0u, peak, offset);
    raise(theirs.peak);
    add(theirs);
  }
};

// Of a warpgroup, in shared memory: what its warps hand to each other.
template <typename Part>
using WarpSums = PartialSum<Part>[kCombineWarps][kTeamThreads];

// The parts of a request that several workers shared, for the query rows of one block of them.
struct Parts {
  int first_slot, count;
  int first_token, first_row;
};

template <typename Element, typename Part>
class Combiner {
 public:
  static constexpr int kRowUnits = kLatentDim / (kTeamThreads * Part::kColumns);

  // `barrier` is a named barrier of the warpgroup.
  __device__ __forceinline__ Combiner(const DecodeParams& params, const Parts& parts, WarpSums<Part>& sums, int barrier)
      : params(params),
        parts(parts),
        sums(sums),
        barrier(barrier),
        thread(threadIdx.x % kCombineThreads),
        lane(threadIdx.x % kTeamThreads),
        first_partial_row(partial_row(params, parts.first_slot, blockIdx.y)),
        stride(params.row_blocks * params.block_rows) {}

  // Units first to last (not included).
  __device__ __forceinline__ void combine(int first, int last) const {
    if (const int units = last - first; units <= 0) {
    } else if (units <= kTeams) {
      by_several_teams_each(first, last, __clz(units - 1) - __clz(kTeams - 1));
    } else if (parts.count <= 2) {
      by_one_team_each<4, 2>(first, last);
    } else {
      by_one_team_each<2, 4>(first, last);
    }
  }

 private:
  // All of a team's parts, kUnits x kParts at a time.
  template <int kUnits, int kParts>
  __device__ __forceinline__ void by_one_team_each(int first, int last) const {
    for (int unit = first + thread / kTeamThreads; unit < last; unit += kUnits * kTeams) {
      PartialSum<Part> sum[kUnits];
      add<kUnits, kParts>(sum, unit, last, 0, 1);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (unit + u * kTeams < last) store(unit + u * kTeams, sum[u]);
      }
    }
  }

  // One unit for every 2^shift teams, which divide its parts between them.
  __device__ __forceinline__ void by_several_teams_each(int first, int last, int shift) const {
    const int team = thread / kTeamThreads, warp = thread / 32, own = first + (team >> shift);
    const int unit = min(own, last - 1), sharing = 1 << shift, part = team & sharing - 1;
    PartialSum<Part> sum[1];
    add<1, 9>(sum, unit, last, part, sharing);
    // First the teams of a warp, then the warps.
#pragma unroll
    for (int offset = kTeamThreads; offset < 32; offset *= 2) {
      if (offset < kTeamThreads * sharing) sum[0].merge_lanes(offset);
    }
    if (const int warps = sharing * kTeamThreads / 32; warps > 1) {
      if (threadIdx.x % 32 < kTeamThreads) sums[warp][lane] = sum[0];
      ptx::named_barrier_sync<kCombineThreads>(barrier);
      if ((warp & warps - 1) > 0) return;
      float peak = sum[0].peak;
#pragma unroll
      for (int w = 1; w < kCombineWarps; ++w) peak = w < warps ? fmaxf(peak, sums[warp + w][lane].peak) : peak;
      sum[0].raise(peak);
#pragma unroll
      for (int w = 1; w < kCombineWarps; ++w) {
        if (w >= warps) break;
        sum[0].add(sums[warp + w][lane]);
      }
    }
    if (part == 0 && own < last) store(unit, sum[0]);
  }

  // Add every `step`-th part from `part` on, of `kUnits` units. All that is read at a time is asked for before any is looked at.
  template <int kUnits, int kParts>
  __device__ __forceinline__ void add(PartialSum<Part> (&sum)[kUnits], int unit, int last, int part, int step) const {
    const int place = unit % kRowUnits * kTeamThreads + lane;  // in the row; units of a team are whole rows apart
    static_assert(kTeams % kRowUnits == 0);
    int first_row[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) first_row[u] = first_partial_row + min(unit + u * kTeams, last - 1) / kRowUnits;
#pragma unroll 1
    for (; part < parts.count; part += kParts * step) {
      float peaks[kUnits][kParts];
      Part read[kUnits][kParts];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          const int row = first_row[u] + (part + p * step) * stride;
          const bool exists = part + p * step < parts.count;
          peaks[u][p] = -INFINITY;
          ptx::load_if(exists, peaks[u][p], params.partial_lse + row);
          read[u][p].load_if(exists, params.partial_out + int64_t{row} * kLatentDim, place);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        float peak = peaks[u][0];
#pragma unroll
        for (int p = 1; p < kParts; ++p) peak = fmaxf(peak, peaks[u][p]);
        sum[u].raise(peak);
#pragma unroll
        for (int p = 0; p < kParts; ++p) sum[u].add(read[u][p], peaks[u][p]);
      }
    }
  }

  __device__ __forceinline__ void store(int unit, PartialSum<Part>& sum) const {
    const int row = parts.first_row + unit / kRowUnits, place = unit % kRowUnits * kTeamThreads + lane;
    const int query = query_of_row(params, row), token = parts.first_token + query, head = row - query * params.heads;
    if (place == 0 && params.lse != nullptr) {
      output_lse(params, token, head) = sum.total > 0 ? (sum.peak + ptx::log2(sum.total)) * kLn2 : -INFINITY;
    }
    sum.rescale(sum.total > 0 ? ptx::reciprocal(sum.total) : 0);
    Element* to = output_row<Element>(params, token, head);
#pragma unroll
    for (int i = 0; i < Part::kColumns / 2; ++i) {
      store_two(params, to + Part::column(place, i), sum.values[i * 2], sum.values[i * 2 + 1]);
    }
  }

  const DecodeParams& params;
  const Parts& parts;
  WarpSums<Part>& sums;
  const int barrier;
  const int thread;  // of the warpgroup
  const int lane;    // of the team
  const int first_partial_row;  // of the first part
  const int stride;  // from a part to the next, in rows
};

// Whether no request owns the token, or its request has no tokens to attend to. The request is guessed first, as if all had equally
// many tokens.
__device__ __forceinline__ bool attends_nothing(const DecodeParams& params, int token) {
  if (params.requests == 0) return true;
  int request = min(divide(token, params.max_query_len), params.requests - 1);
  int begin = params.query_start_loc[request], end = params.query_start_loc[request + 1], seq_len = params.seq_lens[request];
  if (token < begin || token >= end) {
    request = find_owner(params.query_start_loc, params.requests, token);
    begin = params.query_start_loc[request], end = params.query_start_loc[request + 1], seq_len = params.seq_lens[request];
  }
  return token < begin || token >= end || seq_len == 0;
}

// Clear the rows of every so many-th token that attends to nothing. Called by a warp of each block.
template <typename Element>
__device__ __forceinline__ void clear_rows(const DecodeParams& params) {
  const int lane = threadIdx.x % 32, blocks = gridDim.x * gridDim.y;
  for (int first = blockIdx.y * gridDim.x + blockIdx.x; first < params.tokens; first += 32 * blocks) {
    const int mine = first + lane * blocks;
    uint32_t clearing = __ballot_sync(~0u, mine < params.tokens && attends_nothing(params, mine));
    for (; clearing != 0; clearing &= clearing - 1) {
      const int token = first + (__ffs(clearing) - 1) * blocks;
#pragma unroll 1
      for (int head = 0; head < params.heads; ++head) {
        Element* to = output_row<Element>(params, token, head);
        for (int column = lane * 2; column < kLatentDim; column += 64) store_two(params, to + column, 0, 0);
        if (lane == 0 && params.lse != nullptr) output_lse(params, token, head) = -INFINITY;
      }
    }
  }
}

// Whether all workers with a part of a request combine it, and then wait for all parts. Else the one with the first part does their
// work, for whom this waits, too. Helpers wait always. Called by each of a worker's kGroups warpgroups when its parts are stored.
//
// To wait for others is safe only if they are at work, or two decode kernels at the same time could each keep the other's thread
// blocks from starting. The worker with the first part is the last one to start, so all of them are if it has, and helpers start
// after it. It says so when it starts, by what the counter begins with, unless somebody has counted before; so all take the counter
// to mean the same.
template <int kGroups>
__device__ __forceinline__ bool all_combine(const DecodeParams& params, const Piece& piece, int barrier) {
  bool all = false;
  if (threadIdx.x % 128 == 0) {
    uint32_t* const counter = arrivals(params, piece.first_slot());
    const bool waits = piece.part == 0 || piece.part >= piece.parts;
    const uint32_t stored = kGroups * piece.parts;
    uint32_t count;
    do {
      count = ptx::load_acquire(counter);
      all = count >= kAllStarted;
    } while (all ? count < kAllStarted + stored : waits && count < stored);
    // Whoever has seen that all are there counts, too, and the last of these sets the counter to 0.
    if (all) {
      ptx::count(counter, kAllStarted + 2 * stored + kGroups * piece.helpers - 1);
    } else if (waits) {
      ptx::count(counter, stored + kGroups * (1 + piece.helpers) - 1);
    }
  }
  return ptx::uniform(ptx::named_barrier_any<128>(barrier, all));
}

// Combine, with the others who have a part and with helpers, the requests of this worker's parts. Called by each of its kGroups
// warpgroups.
template <typename Element, typename Part, int kGroups>
__device__ __forceinline__ void combine_split(const DecodeParams& params, const SplitPieces& split, int group, int barrier,
                                              WarpSums<Part>& sums) {
#pragma unroll 1
  for (int i = 0; i < split.count; ++i) {
    const Piece piece = split.piece[i];  // all that can be known before the wait
    const int first_row = blockIdx.y * params.block_rows, rows = min(params.block_rows, piece.rows(params) - first_row);
    const Parts parts = {piece.first_slot(), piece.parts, piece.first_token, first_row};
    const Combiner<Element, Part> combiner(params, parts, sums, barrier);
    const int units = rows * combiner.kRowUnits, groups = (parts.count + piece.helpers) * kGroups;
    const int group_units = divide(units + groups - 1, groups);
    int part = piece.part, first = (part * kGroups + group) * group_units;
    const bool all = all_combine<kGroups>(params, piece, barrier);
    if (!all && part > 0 && part < parts.count) continue;
#pragma unroll 1
    for (;;) {
      combiner.combine(first, min(first + group_units, units));
      if (all || ++part >= parts.count) break;
      first += kGroups * group_units;
      ptx::named_barrier_sync<128>(barrier);  // the sums are used again
    }
  }
}

}  // namespace mla_backend::sm90
