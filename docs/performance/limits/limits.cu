// Of a decode step only this: as many pages are read, and as much is multiplied. No schedule, no softmax but its exponentials if
// they are asked for, no result, and reading and products do not wait for each other. limits.py measures how long that takes.
#include <cudaTypedefs.h>

#include "../../../csrc/sm90/ptx.cuh"

using namespace mla_backend;
using Element = __nv_bfloat16;

namespace {

constexpr int kMathThreads = 256, kThreads = kMathThreads + 128;
constexpr int kPageTokens = 64, kColumns = 576, kTokenBytes = kColumns * sizeof(Element), kPageBytes = kPageTokens * kTokenBytes;
constexpr int kBoxColumns = 64, kBoxes = kColumns / kBoxColumns;
// Of what has been read a thread keeps in registers at most: queries of so many latent steps and of the rotary ones, probabilities.
constexpr int kHeldSteps = 9, kQueryNumbers = (kHeldSteps + 2) * 4, kProbabilityNumbers = 8;
constexpr int kThreadNumbers = kQueryNumbers + kProbabilityNumbers;
constexpr int kFactorBytes = kMathThreads * kThreadNumbers * sizeof(uint32_t);  // more than products read in shared memory
constexpr int kMostStages = 3 * kPageTokens / 16;  // 16 tokens at a time at least
constexpr double kFlopsOfMixture = 2.0 * 64 * 64 * (288 + 256), kFlopsOfWide = 2.0 * 64 * 256 * 16 * 16;

struct Shared {
  char ring[3 * kPageBytes];
  uint64_t full[kMostStages];
};

// How pages are read: so many tokens at a time, as many on their way as there is room for in `ring_pages` pages. Scattered pages
// are read as a decode kernel reads them, in the order of a list, a share of it for each thread block, and in boxes of 64 columns.
// Others one after the other by all blocks together, in one piece.
struct Reading {
  int pages, tokens, ring_pages;
  bool scattered, evict_first;
};

__device__ __forceinline__ void load_piece(char* to, const char* from, uint32_t bytes, uint64_t* barrier, bool evict_first) {
  if (evict_first) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            ptx::shared_address(to)),
        "l"(from), "r"(bytes), "r"(ptx::shared_address(barrier)), "l"(policy)
        : "memory");
  } else {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     ptx::shared_address(to)),
                 "l"(from), "r"(bytes), "r"(ptx::shared_address(barrier))
                 : "memory");
  }
}

// By a warp of each block.
__device__ void read(Shared& shared, const CUtensorMap& map, const char* data, const int32_t* list, const Reading& reading) {
  const int lane = threadIdx.x % 32, in_page = kPageTokens / reading.tokens, bytes = reading.tokens * kTokenBytes;
  const int stages = reading.ring_pages * in_page, chunks = reading.pages * in_page;
  int chunk = blockIdx.x, step = gridDim.x, end = chunks;
  if (reading.scattered) {
    chunk = int64_t{reading.pages} * blockIdx.x / gridDim.x * in_page, step = 1;
    end = int64_t{reading.pages} * (blockIdx.x + 1) / gridDim.x * in_page;
  }
  int number = 0;
  for (; chunk < end; chunk += step, ++number) {
    const int stage = number % stages;
    uint64_t* full = &shared.full[stage];
    char* to = shared.ring + stage * bytes;
    if (number >= stages) ptx::mbarrier_wait(full, number / stages - 1 & 1);
    if (lane == 0) ptx::mbarrier_arrive_expect_tx(full, bytes);
    __syncwarp();
    if (!reading.scattered) {
      if (lane == 0) load_piece(to, data + int64_t{chunk} * bytes, bytes, full, reading.evict_first);
    } else if (lane < kBoxes) {
      const int page = list[chunk / in_page], token = chunk % in_page * reading.tokens;
      char* box = to + lane * reading.tokens * kBoxColumns * sizeof(Element);
      if (reading.evict_first) {
        ptx::tma_load_evict_first(box, &map, lane * kBoxColumns, token, page, full);
      } else {
        ptx::tma_load(box, &map, lane * kBoxColumns, token, page, full);
      }
    }
    __syncwarp();
  }
  for (int n = max(0, number - stages); n < number; ++n) ptx::mbarrier_wait(&shared.full[n % stages], n / stages & 1);
}

// Uses results, or the compiler would leave the products out.
__device__ void use(const float (&out)[128], float more, float* sink) {
  float sum = more;
  for (int i = 0; i < 128; ++i) sum += out[i];
  if (sum == 12345.678f) *sink = sum;
}

