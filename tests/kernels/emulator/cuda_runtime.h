// Stand-in for CUDA's cuda_runtime.h: the words of the language and the few calls that our kernels use (fibers.h).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static_assert(false, "use cf::shared_memory()");
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define threadIdx (cf::emulated::self().index)
#define blockIdx (cf::emulated::self().block->index)
#define blockDim (cf::emulated::machine.block)
#define gridDim (cf::emulated::machine.grid)

inline void __syncthreads() {
    cf::emulated::Block& block = *cf::emulated::self().block;
    int live = 0;
    for (auto& warp : block.warps) live += warp->live;
    cf::emulated::barrier_sync(0, live, "__syncthreads");
}
inline void __syncwarp(unsigned = 0xffffffffu) {
    cf::emulated::collective<char>("__syncwarp", char(0), [](auto&, auto&) {});
}
template <class T>
T shuffle(const char* name, T value, int source) {
    struct In {
        T value;
        int source;
    };
    return cf::emulated::collective<T>(name, In{value, source}, [](const In(&in)[32], T(&out)[32]) {
        for (int lane = 0; lane < 32; ++lane) out[lane] = in[in[lane].source & 31].value;
    });
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
    return shuffle("__shfl_sync", value, source);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return shuffle("__shfl_xor_sync", value, cf::emulated::self().lane ^ mask);
}
inline bool __any_sync(unsigned, bool value) {
    return cf::emulated::collective<bool>("__any_sync", value, [](const bool (&in)[32], bool (&out)[32]) {
        bool any = false;
        for (bool one : in) any |= one;
        for (bool& one : out) one = any;
    });
}
template <class T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address = before + value;
    return before;
}
template <class T>
T __ldg(const T* address) {
    return *address;
}
inline void __threadfence() {}
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline void sincospif(float x, float* sine, float* cosine) {
    *sine = float(std::sin(3.14159265358979323846 * x));
    *cosine = float(std::cos(3.14159265358979323846 * x));
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;

typedef void* cudaStream_t;
