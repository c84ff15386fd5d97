// Which tiles of which request a thread block handles: a worker's share of the schedule, piece by piece.
#pragma once

#include "../decode.h"

namespace mla_backend {

// A piece of a request: its tiles first_tile to last_tile (not included), for the query rows of one block.
struct Piece {
  int request;
  int first_tile, last_tile;
  int slot;         // of its partial result; negative if it is all of the request
  int part, parts;  // which one it is of so many parts of the request, from where helpers count on; 0 parts if it is all of it
  int helpers;      // that combine the request's parts and have none
  bool first_completes;  // whether the worker with the first part adds the others
  int seq_len;
  int first_token, queries;  // of the request

  __device__ int tiles() const { return last_tile - first_tile; }
  __device__ int first_slot() const { return slot - part; }
  // Whether its results are the output: it is all of the request, or the first part and adds the others.
  __device__ bool completes() const { return parts == 0 || (first_completes && part == 0); }
  // Whether all who have a part of the request combine it.
  __device__ bool combined() const { return parts > 0 && !first_completes; }
  __device__ int rows(const DecodeParams& params) const { return queries * params.heads; }
};

// The pieces of a share that are parts of requests which all of their workers combine: the first one and the last one, at most. Or
// the request that a helper combines.
struct SplitPieces {
  Piece piece[2];
  int count;
};

// a / divisor in few instructions, given 2^32 / divisor, rounded up. Exact where a x divisor is less than 2^32.
__device__ __forceinline__ int quotient(int a, int divisor, uint32_t reciprocal) {
  return divisor == 1 ? a : __umulhi(a, reciprocal);
}

__device__ __forceinline__ int query_of_row(const DecodeParams& params, int row) {
  return quotient(row, params.heads, params.heads_reciprocal);
}

// The pieces of a worker's share, one after the other. Its functions are called by whole warps.
class Pieces {
 public:
  __device__ explicit Pieces(const DecodeParams& params) : params_(params) {}

  // Look up where share number `share` begins.
  __device__ void find(int share) { share_ = params_.shares[share]; }

  // Whether the step reads each tile once and not many of them, so that the L2 cache had better keep what it has.
  __device__ bool read_little_once() const { return params_.row_blocks == 1 && share_.step_is_small; }

  // The next piece, but for its queries, which must have been found before this is called again.
  __device__ bool take(Piece& piece) {
    if (share_.tiles == 0) return false;
    while (__builtin_expect(share_.seq_len == 0, 0)) {  // on to the next request with tokens
      if (++share_.request == params_.requests) return false;
      if (share_.request == ahead_ + 32) look_ahead();
      share_.seq_len = __shfl_sync(~0u, seq_len_, share_.request - ahead_);
    }
    const int request_tiles = (share_.seq_len - 1) / kTileTokens + 1;
    const int last_tile = min(request_tiles, share_.first_tile + share_.tiles);
    const bool whole = share_.first_tile == 0 && last_tile == request_tiles;
    // The share's first piece, if it is a part at all, is number `part` of `parts`, the last one the first of `last_parts`.
    const int parts = share_.parts > 0 ? share_.parts : whole ? 0 : share_.last_parts;
    piece = {share_.request, share_.first_tile, last_tile, whole ? -1 : share_.slot++, share_.part, parts,
             share_.helpers, share_.first_completes != 0, share_.seq_len, 0, 0};
    share_.part = share_.parts = 0;
    share_.tiles -= piece.tiles();
    share_.first_tile = share_.seq_len = 0;
    return true;
  }

  // Whether there is anything to do, before any piece is taken. Else there may be no request at all.
  __device__ bool any() const { return share_.tiles > 0 || share_.parts > 0; }

  // For find_queries(), which else asks itself and waits: the lengths and queries of requests come from memory.
  __device__ void ask_for_queries() {
    if (ahead_ == kNowhere) look_ahead();
  }

  // Of a helper: the request that it combines, but for its queries.
  __device__ bool take_helped(Piece& piece) const {
    piece = {share_.request, 0, 0, share_.slot, share_.part, share_.parts, share_.helpers, false, 0, 0, 0};
    return share_.parts > 0;
  }

  // Before any piece is taken: whether this worker has the first part of a request that all of its workers combine, and its slot.
  __device__ bool begins_combined() const {
    return !share_.first_completes && (share_.last_parts > 0 || (share_.parts > 0 && share_.part == 0));
  }
  __device__ int begun_slot() const { return share_.slot + (share_.last_parts > 0 && share_.parts > 0); }

  // Where the queries of the piece that was taken last lie.
  __device__ void find_queries(Piece& piece) {
    ask_for_queries();
    piece.first_token = __shfl_sync(~0u, first_token_, piece.request - ahead_);
    piece.queries = __shfl_sync(~0u, end_token_, piece.request - ahead_) - piece.first_token;
  }

 private:
  __device__ void look_ahead() {
    ahead_ = share_.request;
    const int request = min(ahead_ + static_cast<int>(threadIdx.x) % 32, params_.requests - 1);
    seq_len_ = params_.seq_lens[request];
    first_token_ = params_.query_start_loc[request], end_token_ = params_.query_start_loc[request + 1];
  }

  const DecodeParams& params_;
  Share share_ = {};  // what is left of it
  static constexpr int kNowhere = -64;
  int ahead_ = kNowhere;  // the lanes hold the lengths of this request and the 31 after it, once anybody has asked
  int seq_len_, first_token_, end_token_;
};

// Index of row 0 of a partial result.
__device__ __forceinline__ int partial_row(const DecodeParams& params, int slot, int row_block) {
  return (slot * params.row_blocks + row_block) * params.block_rows;
}

}  // namespace mla_backend
