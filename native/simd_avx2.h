// Sixteen fp32 lanes as two 256-bit registers: AVX2 with FMA and F16C, and optionally AVX-VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "count_bits.h"
#include "grid_avx2.h"
#include "kernels.h"
#include "signs.h"

namespace plait {
namespace {

// Four words, for `CountBits`.
struct Words256 {
    using Vector = __m256i;
    static constexpr int kWords = 4;

    static Vector zero() { return _mm256_setzero_si256(); }
    static Vector differing(const uint64_t* rows, uint64_t x) {
        return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows)), _mm256_set1_epi64x(int64_t(x)));
    }
    static Vector odd(Vector a, Vector b, Vector c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
    static Vector majority(Vector a, Vector b, Vector c) {
        return _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(_mm256_xor_si256(a, b), c));
    }
    static Vector bits_of_bytes(Vector x) {
        const __m256i low = _mm256_set1_epi8(15);
        const __m256i counts = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                                                0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
        const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(x, 4), low);
        return _mm256_add_epi8(_mm256_shuffle_epi8(counts, _mm256_and_si256(x, low)), _mm256_shuffle_epi8(counts, upper));
    }
    static Vector add_bytes(Vector a, Vector b) { return _mm256_add_epi8(a, b); }
    static Vector sum_bytes(Vector x) { return _mm256_sad_epu8(x, _mm256_setzero_si256()); }
    static Vector add(Vector a, Vector b) { return _mm256_add_epi64(a, b); }
    static Vector twice(Vector x) { return _mm256_slli_epi64(x, 1); }
    static void store(int64_t* p, Vector x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
};

struct Avx2 : CountBits<Words256> {
    static constexpr int kWideLanes = 8;
    static constexpr int kPairRows = 4;   // rows of a chunk from which on activations are kept as pairs
    static constexpr int kQueryRows = 3;  // of attention that meet a key at once, and of a dense product
    static constexpr int kDenseRows = 1;
    // Keys, and vectors of a value, whose sums are held at a time; the registers are those of one set.
    static constexpr int keys_at_once([[maybe_unused]] int rows) { return rows == 1 ? 4 : 2; }
    static constexpr int vectors_at_once([[maybe_unused]] int rows) { return rows == 1 ? 4 : 2; }
    static constexpr int kScoreVectors = 2;  // of keys that meet many rows

