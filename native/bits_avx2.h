// What one-bit products need of AVX2; the wider sets, which have no better instruction for it, use it too.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

namespace plait {
namespace {

struct BitsAvx2 {
    // How many bits of `words` words of x differ from those of each of 16 rows, [word][16]: out[16].
    static void differing_bits(const uint64_t* rows, const uint64_t* x, int64_t words, int32_t* out) {
        const __m256i low = _mm256_set1_epi8(15);
        const __m256i counts = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                                                0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
        __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                           _mm256_setzero_si256()};
        // A byte gets at most 8 for each word: 31 words are at most 248.
        constexpr int64_t panel = 31;
        for (int64_t first = 0; first < words; first += panel) {
            const int64_t last = first + panel < words ? first + panel : words;
            __m256i bytes[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                                _mm256_setzero_si256()};
            for (int64_t w = first; w < last; ++w) {
                const __m256i same = _mm256_set1_epi64x(int64_t(x[w]));
                for (int i = 0; i < 4; ++i) {
                    const __m256i bits = _mm256_xor_si256(
                        same, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + w * kTile + 4 * i)));
                    const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(bits, 4), low);
                    const __m256i both = _mm256_add_epi8(_mm256_shuffle_epi8(counts, _mm256_and_si256(bits, low)),
                                                         _mm256_shuffle_epi8(counts, upper));
                    bytes[i] = _mm256_add_epi8(bytes[i], both);
                }
            }
            for (int i = 0; i < 4; ++i)
                sums[i] = _mm256_add_epi64(sums[i], _mm256_sad_epu8(bytes[i], _mm256_setzero_si256()));
        }
        alignas(32) int64_t wide[kTile];
        for (int i = 0; i < 4; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(wide + 4 * i), sums[i]);
        for (int r = 0; r < kTile; ++r) out[r] = int32_t(wide[r]);
    }

    // Bit i is set where x[i] + shift[i] is below 0 or NaN, for up to 64 numbers; a null shift is 0.
    static uint64_t negative_bits(const float* x, const float* shift, int count) {
        uint64_t word = 0;
        int i = 0;
        for (; i + 8 <= count; i += 8) {
            __m256 v = _mm256_loadu_ps(x + i);
            if (shift != nullptr) v = _mm256_add_ps(v, _mm256_loadu_ps(shift + i));
            const int mask = _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NGE_UQ));
            word |= uint64_t(uint32_t(mask)) << i;
        }
        for (; i < count; ++i) {
            const float v = shift != nullptr ? x[i] + shift[i] : x[i];
            word |= uint64_t(!(v >= 0.0f)) << i;
        }
        return word;
    }
};

}  // namespace
}  // namespace plait
