#include "bits.h"

#include <algorithm>

#include "dispatch.h"

namespace plait {

void take_signs(const float* x, int64_t ldx, const float* shift, int64_t columns, int64_t begin, int64_t end, uint64_t* words) {
    const int64_t count = words_of(columns);
    for (int64_t row = begin; row < end; ++row)
        for (int64_t w = 0; w < count; ++w)
            words[row * count + w] = kernels().negative_bits(x + row * ldx + w * kWord, shift == nullptr ? nullptr : shift + w * kWord,
                                                             int(std::min(kWord, columns - w * kWord)));
}

void multiply_bits(const BitView& w, int64_t begin, int64_t end, const uint64_t* x, int64_t rows, float* y, int64_t ldy) {
    alignas(64) int32_t differing[kTile];
    const int32_t columns = int32_t(w.columns);
    const auto scale = [&](const float* scales, float* to, int64_t count) {
        for (int64_t r = 0; r < count; ++r) to[r] = scales[r] * float(columns - 2 * differing[r]);
    };
    for (int64_t t = begin; t < end; ++t) {
        const int64_t count = std::min<int64_t>(kTile, w.outputs - t * kTile);
        for (int64_t row = 0; row < rows; ++row) {
            kernels().differing_bits(w.weight + t * w.words * kTile, x + row * w.words, w.words, differing);
            float* to = y + row * ldy + t * kTile;
            // A whole tile has a length that the compiler knows.
            if (count == kTile) scale(w.scales + t * kTile, to, kTile);
            else scale(w.scales + t * kTile, to, count);
        }
    }
}

}  // namespace plait
