// Signs of numbers as bits, one number at a time: the definition, and the end of what vectors do not fill.
#pragma once

#include <cstdint>

namespace plait {

// Bit i is set where x[i] + shift[i] is below 0 or NaN, for i in [first, count); a null shift is 0.
inline uint64_t negative_bits_of(const float* x, const float* shift, int first, int count) {
    uint64_t word = 0;
    for (int i = first; i < count; ++i) {
        const float v = shift != nullptr ? x[i] + shift[i] : x[i];
        word |= uint64_t(!(v >= 0.0f)) << i;
    }
    return word;
}

}  // namespace plait
