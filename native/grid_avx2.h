// What products with matrices of low-bit codes take from AVX2: see kernel_grid.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace plait {
namespace {

// Eight output rows: the parts of a tile that one register holds.
struct GridLanes256 {
    static constexpr int kCount = 8;
    static constexpr int kRows = 4;  // rows that meet a decoded block together
    static constexpr int kLess = 128;  // what `dot` takes off 8-bit codes
    using F = __m256;
    using I = __m256i;   // one whole number for each row
    using U = __m256i;   // four bytes for each row

    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float x) { return _mm256_set1_ps(x); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static F load_halves(const uint8_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static F load_bytes(const uint8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F to_float(I x) { return _mm256_cvtepi32_ps(x); }

    static U plane(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    template <int Shift, int Mask>
    static U field(U x) {
        return _mm256_and_si256(_mm256_srli_epi16(x, Shift), _mm256_set1_epi8(char(Mask)));
    }
    template <int Shift>
    static U raised(U x) { return _mm256_slli_epi16(x, Shift); }
    static U join(U a, U b) { return _mm256_or_si256(a, b); }

    // Bytes, or what two bytes of a wide table stand for, less `less` as pairs; see `Panel`.
    template <bool IsWide>
    static void store_pairs(const U (&u)[8], const U (&low)[8], int less, int16_t* out) {
        const __m256i minus = _mm256_set1_epi16(int16_t(less)), base = _mm256_set1_epi16(kWideBase);
        const auto pair_of = [](U bytes, int i) {
            return i == 0 ? _mm256_and_si256(bytes, _mm256_set1_epi16(255)) : _mm256_srli_epi16(bytes, 8);
        };
        for (int g = 0; g < 8; ++g) {
            for (int i = 0; i < 2; ++i) {
                __m256i pair = pair_of(u[g], i);
                if constexpr (IsWide) pair = _mm256_add_epi16(_mm256_mullo_epi16(pair, base), pair_of(low[g], i));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (4 * g + 2 * i) * kTile), _mm256_sub_epi16(pair, minus));
            }
        }
    }

    using Table = __m256i;
    static Table table(const uint8_t* entries) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
    }
    static U look_up(Table t, U codes) { return _mm256_shuffle_epi8(t, codes); }
    // Bytes of `value` where the code is `last`, else 0.
    static U where_last(U codes, int last, U value) {
        return _mm256_and_si256(_mm256_cmpeq_epi8(codes, _mm256_set1_epi8(char(last))), value);
    }
    // Four times the special byte of each row; `types` are 2 bits a row.
    static U specials(const uint8_t* types, int first, const uint32_t* fourfold) {
        uint32_t bits;
        std::memcpy(&bits, types, 4);
        const __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
        const __m256i type = _mm256_and_si256(
            _mm256_srlv_epi32(_mm256_set1_epi32(int(bits >> (2 * first))), shifts), _mm256_set1_epi32(3));
        const __m256i values =
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(fourfold)));
        return _mm256_permutevar8x32_epi32(values, type);
    }
    static U no_bytes() { return _mm256_setzero_si256(); }

    static __m256i four(const int8_t* x) {
        int32_t bits;
        std::memcpy(&bits, x, 4);
        return _mm256_set1_epi32(bits);
    }
    // Sum over 32 columns of u * x, for u up to Top.
    template <int Top>
    static I dot(const U (&u)[8], const int8_t* x) {
        const __m256i ones = _mm256_set1_epi16(1);
        if constexpr (Top <= 15) {
            // A pair of products is at most 2 * 15 * 127 = 3810, so eight pairs stay below 2^15.
            __m256i sum = _mm256_maddubs_epi16(u[0], four(x));
            for (int g = 1; g < 8; ++g) sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(u[g], four(x + 4 * g)));
            return _mm256_madd_epi16(sum, ones);
        } else if constexpr (Top <= 32) {
            // At most 2 * 32 * 127 = 8128, so four pairs stay below 2^15.
            __m256i total = _mm256_setzero_si256();
            for (int half = 0; half < 8; half += 4) {
                __m256i sum = _mm256_maddubs_epi16(u[half], four(x + 4 * half));
                for (int g = half + 1; g < half + 4; ++g)
                    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(u[g], four(x + 4 * g)));
                total = _mm256_add_epi32(total, _mm256_madd_epi16(sum, ones));
            }
            return total;
        } else if constexpr (Top < kWideBase) {
            // At most 2 * 64 * 127 = 16256, so two pairs stay below 2^15.
            __m256i total = _mm256_setzero_si256();
            for (int g = 0; g < 8; g += 2) {
                const __m256i sum = _mm256_add_epi16(_mm256_maddubs_epi16(u[g], four(x + 4 * g)),
                                                     _mm256_maddubs_epi16(u[g + 1], four(x + 4 * g + 4)));
                total = _mm256_add_epi32(total, _mm256_madd_epi16(sum, ones));
            }
            return total;
        } else {
            // Codes up to 255 would saturate. The sign of code - 128 is given to x instead: a pair of products is
            // then at most 2 * 128 * 127 = 32512. This is the sum of (u - 128) * x.
            __m256i total = _mm256_setzero_si256();
            for (int g = 0; g < 8; ++g) {
                const __m256i code = _mm256_xor_si256(u[g], _mm256_set1_epi8(-128));
                const __m256i pairs =
                    _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(four(x + 4 * g), code));
                total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, ones));
            }
            return total;
        }
    }
    // kWideBase * high + low.
    static I wide(I high, I low) {
        return _mm256_add_epi32(_mm256_mullo_epi32(high, _mm256_set1_epi32(kWideBase)), low);
    }
    // 128 * high + low + shift * minus_sum, which may leave 32 bits on the way and comes back to them.
    static I whole(I high, I low, int shift, int32_t minus_sum) {
        return _mm256_add_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, 7), low),
                                _mm256_set1_epi32(shift * minus_sum));
    }
    // Byte `column` of each row as a number.
    static F number(U u, int column) {
        return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(u, _mm_cvtsi32_si128(8 * column)),
                                                   _mm256_set1_epi32(255)));
    }
};

}  // namespace
}  // namespace plait
