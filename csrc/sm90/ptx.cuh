// The instructions of sm_90a that the kernels use, one function each. Names and semantics are those of the PTX ISA.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

namespace mla_backend::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// A load that is asked for here, even where the same has been asked for before.
__device__ __forceinline__ float load_anew(const float* from) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(from));
  return value;
}

// Loads that are asked for in this order, whatever is needed first.
__device__ __forceinline__ void load_if(bool condition, float& value, const float* from) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p ld.global.f32 %0, [%1];\n}\n"
               : "+f"(value)
               : "l"(from), "r"(static_cast<int>(condition)));
}

__device__ __forceinline__ void load_if(bool condition, float2& value, const float2* from) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p ld.global.v2.f32 {%0, %1}, [%2];\n}\n"
               : "+f"(value.x), "+f"(value.y)
               : "l"(from), "r"(static_cast<int>(condition)));
}

__device__ __forceinline__ void load_if(bool condition, float4& value, const float4* from) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p ld.global.v4.f32 {%0, %1, %2, %3}, [%4];\n}\n"
               : "+f"(value.x), "+f"(value.y), "+f"(value.z), "+f"(value.w)
               : "l"(from), "r"(static_cast<int>(condition)));
}

// Add one to a counter, once all that happened before is visible on the whole GPU.
__device__ __forceinline__ void count_release(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// Add one without waiting for what happened before. After `last` the counter begins anew.
__device__ __forceinline__ void count(uint32_t* counter, uint32_t last) {
  asm volatile("red.relaxed.gpu.global.inc.u32 [%0], %1;" ::"l"(counter), "r"(last) : "memory");
}

// Set a counter that is 0.
__device__ __forceinline__ void set_zero_to(uint32_t* counter, uint32_t value) {
  asm volatile("{\n.reg .b32 before;\natom.relaxed.gpu.global.cas.b32 before, [%0], 0, %1;\n}\n" ::"l"(counter), "r"(value)
               : "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

// --- the kernel's own code ------------------------------------------------------------------------------------------

// Where it begins and ends. PTX cannot say that: these read two counters, and csrc/locate.py makes it the instruction that can.
__device__ __forceinline__ uint64_t code_begin() {
  uint64_t address;
  asm volatile("mov.u64 %0, %%pm0_64;" : "=l"(address));
  return address;
}

__device__ __forceinline__ uint64_t code_end() {
  uint64_t address;
  asm volatile("mov.u64 %0, %%pm1_64;" : "=l"(address));
  return address;
}

// Ask for 128 bytes to be brought to L2. Where there is no memory, nothing happens.
__device__ __forceinline__ void prefetch_l2(uint64_t address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// --- mbarrier -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// --- the cluster ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Of execution only: what is handed from block to block here has mbarriers, and their initialisation its own fence. With release,
// all stores to global memory would be waited for.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The same place in the shared memory of the cluster's block `rank`.
__device__ __forceinline__ uint32_t in_block(const void* pointer, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

// Stores into another block, in the background: what arrives counts as bytes of that block's mbarrier.
__device__ __forceinline__ void store_async(uint32_t to, uint4 value, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void store_async(uint32_t to, float2 value, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
               "f"(value.x), "f"(value.y), "r"(barrier)
               : "memory");
}

// --- the copy engine ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void tma_load(void* to, const CUtensorMap* map, int c0, int c1, int c2, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(barrier))
      : "memory");
}

// The same, and the L2 cache evicts what has been read before all else.
__device__ __forceinline__ void tma_load_evict_first(void* to, const CUtensorMap* map, int c0, int c1, int c2,
                                                     uint64_t* barrier) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], "
      "[%5], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Orders this thread's writes to shared memory before later reads by the tensor cores and the copy engine.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A value that is the same in all lanes, told to the compiler: wgmma takes descriptors from uniform registers, and others
// would be moved there before every single one.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

__device__ __forceinline__ void wait_clocks(int count) {
  for (const long long begin = clock64(); clock64() - begin < count;) continue;
}

// --- synchronisation and registers ----------------------------------------------------------------------------------

// threadIdx.x, read anew wherever it is needed: what is made of threadIdx.x itself may take a register from beginning to end.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// 0, of which the compiler does not know it until registers are assigned: what is made of it is made anew in every round of a loop.
__device__ __forceinline__ uint32_t opaque_zero() {
  uint32_t zero;
  asm volatile("mov.u32 %0, 0;" : "=r"(zero));
  return zero;
}

template <int kThreads>
__device__ __forceinline__ void named_barrier_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// The same, and whether the predicate holds for any of the threads.
template <int kThreads>
__device__ __forceinline__ bool named_barrier_any(int id, bool predicate) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred mine, all;\n"
      "setp.ne.b32 mine, %2, 0;\n"
      "barrier.cta.red.or.pred all, %1, %3, mine;\n"
      "selp.b32 %0, 1, 0, all;\n"
      "}\n"
      : "=r"(any)
      : "r"(id), "r"(static_cast<int>(predicate)), "n"(kThreads)
      : "memory");
  return any;
}

