// The split schedule of a step: the running count of the requests' tiles. One small launch, no host synchronisation.
#pragma once

#include "../decode.h"

namespace mla_backend::sm90 {

constexpr int kPlanThreads = 1024;

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const int32_t* seq_lens, int requests, int32_t* request_tiles) {
  __shared__ int warp_sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0;  // tiles of the requests of earlier rounds
  if (threadIdx.x == 0) request_tiles[0] = 0;
  for (int first = 0; first < requests; first += kPlanThreads) {
    const int request = first + threadIdx.x;
    int count = request < requests ? (seq_lens[request] + kTileTokens - 1) / kTileTokens : 0;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(~0u, count, offset);
      if (lane >= offset) count += other;
    }
    if (lane == 31) warp_sums[warp] = count;
    __syncthreads();
    int sums = warp_sums[lane];
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(~0u, sums, offset);
      if (lane >= offset) sums += other;
    }
    const int earlier_warps = __shfl_sync(~0u, sums, max(warp - 1, 0));
    if (request < requests) request_tiles[request + 1] = before + count + (warp > 0 ? earlier_warps : 0);
    before += __shfl_sync(~0u, sums, 31);
    __syncthreads();
  }
}

}  // namespace mla_backend::sm90
