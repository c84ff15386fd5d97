// The torch operators' CUDA implementations: from tensors to a launch, no device code.
//
// Bound through libtorch's stable C ABI, so that one library serves every torch from 2.11 on and every Python. Apache
// TVM-FFI would give that too. But what is registered with torch's own dispatcher is one operator to a plain call, to
// fake tensors, and to torch.compile and its CUDA graphs; streams, device guards and memory are torch's without
// translation; and nothing beside torch need be installed.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>

#include "launch.h"

// Not declared where torch's headers come from a build without CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace mla_backend {
namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "mla_decode: no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

bool starts_at_16_bytes(const Tensor& t) {
  const int64_t elements = 16 / t.element_size();
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(0) % elements == 0 &&
         t.stride(1) % elements == 0;
}

void plan(const Tensor& seq_lens, Tensor& request_tiles) {
  const int device = seq_lens.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto problem = launch_plan(static_cast<const int32_t*>(seq_lens.const_data_ptr()),
                                   static_cast<int>(seq_lens.size(0)),
                                   static_cast<int32_t*>(request_tiles.mutable_data_ptr()), current_stream(device));
  STD_TORCH_CHECK(problem.empty(), "mla_decode: ", problem);
}

void mla_decode(const Tensor& q_nope, const Tensor& q_pe, const Tensor& kv_cache, const Tensor& block_table,
                const Tensor& seq_lens, const Tensor& query_start_loc, const Tensor& request_tiles, Tensor& partial_out,
                Tensor& partial_lse, int64_t max_query_len, int64_t max_seq_len, double softmax_scale, bool causal,
                const std::optional<Tensor>& kv_scale, Tensor& out, std::optional<Tensor>& lse) {
  const int tokens = static_cast<int>(q_nope.size(0)), heads = static_cast<int>(q_nope.size(1));
  if (tokens == 0) return;
  const auto type = q_nope.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "mla_decode: q_nope must be bfloat16 or float16 on a GPU");
  STD_TORCH_CHECK(kv_cache.scalar_type() == type, "mla_decode: kv_cache must have the dtype of q_nope on a GPU");
  const int64_t page_size = kv_cache.size(1);
  STD_TORCH_CHECK(page_size == 16 || page_size == 32 || page_size % kTileTokens == 0,
                  "mla_decode: kv_cache has pages of ", page_size,
                  " tokens, wanted 16, 32, 64 or a multiple of 64 on a GPU");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(kv_cache.const_data_ptr()) % 16 == 0 && kv_cache.stride(0) % 8 == 0 &&
                      kv_cache.stride(1) % 8 == 0,
                  "mla_decode: every token of kv_cache must start at a multiple of 16 bytes, but it starts at ",
                  kv_cache.const_data_ptr(), " and has strides of ", kv_cache.stride(0), " and ", kv_cache.stride(1),
                  " elements");

  const int device = q_nope.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  DecodeParams params = {};
  params.q_nope = q_nope.const_data_ptr();
  params.q_pe = q_pe.const_data_ptr();
  params.q_nope_token_stride = q_nope.stride(0), params.q_nope_head_stride = q_nope.stride(1);
  params.q_pe_token_stride = q_pe.stride(0), params.q_pe_head_stride = q_pe.stride(1);
  params.queries_are_vectors = starts_at_16_bytes(q_nope) && starts_at_16_bytes(q_pe);
  params.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  params.block_table_stride = block_table.stride(0);
  params.seq_lens = static_cast<const int32_t*>(seq_lens.const_data_ptr());
  params.query_start_loc = static_cast<const int32_t*>(query_start_loc.const_data_ptr());
  params.request_tiles = static_cast<const int32_t*>(request_tiles.const_data_ptr());
  params.tokens = tokens, params.heads = heads;
  params.requests = static_cast<int>(seq_lens.size(0)), params.page_size = static_cast<int>(page_size);
  params.max_rows = static_cast<int>(max_query_len * heads);
  params.row_blocks = std::max(1, (params.max_rows + kBlockRows - 1) / kBlockRows);
  params.workers = std::max(1, static_cast<int>(partial_lse.numel()) / (2 * kBlockRows) / params.row_blocks);
  params.causal = causal;
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.out = out.mutable_data_ptr();
  params.out_token_stride = out.stride(0), params.out_head_stride = out.stride(1);
  params.output_is_pairs = reinterpret_cast<uintptr_t>(params.out) % 4 == 0 && out.stride(0) % 2 == 0 &&
                           out.stride(1) % 2 == 0;
  if (lse.has_value()) {
    params.lse = static_cast<float*>(lse->mutable_data_ptr());
    params.lse_token_stride = lse->stride(0), params.lse_head_stride = lse->stride(1);
  }
  params.partial_out = static_cast<float*>(partial_out.mutable_data_ptr());
  params.partial_lse = static_cast<float*>(partial_lse.mutable_data_ptr());

  const Cache cache = {kv_cache.const_data_ptr(), kv_cache.size(0), kv_cache.stride(0), kv_cache.stride(1)};
  const auto element = type == ScalarType::BFloat16 ? ElementType::kBFloat16 : ElementType::kFloat16;
  const auto problem = launch_decode(params, cache, element, current_stream(device));
  STD_TORCH_CHECK(problem.empty(), "mla_decode: ", problem);
}

}  // namespace
}  // namespace mla_backend

STABLE_TORCH_LIBRARY_IMPL(mla_backend, CUDA, library) {
  library.impl("plan", TORCH_BOX(&mla_backend::plan));
  library.impl("mla_decode", TORCH_BOX(&mla_backend::mla_decode));
}