template <int kThreads>
__device__ __forceinline__ void named_barrier_arrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Stores four 8 x 8 matrices, each transposed; the 32 lanes point at their 32 rows.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// The same with two, whose 16 rows the first 16 lanes point at.
__device__ __forceinline__ void stmatrix_x2_trans(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit elements, whose 32 rows the lanes point at: each lane gets two neighbours of a row of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// The same, each transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// Four float8 numbers (e4m3) as float16: the lower two and the upper two.
__device__ __forceinline__ void half_of_fp8(uint32_t four, uint32_t& low, uint32_t& high) {
  asm volatile("{\n.reg .b16 two, others;\nmov.b32 {two, others}, %2;\n"
               "cvt.rn.f16x2.e4m3x2 %0, two;\ncvt.rn.f16x2.e4m3x2 %1, others;\n}\n"
               : "=r"(low), "=r"(high)
               : "r"(four));
}

// Of an 8 x 8 matrix of 16-bit elements, of which each lane holds two neighbours in a row, the transposed one.
__device__ __forceinline__ uint32_t transposed(uint32_t two) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(two));
  return result;
}

__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- wgmma ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of accumulators over the wait above them.
template <int kCount>
__device__ __forceinline__ void keep(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// The same of registers that the tensor cores read until here.
template <int kCount>
__device__ __forceinline__ void keep(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i]));
}

// Matrix descriptor of an operand in rows of 128, 64 or 32 bytes with the swizzle of that width (PTX ISA, "Matrix descriptor
// format"). K-major operands: `leading` is unused and `stride` goes from 8 rows to the next 8.
// MN-major operands: `leading` goes from 64 columns to the next 64, `stride` from 8 rows of K to the next 8.
enum class Swizzle : uint64_t { k128Bytes = 1, k64Bytes = 2, k32Bytes = 3 };

struct Matrix {
  uint64_t descriptor;

  __device__ __forceinline__ Matrix(uint32_t address, uint32_t leading, uint32_t stride, Swizzle swizzle = Swizzle::k128Bytes)
      : descriptor(static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
                   static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62) {}

  // The descriptor of the matrix that begins `bytes` further on.
  __device__ __forceinline__ uint64_t at(uint32_t bytes) const { return descriptor + (bytes >> 4); }
};

#define MLA_C4(n) "+f"(c[n]), "+f"(c[n + 1]), "+f"(c[n + 2]), "+f"(c[n + 3])
#define MLA_C16(n) MLA_C4(n), MLA_C4(n + 4), MLA_C4(n + 8), MLA_C4(n + 12)
#define MLA_C64(n) MLA_C16(n), MLA_C16(n + 16), MLA_C16(n + 32), MLA_C16(n + 48)

#define MLA_R16                                                                                                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"

#define MLA_R24                                                                                                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23}"

#define MLA_R32                                                                                                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31}"

#define MLA_R128                                                                                                    \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "  \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, "  \
  "%68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, "  \
  "%90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "  \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

#define MLA_R8 "{%0, %1, %2, %3, %4, %5, %6, %7}"

#define MLA_WGMMA_N16(type)                                                                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %10, 0;\n"                                    \
               "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type " " MLA_R8              \
               ", %8, %9, add, 1, 1, %11, 0;\n}\n"                                                 \
               : MLA_C4(0), MLA_C4(4)                                                              \
               : "l"(a), "l"(b), "r"(add), "n"(kTransposedA))

#define MLA_WGMMA_N32(type)                                                                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %18, 0;\n"                                    \
               "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " " MLA_R16             \
               ", %16, %17, add, 1, 1, %19, 0;\n}\n"                                               \
               : MLA_C16(0)                                                                        \
               : "l"(a), "l"(b), "r"(add), "n"(kTransposedA))

