// A thread of the wide kernels, and where it leaves results: in the output or, of a part of a request, in float16, to be added up.
#pragma once

#include "combine.cuh"

namespace mla_backend::sm90 {

constexpr int kBlockLatent = kLatentDim / 2;  // columns of a thread block of the cluster

// A mathematics thread of a wide kernel: which rows and columns of its warpgroup's accumulators are its own, 128 of 64 query rows x
// kBlockLatent columns, and how it stores them.
template <typename Element, int kRows>
class WideThread {
 protected:
  static constexpr bool kSharesRows = kRows == 64;  // both warpgroups have the same rows, and take turns with the tiles
  static constexpr int kGroups = 4;                 // of a worker
  using Part = Part16;                              // half of the bytes are worth the instructions
  static constexpr int kPlaceAccumulators = Part::kColumns * 2;  // of both rows, in a place

  // `shared` is where the block's shared memory begins.
  __device__ __forceinline__ WideThread(const DecodeParams& params, const void* shared)
      : params(params),
        rank(ptx::cluster_rank()),
        distance(ptx::in_block(shared, 1 - rank) - ptx::shared_address(shared)),
        group(ptx::uniform(threadIdx.x / 128)),
        thread(threadIdx.x % 128) {}

  // What is sent in this warpgroup arrives in the same place of the other block.
  __device__ __forceinline__ uint32_t over_there(const void* pointer) const {
    return ptx::shared_address(pointer) + distance;
  }

  // The warpgroup's first row in the block of rows, and in the request.
  __device__ __forceinline__ int group_row() const { return kSharesRows ? 0 : group * 64; }
  __device__ __forceinline__ int first_row() const { return blockIdx.y * params.block_rows + group_row(); }

  // A thread holds rows own_row() and own_row() + 8 of every accumulator, and in each group of 8 columns two neighbours.
  __device__ __forceinline__ static int own_lane() { return ptx::thread_index() % 32; }
  __device__ __forceinline__ static int own_column() { return own_lane() % 4 * 2; }
  __device__ __forceinline__ static int own_row() {
    const int index = ptx::thread_index() % 128;
    return index / 32 * 16 + index % 32 / 4;
  }

  // Write accumulators kBegin to kEnd (not included) of the own rows, with what other workers have found if this one completes the
  // request.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void finish(float (&out)[128], float (&log2_sum)[2], const Rows<Element>& results) {
    const bool has_lse = rank == 0 && own_lane() % 4 == 0 && (group == 0 || !kSharesRows);
    // In this order in the machine code, too, as in the narrow kernel.
    int complete = results.complete;
    if (!complete) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row() + own_row() + 8 * i;
        store_part<kBegin, kEnd>(results, row, [&](int j) { return out[j + i * 2]; });
        if (has_lse && row < results.last_row) results.store_partial_lse(row, log2_sum[i]);
      }
      results.announce(kGroupBarrier + group);
    }
    asm volatile("" : "+r"(complete));
    if (complete) {
      if (results.template wait_for_others<kGroups>(kGroupBarrier + group)) add_parts<kBegin, kEnd>(out, log2_sum, results);
      if (params.output_is_vectors) {
        store_vectors<kBegin, kEnd>(out, results);
      } else {
        store_elements<kBegin, kEnd>(out, results);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row() + own_row() + 8 * i;
        if (has_lse && row < results.last_row) results.store_lse(row, log2_sum[i]);
      }
    }
  }

  // Of a row of a part: where this thread has a place for its accumulators from `first` on, two neighbours of every four.
  __device__ __forceinline__ int place_of(int first) const {
    return rank * (kBlockLatent / Part::kColumns) + first / kPlaceAccumulators * 4 + own_lane() % 4;
  }

  // Add the other parts of a request, which this worker completes.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void add_parts(float (&out)[128], float (&log2_sum)[2], const Rows<Element>& results) {
    constexpr int kLoads = (kEnd - kBegin) / kPlaceAccumulators;  // on their way at a time
#pragma unroll 1
    for (int part = 1; part < results.parts; ++part) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row() + own_row() + 8 * i;
        const bool exists = row < results.last_row;
        const float* from = results.partial_out(row, part);
        float other = -INFINITY;
        ptx::load_if(exists, other, params.partial_lse + results.partial_row_of(row, part));
        Part read[kLoads];
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
          const bool scaled_alike = k * kPlaceAccumulators % (Part::kScaleColumns / 2) > 0;
          read[k].load_if(exists, from, place_of(kBegin + k * kPlaceAccumulators), scaled_alike ? &read[k - 1] : nullptr);
        }
        const Weights weights(log2_sum[i], other);
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
          float* own = &out[kBegin + k * kPlaceAccumulators + i * 2];
          float sum[Part::kColumns];
