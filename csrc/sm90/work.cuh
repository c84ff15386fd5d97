// Which tiles of which request a thread block handles: the split schedule, as every kernel reads it.
//
// Lay the tiles of all requests end to end; `request_tiles` is their running count. Worker w of W gets the w-th of W
// nearly equal shares, or fewer workers do where the shares would be too small to be worth a partial result. A share may
// begin and end inside a request, so a worker handles a few pieces of requests; of these only the first and the last can be
// a part of their request, and so a worker has two places for partial results. Requests of equal length get equally many
// workers each: to leave a few idle costs less than to let most of them begin anew in the middle of their share.
#pragma once

#include "../decode.h"

namespace mla_backend {

// Index of the last entry of the ascending `starts` [count + 1] that is <= value, so that value lies in
// starts[i]:starts[i + 1]. All 32 lanes search together: two reads for a thousand entries.
__device__ __forceinline__ int find_owner(const int32_t* starts, int count, int value) {
  const int lane = threadIdx.x % 32;
  int low = 0;  // starts[low] <= value
  for (int span = count; span > 1;) {
    const int step = (span + 31) / 32;
    const int probe = low + lane * step;
    const bool below = probe < low + span && probe < count && starts[probe] <= value;
    const int last = 31 - __clz(__ballot_sync(~0u, below) | 1u);
    low += last * step;
    span = min(step, span - last * step);
  }
  return low;
}

constexpr int kLeastShare = 2;  // tiles that a worker gets at least
constexpr int kFewTiles = 3072;  // 226 MB, four times what the L2 cache holds; with more it gained nothing or lost

// a / b, in a third of the instructions where a < 2^20: these are cold in the caches when a kernel begins. (a + 1/2) / b is
// 1 / 2b or more from any whole number, and its error less than that.
__device__ __forceinline__ int divide(int a, int b) {
  return a < 1 << 20 ? __float2int_rz(__fdividef(a + 0.5f, b)) : a / b;
}

// The shares of all workers. Made by a whole warp.
class Shares {
 public:
  __device__ explicit Shares(const DecodeParams& params) {
    // The first entries are asked for all at once, before the total tells which of them matters: a kernel cannot start
    // before it knows its first request, and each load that waits for another one costs most of a microsecond.
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) counts_[i] = params.request_tiles[min(i * 32 + lane, params.requests)];
    const bool all_held = params.requests < kLoads * 32;
    total = all_held ? __shfl_sync(~0u, counts_[kLoads - 1], 31) : params.request_tiles[params.requests];
    const int workers = max(1, min(params.workers, total / kLeastShare));
    quotient_ = divide(total, workers), remainder_ = total - quotient_ * workers;
    if (all_held && total > 0 && params.requests <= workers) {
      const int length = divide(total, params.requests);
      bool equal = length * params.requests == total;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) equal &= counts_[i] == min(i * 32 + lane, params.requests) * length;
      if (__all_sync(~0u, equal)) length_ = length, parts_ = divide(workers, params.requests);
    }
  }

  // First tile of a worker's share; of workers that get nothing, past the last tile.
  __device__ int begin(int worker) const {
    int first = worker * quotient_ + min(worker, remainder_);
    if (parts_ > 0) {
      const int request = divide(worker, parts_);
      first = request * length_ + divide((worker - request * parts_) * length_, parts_);
    }
    return min(first, total);
  }

  __device__ int worker_of(int tile) const {
    if (parts_ > 0) return tile / length_ * parts_ + ((tile % length_ + 1) * parts_ - 1) / length_;
    const int larger = remainder_ * (quotient_ + 1);
    return tile < larger ? tile / (quotient_ + 1) : remainder_ + (tile - larger) / quotient_;
  }

  // The request that a tile belongs to.
  __device__ int owner(const DecodeParams& params, int tile) const {
    if (params.requests >= kLoads * 32) return find_owner(params.request_tiles, params.requests, tile);
    const int lane = threadIdx.x % 32;
    int owner = -1;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      owner += __popc(__ballot_sync(~0u, i * 32 + lane < params.requests && counts_[i] <= tile));
    }
    return owner;
  }

  int total;

 private:
  static constexpr int kLoads = 4;
  int counts_[kLoads];  // the lanes hold the first entries of request_tiles
  int quotient_, remainder_;
  int length_ = 0, parts_ = 0;  // with requests of equal length: their tiles, and workers for each
};

