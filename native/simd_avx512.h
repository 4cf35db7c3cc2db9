// Sixteen fp32 lanes as one 512-bit register: AVX-512 F, BW, DQ, VL and VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "count_bits.h"
#include "grid_avx512.h"
#include "kernels.h"

namespace plait {
namespace {

// Eight words, for `CountBits`.
struct Words512 {
    using Vector = __m512i;
    static constexpr int kWords = 8;

    static Vector zero() { return _mm512_setzero_si512(); }
    static Vector differing(const uint64_t* rows, uint64_t x) {
        return _mm512_xor_si512(_mm512_loadu_si512(rows), _mm512_set1_epi64(int64_t(x)));
    }
    static Vector odd(Vector a, Vector b, Vector c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
    static Vector majority(Vector a, Vector b, Vector c) { return _mm512_ternarylogic_epi64(a, b, c, 0xe8); }
    static Vector bits_of_bytes(Vector x) {
        const __m512i low = _mm512_set1_epi8(15);
        const __m512i counts = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
        const __m512i upper = _mm512_and_si512(_mm512_srli_epi16(x, 4), low);
        return _mm512_add_epi8(_mm512_shuffle_epi8(counts, _mm512_and_si512(x, low)), _mm512_shuffle_epi8(counts, upper));
    }
    static Vector add_bytes(Vector a, Vector b) { return _mm512_add_epi8(a, b); }
    static Vector sum_bytes(Vector x) { return _mm512_sad_epu8(x, _mm512_setzero_si512()); }
    static Vector add(Vector a, Vector b) { return _mm512_add_epi64(a, b); }
    static Vector twice(Vector x) { return _mm512_slli_epi64(x, 1); }
    static void store(int64_t* p, Vector x) { _mm512_storeu_si512(p, x); }
};

struct Avx512 : CountBits<Words512> {
    static constexpr int kWideLanes = 16;
    // Products of bytes cost no more than those of pairs, and need no codes to be widened: never.
    static constexpr int kPairRows = kRowChunk + 1;
    static constexpr int kQueryRows = 4;  // of attention that meet a key at once, and of a dense product
    static constexpr int kDenseRows = 4;
    // Keys, and vectors of a value, whose sums are held at a time; the registers are those of one set.
    static constexpr int keys_at_once([[maybe_unused]] int rows) { return 4; }
    static constexpr int vectors_at_once([[maybe_unused]] int rows) { return 4; }
    static constexpr int kScoreVectors = 2;  // of keys that meet many rows

