// What products with matrices of low-bit codes take from AVX-512: see kernel_grid.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace plait {
namespace {

// Sixteen output rows: a tile.
struct GridLanes512 {
    static constexpr int kCount = 16;
    static constexpr int kRows = 4;  // rows that meet a decoded block together
    static constexpr int kLess = 0;  // what `dot` takes off 8-bit codes
    using F = __m512;
    using I = __m512i;   // one whole number for each row
    using U = __m512i;   // four bytes for each row

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static F load_halves(const uint8_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static F load_bytes(const uint8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F to_float(I x) { return _mm512_cvtepi32_ps(x); }

    static U plane(const uint8_t* p) { return _mm512_loadu_si512(p); }
    template <int Shift, int Mask>
    static U field(U x) {
        return _mm512_and_si512(_mm512_srli_epi16(x, Shift), _mm512_set1_epi8(char(Mask)));
    }
    template <int Shift>
    static U raised(U x) { return _mm512_slli_epi16(x, Shift); }
    static U join(U a, U b) { return _mm512_or_si512(a, b); }

    using Table = __m512i;
    static Table table(const uint8_t* entries) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
    }
    static U look_up(Table t, U codes) { return _mm512_shuffle_epi8(t, codes); }
    // Bytes of `value` where the code is `last`, else 0.
    static U where_last(U codes, int last, U value) {
        return _mm512_maskz_mov_epi8(_mm512_cmpeq_epi8_mask(codes, _mm512_set1_epi8(char(last))), value);
    }
    // Four times the special byte of each row; `types` are 2 bits a row.
    static U specials(const uint8_t* types, int, const uint32_t* fourfold) {
        uint32_t bits;
        std::memcpy(&bits, types, 4);
        const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i type = _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(int(bits)), shifts), _mm512_set1_epi32(3));
        const __m512i values =
            _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(fourfold)));
        return _mm512_permutexvar_epi32(type, values);
    }
    static U no_bytes() { return _mm512_setzero_si512(); }

    static __m512i four(const int8_t* x) {
        int32_t bits;
        std::memcpy(&bits, x, 4);
        return _mm512_set1_epi32(bits);
    }
    // Sum over 32 columns of u * x.
    template <int Top>
    static I dot(const U (&u)[8], const int8_t* x) {
        I even = _mm512_setzero_si512(), odd = even;
        for (int g = 0; g < 8; g += 2) {
            even = _mm512_dpbusd_epi32(even, u[g], four(x + 4 * g));
            odd = _mm512_dpbusd_epi32(odd, u[g + 1], four(x + 4 * g + 4));
        }
        return _mm512_add_epi32(even, odd);
    }
    // kWideBase * high + low.
    static I wide(I high, I low) {
        return _mm512_add_epi32(_mm512_mullo_epi32(high, _mm512_set1_epi32(kWideBase)), low);
    }
    // 128 * high + low + shift * minus_sum, which may leave 32 bits on the way and comes back to them.
    static I whole(I high, I low, int shift, int32_t minus_sum) {
        return _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(high, 7), low), _mm512_set1_epi32(shift * minus_sum));
    }
    // Byte `column` of each row as a number.
    static F number(U u, int column) {
        return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srl_epi32(u, _mm_cvtsi32_si128(8 * column)),
                                                   _mm512_set1_epi32(255)));
    }
};

}  // namespace
}  // namespace plait
