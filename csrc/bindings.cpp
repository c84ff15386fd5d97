// The torch operators' CUDA implementations: their arguments' checks, and from tensors to a launch; no device code.
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
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

#include "launch.h"

// Not declared where torch's headers come from a build without CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace mla_backend {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

constexpr int64_t kAny = -1;  // a size that may be anything

std::string describe(const Device& device) {
  if (device.is_cuda()) return "cuda:" + std::to_string(device.index());
  return device.is_cpu() ? "cpu" : "another kind of device";
}

template <typename Numbers>
std::string describe(const Numbers& numbers) {
  std::string text;
  for (const int64_t number : numbers) {
    text += (text.empty() ? "" : ", ") + (number == kAny ? std::string("any") : std::to_string(number));
  }
  return "[" + text + "]";
}

bool starts_at_16_bytes(const Tensor& t) {
  const int64_t elements = 16 / t.element_size();
  const auto strides = t.strides();
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 &&
         std::all_of(strides.begin(), strides.end() - 1, [=](int64_t stride) { return stride % elements == 0; });
}

// Throw unless an argument is what is wanted, saying what it is instead.
void check(const char* name, const Tensor& t, const Device& device, ScalarType dtype,
           std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.device() == device, "mla_decode: ", name, " is on ", describe(t.device()), ", wanted ",
                  describe(device));
  STD_TORCH_CHECK(t.scalar_type() == dtype, "mla_decode: ", name, " is ", t.scalar_type(), ", wanted ", dtype);
  const auto sizes = t.sizes(), strides = t.strides();
  const auto fits = [](int64_t size, int64_t wanted) { return wanted == kAny || size == wanted; };
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end(), fits), "mla_decode: ", name,
                  " has shape ", describe(sizes), ", wanted ", describe(shape));
  STD_TORCH_CHECK(sizes[sizes.size() - 1] <= 1 || strides[strides.size() - 1] == 1, "mla_decode: ", name,
                  " has strides ", describe(strides), ", wanted a contiguous last dimension");
}

void check_alignment(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(starts_at_16_bytes(t), "mla_decode: ", name, " starts at ", t.const_data_ptr(), " and has strides ",
                  describe(t.strides()), ", wanted every row to start at a multiple of 16 bytes");
}

void check_contiguous(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), "mla_decode: ", name, " has strides ", describe(t.strides()),
                  ", wanted a contiguous tensor");
}

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "mla_decode: no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

void check_schedule(const Tensor& shares, const Tensor& splits, const Device& device, int64_t requests) {
  check("shares", shares, device, ScalarType::Int, {kAny, kShareNumbers});
  check_contiguous("shares", shares);
  check_alignment("shares", shares);
  check("splits", splits, device, ScalarType::Int, {requests + 1});
}

void check_heads(int64_t heads, const char* of) {
  STD_TORCH_CHECK(1 <= heads && heads <= kMaxHeads, "mla_decode: ", of, " has ", heads, " heads, wanted 1 to ", kMaxHeads);
}

void check_queries(int64_t max_query_len) {
  STD_TORCH_CHECK(0 <= max_query_len && max_query_len <= kMaxTokens, "mla_decode: max_query_len is ", max_query_len,
                  ", wanted 0 to ", kMaxTokens);
}

void check_lengths(int64_t max_seq_len) {
  constexpr int kMost = std::numeric_limits<int>::max();
  STD_TORCH_CHECK(0 <= max_seq_len && max_seq_len <= kMost, "mla_decode: max_seq_len is ", max_seq_len, ", wanted 0 to ", kMost);
}

// Of numbers that were checked.
StepBounds bounds_of(int64_t requests, int64_t heads, int64_t max_query_len, int64_t max_seq_len, bool batch_invariant,
                     bool quantized) {
  return {static_cast<int>(requests), static_cast<int>(heads), static_cast<int>(max_query_len),
          static_cast<int>(max_seq_len), batch_invariant, quantized};
}

