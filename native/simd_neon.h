// Sixteen fp32 lanes as four 128-bit registers: NEON of 64-bit ARM, and optionally its dot products of bytes.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "dot_neon.h"
#include "grid_neon.h"
#include "kernels.h"
#include "signs.h"

namespace plait {
namespace {

struct Neon {
    static constexpr int kWideLanes = 4;
    static constexpr int kPairRows = 4;   // rows of a chunk from which on activations are kept as pairs
    static constexpr int kQueryRows = 2;  // of attention that meet a key at once, and of a dense product
    static constexpr int kDenseRows = 1;
    // Keys, and vectors of a value, whose sums are held at a time; the registers are those of one set.
    static constexpr int keys_at_once([[maybe_unused]] int rows) { return rows == 1 ? 4 : 2; }
    static constexpr int vectors_at_once([[maybe_unused]] int rows) { return rows == 1 ? 4 : 2; }
    static constexpr int kScoreVectors = 4;  // of keys that meet many rows

    struct F {
        float32x4_t a, b, c, d;
    };
    using Wide = float32x4_t;
    using WideInt = int32x4_t;
    using GridLanes = GridLanesNeon;

    static F zero() { return set1(0.0f); }
    static F set1(float x) {
        const float32x4_t four = vdupq_n_f32(x);
        return {four, four, four, four};
    }
    static F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
    static float32x4_t load4(const uint16_t* p, bool is_bf16) {
        const uint16x4_t bits = vld1_u16(p);
        if (is_bf16) return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
        return vcvt_f32_f16(vreinterpret_f16_u16(bits));
    }
    static F load(const uint16_t* p, bool is_bf16) {
        return {load4(p, is_bf16), load4(p + 4, is_bf16), load4(p + 8, is_bf16), load4(p + 12, is_bf16)};
    }
    // Fewer than 16, zeros behind them; by one load or not.
    static constexpr bool kLoadsSome = false;
    static F load_some(const float* p, int64_t n) { return load(SomeLanes<float>(p, n).at); }
    static F load_some(const uint16_t* p, int64_t n, bool is_bf16) { return load(SomeLanes<uint16_t>(p, n).at, is_bf16); }
    // Numbers of fp16 from two places, eight each, and from four.
    static F load_halves(const uint16_t* a, const uint16_t* b) { return load_quarters(a, a + 4, b, b + 4); }
    static F load_quarters(const uint16_t* a, const uint16_t* b, const uint16_t* c, const uint16_t* d) {
        return {load4(a, false), load4(b, false), load4(c, false), load4(d, false)};
    }
    static void store(float* p, F x) {
        vst1q_f32(p, x.a);
        vst1q_f32(p + 4, x.b);
        vst1q_f32(p + 8, x.c);
        vst1q_f32(p + 12, x.d);
    }
    static uint16x4_t narrow4(float32x4_t x, bool is_bf16) {
        if (!is_bf16) return vreinterpret_u16_f16(vcvt_f16_f32(x));
        const uint32x4_t bits = vreinterpretq_u32_f32(x), top = vshrq_n_u32(bits, 16);
        const uint32x4_t odd = vandq_u32(top, vdupq_n_u32(1));
        const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
        const uint32x4_t quiet = vorrq_u32(top, vdupq_n_u32(0x40));
        return vmovn_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet));
    }
    static void store(uint16_t* p, F x, bool is_bf16) {
        vst1_u16(p, narrow4(x.a, is_bf16));
        vst1_u16(p + 4, narrow4(x.b, is_bf16));
        vst1_u16(p + 8, narrow4(x.c, is_bf16));
        vst1_u16(p + 12, narrow4(x.d, is_bf16));
    }
    static F add(F x, F y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)}; }
    static F sub(F x, F y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b), vsubq_f32(x.c, y.c), vsubq_f32(x.d, y.d)}; }
    static F mul(F x, F y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b), vmulq_f32(x.c, y.c), vmulq_f32(x.d, y.d)}; }
    static F div(F x, F y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b), vdivq_f32(x.c, y.c), vdivq_f32(x.d, y.d)}; }
    static F fma(F x, F y, F z) {
        return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
    }
    // Not the instructions of that name, which return NaN for either operand and order the zeros.
    static float32x4_t max4(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
    static float32x4_t min4(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
    static F max(F x, F y) { return {max4(x.a, y.a), max4(x.b, y.b), max4(x.c, y.c), max4(x.d, y.d)}; }
    static F min(F x, F y) { return {min4(x.a, y.a), min4(x.b, y.b), min4(x.c, y.c), min4(x.d, y.d)}; }
    static F abs(F x) { return {vabsq_f32(x.a), vabsq_f32(x.b), vabsq_f32(x.c), vabsq_f32(x.d)}; }
    // -x in the lanes whose bit, from First on, is set.
    template <int First>
    static float32x4_t negated(float32x4_t x, uint32x4_t bits) {
        const int32x4_t to_sign = {31 - First, 30 - First, 29 - First, 28 - First};
        const uint32x4_t sign = vandq_u32(vshlq_u32(bits, to_sign), vdupq_n_u32(0x80000000u));
        return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), sign));
    }
    static F negated(F x, uint32_t bits) {
        const uint32x4_t all = vdupq_n_u32(bits);
        return {negated<0>(x.a, all), negated<4>(x.b, all), negated<8>(x.c, all), negated<12>(x.d, all)};
    }
    static F round(F x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b), vrndnq_f32(x.c), vrndnq_f32(x.d)}; }
    static F select_less(F x, F y, F if_less, F otherwise) {
        return {vbslq_f32(vcltq_f32(x.a, y.a), if_less.a, otherwise.a), vbslq_f32(vcltq_f32(x.b, y.b), if_less.b, otherwise.b),
                vbslq_f32(vcltq_f32(x.c, y.c), if_less.c, otherwise.c), vbslq_f32(vcltq_f32(x.d, y.d), if_less.d, otherwise.d)};
    }
    static float32x4_t power_of_two(float32x4_t n) {
        return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
    }
    static F power_of_two(F n) { return {power_of_two(n.a), power_of_two(n.b), power_of_two(n.c), power_of_two(n.d)}; }

    static float32x4_t quarters(F x) { return vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d)); }
    static float sum(F x) {
        const float32x4_t b = quarters(x);
        return vpadds_f32(vadd_f32(vget_low_f32(b), vget_high_f32(b)));
    }
    static float largest(F x) {
        const float32x4_t b = max4(max4(x.a, x.c), max4(x.b, x.d)), pair = max4(b, vextq_f32(b, b, 2));
        return vgetq_lane_f32(max4(pair, vextq_f32(pair, pair, 1)), 0);
    }
    // Lanes 0 and 1, or 2 and 3, of two vectors.
    static float32x4_t low_halves(float32x4_t x, float32x4_t y) {
        return vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
    }
    static float32x4_t high_halves(float32x4_t x, float32x4_t y) {
        return vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
    }
    static float32x4_t sums(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
        const float32x4_t ab = vaddq_f32(vzip1q_f32(a, b), vzip2q_f32(a, b)), cd = vaddq_f32(vzip1q_f32(c, d), vzip2q_f32(c, d));
        return vaddq_f32(low_halves(ab, cd), high_halves(ab, cd));
    }
    template <int Rows>
    static void store_sums(const F (&x)[Rows][4], float* out, int64_t stride) {
        for (int r = 0; r < Rows; ++r)
            vst1q_f32(out + r * stride, sums(quarters(x[r][0]), quarters(x[r][1]), quarters(x[r][2]), quarters(x[r][3])));
    }
    // Four vectors as columns: out[lane][which].
    static void store_turned(const F (&x)[4], float* out, int64_t stride) {
        store_turned(x[0].a, x[1].a, x[2].a, x[3].a, out, stride);
        store_turned(x[0].b, x[1].b, x[2].b, x[3].b, out + 4 * stride, stride);
        store_turned(x[0].c, x[1].c, x[2].c, x[3].c, out + 8 * stride, stride);
        store_turned(x[0].d, x[1].d, x[2].d, x[3].d, out + 12 * stride, stride);
    }
    static void store_turned(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d, float* out, int64_t stride) {
        const float32x4_t ab = vzip1q_f32(a, b), cd = vzip1q_f32(c, d), ab_high = vzip2q_f32(a, b), cd_high = vzip2q_f32(c, d);
        vst1q_f32(out, low_halves(ab, cd));
        vst1q_f32(out + stride, high_halves(ab, cd));
        vst1q_f32(out + 2 * stride, low_halves(ab_high, cd_high));
        vst1q_f32(out + 3 * stride, high_halves(ab_high, cd_high));
    }

    // Whole numbers as 16 bits.
    static int16x8_t words(float32x4_t low, float32x4_t high) {
        return vcombine_s16(vmovn_s32(vcvtq_s32_f32(low)), vmovn_s32(vcvtq_s32_f32(high)));
    }
    static void store_int8(int8_t* p, F x) {
        vst1q_s8(p, vcombine_s8(vmovn_s16(words(x.a, x.b)), vmovn_s16(words(x.c, x.d))));
    }
    // Sixteen numbers of 16 bits, those of four in the order 0, 2, 1, 3.
    static void store_pairs(int8_t* p, F x) {
        const uint8x16_t places = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
        vst1q_s8(p, vqtbl1q_s8(vreinterpretq_s8_s16(words(x.a, x.b)), places));
        vst1q_s8(p + 16, vqtbl1q_s8(vreinterpretq_s8_s16(words(x.c, x.d)), places));
    }

    // Sixteen codes as whole numbers, from the lowest bit of a byte on; up to 4 bytes behind them are read.
    template <int Bits, int First>
    static float32x4_t four_codes(uint32x4_t bits) {
        const int32x4_t places = {-First * Bits, -(First + 1) * Bits, -(First + 2) * Bits, -(First + 3) * Bits};
        return vcvtq_f32_u32(vandq_u32(vshlq_u32(bits, places), vdupq_n_u32((1u << Bits) - 1)));
    }
    template <int Bits>
    static F codes(const uint8_t* p) {
        if constexpr (Bits == 8) {
            const uint8x16_t all = vld1q_u8(p);
            const uint16x8_t low = vmovl_u8(vget_low_u8(all)), high = vmovl_high_u8(all);
            return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_high_u16(low)),
                    vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_high_u16(high))};
        }
        uint32_t first, second;
        __builtin_memcpy(&first, p, 4);
        __builtin_memcpy(&second, p + Bits, 4);
        const uint32x4_t low = vdupq_n_u32(first), high = vdupq_n_u32(second);
        return {four_codes<Bits, 0>(low), four_codes<Bits, 4>(low), four_codes<Bits, 0>(high), four_codes<Bits, 4>(high)};
    }
    template <int Bits>
    using Levels = PlainLevels<Neon, Bits>;

    static Wide wide_zero() { return vdupq_n_f32(0.0f); }
    static Wide wide_set1(const float* p) { return vld1q_dup_f32(p); }
    static Wide wide_load(const float* p) { return vld1q_f32(p); }
    static Wide wide_load(const uint16_t* p) { return load4(p, false); }
    static void wide_store(float* p, Wide x) { vst1q_f32(p, x); }
    static Wide wide_add(Wide a, Wide b) { return vaddq_f32(a, b); }
    static Wide wide_mul(Wide a, Wide b) { return vmulq_f32(a, b); }
    static Wide wide_fma(Wide a, Wide b, Wide c) { return vfmaq_f32(c, a, b); }
    static Wide to_float(WideInt x) { return vcvtq_f32_s32(x); }
    static WideInt join(WideInt high, WideInt low) { return vaddq_s32(vshlq_n_s32(high, 7), low); }

    // The codes of 4 rows (a quarter of a tile) and 32 columns.
    template <int Bits>
    struct Codes {
        uint8x16_t at[8];
    };
    template <int Bits>
    static Codes<Bits> load_codes(const uint8_t* p) {
        Codes<Bits> codes;
        if constexpr (Bits == 4) {
            for (int j = 0; j < 4; ++j) {
                const uint8x16_t packed = vld1q_u8(p + 64 * j);
                codes.at[2 * j] = vandq_u8(packed, vdupq_n_u8(15));
                codes.at[2 * j + 1] = vshrq_n_u8(packed, 4);
            }
        } else {
            for (int g = 0; g < 8; ++g) codes.at[g] = vld1q_u8(p + 64 * g);
        }
        return codes;
    }
    template <int Bits, int Shift, int From, int To>
    static WideInt dot(const Codes<Bits>& codes, const int8_t* x, const int32_t* minus_sum) {
        const WideInt total = NeonBytes::dot<(1 << Bits) - 1, From, To>(codes.at, x);
        // Codes of 8 bits are stored plus 128, which the product takes off.
        static_assert(Bits != 8 || Shift == 7, "8-bit codes are stored plus 128");
        if constexpr (Bits == 8 || Shift < 0) return total;
        else return vaddq_s32(total, vshlq_n_s32(vld1q_dup_s32(minus_sum), Shift));
    }

    // Codes less `Less` as pairs; see `Panel`. Here a pair of columns of four rows lies as [which][row].
    template <int Less, int Bits>
    static void store_pairs(const Codes<Bits>& codes, int16_t* out) {
        for (int g = 0; g < 8; ++g)
            for (int i = 0; i < 2; ++i)
                vst1q_s16(out + (4 * g + 2 * i) * kTile, vsubq_s16(NeonBytes::pair(codes.at[g], i), vdupq_n_s16(Less)));
    }
    using WidePairs = int16x8_t;
    static WideInt wide_int_zero() { return vdupq_n_s32(0); }
    static WidePairs load_pairs(const int16_t* p) { return vld1q_s16(p); }
    // Two activations.
    static int16x4_t same_pairs(const int8_t* p) {
        int32_t bits;
        std::memcpy(&bits, p, 4);
        return vreinterpret_s16_s32(vdup_n_s32(bits));
    }
    static WideInt add_pairs(WideInt sum, WidePairs codes, int16x4_t x) {
        return vmlal_high_lane_s16(vmlal_lane_s16(sum, vget_low_s16(codes), x, 0), codes, x, 1);
    }

    // How many bits of `words` words of x differ from those of each of 16 rows, [word][16]: out[16].
    static void differing_bits(const uint64_t* rows, const uint64_t* x, int64_t words, int32_t* out) {
        for (int first = 0; first < kTile; first += 2) {
            uint64x2_t total = vdupq_n_u64(0);
            for (int64_t w = 0; w < words;) {
                // A byte gets at most 8 for each word: 31 times that is at most 248.
                uint8x16_t counts = vdupq_n_u8(0);
                for (int i = 0; i < 31 && w < words; ++i, ++w) {
                    const uint64x2_t differing = veorq_u64(vld1q_u64(rows + w * kTile + first), vdupq_n_u64(x[w]));
                    counts = vaddq_u8(counts, vcntq_u8(vreinterpretq_u8_u64(differing)));
                }
                total = vpadalq_u32(total, vpaddlq_u16(vpaddlq_u8(counts)));
            }
            vst1_s32(out + first, vreinterpret_s32_u32(vmovn_u64(total)));
        }
    }

    // Bit i is set where x[i] + shift[i] is below 0 or NaN, for up to 64 numbers; a null shift is 0.
    static uint64_t negative_bits(const float* x, const float* shift, int count) {
        const uint32x4_t places = {1, 2, 4, 8};
        uint64_t word = 0;
        int i = 0;
        for (; i + 4 <= count; i += 4) {
            float32x4_t v = vld1q_f32(x + i);
            if (shift != nullptr) v = vaddq_f32(v, vld1q_f32(shift + i));
            const uint32x4_t is_positive = vcgeq_f32(v, vdupq_n_f32(0.0f));
            word |= uint64_t(vaddvq_u32(vbicq_u32(places, is_positive))) << i;
        }
        return word | negative_bits_of(x, shift, i, count);
    }
};

}  // namespace
}  // namespace plait
