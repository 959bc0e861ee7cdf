// PTX of Hopper (sm_90a) in thin wrappers: barriers in shared memory, the copy engine, products of a warpgroup.
//
// A warpgroup is four warps, the first of them a multiple of four. A product is d (64 x N, float32) += a b, with a in
// registers and b in shared memory. With g = lane / 4, t = lane % 4 and w the warp in its group, a thread holds
//    a[0], a[1]  rows 16 w + g and + 8, bytes 4 t ... 4 t + 3 along k     a[2], a[3]  the same rows, bytes 16 + 4 t ...
//    d[4 j + 0], d[4 j + 1]  row 16 w + g, columns 8 j + 2 t and + 1      d[4 j + 2], d[4 j + 3]  the same of row + 8
// where k is 32 bytes: 16 numbers of 16 bits or 32 of e4m3 (PTX ISA, "Register fragments and shared memory layouts").
#pragma once

#include "cuda/ptx.cuh"

#if defined(CF_EMULATE)
#include "sm90.h"  // tests/kernels/emulator: the same wrappers on the host
#else

#include <cuda.h>

namespace cf {

typedef CUtensorMap TensorMap;

// ---- barriers that count threads and bytes --------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the inits, before the barrier of the block: makes them known to the copy engine.
__device__ __forceinline__ void mbarrier_publish() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrive, and let the phase wait for `bytes` of copies too.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Wait for the end of the phase of this parity; a fresh barrier is in phase 0, and the phase before it, 1, has ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// ---- the copy engine: one thread starts a copy, its end counts bytes on a barrier -----------------------------------

__device__ __forceinline__ void copy_tile(void* shared, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2,
                                          int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(shared_address(shared)),
        "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
__device__ __forceinline__ void copy_tile(void* shared, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2,
                                          int c3, int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
        "%7}], [%2];" ::"r"(shared_address(shared)),
        "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}
// Adjacent bytes, a multiple of 16, both addresses multiples of 16.
__device__ __forceinline__ void copy_bytes(void* shared, const void* global, int bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- registers ------------------------------------------------------------------------------------------------------

template <int registers>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// ---- products -------------------------------------------------------------------------------------------------------

// Before the first product, and after other instructions wrote registers of one.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Wait until at most n committed groups are under way.
template <int n>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}
// Keep the compiler from moving what it knows of these sums across.
template <int n>
__device__ __forceinline__ void wgmma_hold(float (&d)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Keep what follows, waits above all, behind the computation of x >= 0. The assembler moves a wait up over arithmetic
// that does not need it, and then nothing runs beside the products; it does not move one over a trap.
__device__ __forceinline__ void compute_before(float x) {
    asm volatile("{\n.reg .pred never;\nsetp.lt.f32 never, %0, 0f00000000;\n@never trap;\n}" ::"f"(x) : "memory");
}

// Where b lies. Rows of `swizzle` bytes (128 or 64), 8 rows after each other, then the next 8 `stride` bytes later,
// where 16-byte pieces of a row are permuted by the row's number as the copy engine's mode of that name does it. Not
// transposed, a row is a column of b, its bytes along k; transposed, a row is a k, and the next 64 columns begin
// `leap` bytes later.
__device__ __forceinline__ uint64_t matrix_place(const void* shared, int swizzle, int stride, int leap) {
    return uint64_t((shared_address(shared) & 0x3ffff) >> 4) | uint64_t(leap >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           uint64_t(swizzle == 128 ? 1 : 2) << 62;
}
// The same, `bytes` further: rows of a swizzled pattern keep their permutation, which comes from the whole address.
__device__ __forceinline__ uint64_t matrix_step(uint64_t place, int bytes) { return place + uint64_t(bytes >> 4); }

// d += a b, or d = a b where `add` is 0. A specialisation for each kind of number, width and order of b that is in use.
template <class T, int N, bool transposed>
struct Product;

template <class T, int N, bool transposed>
__device__ __forceinline__ void wgmma(float* d, const uint32_t (&a)[4], uint64_t b, int add) {
    Product<T, N, transposed>::issue(d, a, b, add);
}

#define CF_D8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define CF_D16(i) CF_D8(i), CF_D8(i + 8)
#define CF_D32(i) CF_D16(i), CF_D16(i + 16)
#define CF_D64(i) CF_D32(i), CF_D32(i + 32)
#define CF_N8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CF_N16 CF_N8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define CF_N32 \
    CF_N16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CF_N64                                                                                    \
    CF_N32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
           "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define CF_PRODUCT(T, N, transposed, name, end, numbers, a_numbers, b_number, add_number, sums)                       \
    template <>                                                                                                       \
    struct Product<T, N, transposed> {                                                                                \
        static __device__ __forceinline__ void issue(float* d, const uint32_t(&a)[4], uint64_t b, int add) {          \
            asm volatile(                                                                                             \
                "{\n.reg .pred add;\nsetp.ne.b32 add, " add_number ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N name  \
                " {" numbers "}, {" a_numbers "}, " b_number ", add, 1, 1" end ";\n}"                                 \
                : sums                                                                                                \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                      \
        }                                                                                                             \
    };
#define CF_PRODUCT_32(T, transposed, name, end) \
    CF_PRODUCT(T, 32, transposed, name, end, CF_N16, "%16, %17, %18, %19", "%20", "%21", CF_D16(0))
#define CF_PRODUCT_64(T, transposed, name, end) \
    CF_PRODUCT(T, 64, transposed, name, end, CF_N32, "%32, %33, %34, %35", "%36", "%37", CF_D32(0))
#define CF_PRODUCT_128(T, transposed, name, end) \
    CF_PRODUCT(T, 128, transposed, name, end, CF_N64, "%64, %65, %66, %67", "%68", "%69", CF_D64(0))

CF_PRODUCT_32(F16, false, "k16.f32.f16.f16", ", 0")
CF_PRODUCT_128(F16, false, "k16.f32.f16.f16", ", 0")
CF_PRODUCT_64(F16, true, "k16.f32.f16.f16", ", 1")
CF_PRODUCT_128(F16, true, "k16.f32.f16.f16", ", 1")
CF_PRODUCT_32(BF16, false, "k16.f32.bf16.bf16", ", 0")
CF_PRODUCT_128(BF16, false, "k16.f32.bf16.bf16", ", 0")
CF_PRODUCT_64(BF16, true, "k16.f32.bf16.bf16", ", 1")
CF_PRODUCT_128(BF16, true, "k16.f32.bf16.bf16", ", 1")
CF_PRODUCT_32(E4M3, false, "k32.f32.e4m3.e4m3", "")
CF_PRODUCT_64(E4M3, false, "k32.f32.e4m3.e4m3", "")
CF_PRODUCT_128(E4M3, false, "k32.f32.e4m3.e4m3", "")

#undef CF_PRODUCT
#undef CF_PRODUCT_32
#undef CF_PRODUCT_64
#undef CF_PRODUCT_128
#undef CF_D8
#undef CF_D16
#undef CF_D32
#undef CF_D64
#undef CF_N8
#undef CF_N16
#undef CF_N32
#undef CF_N64

}  // namespace cf
#endif