    struct F {
        __m256 lo, hi;
    };
    using Wide = __m256;
    using WideInt = __m256i;
    using GridLanes = GridLanes256;

    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static __m256 load8(const uint16_t* p, bool is_bf16) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        if (is_bf16) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
        return _mm256_cvtph_ps(bits);
    }
    static F load(const uint16_t* p, bool is_bf16) { return {load8(p, is_bf16), load8(p + 8, is_bf16)}; }
    // Fewer than 16, zeros behind them; by one load or not.
    static constexpr bool kLoadsSome = false;
    static F load_some(const float* p, int64_t n) {
        alignas(64) static constexpr int32_t kFirst[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
        const __m256i* first = reinterpret_cast<const __m256i*>(kFirst + 16 - n);
        return {_mm256_maskload_ps(p, _mm256_loadu_si256(first)), _mm256_maskload_ps(p + 8, _mm256_loadu_si256(first + 1))};
    }
    static F load_some(const uint16_t* p, int64_t n, bool is_bf16) { return load(SomeLanes<uint16_t>(p, n).at, is_bf16); }
    // Numbers of fp16 from two places, eight each, and from four.
    static F load_halves(const uint16_t* a, const uint16_t* b) { return {load8(a, false), load8(b, false)}; }
    static __m256 load4(const uint16_t* a, const uint16_t* b) {
        return _mm256_cvtph_ps(_mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a)),
                                                  _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b))));
    }
    static F load_quarters(const uint16_t* a, const uint16_t* b, const uint16_t* c, const uint16_t* d) {
        return {load4(a, b), load4(c, d)};
    }
    static void store(float* p, F x) {
        _mm256_storeu_ps(p, x.lo);
        _mm256_storeu_ps(p + 8, x.hi);
    }
    static __m128i round_to_bf16(__m256 x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_srli_epi32(
            _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
        const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i result = _mm256_blendv_epi8(rounded, quiet, is_nan);
        return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
    }
    static void store(uint16_t* p, F x, bool is_bf16) {
        const __m128i lo = is_bf16 ? round_to_bf16(x.lo) : _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT);
        const __m128i hi = is_bf16 ? round_to_bf16(x.hi) : _mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), lo);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), hi);
    }
    static F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
    static F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
    static F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
    static F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
    static F fma(F a, F b, F c) {
        return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
    }
    static F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
    static F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
    static F abs(F a) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
    }
    static __m256 negated(__m256 x, __m256i bits, __m256i to_top) {
        const __m256 sign = _mm256_castsi256_ps(_mm256_sllv_epi32(bits, to_top));
        return _mm256_xor_ps(x, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
    }
    static F negated(F x, uint32_t bits) {
        const __m256i all = _mm256_set1_epi32(int(bits));
        return {negated(x.lo, all, _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24)),
                negated(x.hi, all, _mm256_setr_epi32(23, 22, 21, 20, 19, 18, 17, 16))};
    }
    static F round(F a) {
        constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(a.lo, nearest), _mm256_round_ps(a.hi, nearest)};
    }
    static F select_less(F a, F b, F if_less, F otherwise) {
        return {_mm256_blendv_ps(otherwise.lo, if_less.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
                _mm256_blendv_ps(otherwise.hi, if_less.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
    }
    static __m256 power_of_two(__m256 n) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    }
    static F power_of_two(F n) { return {power_of_two(n.lo), power_of_two(n.hi)}; }
    static __m128 quarters(F x) {
        const __m256 half = _mm256_add_ps(x.lo, x.hi);
        return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
    static float sum(F x) {
        const __m128 b = quarters(x);
        const __m128 pair = _mm_add_ps(b, _mm_movehl_ps(b, b));
        return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
    }
    static float largest(F x) {
        const __m256 half = _mm256_max_ps(x.lo, x.hi);
        const __m128 b = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        const __m128 pair = _mm_max_ps(b, _mm_movehl_ps(b, b));
        return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
    }
    static __m128 sums(__m128 a, __m128 b, __m128 c, __m128 d) {
        const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
        return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
    }
    template <int Rows>
    static void store_sums(const F (&x)[Rows][4], float* out, int64_t stride) {
        for (int r = 0; r < Rows; ++r)
            _mm_storeu_ps(out + r * stride,
                          sums(quarters(x[r][0]), quarters(x[r][1]), quarters(x[r][2]), quarters(x[r][3])));
    }
    // Four vectors as columns: out[lane][which].
    static void store_turned(const F (&x)[4], float* out, int64_t stride) {
        store_turned(x[0].lo, x[1].lo, x[2].lo, x[3].lo, out, stride);
        store_turned(x[0].hi, x[1].hi, x[2].hi, x[3].hi, out + 8 * stride, stride);
    }
    static void store_turned(__m256 a, __m256 b, __m256 c, __m256 d, float* out, int64_t stride) {
        const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
        const __m256d ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
        const __m256d cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
        const __m256d columns[4] = {_mm256_unpacklo_pd(ab, cd), _mm256_unpackhi_pd(ab, cd),
                                    _mm256_unpacklo_pd(ab_high, cd_high), _mm256_unpackhi_pd(ab_high, cd_high)};
        for (int i = 0; i < 4; ++i) {
            const __m256 column = _mm256_castpd_ps(columns[i]);
            _mm_storeu_ps(out + i * stride, _mm256_castps256_ps128(column));
            _mm_storeu_ps(out + (i + 4) * stride, _mm256_extractf128_ps(column, 1));
        }
    }
    static void store_int8(int8_t* p, F x) {
        const __m256i words = _mm256_permute4x64_epi64(
            _mm256_packs_epi32(_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi)), 0xd8);
        const __m128i bytes =
            _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    }

    // Sixteen numbers of 16 bits, those of four in the order 0, 2, 1, 3.
    static void store_pairs(int8_t* p, F x) {
        const __m256i words = _mm256_permute4x64_epi64(
            _mm256_packs_epi32(_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi)), 0xd8);
        const __m256i pairs = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pairs);
    }

    // Sixteen codes as whole numbers, from the lowest bit of a byte on; up to 4 bytes behind them are read.
    template <int Bits>
    static __m256 eight_codes(uint32_t bits) {
        const __m256i places = _mm256_setr_epi32(0, Bits, 2 * Bits, 3 * Bits, 4 * Bits, 5 * Bits, 6 * Bits, 7 * Bits);
        const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(int(bits)), places);
        return _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32((1 << Bits) - 1)));
    }
    template <int Bits>
    static F codes(const uint8_t* p) {
        if constexpr (Bits == 8) {
            const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
            return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bits)),
                    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bits, 8)))};
        }
        uint32_t first, second;
        __builtin_memcpy(&first, p, 4);
        __builtin_memcpy(&second, p + Bits, 4);
        return {eight_codes<Bits>(first), eight_codes<Bits>(second)};
    }
    template <int Bits>
    using Levels = PlainLevels<Avx2, Bits>;

    static Wide wide_zero() { return _mm256_setzero_ps(); }
    static Wide wide_set1(const float* p) { return _mm256_broadcast_ss(p); }
    static Wide wide_load(const float* p) { return _mm256_loadu_ps(p); }
    static Wide wide_load(const uint16_t* p) { return load8(p, false); }
    static void wide_store(float* p, Wide x) { _mm256_storeu_ps(p, x); }
    static Wide wide_add(Wide a, Wide b) { return _mm256_add_ps(a, b); }
    static Wide wide_mul(Wide a, Wide b) { return _mm256_mul_ps(a, b); }
    static Wide wide_fma(Wide a, Wide b, Wide c) { return _mm256_fmadd_ps(a, b, c); }
    static Wide to_float(WideInt x) { return _mm256_cvtepi32_ps(x); }
    static WideInt join(WideInt high, WideInt low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 7), low); }

    // The codes of 8 rows (half a tile) and 32 columns.
    template <int Bits>
    struct Codes {
        __m256i at[8];
    };
    template <int Bits>
    static Codes<Bits> load_codes(const uint8_t* p) {
        Codes<Bits> codes;
        if constexpr (Bits == 4) {
            const __m256i low = _mm256_set1_epi8(15);
            for (int j = 0; j < 4; ++j) {
                const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 64 * j));
                codes.at[2 * j] = _mm256_and_si256(packed, low);
                codes.at[2 * j + 1] = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
            }
        } else {
            for (int g = 0; g < 8; ++g)
                codes.at[g] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 64 * g));
        }
        return codes;
    }

    // Codes less `Less` as pairs: [group of four columns][first and third, second and fourth][row of the tile][which].
    template <int Less, int Bits>
    static void store_pairs(const Codes<Bits>& codes, int16_t* out) {
        for (int g = 0; g < 8; ++g) {
            store_words(_mm256_sub_epi16(_mm256_and_si256(codes.at[g], _mm256_set1_epi16(255)), _mm256_set1_epi16(Less)),
                        out + 4 * g * kTile);
            store_words(_mm256_sub_epi16(_mm256_srli_epi16(codes.at[g], 8), _mm256_set1_epi16(Less)), out + (4 * g + 2) * kTile);
        }
    }
    static void store_words(__m256i words, int16_t* out) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words); }

    using WidePairs = __m256i;
    static WideInt wide_int_zero() { return _mm256_setzero_si256(); }
    static WidePairs load_pairs(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static WidePairs same_pairs(const int8_t* p) { return four(p); }
    static WideInt add_pairs(WideInt sum, WidePairs a, WidePairs b) {
#if defined(__AVXVNNI__)
        return _mm256_dpwssd_avx_epi32(sum, a, b);
#elif defined(__GNUC__)
        // As one piece of code: compilers otherwise make products early and spill sums, which costs twice the time.
        __m256i product;
        __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
        return sum;
#else
        return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
    }

    static __m256i four(const int8_t* x) {
        int32_t bits;
        __builtin_memcpy(&bits, x, 4);
        return _mm256_set1_epi32(bits);
    }
    static __m256i correction(const int32_t* minus_sum, int shift) {
        return _mm256_slli_epi32(_mm256_set1_epi32(*minus_sum), shift);
    }

#ifdef __AVXVNNI__
    template <int Bits, int Shift, int From, int To>
    static WideInt dot(const Codes<Bits>& codes, const int8_t* x, const int32_t* minus_sum) {
        // Two chains hide the latency of the dot product.
        __m256i even = Shift < 0 ? _mm256_setzero_si256() : correction(minus_sum, Shift < 0 ? 0 : Shift);
        __m256i odd = _mm256_setzero_si256();
        for (int g = From; g < To; g += 2) {
            even = _mm256_dpbusd_avx_epi32(even, codes.at[g], four(x + 4 * g));
            odd = _mm256_dpbusd_avx_epi32(odd, codes.at[g + 1], four(x + 4 * g + 4));
        }
        return _mm256_add_epi32(even, odd);
    }
#else
    // Products of codes with the same four activations, added in pairs. As one piece of code: compilers otherwise load
    // the activations early and spill them, which costs twice the time of the products.
    static __m256i products(__m256i codes, const int8_t* x) {
#if defined(__GNUC__)
        __m256i result;
        __asm__("vpbroadcastd %1, %0\n\tvpmaddubsw %0, %2, %0"
                : "=&x"(result)
                : "m"(*reinterpret_cast<const int8_t(*)[4]>(x)), "x"(codes));
        return result;
#else
        return _mm256_maddubs_epi16(codes, four(x));
#endif
    }

    template <int Bits, int Shift, int From, int To>
    static WideInt dot(const Codes<Bits>& codes, const int8_t* x, const int32_t* minus_sum) {
        const __m256i ones = _mm256_set1_epi16(1);
        if constexpr (Bits == 4) {
            // A pair of products is at most 2 * 15 * 127 = 3810, so eight pairs stay below 2^15.
            __m256i sum = products(codes.at[From], x + 4 * From);
            for (int g = From + 1; g < To; ++g)
                sum = _mm256_add_epi16(sum, products(codes.at[g], x + 4 * g));
            const __m256i total = _mm256_madd_epi16(sum, ones);
            return Shift < 0 ? total : _mm256_add_epi32(total, correction(minus_sum, Shift < 0 ? 0 : Shift));
        } else if constexpr (Bits == 7) {
            // Codes up to 127: a pair of products is at most 2 * 127 * 127 = 32258, below 2^15.
            __m256i total = Shift < 0 ? _mm256_setzero_si256() : correction(minus_sum, Shift < 0 ? 0 : Shift);
            for (int g = From; g < To; ++g)
                total = _mm256_add_epi32(
                    total, _mm256_madd_epi16(products(codes.at[g], x + 4 * g), ones));
            return total;
        } else {
            // Codes up to 255 would saturate. Give the sign of code - 128 to x instead: a pair of products is
            // then at most 2 * 128 * 127 = 32512.
            static_assert(Shift == 7, "8-bit codes are stored plus 128");
            __m256i total = _mm256_setzero_si256();
            for (int g = From; g < To; ++g) {
                const __m256i code = _mm256_xor_si256(codes.at[g], _mm256_set1_epi8(-128));
                const __m256i pairs =
                    _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(four(x + 4 * g), code));
                total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, ones));
            }
            return total;
        }
    }
#endif

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
        return word | negative_bits_of(x, shift, i, count);
    }
};

}  // namespace
}  // namespace plait
