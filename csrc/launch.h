// The host's side of the kernels: what bindings.cpp calls, free of torch and of device code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "decode.h"

namespace mla_backend {

enum class ElementType { kBFloat16, kFloat16 };

// The latent cache [pages, page_size, 576], contiguous in the last dimension; strides count elements.
struct Cache {
  const void* data;
  int64_t pages, page_stride, token_stride;
};

// Launch one decode call. `params` need not say how rows are divided: that follows from the choice of the kernel. Throws
// std::runtime_error with what CUDA said.
void launch_decode(const DecodeParams& params, const Cache& cache, ElementType type, cudaStream_t stream);

// Write the running count of tiles, request_tiles [requests + 1], of seq_lens [requests].
void launch_plan(const int32_t* seq_lens, int requests, int32_t* request_tiles, cudaStream_t stream);

}  // namespace mla_backend
