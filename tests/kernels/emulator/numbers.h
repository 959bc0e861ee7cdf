// The number types of the tensor cores as bits, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace cf::emulated {

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// A float with `exponent_bits` and `mantissa_bits`; subnormal numbers included. Not for NaN and what overflows.
inline uint32_t round_to(float value, int exponent_bits, int mantissa_bits) {
    const uint32_t sign = std::signbit(value) ? 1u << (exponent_bits + mantissa_bits) : 0;
    const double size = std::fabs(double(value));
    if (size == 0) return sign;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    int exponent = std::ilogb(size);
    if (exponent < 1 - bias) exponent = 1 - bias;
    const double units = std::nearbyint(std::ldexp(size, mantissa_bits - exponent));  // ties to even by default
    // a carry out of the mantissa lands in the exponent, a subnormal number has no hidden one: both by plain addition
    return sign | uint32_t(int64_t(units) + ((int64_t(exponent + bias) - 1) << mantissa_bits));
}

inline float value_of(uint32_t bits, int exponent_bits, int mantissa_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = int(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const int mantissa = int(bits) & ((1 << mantissa_bits) - 1);
    const double size = exponent ? std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
                                 : std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return float(bits >> (exponent_bits + mantissa_bits) & 1 ? -size : size);
}

inline uint16_t to_f16(float x) {
    if (std::isnan(x)) return 0x7fff;
    const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
    return uint16_t(std::fabs(x) >= 65520.0f ? sign | 0x7c00 : round_to(x, 5, 10));
}
inline float from_f16(uint16_t bits) {
    if ((bits & 0x7c00) == 0x7c00) return bits & 0x3ff ? NAN : bits & 0x8000 ? -INFINITY : INFINITY;
    return value_of(bits, 5, 10);
}
inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    if (std::isnan(x)) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }
inline uint8_t to_e4m3(float x) {  // saturating: no infinity
    if (std::isnan(x)) return 0x7f;
    if (std::fabs(x) >= 448.0f) return std::signbit(x) ? 0xfe : 0x7e;
    return uint8_t(round_to(x, 4, 3));
}
inline float from_e4m3(uint8_t bits) { return (bits & 0x7f) == 0x7f ? NAN : value_of(bits, 4, 3); }

}  // namespace cf::emulated
