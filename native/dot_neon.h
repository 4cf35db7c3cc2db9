// Exact products of bytes on NEON: what packed matrices and low-bit codes share.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace plait {
namespace {

struct NeonBytes {
    // Four activations, for each of four rows.
    static int8x16_t four(const int8_t* x) {
        int32_t bits;
        std::memcpy(&bits, x, 4);
        return vreinterpretq_s8_s32(vdupq_n_s32(bits));
    }
    // Codes as signed bytes: those that may exceed 127, less 128.
    template <int Top>
    static int8x16_t signed_codes(uint8x16_t codes) {
        return vreinterpretq_s8_u8(Top > 127 ? veorq_u8(codes, vdupq_n_u8(128)) : codes);
    }

    // Sums over the columns of groups [From, To) of code * x, for codes of four rows up to Top; of (code - 128) * x where
    // Top exceeds 127. Activations are in [-127, 127].
    template <int Top, int From, int To>
    static int32x4_t dot(const uint8x16_t (&codes)[8], const int8_t* x) {
#ifdef __ARM_FEATURE_DOTPROD
        // Two chains hide the latency of the dot product.
        int32x4_t even = vdupq_n_s32(0), odd = even;
        for (int g = From; g < To; g += 2) {
            even = vdotq_s32(even, signed_codes<Top>(codes[g]), four(x + 4 * g));
            odd = vdotq_s32(odd, signed_codes<Top>(codes[g + 1]), four(x + 4 * g + 4));
        }
        return vaddq_s32(even, odd);
#else
        // Products of one column whose sum stays below 2^15.
        constexpr int kMost = Top > 127 ? 128 : Top, kFit = 32767 / (127 * kMost);
        constexpr int kTogether = kFit < To - From ? kFit : To - From;
        static_assert((To - From) % kTogether == 0, "groups must be taken in whole runs");
        int32x4_t low = vdupq_n_s32(0), high = low;  // pairs of columns of two rows each
        for (int first = From; first < To; first += kTogether) {
            const int8x16_t code = signed_codes<Top>(codes[first]), q = four(x + 4 * first);
            int16x8_t low_sum = vmull_s8(vget_low_s8(code), vget_low_s8(q)), high_sum = vmull_high_s8(code, q);
            for (int g = first + 1; g < first + kTogether; ++g) {
                const int8x16_t more = signed_codes<Top>(codes[g]), with = four(x + 4 * g);
                low_sum = vmlal_s8(low_sum, vget_low_s8(more), vget_low_s8(with));
                high_sum = vmlal_high_s8(high_sum, more, with);
            }
            low = vpadalq_s16(low, low_sum);
            high = vpadalq_s16(high, high_sum);
        }
        return vpaddq_s32(low, high);
#endif
    }

    // One pair of columns of four rows as numbers of 16 bits, [which][row]: bytes `column` and `column` + 2 of each row.
    static int16x8_t pair(uint8x16_t codes, int column) {
        // An index beyond the table gives 0.
        const uint8x16_t places = {0, 255, 4, 255, 8, 255, 12, 255, 2, 255, 6, 255, 10, 255, 14, 255};
        const uint8x16_t step = vreinterpretq_u8_u16(vdupq_n_u16(uint16_t(column)));
        return vreinterpretq_s16_u8(vqtbl1q_u8(codes, vaddq_u8(places, step)));
    }
};

}  // namespace
}  // namespace plait
