// The split schedule of a step, from the requests' lengths alone: one small launch, no host synchronisation.
//
// Lay the tiles of all requests end to end. Worker w of W gets the w-th of W nearly equal shares, or fewer workers do where
// the shares would be too small to be worth a partial result. A share may begin and end inside a request, so a worker handles a
// few pieces of requests; of these only the first and the last can be a part of their request, so that there are at most two
// partial results for each worker. Those of a request follow each other in the order of its tiles.
//
// Requests of equal length get equally many workers each: to leave a few idle costs less than to let most of them begin anew in
// the middle of their share. In a batch-invariant schedule no request is split: the worker with a request's first tile has all
// of it.
#pragma once

#include <climits>
#include <cub/block/block_scan.cuh>

#include "../decode.h"

namespace mla_backend::sm90 {

constexpr int kPlanThreads = 1024;

// How tiles are divided among workers.
struct Division {
  int total, quotient, remainder;
  int length = 0, parts = 0;  // with requests of equal length: their tiles, and workers for each

  // First tile of a worker's share; of workers that get nothing, past the last tile.
  __device__ int begin(int worker) const {
    if (parts == 0) return min(worker * quotient + min(worker, remainder), total);
    const int request = worker / parts;
    return min(request * length + (worker - request * parts) * length / parts, total);
  }

  __device__ int worker_of(int tile) const {
    if (parts > 0) return tile / length * parts + ((tile % length + 1) * parts - 1) / length;
    const int larger = remainder * (quotient + 1);
    return tile < larger ? tile / (quotient + 1) : remainder + (tile - larger) / quotient;
  }
};

// The request that a share begins with: its number, first tile among all tiles, length, and first partial result.
struct Beginning {
  int request, first_tile, seq_len, slot;
};

template <bool kBatchInvariant>
__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const int32_t* seq_lens, int requests, int most_workers, int least_share, Share* shares, int32_t* splits) {
  using Scan = cub::BlockScan<int, kPlanThreads>;
  constexpr int kNobody = kBatchInvariant ? INT_MAX : -1;
  __shared__ typename Scan::TempStorage storage;
  __shared__ int first_request[kPlanThreads];  // of the share of the worker with the thread's number
  __shared__ Beginning beginnings[kPlanThreads];
  __shared__ int whole_tiles[kPlanThreads];  // of the worker's requests, where none is split
  const int thread = threadIdx.x;
  const auto tiles_of = [&](int request) { return request < requests ? (seq_lens[request] + kTileTokens - 1) / kTileTokens : 0; };
  const auto sum_before = [&](int value, int& sum) {
    int before;
    Scan(storage).ExclusiveSum(value, before, sum);
    __syncthreads();  // the storage is used again
    return before;
  };

  Division division = {};
  bool equal = true;
  const int length = tiles_of(0);
  for (int first = 0; first < requests; first += kPlanThreads) {
    const int request = first + thread, tiles = tiles_of(request);
    int sum;
    sum_before(tiles, sum);
    division.total += sum;
    equal &= __syncthreads_and(request >= requests || tiles == length);
  }
  const int workers = max(1, min(most_workers, division.total / least_share));
  division.quotient = division.total / workers, division.remainder = division.total % workers;
  if (equal && length > 0 && requests <= workers) division.length = length, division.parts = workers / requests;

  first_request[thread] = kNobody, whole_tiles[thread] = 0;
  if (thread == 0) splits[0] = 0;
  __syncthreads();
  int tiles_before = 0, splits_before = 0;  // of the requests of earlier rounds
  for (int first = 0; first < requests; first += kPlanThreads) {
    const int request = first + thread, tiles = tiles_of(request);
    int tiles_sum, splits_sum;
    const int begin = tiles_before + sum_before(tiles, tiles_sum);
    const int first_worker = tiles > 0 ? division.worker_of(begin) : 0;
    const int workers_of_it = tiles > 0 && !kBatchInvariant ? division.worker_of(begin + tiles - 1) - first_worker + 1 : 1;
    const int parts = workers_of_it > 1 ? workers_of_it : 0;
    const int slot = splits_before + sum_before(parts, splits_sum);
    if (request < requests) splits[request + 1] = slot + parts;
    tiles_before += tiles_sum, splits_before += splits_sum;

    // The first worker whose share begins with this request's first tile or later, and so with the last such request; or the one
    // that has all of it, and begins with the first such request.
    const int worker = kBatchInvariant || begin == 0 ? first_worker : division.worker_of(begin - 1) + 1;
    const bool begins = tiles > 0 && worker < most_workers;
    if (begins && kBatchInvariant) {
      atomicMin(&first_request[worker], request);
      atomicAdd(&whole_tiles[worker], tiles);
    } else if (begins) {
      atomicMax(&first_request[worker], request);
    }
    __syncthreads();
    if (begins && first_request[worker] == request) beginnings[worker] = {request, begin, seq_lens[request], slot};
  }
  __syncthreads();

  Share share = {};
  share.step_is_small = division.total < kSmallStep;
  if constexpr (kBatchInvariant) {
    if (share.tiles = whole_tiles[thread]; share.tiles > 0) {
      share.request = beginnings[thread].request, share.seq_len = beginnings[thread].seq_len;
    }
  } else {
    // A share that begins inside a request begins with that of the last worker before it where a request begins.
    __shared__ int begins_as[kPlanThreads + 1];
    Scan(storage).InclusiveScan(first_request[thread] == kNobody ? 0 : thread, begins_as[thread],
                                [](int a, int b) { return max(a, b); });
    __syncthreads();
    const auto workers_of = [&](const Beginning& of) {
      const int tiles = (of.seq_len - 1) / kTileTokens + 1;
      return division.worker_of(of.first_tile + tiles - 1) - division.worker_of(of.first_tile) + 1;
    };
    const int begin = division.begin(thread), end = division.begin(thread + 1);
    if (share.tiles = end - begin; share.tiles > 0) {
      const Beginning first = beginnings[begins_as[thread]];
      share.request = first.request, share.first_tile = begin - first.first_tile, share.seq_len = first.seq_len;
      const int part = thread - division.worker_of(first.first_tile), parts = workers_of(first);
      share.slot = first.slot + part;
      if (parts > 1) share.part = part, share.parts = parts;
      if (end < division.total) {
        const Beginning next = beginnings[begins_as[thread + 1]];  // what the next share begins with
        if (next.request != first.request && next.first_tile < end) {
          share.last_request = next.request, share.last_parts = workers_of(next);
        }
      }
    }
  }
  if (thread < most_workers) shares[thread] = share;
}

}  // namespace mla_backend::sm90
