// The host's side of the kernels: what bindings.cpp calls, free of torch and of device code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "decode.h"

namespace mla_backend {

enum class ElementType { kBFloat16, kFloat16 };

// The latent cache [pages, page_size, 576], contiguous in the last dimension; strides count elements, which have the queries' type
// or, where it is quantised, are float8 numbers (e4m3).
struct Cache {
  const void* data;
  int64_t pages, page_stride, token_stride;
};

// What the host knows of a step. The kernel is chosen by it, so a schedule serves calls with the same numbers only.
struct StepBounds {
  int requests, heads;
  int max_query_len, max_seq_len;  // that a request may have
  bool batch_invariant;
  bool quantized;  // whether the cache is
};

// Launch one decode call. `params` need not say how rows are divided: that follows from the choice of the kernel. Throws
// std::runtime_error with what CUDA said.
void launch_decode(const DecodeParams& params, const StepBounds& bounds, const Cache& cache, ElementType type,
                   cudaStream_t stream);

// The query rows that there must be room for in partial results.
int64_t partial_rows(int workers, const StepBounds& bounds);

// The counters that there must be room for, of parts that have arrived.
int64_t arrival_counters(int workers, const StepBounds& bounds);

// Write the schedule for seq_lens [requests]: shares [multiprocessors], of which it returns how many are workers', and splits
// [requests + 1].
int launch_plan(const int32_t* seq_lens, const StepBounds& bounds, int multiprocessors, Share* shares, int32_t* splits,
                cudaStream_t stream);

}  // namespace mla_backend
