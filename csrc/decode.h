// What the host hands to the device for one decode call. Strides count elements.
#pragma once

#include <cstdint>

namespace mla_backend {

constexpr int kLatentDim = 512;  // also the width of a value
constexpr int kRopeDim = 64;
constexpr int kHeadDim = kLatentDim + kRopeDim;
constexpr int kMaxHeads = 128;
constexpr int kMaxTokens = 65535;  // query tokens: thread blocks that a grid can have in its second dimension

constexpr int kTileTokens = 64;   // cached tokens that a thread block handles at a time: the unit of the schedule
constexpr int kLeastBox = kTileTokens / 2;  // tokens that the copy engine brings at a time, at least, from pages of several boxes

// Pages that a request may have: with more, quotient() of its boxes by those of a page would not be exact.
constexpr int64_t max_pages(int64_t page_size) { return (int64_t{1} << 32) * kLeastBox * kLeastBox / page_size / page_size; }

constexpr int kPartialRows = 64;  // query rows (token and head) that there is room for in a partial result, per multiprocessor

// A worker's share of a step, as the schedule gives it: `tiles` tiles, beginning with tile `first_tile` of request `request`
// and going on with the next requests'. Or that of a helper, which has no tiles and combines what others find.
struct alignas(16) Share {
  int32_t request, first_tile, tiles;
  int32_t slot;           // of its first partial result, a second one has the next; of a helper, as if it had a part
  int32_t seq_len;        // of the request that it begins with
  // Which one it has of so many parts of the request that it begins with; 0 parts if it has all of it. Helpers count on from there.
  int16_t part, parts;
  int16_t last_parts;     // of the request that it ends with, 0 if it has all of it or begins with it
  int16_t helpers;        // of the request that it begins with
  uint32_t step_is_small : 1;    // whether all shares together have less than kSmallStep tiles
  uint32_t first_completes : 1;  // whether all that are split are completed by the worker with their first part
};
constexpr int kSmallStep = 3072;  // 226 MB in 16 bits, four times what the L2 cache holds: with more it gained nothing or lost
constexpr int kShareNumbers = sizeof(Share) / sizeof(int32_t);

struct DecodeParams {
  // First what the first page is found and asked for with.
  const Share* shares;         // [workers], the schedule; those of later tiles first
  const int32_t* block_table;  // [requests, max_pages]
  int64_t block_table_stride;
  int requests, page_size;
  // Set with the choice of the kernel: a request's query rows (token and head) are handled in blocks of whole tokens, each of
  // them by all workers.
  int block_rows, row_blocks;
  int box_shift;       // the copy engine brings 2^box_shift tokens of a page at a time,
  int boxes_per_page;  // so many times
  uint32_t heads_reciprocal, boxes_reciprocal;  // for quotient()
  const int32_t* seq_lens;         // [requests]
  const int32_t* query_start_loc;  // [requests + 1]
  int tokens, heads;
  int max_query_len;          // query tokens that a request may have
  int workers;                // thread blocks, or clusters of them, that share the tiles
  bool causal;
  bool queries_are_vectors;  // every row of the queries starts at a multiple of 16 bytes, as the copy engine wants it
  float softmax_scale;

  // Queries [tokens, heads, 512] and [tokens, heads, 64].
  const void* q_nope;
  const void* q_pe;
  int64_t q_nope_token_stride, q_nope_head_stride;
  int64_t q_pe_token_stride, q_pe_head_stride;

  // Output [tokens, heads, 512], contiguous in the last dimension.
  void* out;
  int64_t out_token_stride, out_head_stride;
  bool output_is_vectors;  // every row starts at a multiple of 16 bytes
  float* lse;  // [tokens, heads] or null
  int64_t lse_token_stride, lse_head_stride;

  // Results of requests that several workers share: [slots, row_blocks, block_rows, 512] normalised, and the base-2 logarithm
  // of their denominators [slots, row_blocks, block_rows]. Columns lie as the tensor cores leave them to threads, so that each
  // stores sixteen bytes or, in the narrow kernels' float32, eight at a time.
  //
  // The narrow kernels': of each sixteen columns the second eight lie between the first eight, 0, 8, 1, 9 and so on; in order where
  // they convert a quantised cache for up to 32 rows.
  //
  // The wide kernels', which are large: float16 in the first half of a row, with three significant bits more than bfloat16; of each
  // 32 columns first 0 and 1, 8 and 9, 16 and 17, 24 and 25, then 2 and 3 and so on. After them for each 128 columns the power of
  // two that they were divided by where float16's range would not do: where a thread has nothing but values below 2^-8, or one from
  // 2^15 on. Values too small for all significant bits are off by up to 2^-25 without a division, and with one by up to 2^-39 of
  // the largest of those columns.
  //
  // The same with 33 to 64 rows over a quantised cache, but of each half first 0 and 1, 64 and 65, 128 and 129, 192 and 193, then 2
  // and 3 and so on, and a power of two for each 64 of those numbers.
  float* partial_out;
  float* partial_lse;
  // [workers, row_blocks], by half of the slot of a request's first part: how many warpgroups have stored a part of it or, helpers
  // among them, have seen that all are there. It begins with kAllStarted (csrc/sm90/tile.cuh) if the worker with that part has
  // started before anybody counted. After the last one it is 0 again.
  uint32_t* arrivals;

  const float* kv_scale;  // from a quantised cache's numbers to their true values
};

}  // namespace mla_backend