// By each of two warpgroups: products of 64 rows, whose factors lie in shared memory or registers and are whatever is there.
// As many as decode_wide multiplies with a tile, in nearly the same order: 16 + 2 of 64 columns for scores, nine of the 16 and the
// two with queries from registers, and 4 of 256 for values. With exponentials, those of half of the scores are the first factor of
// values, so that a warpgroup waits for its scores before it begins its values; the other one multiplies meanwhile.
template <bool kExponentials>
__device__ void multiply_mixture(Shared& shared, int times, float* sink) {
  const uint32_t address = ptx::shared_address(shared.ring);
  const ptx::Matrix k(address, 0, 1024), k_rope(address + 32768, 0, 512, ptx::Swizzle::k64Bytes);
  const ptx::Matrix values(address, 8192, 1024);
  uint32_t queries[kQueryNumbers], probabilities[kProbabilityNumbers];  // the rotary ones last; those of half of the tokens
  const auto* numbers = reinterpret_cast<const uint32_t*>(shared.ring) + threadIdx.x * kThreadNumbers;
  for (int i = 0; i < kQueryNumbers; ++i) queries[i] = numbers[i];
  for (int i = 0; i < kProbabilityNumbers; ++i) probabilities[i] = numbers[kQueryNumbers + i];
  float out[128] = {}, scores = 0;
  for (int time = 0; time < times; ++time) {
    float score[32];
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 16; ++step) {
      const uint32_t place = step / 4 * 8192 + step % 4 * 32;
      if (step % 2 == 0 || step == 15) {
        ptx::wgmma<Element>(score, queries + (step + 1) / 2 * 4, k.at(place), step > 0);
      } else {
        ptx::wgmma<Element>(score, k.at(place), k.at(place), 1);
      }
      if (step % 8 == 7) ptx::wgmma<Element>(score, queries + (kHeldSteps + step / 8) * 4, k_rope.at(step / 8 * 32), 1);
    }
    if constexpr (kExponentials) {
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::keep(score);
#pragma unroll
      for (int i = 0; i < kProbabilityNumbers; ++i) {
        const auto power = [&](int k) { return ptx::exp2(score[k] * 0.01f - 1); };
        const __nv_bfloat162 two = __floats2bfloat162_rn(power(i * 2), power(i * 2 + 1));
        probabilities[i] = reinterpret_cast<const uint32_t&>(two);
      }
      ptx::wgmma_fence();
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ptx::wgmma_transposed_b<Element>(out, probabilities + step % 2 * 4, values.at(step * 2048), 1);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::keep(score), ptx::keep(out), ptx::keep(queries), ptx::keep(probabilities);
    scores += score[0];
  }
  use(out, scores, sink);
}

// As the fewest reads of shared memory would have it: 16 of 256 columns.
__device__ void multiply_wide(Shared& shared, int times, float* sink) {
  const ptx::Matrix values(ptx::shared_address(shared.ring), 8192, 1024);
  uint32_t a[16];
  for (int i = 0; i < 16; ++i) a[i] = reinterpret_cast<const uint32_t*>(shared.ring)[threadIdx.x * 16 + i];
  float out[128] = {};
  for (int time = 0; time < times; ++time) {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 16; ++step) {
      ptx::wgmma_transposed_b<Element>(out, a + step % 4 * 4, values.at(step % 4 * 2048), 1);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::keep(out), ptx::keep(a);
  }
  use(out, 0, sink);
}

enum Products { kWide, kMixture, kExponentials };

// `times` times the products of a loop by each warpgroup, as soon as they have something to multiply.
template <Products kProducts>
__global__ void __launch_bounds__(kThreads, 1)
    work(const __grid_constant__ CUtensorMap map, const char* data, const int32_t* list, const __grid_constant__ Reading reading,
         int times, float* sink) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&map);
    for (uint64_t& barrier : shared.full) ptx::mbarrier_init(&barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kMathThreads) {
    ptx::setmaxnreg_dec<24>();
    if (threadIdx.x < kMathThreads + 32) read(shared, map, data, list, reading);
  } else {
    ptx::setmaxnreg_inc<240>();
    if (times == 0) return;
    // Whoever reads uses these barriers again without waiting for this warp, but not before it has read a ring of pages.
    for (int i = 0; i * reading.tokens * kTokenBytes < kFactorBytes; ++i) ptx::mbarrier_wait(&shared.full[i], 0);
    if constexpr (kProducts == kWide) {
      multiply_wide(shared, times, sink);
    } else {
      multiply_mixture<kProducts == kExponentials>(shared, times, sink);
    }
  }
}

int encode(CUtensorMap& map, const void* data, const Reading& reading) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  if (const int error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result)) {
    return error;
  }
  if (function == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {kColumns, kPageTokens, static_cast<cuuint64_t>(reading.pages)}, strides[] = {kTokenBytes, kPageBytes};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(reading.tokens), 1}, steps[] = {1, 1, 1};
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace

// Read `pages` pages of the cache at `data` as Reading says, in the order of `list` if `scattered`, and compute `flops` flops, on
// so many multiprocessors, of which each reads one page at least if there are flops. Returns a CUDA error.
extern "C" int limits_work(const void* data, const int32_t* list, int pages, int tokens, int ring_pages, int scattered,
                           int evict_first, double flops, int products, int multiprocessors, cudaStream_t stream) {
  const Reading reading = {pages, tokens, ring_pages, scattered != 0, evict_first != 0};
  CUtensorMap map;
  if (const int error = encode(map, data, reading)) return error;
  const auto kernel = products == kWide ? work<kWide> : products == kMixture ? work<kMixture> : work<kExponentials>;
  const double flops_each = products == kWide ? kFlopsOfWide : kFlopsOfMixture;
  const int times = static_cast<int>(flops / (2 * multiprocessors) / flops_each + 0.5);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  kernel<<<multiprocessors, kThreads, sizeof(Shared), stream>>>(map, static_cast<const char*>(data), list, reading, times,
                                                                nullptr);
  return cudaGetLastError();
}