#pragma unroll
          for (int c = 0; c < Part::kColumns; ++c) sum[c] = own[c / 2 * 4 + c % 2] * weights.own;
          read[k].add_to(sum, weights.other);
#pragma unroll
          for (int c = 0; c < Part::kColumns; ++c) own[c / 2 * 4 + c % 2] = sum[c];
        }
      }
    }
  }

  // In float16, with scales. Of every four accumulators the row has value(0) and value(1), two neighbours in a group of eight
  // columns. Called by whole warps.
  template <int kBegin, int kEnd, typename Value>
  __device__ __forceinline__ void store_part(const Rows<Element>& results, int row, Value value) {
    // Of a thread: all, and those with the same scale.
    constexpr int kColumns = (kEnd - kBegin) / 2, kScaled = Part::kScaleColumns / 4;
    const auto column = [&](int c) { return value(kBegin + c / 2 * 4 + c % 2); };
    uint32_t packed[kColumns / 2];
    __half2 largest[kColumns / kScaled] = {};
#pragma unroll
    for (int k = 0; k < kColumns / 2; ++k) {
      packed[k] = pack<__half>(column(k * 2), column(k * 2 + 1));
      __half2& of_scale = largest[k * 2 / kScaled];
      of_scale = __hmax2(of_scale, __habs2(reinterpret_cast<const __half2&>(packed[k])));
    }
    float scale[kColumns / kScaled];
#pragma unroll
    for (float& of : scale) of = 1;
    // Nearly always all is well as it is.
    bool fits = true;
#pragma unroll
    for (const __half2 of_scale : largest) fits &= fits_half(of_scale);
    if (__any_sync(~0u, row < results.last_row && !fits)) {
#pragma unroll
      for (int s = 0; s < kColumns / kScaled; ++s) {
        float peak = 0;
#pragma unroll
        for (int c = s * kScaled; c < (s + 1) * kScaled; ++c) peak = fmaxf(peak, fabsf(column(c)));
        const HalfScale fitted(quad_max(peak));
        scale[s] = fitted.scale;
#pragma unroll
        for (int c = s * kScaled; c < (s + 1) * kScaled; c += 2) {
          packed[c / 2] = pack<__half>(column(c) * fitted.reciprocal, column(c + 1) * fitted.reciprocal);
        }
      }
    }
    if (row >= results.last_row) return;
    float* to = results.partial_out(row);
    const int place = place_of(kBegin);
#pragma unroll
    for (int k = 0; k < kColumns / 2; k += 4) {
      reinterpret_cast<uint4*>(to)[place + k] = make_uint4(packed[k], packed[k + 1], packed[k + 2], packed[k + 3]);
    }
    if (own_lane() % 4 > 0) return;
#pragma unroll
    for (int s = 0; s < kColumns / kScaled; ++s) to[kScales + place * Part::kColumns / Part::kScaleColumns + s] = scale[s];
  }

  // Lanes with even numbers exchange what they have of the second group for what the others have of the first, so that all store
  // four columns of one: 32 bytes of a row at a time.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void store_vectors(const float (&out)[128], const Rows<Element>& results) {
    const int lane = own_lane();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row() + own_row() + 8 * i;
      Element* to = results.out(row) + rank * kBlockLatent + lane % 2 * 8 + lane % 4 / 2 * 4;
      const auto value = [&](int j) { return out[j + i * 2]; };
#pragma unroll
      for (int j = kBegin; j < kEnd; j += 8) {
        const uint32_t first = pack<Element>(value(j), value(j + 1)), second = pack<Element>(value(j + 4), value(j + 5));
        const uint32_t received = __shfl_xor_sync(~0u, lane % 2 ? first : second, 1);
        if (row >= results.last_row) continue;
        *reinterpret_cast<uint2*>(to + j * 2) = lane % 2 ? make_uint2(received, second) : make_uint2(first, received);
      }
    }
  }

  // The same where rows may start anywhere.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void store_elements(const float (&out)[128], const Rows<Element>& results) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row() + own_row() + 8 * i;
      if (row >= results.last_row) continue;
      Element* to = results.out(row) + rank * kBlockLatent + own_column();
#pragma unroll
      for (int j = kBegin; j < kEnd; j += 4) {
        const uint32_t two = pack<Element>(out[j + i * 2], out[j + i * 2 + 1]);
        to[j * 2] = reinterpret_cast<const Element(&)[2]>(two)[0], to[j * 2 + 1] = reinterpret_cast<const Element(&)[2]>(two)[1];
      }
    }
  }

  const DecodeParams& params;
  const int rank;
  const uint32_t distance;  // from a place in this block's shared memory to the same place in the other block's
  const int group, thread;
};

}  // namespace mla_backend::sm90
