// The split schedule of a step, from the requests' lengths alone: one small launch, no host synchronisation.
//
// Lay the costs of all requests end to end: one for each tile, after what it costs a worker to begin a request. Worker w of W gets
// the tiles in the w-th of W nearly equal shares, or fewer workers do where the shares would be too small to be worth a partial
// result. A share may begin and end inside a request, so a worker handles a few pieces of requests; of these only the first and
// the last can be a part of their request, so that there are at most two partial results for each worker. Those of a request
// follow each other in the order of its tiles. A share that would begin just after a request's beginning begins with the request.
// Where no request has more than a few parts, the worker with the first one completes it: its share ends with that, and the next
// one begins with the next, so that the others are there, or nearly so. Else all workers add them up, at the same time.
//
// Where there is a worker for every request at least, each gets workers of its own, so many that none has more than a limit, unless
// that would have to be much more than an even share: to leave a few idle costs less than to let most of them begin anew in the
// middle of their share. Parts then come at the same time, and all who have one add them up. Workers that are left over help with
// that: if they took tiles, there would be more parts, and the last one would not be ready sooner.
//
// And no request is split where that would save less time than it takes to combine parts, or in a batch-invariant schedule: the
// worker with a request's beginning has all of it.
#pragma once

#include <climits>
#include <cub/block/block_scan.cuh>

#include "../decode.h"

namespace mla_backend::sm90 {

// A thread for each worker, and for each request of a round. More would have more instructions to issue and end no sooner.
constexpr int kPlanThreads = 256;
constexpr int kPlanWarps = kPlanThreads / 32;

// What the plan depends on beside the lengths. Costs are in tiles.
struct PlanParams {
  const int32_t* seq_lens;
  int requests;
  int workers;      // at most
  int least_share;  // of workers that divide requests, on average, if these are more than half of all
  int begin_cost;   // of a request
  int uneven_cost;  // of shares that begin anywhere, if otherwise some requests were split
  int whole_cost;   // and if otherwise none were
  int split_cost;   // of a part for each worker: storing them, and combining them when all are there
  int most_parts;   // of any request, if first workers complete them
  bool batch_invariant;
};

// How cost is divided among workers whose shares begin anywhere.
struct Division {
  int total, workers, quotient, remainder;

  __device__ Division(int total, int workers)
      : total(total), workers(workers), quotient(total / workers), remainder(total % workers) {}

  // Where a worker's share begins; those of workers that get nothing, at the end.
  __device__ int begin(int worker) const {
    return worker < workers ? worker * quotient + min(worker, remainder) : total;
  }

  __device__ int worker_of(int position) const {
    const int larger = remainder * (quotient + 1);
    return position < larger ? position / (quotient + 1) : remainder + (position - larger) / quotient;
  }
};

// How many workers requests get that have workers of their own, of which none has more than `most` tiles.
struct Allotment {
  int most, workers;

  __device__ int workers_of(int tiles) const { return (tiles + most - 1) / most; }
};

// The request that a share begins with: its number and length, where its first tile is in cost and in tiles, its first partial
// result, and its workers.
struct Beginning {
  int request, seq_len;
  int position, tile;
  int slot;
  int first_worker, workers;