#define MLA_WGMMA_N48(type)                                                                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %26, 0;\n"                                    \
               "wgmma.mma_async.sync.aligned.m64n48k16.f32." type "." type " " MLA_R24             \
               ", %24, %25, add, 1, 1, %27, 0;\n}\n"                                               \
               : MLA_C16(0), MLA_C4(16), MLA_C4(20)                                                \
               : "l"(a), "l"(b), "r"(add), "n"(kTransposedA))

#define MLA_WGMMA_N64(type)                                                                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"                                    \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " MLA_R32             \
               ", %32, %33, add, 1, 1, %35, 0;\n}\n"                                               \
               : MLA_C16(0), MLA_C16(16)                                                           \
               : "l"(a), "l"(b), "r"(add), "n"(kTransposedA))

#define MLA_WGMMA_RS_N16(type)                                                                     \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %13, 0;\n"                                    \
               "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type " " MLA_R8              \
               ", {%8, %9, %10, %11}, %12, add, 1, 1, 0;\n}\n"                                     \
               : MLA_C4(0), MLA_C4(4)                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))

#define MLA_WGMMA_RS_N32(type)                                                                     \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %21, 0;\n"                                    \
               "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " " MLA_R16             \
               ", {%16, %17, %18, %19}, %20, add, 1, 1, 0;\n}\n"                                   \
               : MLA_C16(0)                                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))

#define MLA_WGMMA_RS_N64(type)                                                                     \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                    \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " MLA_R32             \
               ", {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}\n"                                  \
               : MLA_C16(0), MLA_C16(16)                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))

#define MLA_WGMMA_N256(type)                                                                       \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %133, 0;\n"                                   \
               "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " " MLA_R128           \
               ", {%128, %129, %130, %131}, %132, add, 1, 1, 1;\n}\n"                              \
               : MLA_C64(0), MLA_C64(64)                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))

#define MLA_OF_ELEMENT(wgmma)                             \
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) { \
    wgmma("bf16");                                        \
  } else {                                                \
    wgmma("f16");                                         \
  }

// c [64 x N] (+)= a [64 x 16] times b [16 x N], K-major; a is K-major, or M-major where kTransposedA is 1.
template <typename Element, int kTransposedA = 0>
__device__ __forceinline__ void wgmma(float (&c)[8], uint64_t a, uint64_t b, int add) {
  MLA_OF_ELEMENT(MLA_WGMMA_N16)
}

template <typename Element, int kTransposedA = 0>
__device__ __forceinline__ void wgmma(float (&c)[16], uint64_t a, uint64_t b, int add) {
  MLA_OF_ELEMENT(MLA_WGMMA_N32)
}

template <typename Element, int kTransposedA = 0>
__device__ __forceinline__ void wgmma(float (&c)[24], uint64_t a, uint64_t b, int add) {
  MLA_OF_ELEMENT(MLA_WGMMA_N48)
}

template <typename Element, int kTransposedA = 0>
__device__ __forceinline__ void wgmma(float (&c)[32], uint64_t a, uint64_t b, int add) {
  MLA_OF_ELEMENT(MLA_WGMMA_N64)
}

// The same with a in registers.
template <typename Element>
__device__ __forceinline__ void wgmma(float (&c)[8], const uint32_t* a, uint64_t b, int add) {
  MLA_OF_ELEMENT(MLA_WGMMA_RS_N16)
}

template <typename Element>
__device__ __forceinline__ void wgmma(float (&c)[16], const uint32_t* a, uint64_t b, int add) {
  MLA_OF_ELEMENT(MLA_WGMMA_RS_N32)
}

template <typename Element>
__device__ __forceinline__ void wgmma(float (&c)[32], const uint32_t* a, uint64_t b, int add) {
  MLA_OF_ELEMENT(MLA_WGMMA_RS_N64)
}

// c [64 x 256] (+)= a [64 x 16], in registers, times b [16 x 256], MN-major.
template <typename Element>
__device__ __forceinline__ void wgmma_transposed_b(float (&c)[128], const uint32_t* a, uint64_t b, int add) {
  MLA_OF_ELEMENT(MLA_WGMMA_N256)
}

#undef MLA_OF_ELEMENT
#undef MLA_WGMMA_N256
#undef MLA_WGMMA_N64
#undef MLA_WGMMA_RS_N64
#undef MLA_WGMMA_RS_N32
#undef MLA_WGMMA_RS_N16
#undef MLA_WGMMA_N32
#undef MLA_WGMMA_N16
#undef MLA_R8
#undef MLA_R128
#undef MLA_R32
#undef MLA_R16
#undef MLA_C64
#undef MLA_C16
#undef MLA_C4

}  // namespace mla_backend::ptx
