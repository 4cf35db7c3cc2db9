// Scalar conversions of 16-bit floating-point numbers. Used where single numbers are read; the vector
// paths have instructions of their own with the same results.
#pragma once

#include <cstdint>
#include <cstring>

namespace plait {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float bf16_to_float(uint16_t x) { return float_of(uint32_t(x) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float fp16_to_float(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000u) << 16;
    const uint32_t exponent = (x >> 10) & 31u, fraction = x & 0x3ffu;
    if (exponent == 31) return float_of(sign | 0x7f800000u | (fraction << 13) | (fraction ? 0x400000u : 0u));
    if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
    // Subnormal: the fraction counts steps of 2^-24, which fp32 holds exactly.
    const float size = float(fraction) * 0x1p-24f;
    return float_of(bits_of(size) | sign);
}

// Round to nearest, ties to even; too large becomes infinite; NaN stays NaN.
inline uint16_t float_to_fp16(float x) {
    const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((size >> 13) & 0x3ffu));
    if (size >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65536 or more
    if (size < 0x38800000u) {
        // Below 2^-14 the result counts steps of 2^-24; adding 0.5 makes the adder round to that step.
        return uint16_t(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)));
    }
    return uint16_t(sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13));
}

}  // namespace plait