// A piece of a request: its tiles first_tile to last_tile (not included), for the query rows of one block.
struct Piece {
  int request;
  int first_tile, last_tile, request_tiles;
  bool begins_share;  // it is the first of its worker's share, whose partial results go to the first of two places
  int first_token, queries, seq_len;  // of the request

  __device__ int tiles() const { return last_tile - first_tile; }
  __device__ bool whole() const { return first_tile == 0 && last_tile == request_tiles; }
  __device__ int rows(const DecodeParams& params) const { return queries * params.heads; }
};

// row / heads, without a division.
__device__ __forceinline__ int query_of_row(const DecodeParams& params, int row) {
  return params.heads == 1 ? row : __umulhi(row, params.heads_reciprocal);
}

// The pieces of a worker's share, one after the other. Its functions are called by whole warps.
class Pieces {
 public:
  __device__ explicit Pieces(const DecodeParams& params) : params_(params) {}

  // Look up where the share of a worker begins.
  __device__ void find(int worker) {
    const DecodeParams& params = params_;
    if (params.batch_invariant) {
      request_ = worker - params.workers;
      return;
    }
    // Asked for together with the schedule: a kernel cannot start before it knows its first request.
    if (const int lane = threadIdx.x % 32; lane < params.requests) {
      seq_len_ = params.seq_lens[lane];
      first_token_ = params.query_start_loc[lane], end_token_ = params.query_start_loc[lane + 1];
    }
    const Shares shares(params);
    next_ = share_begin_ = shares.begin(worker);
    end_ = shares.begin(worker + 1);
    all_tiles_ = shares.total;
    if (next_ < end_) request_ = shares.owner(params, next_);
  }

  // Whether the step reads each tile once and not many of them, so that the L2 cache had better keep what it has.
  __device__ bool read_little_once() const { return params_.row_blocks == 1 && all_tiles_ > 0 && all_tiles_ < kFewTiles; }

  __device__ bool take(Piece& piece) {
    if (params_.batch_invariant) {
      // Every so many-th request, as a whole.
      do {
        request_ += params_.workers;
        if (request_ >= params_.requests) return false;
        next_ = params_.request_tiles[request_], end_ = params_.request_tiles[request_ + 1];
      } while (next_ == end_);
    }
    if (next_ >= end_) return false;
    while (params_.request_tiles[request_ + 1] <= next_) ++request_;
    const int begin = params_.request_tiles[request_], end = params_.request_tiles[request_ + 1];
    const bool held = request_ < 32 && !params_.batch_invariant;
    const auto of_request = [&](int mine, const int32_t* all) {
      return held ? __shfl_sync(~0u, mine, request_) : all[request_];
    };
    const int first_token = of_request(first_token_, params_.query_start_loc);
    const int end_token = of_request(end_token_, params_.query_start_loc + 1);
    piece = {request_, next_ - begin, min(end, end_) - begin, end - begin, next_ == share_begin_,
             first_token, end_token - first_token, of_request(seq_len_, params_.seq_lens)};
    next_ = begin + piece.last_tile;
    return true;
  }

 private:
  const DecodeParams& params_;
  int next_ = 0, end_ = 0, share_begin_ = 0, request_ = 0, all_tiles_ = 0;
  int seq_len_, first_token_, end_token_;  // the lanes hold those of the first requests
};

// Index of row 0 of a piece's partial results.
__device__ __forceinline__ int64_t partial_row(const DecodeParams& params, int row_block, int worker, bool begins_share) {
  return ((static_cast<int64_t>(row_block) * params.workers + worker) * 2 + (begins_share ? 0 : 1)) * params.block_rows;
}

}  // namespace mla_backend
