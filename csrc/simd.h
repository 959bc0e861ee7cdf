// Vectors of W floats, in a namespace per instruction set so that copies of one kernel never meet at link time.
//
// GCC/Clang vector extensions carry the arithmetic (a * b + c contracts to an FMA); intrinsics appear only where the
// extensions have no word: rounding in exp2, bf16 conversion and the bf16 dot product.
// Kernels must not instantiate library templates from a copy compiled for a wide instruction set: the linker could
// keep that copy for everybody. Plain loops and raw arrays only.
#pragma once

#include <cstdint>
#include <cstring>

#if CF_LEVEL >= 1
#include <immintrin.h>
#endif

#define CF_PASTE_(a, b) a##b
#define CF_PASTE(a, b) CF_PASTE_(a, b)
#define CF_NS CF_PASTE(l, CF_LEVEL)
#define CF_INLINE inline __attribute__((always_inline))

namespace cf {
namespace CF_NS {

#if CF_LEVEL >= 2
constexpr int W = 16;
#elif CF_LEVEL == 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr bool kDot = CF_LEVEL == 3;  // bf16 pairs multiplied and summed by one instruction

typedef float vf __attribute__((vector_size(W * 4)));
typedef float vf_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint32_t vu_mem __attribute__((vector_size(W * 4), aligned(2), may_alias));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint16_t vh_mem __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef uint16_t __attribute__((may_alias)) bf16;  // stored into buffers that are read as float

CF_INLINE vf splat(float x) { return vf{} + x; }
CF_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
CF_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_mem*>(p) = x; }
CF_INLINE vf as_float(vu x) { return reinterpret_cast<vf>(x); }
CF_INLINE vu as_bits(vf x) { return reinterpret_cast<vu>(x); }
CF_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

CF_INLINE float sum(vf x) {
    float total = 0;
    for (int i = 0; i < W; ++i) total += x[i];
    return total;
}

// ---- bf16 ------------------------------------------------------------------------------------------------------

CF_INLINE float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
CF_INLINE bf16 to_bf16(float x) {  // round to nearest even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40u);
    return bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
CF_INLINE vf load(const bf16* p) {
    return as_float(__builtin_convertvector(*reinterpret_cast<const vh_mem*>(p), vu) << 16);
}
CF_INLINE void store(bf16* p, vf x) {
#if CF_LEVEL == 3
    const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
    std::memcpy(p, &half, 32);
#else
    const vu bits = as_bits(x);
    const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const vu quiet = (bits >> 16) | 0x40u;
    const vu chosen = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
    *reinterpret_cast<vh_mem*>(p) = __builtin_convertvector(chosen, vh);
#endif
}

CF_INLINE float load1(const float* p) { return *p; }
CF_INLINE float load1(const bf16* p) { return to_float(*p); }
CF_INLINE void store1(float* p, float x) { *p = x; }
CF_INLINE void store1(bf16* p, float x) { *p = to_bf16(x); }

// Value of one element after a round trip through T.
CF_INLINE vf rounded_to(const float*, vf x) { return x; }
CF_INLINE vf rounded_to(const bf16*, vf x) {
    bf16 half[W];
    store(half, x);
    return load(half);
}

// ---- pairs of channels ------------------------------------------------------------------------------------------

// Exchange lanes 2i and 2i + 1.
CF_INLINE vf swap_pairs(vf x) {
#if CF_LEVEL >= 2
    return reinterpret_cast<vf>(_mm512_permute_ps(reinterpret_cast<__m512>(x), 0xB1));
#elif CF_LEVEL == 1
    return reinterpret_cast<vf>(_mm256_permute_ps(reinterpret_cast<__m256>(x), 0xB1));
#else
    return vf{x[1], x[0], x[3], x[2]};
#endif
}

// (x0, x1) -> (x0 c - x1 s, x0 s + x1 c) for every pair; cosine holds (c, c), sine (-s, s).
CF_INLINE vf turn(vf x, vf cosine, vf sine) { return x * cosine + swap_pairs(x) * sine; }

// ---- exponential ------------------------------------------------------------------------------------------------

// 2^x for x <= 0: 2^floor(x) times a polynomial of degree 5 in the fraction.
// Relative error at most 2.5e-7 against float64 (measured over [-120, 0]); 0 below -126, NaN stays NaN.
CF_INLINE vf exp2_negative(vf x) {
#if CF_LEVEL >= 2
    const __m512 z = reinterpret_cast<__m512>(x);
    const vf f = reinterpret_cast<vf>(_mm512_reduce_ps(z, 0x01));  // x - floor(x)
#else
    x = x < -126.0f ? splat(-126.0f) : x;
    const vi truncated = __builtin_convertvector(x, vi);
    const vi whole = truncated + (__builtin_convertvector(truncated, vf) > x);  // a true comparison is -1
    const vf f = x - __builtin_convertvector(whole, vf);
#endif
    vf p = splat(1.8775767e-3f) * f + 8.9893397e-3f;
    p = p * f + 5.5826318e-2f;
    p = p * f + 2.4015361e-1f;
    p = p * f + 6.9315308e-1f;
    p = p * f + 9.9999994e-1f;
#if CF_LEVEL >= 2
    return reinterpret_cast<vf>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), z));
#else
    const vf power = reinterpret_cast<vf>((whole + 127) << 23);
    return x <= -126.0f ? splat(0.0f) : p * power;
#endif
}

}  // namespace CF_NS
}  // namespace cf