    using F = __m512;
    using Wide = __m512;
    using WideInt = __m512i;
    using GridLanes = GridLanes512;

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static F widened(__m256i bits, bool is_bf16) {
        if (is_bf16) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        return _mm512_cvtph_ps(bits);
    }
    static F load(const uint16_t* p, bool is_bf16) {
        return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), is_bf16);
    }
    // Fewer than 16, zeros behind them; by one load or not.
    static constexpr bool kLoadsSome = true;
    static __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1); }
    static F load_some(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
    static F load_some(const uint16_t* p, int64_t n, bool is_bf16) {
        return widened(_mm256_maskz_loadu_epi16(first(n), p), is_bf16);
    }
    // Numbers of fp16 from two places, eight each, and from four.
    static F load_halves(const uint16_t* a, const uint16_t* b) {
        return _mm512_cvtph_ps(_mm256_set_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b)),
                                                _mm_loadu_si128(reinterpret_cast<const __m128i*>(a))));
    }
    static __m128i bits4(const uint16_t* a, const uint16_t* b) {
        return _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a)),
                                  _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b)));
    }
    static F load_quarters(const uint16_t* a, const uint16_t* b, const uint16_t* c, const uint16_t* d) {
        return _mm512_cvtph_ps(_mm256_set_m128i(bits4(c, d), bits4(a, b)));
    }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static void store(uint16_t* p, F x, bool is_bf16) {
        __m256i result;
        if (is_bf16) {
            // Not the bf16 instruction, which takes subnormal numbers for zero.
            const __m512i bits = _mm512_castps_si512(x);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            const __m512i rounded = _mm512_srli_epi32(
                _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
            const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
            const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
            result = _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan, rounded, quiet));
        } else {
            result = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), result);
    }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static F negated(F x, uint32_t bits) {
        return _mm512_mask_xor_ps(x, __mmask16(bits), x, _mm512_set1_ps(-0.0f));
    }
    static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F select_less(F a, F b, F if_less, F otherwise) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, if_less);
    }
    static F power_of_two(F n) {
        const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
        return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
    }
    static float sum(F x) {
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        const __m128 b = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        const __m128 pair = _mm_add_ps(b, _mm_movehl_ps(b, b));
        return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
    }
    static float largest(F x) {
        const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        const __m128 b = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        const __m128 pair = _mm_max_ps(b, _mm_movehl_ps(b, b));
        return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
    }
    // The halves of a and b, added: [a | b], 256 bits each. Then the quarters of four: [a | b | c | d].
    static F halves(F a, F b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    static F quarters(F a, F b, F c, F d) {
        const F ab = halves(a, b), cd = halves(c, d);
        return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    }
    template <int Rows>
    static void store_sums(const F (&x)[Rows][4], float* out, int64_t stride) {
        static_assert(Rows <= 4, "one 128-bit lane holds a row's four sums");
        constexpr int r1 = Rows > 1 ? 1 : 0, r2 = Rows > 2 ? 2 : 0, r3 = Rows > 3 ? 3 : 0;
        F q[4];
        for (int k = 0; k < 4; ++k) q[k] = quarters(x[0][k], x[r1][k], x[r2][k], x[r3][k]);
        const F ab = _mm512_add_ps(_mm512_unpacklo_ps(q[0], q[1]), _mm512_unpackhi_ps(q[0], q[1]));
        const F cd = _mm512_add_ps(_mm512_unpacklo_ps(q[2], q[3]), _mm512_unpackhi_ps(q[2], q[3]));
        const F first = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
        const F second = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
        const F sums = _mm512_add_ps(first, second);
        _mm_storeu_ps(out, _mm512_castps512_ps128(sums));
        if constexpr (Rows > 1) _mm_storeu_ps(out + stride, _mm512_extractf32x4_ps(sums, 1));
        if constexpr (Rows > 2) _mm_storeu_ps(out + 2 * stride, _mm512_extractf32x4_ps(sums, 2));
        if constexpr (Rows > 3) _mm_storeu_ps(out + 3 * stride, _mm512_extractf32x4_ps(sums, 3));
    }
    // Four vectors as columns: out[lane][which].
    static void store_turned(const F (&x)[4], float* out, int64_t stride) {
        const F ab_low = _mm512_unpacklo_ps(x[0], x[1]), ab_high = _mm512_unpackhi_ps(x[0], x[1]);
        const F cd_low = _mm512_unpacklo_ps(x[2], x[3]), cd_high = _mm512_unpackhi_ps(x[2], x[3]);
        // The fours of lanes k, k + 4, k + 8 and k + 12.
        const auto joined = [](F a, F b, bool is_high) {
            const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
            return _mm512_castpd_ps(is_high ? _mm512_unpackhi_pd(c, d) : _mm512_unpacklo_pd(c, d));
        };
        const F fours[4] = {joined(ab_low, cd_low, false), joined(ab_low, cd_low, true), joined(ab_high, cd_high, false),
                            joined(ab_high, cd_high, true)};
        for (int k = 0; k < 4; ++k) {
            _mm_storeu_ps(out + k * stride, _mm512_castps512_ps128(fours[k]));
            _mm_storeu_ps(out + (k + 4) * stride, _mm512_extractf32x4_ps(fours[k], 1));
            _mm_storeu_ps(out + (k + 8) * stride, _mm512_extractf32x4_ps(fours[k], 2));
            _mm_storeu_ps(out + (k + 12) * stride, _mm512_extractf32x4_ps(fours[k], 3));
        }
    }
    static void store_int8(int8_t* p, F x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
    }

    // Sixteen codes from the lowest bit of a byte on, as lanes whose lowest `Bits` bits are one; up to 4 bytes behind them are
    // read. Then as whole numbers, and as code * scale + minimum, which a table has for codes of up to 4 bits.
    template <int Bits>
    static __m512i lanes_of_codes(const uint8_t* p) {
        const __m512i places = _mm512_setr_epi32(0, Bits, 2 * Bits, 3 * Bits, 4 * Bits, 5 * Bits, 6 * Bits, 7 * Bits, 0, Bits,
                                                 2 * Bits, 3 * Bits, 4 * Bits, 5 * Bits, 6 * Bits, 7 * Bits);
        uint32_t first, second;
        __builtin_memcpy(&first, p, 4);
        __builtin_memcpy(&second, p + Bits, 4);
        const __m512i words = _mm512_inserti64x4(_mm512_set1_epi32(int(first)), _mm256_set1_epi32(int(second)), 1);
        return _mm512_srlv_epi32(words, places);
    }
    template <int Bits>
    static F codes(const uint8_t* p) {
        if constexpr (Bits == 8) {
            return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
        } else {
            return _mm512_permutexvar_ps(lanes_of_codes<Bits>(p), numbers_of_lanes<Bits>());
        }
    }
    template <int Bits>
    struct TableLevels {
        F all;

        TableLevels(float scale, float minimum) : all(fma(numbers_of_lanes<Bits>(), set1(scale), set1(minimum))) {}
        F numbers(const uint8_t* p) const { return _mm512_permutexvar_ps(lanes_of_codes<Bits>(p), all); }
    };
    template <int Bits>
    using Levels = std::conditional_t<Bits == 8, PlainLevels<Avx512, Bits>, TableLevels<Bits>>;
    // 0, 1, ... again and again: four bits choose a lane.
    template <int Bits>
    static F numbers_of_lanes() {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_cvtepi32_ps(_mm512_and_si512(lanes, _mm512_set1_epi32((1 << Bits) - 1)));
    }

    static Wide wide_zero() { return zero(); }
    static Wide wide_set1(const float* p) { return _mm512_set1_ps(*p); }
    static Wide wide_load(const float* p) { return load(p); }
    static Wide wide_load(const uint16_t* p) { return load(p, false); }
    static void wide_store(float* p, Wide x) { store(p, x); }
    static Wide wide_add(Wide a, Wide b) { return _mm512_add_ps(a, b); }
    static Wide wide_mul(Wide a, Wide b) { return mul(a, b); }
    static Wide wide_fma(Wide a, Wide b, Wide c) { return fma(a, b, c); }
    static Wide to_float(WideInt x) { return _mm512_cvtepi32_ps(x); }
    static WideInt join(WideInt high, WideInt low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 7), low); }

    template <int Bits>
    struct Codes {
        __m512i at[8];
    };
    template <int Bits>
    static Codes<Bits> load_codes(const uint8_t* p) {
        Codes<Bits> codes;
        if constexpr (Bits == 4) {
            const __m512i low = _mm512_set1_epi8(15);
            for (int j = 0; j < 4; ++j) {
                const __m512i packed = _mm512_loadu_si512(p + 64 * j);
                codes.at[2 * j] = _mm512_and_si512(packed, low);
                codes.at[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low);
            }
        } else {
            for (int g = 0; g < 8; ++g) codes.at[g] = _mm512_loadu_si512(p + 64 * g);
        }
        return codes;
    }
    static __m512i four(const int8_t* x) {
        int32_t bits;
        __builtin_memcpy(&bits, x, 4);
        return _mm512_set1_epi32(bits);
    }
    static WideInt wide_int_zero() { return _mm512_setzero_si512(); }
    static WideInt wide_int_add(WideInt a, WideInt b) { return _mm512_add_epi32(a, b); }
    template <int Bits>
    static WideInt raised(WideInt x) { return _mm512_slli_epi32(x, Bits); }
    static WideInt correction(const int32_t* minus_sum, int shift) {
        return _mm512_slli_epi32(_mm512_set1_epi32(*minus_sum), shift);
    }
    // Adds the products of four columns.
    static WideInt add_products(WideInt sum, __m512i codes, const int8_t* x) { return _mm512_dpbusd_epi32(sum, codes, four(x)); }
    template <int Bits, int Shift, int From, int To>
    static WideInt dot(const Codes<Bits>& codes, const int8_t* x, const int32_t* minus_sum) {
        __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
        if constexpr (Shift >= 0) even = correction(minus_sum, Shift);
        // Two chains hide the latency of the dot product.
        for (int g = From; g < To; g += 2) {
            even = _mm512_dpbusd_epi32(even, codes.at[g], four(x + 4 * g));
            odd = _mm512_dpbusd_epi32(odd, codes.at[g + 1], four(x + 4 * g + 4));
        }
        return _mm512_add_epi32(even, odd);
    }

    // Bit i is set where x[i] + shift[i] is below 0 or NaN, for up to 64 numbers; a null shift is 0.
    static uint64_t negative_bits(const float* x, const float* shift, int count) {
        uint64_t word = 0;
        for (int i = 0; i < count; i += 16) {
            const __mmask16 there = __mmask16((1u << (count - i < 16 ? count - i : 16)) - 1);
            __m512 v = _mm512_maskz_loadu_ps(there, x + i);
            if (shift != nullptr) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(there, shift + i));
            const __mmask16 mask = _mm512_mask_cmp_ps_mask(there, v, _mm512_setzero_ps(), _CMP_NGE_UQ);
            word |= uint64_t(mask) << i;
        }
        return word;
    }
};

}  // namespace
}  // namespace plait