int64_t plan(const Tensor& seq_lens, int64_t heads, int64_t max_query_len, int64_t max_seq_len, bool batch_invariant,
             bool quantized, Tensor& shares, Tensor& splits) {
  const Device device = seq_lens.device();
  check("seq_lens", seq_lens, device, ScalarType::Int, {kAny});
  check_heads(heads, "the schedule");
  check_queries(max_query_len);
  check_lengths(max_seq_len);
  check_schedule(shares, splits, device, seq_lens.size(0));

  const torch::stable::accelerator::DeviceGuard guard(device.index());
  const StepBounds bounds = bounds_of(seq_lens.size(0), heads, max_query_len, max_seq_len, batch_invariant, quantized);
  return launch_plan(static_cast<const int32_t*>(seq_lens.const_data_ptr()), bounds, static_cast<int>(shares.size(0)),
                     static_cast<Share*>(shares.mutable_data_ptr()), static_cast<int32_t*>(splits.mutable_data_ptr()),
                     current_stream(device.index()));
}

void mla_decode(const Tensor& q_nope, const Tensor& q_pe, const Tensor& kv_cache, const Tensor& block_table,
                const Tensor& seq_lens, const Tensor& query_start_loc, const Tensor& shares, const Tensor& splits,
                Tensor& partial_out, Tensor& partial_lse, Tensor& arrivals, int64_t planned_heads, int64_t max_query_len,
                int64_t max_seq_len, double softmax_scale, bool causal, bool batch_invariant, bool quantized,
                const std::optional<Tensor>& kv_scale, Tensor& out, std::optional<Tensor>& lse) {
  const Device device = q_nope.device();
  const ScalarType type = q_nope.scalar_type();
  STD_TORCH_CHECK(device.is_cuda(), "mla_decode: q_nope is on ", describe(device), ", wanted cuda");
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "mla_decode: q_nope is ", type,
                  ", wanted BFloat16 or Half");
  check("q_nope", q_nope, device, type, {kAny, kAny, kLatentDim});
  const int64_t tokens = q_nope.size(0), heads = q_nope.size(1);
  check_heads(heads, "q_nope");
  STD_TORCH_CHECK(heads == planned_heads, "mla_decode: q_nope has ", heads, " heads, wanted ", planned_heads,
                  ", those of the schedule");
  check_queries(max_query_len);
  check_lengths(max_seq_len);
  STD_TORCH_CHECK(tokens <= kMaxTokens, "mla_decode: q_nope has ", tokens, " tokens, wanted at most ", kMaxTokens);
  check("q_pe", q_pe, device, type, {tokens, heads, kRopeDim});
  check("kv_cache", kv_cache, device, quantized ? ScalarType::Float8_e4m3fn : type, {kAny, kAny, kHeadDim});
  STD_TORCH_CHECK(kv_scale.has_value() == quantized, "mla_decode: kv_scale is ", quantized ? "missing, wanted one" :
                  "given, wanted none");
  if (quantized) {
    STD_TORCH_CHECK(kv_scale->numel() == 1 && kv_scale->scalar_type() == ScalarType::Float && kv_scale->device() == device,
                    "mla_decode: kv_scale is ", kv_scale->numel(), " numbers of ", kv_scale->scalar_type(), " on ",
                    describe(kv_scale->device()), ", wanted one of Float on ", describe(device));
  }
  const int64_t page_size = kv_cache.size(1), page_stride = kv_cache.stride(0), token_stride = kv_cache.stride(1);
  STD_TORCH_CHECK(page_size == 16 || page_size == 32 || (page_size > 0 && page_size % kTileTokens == 0),
                  "mla_decode: kv_cache has pages of ", page_size, " tokens, wanted 16, 32 or a multiple of 64");
  check_alignment("kv_cache", kv_cache);
  check("seq_lens", seq_lens, device, ScalarType::Int, {kAny});
  const int64_t requests = seq_lens.size(0);
  check("block_table", block_table, device, ScalarType::Int, {requests, kAny});
  STD_TORCH_CHECK(block_table.size(1) <= max_pages(page_size), "mla_decode: block_table has ", block_table.size(1),
                  " pages of ", page_size, " tokens for a request, wanted at most ", max_pages(page_size));
  check("query_start_loc", query_start_loc, device, ScalarType::Int, {requests + 1});
  check_schedule(shares, splits, device, requests);
  check("partial_lse", partial_lse, device, ScalarType::Float, {kAny, 2, kPartialRows});
  check("partial_out", partial_out, device, ScalarType::Float, {partial_lse.size(0), 2, kPartialRows, kLatentDim});
  check_contiguous("partial_lse", partial_lse);
  check_contiguous("partial_out", partial_out);
  check_alignment("partial_out", partial_out);
  const int64_t workers = shares.size(0), room = partial_lse.numel();
  const StepBounds bounds = bounds_of(requests, heads, max_query_len, max_seq_len, batch_invariant, quantized);
  const int64_t rows = partial_rows(static_cast<int>(workers), bounds);
  STD_TORCH_CHECK(rows <= room, "mla_decode: partial_lse has room for ", room, " query rows, wanted ", rows, " for ", workers,
                  " shares of ", max_query_len, " query tokens and ", heads, " heads");
  check("arrivals", arrivals, device, ScalarType::Int, {kAny});
  const int64_t counters = arrival_counters(static_cast<int>(workers), bounds);
  STD_TORCH_CHECK(counters <= arrivals.numel(), "mla_decode: arrivals has ", arrivals.numel(), " counters, wanted ", counters,
                  " for ", workers, " shares of ", max_query_len, " query tokens and ", heads, " heads");
  STD_TORCH_CHECK(softmax_scale > 0, "mla_decode: softmax_scale is ", softmax_scale, ", wanted a positive number");
  check("out", out, device, type, {tokens, heads, kLatentDim});
  if (lse.has_value()) check("lse", *lse, device, ScalarType::Float, {tokens, heads});
  if (tokens == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(device.index());
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
  params.shares = static_cast<const Share*>(shares.const_data_ptr());
  params.tokens = static_cast<int>(tokens), params.heads = static_cast<int>(heads);
  params.requests = static_cast<int>(requests), params.page_size = static_cast<int>(page_size);
  params.max_query_len = static_cast<int>(max_query_len);
  params.workers = static_cast<int>(workers);
  params.causal = causal;
  params.softmax_scale = static_cast<float>(softmax_scale);
  if (quantized) params.kv_scale = static_cast<const float*>(kv_scale->const_data_ptr());
  params.out = out.mutable_data_ptr();
  params.out_token_stride = out.stride(0), params.out_head_stride = out.stride(1);
  params.output_is_vectors = starts_at_16_bytes(out);
  if (lse.has_value()) {
    params.lse = static_cast<float*>(lse->mutable_data_ptr());
    params.lse_token_stride = lse->stride(0), params.lse_head_stride = lse->stride(1);
  }
  params.partial_out = static_cast<float*>(partial_out.mutable_data_ptr());
  params.partial_lse = static_cast<float*>(partial_lse.mutable_data_ptr());
  params.arrivals = static_cast<uint32_t*>(arrivals.mutable_data_ptr());

  const Cache cache = {kv_cache.const_data_ptr(), kv_cache.size(0), page_stride, token_stride};
  const auto element = type == ScalarType::BFloat16 ? ElementType::kBFloat16 : ElementType::kFloat16;
  launch_decode(params, bounds, cache, element, current_stream(device.index()));
}

}  // namespace
}  // namespace mla_backend

STABLE_TORCH_LIBRARY_IMPL(mla_backend, CUDA, library) {
  library.impl("plan", TORCH_BOX(&mla_backend::plan));
  library.impl("mla_decode", TORCH_BOX(&mla_backend::mla_decode));
}
