// What products with matrices of low-bit codes take from NEON: see kernel_grid.h.
#pragma once

#include "dot_neon.h"

namespace plait {
namespace {

// Four output rows: the parts of a tile that one register holds.
struct GridLanesNeon {
    static constexpr int kCount = 4;
    static constexpr int kRows = 4;  // rows that meet a decoded block together
    static constexpr int kLess = 128;  // what `dot` takes off 8-bit codes
    using F = float32x4_t;
    using I = int32x4_t;   // one whole number for each row
    using U = uint8x16_t;  // four bytes for each row

    static F zero() { return vdupq_n_f32(0.0f); }
    static F set1(float x) { return vdupq_n_f32(x); }
    static F load(const float* p) { return vld1q_f32(p); }
    static F load_halves(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
    static F load_bytes(const uint8_t* p) {
        uint32_t bits;
        std::memcpy(&bits, p, 4);
        const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(bits)));
        return vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)));
    }
    static void store(float* p, F x) { vst1q_f32(p, x); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F to_float(I x) { return vcvtq_f32_s32(x); }

    static U plane(const uint8_t* p) { return vld1q_u8(p); }
    template <int Shift, int Mask>
    static U field(U x) {
        if constexpr (Shift > 0) x = vshrq_n_u8(x, Shift);
        return vandq_u8(x, vdupq_n_u8(Mask));
    }
    template <int Shift>
    static U raised(U x) { return vshlq_n_u8(x, Shift); }
    static U join(U a, U b) { return vorrq_u8(a, b); }

    // Bytes, or what two bytes of a wide table stand for, less `less` as pairs; see `Panel`.
    template <bool IsWide>
    static void store_pairs(const U (&u)[8], const U (&low)[8], int less, int16_t* out) {
        const int16x8_t minus = vdupq_n_s16(int16_t(less));
        for (int g = 0; g < 8; ++g) {
            for (int i = 0; i < 2; ++i) {
                int16x8_t pair = NeonBytes::pair(u[g], i);
                if constexpr (IsWide) pair = vmlaq_n_s16(NeonBytes::pair(low[g], i), pair, kWideBase);
                vst1q_s16(out + (4 * g + 2 * i) * kTile, vsubq_s16(pair, minus));
            }
        }
    }

    using Table = uint8x16_t;
    static Table table(const uint8_t* entries) { return vld1q_u8(entries); }
    static U look_up(Table t, U codes) { return vqtbl1q_u8(t, codes); }
    // Bytes of `value` where the code is `last`, else 0.
    static U where_last(U codes, int last, U value) { return vandq_u8(vceqq_u8(codes, vdupq_n_u8(uint8_t(last))), value); }
    // Four times the special byte of each row; `types` are 2 bits a row.
    static U specials(const uint8_t* types, int first, const uint32_t* fourfold) {
        const int32x4_t places = {0, -2, -4, -6};
        const uint32x4_t type = vandq_u32(vshlq_u32(vdupq_n_u32(types[first / 4]), places), vdupq_n_u32(3));
        // Four times the type finds its number in the table, whose four bytes are the same.
        return vqtbl1q_u8(vreinterpretq_u8_u32(vld1q_u32(fourfold)), vreinterpretq_u8_u32(vmulq_n_u32(type, 0x04040404u)));
    }
    static U no_bytes() { return vdupq_n_u8(0); }

    // Sum over 32 columns of u * x, for u up to Top.
    template <int Top>
    static I dot(const U (&u)[8], const int8_t* x) { return NeonBytes::dot<Top, 0, 8>(u, x); }
    // kWideBase * high + low.
    static I wide(I high, I low) { return vmlaq_n_s32(low, high, kWideBase); }
    // 128 * high + low + shift * minus_sum, which may leave 32 bits on the way and comes back to them.
    static I whole(I high, I low, int shift, int32_t minus_sum) {
        return vaddq_s32(vaddq_s32(vshlq_n_s32(high, 7), low), vdupq_n_s32(shift * minus_sum));
    }
    // Byte `column` of each row as a number.
    static F number(U u, int column) {
        const uint32x4_t moved = vshlq_u32(vreinterpretq_u32_u8(u), vdupq_n_s32(-8 * column));
        return vcvtq_f32_u32(vandq_u32(moved, vdupq_n_u32(255)));
    }
};

}  // namespace
}  // namespace plait