  __device__ int tiles() const { return (seq_len - 1) / kTileTokens + 1; }
  __device__ int tiles_before(int at) const { return tile + max(0, at - position); }
};

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(PlanParams params, Share* shares, int32_t* splits) {
  using Scan = cub::BlockScan<int, kPlanThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ int first_request[kPlanThreads];  // of the share of the worker with the thread's number
  __shared__ Beginning beginnings[kPlanThreads];
  __shared__ int whole_tiles[kPlanThreads];  // of the worker's requests, where none is split; while that is judged, their costs
  __shared__ int longest_whole_share, lowest_limit, most_parts;
  __shared__ Allotment allotment;
  const int thread = threadIdx.x, requests = params.requests;
  const auto length_of = [&](int request) { return request < requests ? params.seq_lens[request] : 0; };
  const auto tiles_of = [](int seq_len) { return (seq_len + kTileTokens - 1) / kTileTokens; };
  const auto sum_before = [&](int value, int& sum) {
    int before;
    Scan(storage).ExclusiveSum(value, before, sum);
    __syncthreads();  // the storage is used again
    return before;
  };

  if (thread == 0) longest_whole_share = most_parts = 0, lowest_limit = INT_MAX, allotment = {};
  __syncthreads();
  int all_tiles = 0, begun = 0;  // requests with tiles; those without count for nothing, as CUDA graphs pad batches with them
  for (int first = 0; first < requests; first += kPlanThreads) {
    const int tiles = tiles_of(length_of(first + thread));
    int sum;
    sum_before(tiles, sum);
    all_tiles += sum, begun += __syncthreads_count(tiles > 0);
  }
  // Without splits there may be a worker for every request. What would the longest share cost?
  Division division(all_tiles + begun * params.begin_cost, params.workers);
  const int begin_cost = params.begin_cost;
  bool whole = params.batch_invariant, aligned = false;  // whether no worker has tiles of two requests
  int workers = params.workers;  // that may get something
  if (!whole) {
    whole_tiles[thread] = 0;
    __syncthreads();
    for (int first = 0, before = 0; first < requests; first += kPlanThreads) {
      const int tiles = tiles_of(length_of(first + thread)), cost = tiles > 0 ? tiles + begin_cost : 0;
      int sum;
      const int begin = before + sum_before(cost, sum);
      if (cost > 0) atomicAdd(&whole_tiles[division.worker_of(begin)], cost);
      before += sum;
    }
    __syncthreads();
    if (whole_tiles[thread] > 0) atomicMax(&longest_whole_share, whole_tiles[thread]);
    __syncthreads();

    const int single = min(all_tiles, params.workers / 2);  // workers that may have one tile each
    const int sharing = max(1, min(params.workers, max(single, all_tiles / params.least_share)));
    if (begun <= sharing) {
      // Every warp tries limits of its own, and the lowest one that suffices is taken.
      const int even_share = max(1, all_tiles / sharing), highest = even_share + max(params.uneven_cost, params.whole_cost);
      Allotment tried = {even_share + thread / 32, 0};
      bool suffices = false;
      for (; tried.most <= highest; tried.most += kPlanWarps) {
        int own_workers = 0, split = 0;
        for (int request = thread % 32; request < requests; request += 32) {
          const int of_request = tried.workers_of(tiles_of(params.seq_lens[request]));
          own_workers += of_request, split += of_request > 1;
        }
        tried.workers = __reduce_add_sync(~0u, own_workers), split = __reduce_add_sync(~0u, split);
        const int longest = even_share + (split > 0 ? params.uneven_cost : params.whole_cost);
        suffices = tried.workers <= sharing && tried.most <= longest;
        if (suffices) break;
      }
      if (suffices && thread % 32 == 0) atomicMin(&lowest_limit, tried.most);
      __syncthreads();
      if (suffices && tried.most == lowest_limit) allotment = tried;
      __syncthreads();
      aligned = allotment.workers > 0;
    }
    const Division splitting(division.total, sharing);
    // Shares that begin anywhere begin with a part and end with another one. Where many workers can help, parts cost less.
    int split_cost = aligned ? params.split_cost : 2 * params.split_cost;
    if (aligned && allotment.workers <= params.workers / 4) split_cost = max(1, params.split_cost / 3);
    whole = longest_whole_share <= (aligned ? allotment.most : splitting.quotient) + split_cost + begin_cost;
    aligned &= !whole;
    if (!whole) division = splitting, workers = sharing;
  }
  const int nobody = whole ? INT_MAX : -1;

  first_request[thread] = nobody, whole_tiles[thread] = 0;
  if (thread == 0) splits[0] = 0;
  __syncthreads();
  int tiles_before = 0, begun_before = 0, splits_before = 0, workers_before = 0;  // of the requests of earlier rounds
  for (int first = 0; first < requests; first += kPlanThreads) {
    const int request = first + thread, seq_len = length_of(request), tiles = tiles_of(seq_len);
    int tiles_sum, begun_sum, splits_sum, workers_sum = 0;
    const int tile = tiles_before + sum_before(tiles, tiles_sum);
    const int begin = tile + (begun_before + sum_before(tiles > 0, begun_sum)) * begin_cost;
    Beginning own = {request, seq_len, begin + begin_cost, tile, 0, 0, 1};
    if (aligned) {
      own.workers = allotment.workers_of(tiles);
      own.first_worker = workers_before + sum_before(own.workers, workers_sum);
    } else if (!whole && tiles > 0) {
      own.first_worker = division.worker_of(own.position);
      own.workers = division.worker_of(own.position + tiles - 1) - own.first_worker + 1;
    }
    const int parts = own.workers > 1 ? own.workers : 0;
    own.slot = splits_before + sum_before(parts, splits_sum);
    if (request < requests) splits[request + 1] = own.slot + parts;
    if (parts > 0) atomicMax(&most_parts, parts);
    tiles_before += tiles_sum, begun_before += begun_sum, splits_before += splits_sum, workers_before += workers_sum;

    // A share begins with the last request that begins before it, so a request announces itself to the first worker whose share
    // begins after it, and the last one is heard. Where none is split, to the worker that has it, and the first one is heard.
    int worker = params.workers;
    if (tiles > 0 && aligned) {
      worker = own.first_worker;
    } else if (tiles > 0) {
      worker = whole ? division.worker_of(begin) : begin == 0 ? 0 : division.worker_of(begin - 1) + 1;
    }
    const bool begins = worker < params.workers;
    if (begins && whole) {
      atomicMin(&first_request[worker], request);
      atomicAdd(&whole_tiles[worker], tiles);
    } else if (begins) {
      atomicMax(&first_request[worker], request);
    }
    __syncthreads();
    if (begins && first_request[worker] == request) beginnings[worker] = own;
  }
  if (aligned) workers = workers_before;
  __syncthreads();

  Share share = {};
  if (whole) {
    if (share.tiles = whole_tiles[thread]; share.tiles > 0) {
      share.request = beginnings[thread].request, share.seq_len = beginnings[thread].seq_len;
    }
  } else {
    // A share that begins inside a request begins with that of the last worker before it where a request begins.
    __shared__ int begins_as[kPlanThreads + 1];
    Scan(storage).InclusiveScan(first_request[thread] == nobody ? 0 : thread, begins_as[thread],
                                [](int a, int b) { return max(a, b); });
    __syncthreads();
    const Beginning first = beginnings[begins_as[thread]];
    const int part = thread - first.first_worker;
    share.request = first.request, share.seq_len = first.seq_len, share.slot = first.slot + part;
    if (first.workers > 1) share.part = part, share.parts = first.workers;
    if (aligned && thread < workers) {
      share.first_tile = part * first.tiles() / first.workers;
      share.tiles = (part + 1) * first.tiles() / first.workers - share.first_tile;
    } else if (const int begin = division.begin(thread), end = division.begin(thread + 1); !aligned && begin < end) {
      const bool is_last = end == division.total;
      const Beginning next = is_last ? Beginning{} : beginnings[begins_as[thread + 1]];  // what the next share begins with
      share.tiles = (is_last ? all_tiles : next.tiles_before(end)) - first.tiles_before(begin);
      share.first_tile = first.tiles_before(begin) - first.tile;
      if (!is_last && next.request != first.request && next.position < end) share.last_parts = next.workers;
    }
    if (share.tiles == 0) share = {};
    // As many helpers for each part, or nearly so.
    if (const int helpers = params.workers - workers; aligned && helpers > 0 && splits_before > 0) {
      __shared__ int with_slot[kPlanThreads];
      const auto first_helper = [=](int slot) { return (slot * helpers + splits_before - 1) / splits_before; };
      const auto helpers_of = [=](const Beginning& request) {
        return first_helper(request.slot + request.workers) - first_helper(request.slot);
      };
      if (share.parts > 0) with_slot[share.slot] = thread, share.helpers = helpers_of(first);
      __syncthreads();
      if (const int helper = thread - workers; helper >= 0 && helper < helpers) {
        const Beginning helped = beginnings[begins_as[with_slot[helper * splits_before / helpers]]];
        share.request = helped.request, share.parts = helped.workers, share.helpers = helpers_of(helped);
        share.part = helped.workers + helper - first_helper(helped.slot);
        share.slot = helped.slot + share.part;
      }
    }
  }
  share.step_is_small = all_tiles < kSmallStep;
  share.first_completes = !aligned && most_parts <= params.most_parts;
  // Those of later workers come first: thread blocks start in this order, and whoever completes a request waits for later workers
  // only, which so are on their way whatever else the GPU has to do. Those past the last that may have a share are left to the end.
  if (thread < params.workers) shares[thread < workers ? workers - 1 - thread : thread] = share;
}

}  // namespace mla_backend::sm90
