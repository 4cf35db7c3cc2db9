// Sixteen fp32 lanes in plain C++: the definition of every vector operation, and the path for processors
// without a vector path of their own.
#pragma once

#include <cmath>
#include <cstdint>

#include "half.h"
#include "kernels.h"
#include "signs.h"

namespace plait {
namespace {

struct Scalar {
    static constexpr int kPairRows = 4;   // rows of a chunk from which on activations are kept as pairs
    static constexpr int kWideLanes = 16;  // lanes of the vectors in which packed rows are multiplied
    static constexpr int kQueryRows = 2;  // of attention that meet a key at once, and of a dense product
    static constexpr int kDenseRows = 2;
    // Keys, and vectors of a value, whose sums are held at a time; the registers are those of one set.
    static constexpr int keys_at_once([[maybe_unused]] int rows) { return 4; }
    static constexpr int vectors_at_once([[maybe_unused]] int rows) { return 4; }
    static constexpr int kScoreVectors = 1;  // of keys that meet many rows

    struct F {
        float at[16];
    };
    using Wide = F;
    using GridLanes = void;
    struct WideInt {
        int32_t at[16];
    };

    template <class Function>
    static F each(Function function) {
        F result;
        for (int i = 0; i < 16; ++i) result.at[i] = function(i);
        return result;
    }

    static F zero() { return set1(0.0f); }
    static F set1(float x) {
        return each([&](int) { return x; });
    }
    static F load(const float* p) {
        return each([&](int i) { return p[i]; });
    }
    static F load(const uint16_t* p, bool is_bf16) {
        return each([&](int i) { return is_bf16 ? bf16_to_float(p[i]) : fp16_to_float(p[i]); });
    }
    // Fewer than 16, zeros behind them; by one load or not.
    static constexpr bool kLoadsSome = false;
    static F load_some(const float* p, int64_t n) { return load(SomeLanes<float>(p, n).at); }
    static F load_some(const uint16_t* p, int64_t n, bool is_bf16) { return load(SomeLanes<uint16_t>(p, n).at, is_bf16); }
    // Numbers of fp16 from two places, eight each, and from four.
    static F load_halves(const uint16_t* a, const uint16_t* b) {
        return each([&](int i) { return fp16_to_float(i < 8 ? a[i] : b[i - 8]); });
    }
    static F load_quarters(const uint16_t* a, const uint16_t* b, const uint16_t* c, const uint16_t* d) {
        const uint16_t* from[4] = {a, b, c, d};
        return each([&](int i) { return fp16_to_float(from[i / 4][i % 4]); });
    }
    static void store(float* p, F x) {
        for (int i = 0; i < 16; ++i) p[i] = x.at[i];
    }
    static void store(uint16_t* p, F x, bool is_bf16) {
        for (int i = 0; i < 16; ++i) p[i] = is_bf16 ? float_to_bf16(x.at[i]) : float_to_fp16(x.at[i]);
    }
    static F add(F a, F b) {
        return each([&](int i) { return a.at[i] + b.at[i]; });
    }
    static F sub(F a, F b) {
        return each([&](int i) { return a.at[i] - b.at[i]; });
    }
    static F mul(F a, F b) {
        return each([&](int i) { return a.at[i] * b.at[i]; });
    }
    static F div(F a, F b) {
        return each([&](int i) { return a.at[i] / b.at[i]; });
    }
    static F fma(F a, F b, F c) {
        return each([&](int i) { return std::fma(a.at[i], b.at[i], c.at[i]); });
    }
    // As the processors do: the second operand when either is NaN.
    static F max(F a, F b) {
        return each([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
    }
    static F min(F a, F b) {
        return each([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; });
    }
    static F abs(F a) {
        return each([&](int i) { return std::fabs(a.at[i]); });
    }
    // -x in the lanes whose bit is set; bits from the 16th up are not looked at.
    static F negated(F x, uint32_t bits) {
        return each([&](int i) { return bits >> i & 1 ? -x.at[i] : x.at[i]; });
    }
    static F round(F a) {
        return each([&](int i) { return std::nearbyintf(a.at[i]); });
    }
    // if_less where a < b, otherwise the other; comparisons with NaN are false.
    static F select_less(F a, F b, F if_less, F otherwise) {
        return each([&](int i) { return a.at[i] < b.at[i] ? if_less.at[i] : otherwise.at[i]; });
    }
    // 2^n for whole n in [-126, 127].
    static F power_of_two(F n) {
        return each([&](int i) { return float_of(uint32_t(int32_t(n.at[i]) + 127) << 23); });
    }
    // The order of every sum over lanes: halves, quarters, then (0 + 2) + (1 + 3).
    static float sum(F x) {
        float a[8], b[4];
        for (int i = 0; i < 8; ++i) a[i] = x.at[i] + x.at[i + 8];
        for (int i = 0; i < 4; ++i) b[i] = a[i] + a[i + 4];
        return (b[0] + b[2]) + (b[1] + b[3]);
    }
    static float largest(F x) {
        float top = x.at[0];
        for (int i = 1; i < 16; ++i) top = x.at[i] > top ? x.at[i] : top;
        return top;
    }
    template <int Rows>
    static void store_sums(const F (&x)[Rows][4], float* out, int64_t stride) {
        for (int r = 0; r < Rows; ++r)
            for (int k = 0; k < 4; ++k) out[r * stride + k] = sum(x[r][k]);
    }
    // Four vectors as columns: out[lane][which].
    static void store_turned(const F (&x)[4], float* out, int64_t stride) {
        float lanes[16];
        for (int k = 0; k < 4; ++k) {
            store(lanes, x[k]);
            for (int i = 0; i < 16; ++i) out[i * stride + k] = lanes[i];
        }
    }
    // Whole numbers in [-127, 127] as bytes.
    static void store_int8(int8_t* p, F x) {
        for (int i = 0; i < 16; ++i) p[i] = int8_t(x.at[i]);
    }

    // Sixteen numbers of 16 bits, those of four in the order 0, 2, 1, 3.
    static void store_pairs(int8_t* p, F x) {
        for (int i = 0; i < 16; i += 4) {
            const int16_t four[4] = {int16_t(x.at[i]), int16_t(x.at[i + 2]), int16_t(x.at[i + 1]), int16_t(x.at[i + 3])};
            __builtin_memcpy(p + 2 * i, four, sizeof four);
        }
    }

    // Sixteen codes as whole numbers, from the lowest bit of a byte on; up to 4 bytes behind them are read.
    template <int Bits>
    static F codes(const uint8_t* p) {
        if constexpr (Bits == 8) return each([&](int i) { return float(p[i]); });
        uint32_t first, second;
        __builtin_memcpy(&first, p, 4);
        __builtin_memcpy(&second, p + Bits, 4);
        return each([&](int i) { return float(((i < 8 ? first : second) >> (Bits * (i % 8))) & ((1u << Bits) - 1)); });
    }
    template <int Bits>
    using Levels = PlainLevels<Scalar, Bits>;

    // Vectors of packed matrices: lane r belongs to output row r of the tile.
    static Wide wide_zero() { return zero(); }
    static Wide wide_set1(const float* p) { return set1(*p); }
    static Wide wide_load(const float* p) { return load(p); }
    static Wide wide_load(const uint16_t* p) { return load(p, false); }
    static void wide_store(float* p, Wide x) { store(p, x); }
    static Wide wide_add(Wide a, Wide b) { return add(a, b); }
    static Wide wide_mul(Wide a, Wide b) { return mul(a, b); }
    static Wide wide_fma(Wide a, Wide b, Wide c) { return fma(a, b, c); }
    static Wide to_float(WideInt x) {
        return each([&](int i) { return float(x.at[i]); });
    }

    static WideInt join(WideInt high, WideInt low) {
        WideInt joined;
        for (int r = 0; r < 16; ++r) joined.at[r] = high.at[r] * 128 + low.at[r];
        return joined;
    }

    // The codes of 16 rows and 32 columns, one byte each: byte [group of 4 columns][row][column].
    template <int Bits>
    struct Codes {
        uint8_t at[8][64];
    };
    template <int Bits>
    static Codes<Bits> load_codes(const uint8_t* p) {
        Codes<Bits> codes;
        for (int g = 0; g < 8; ++g)
            for (int i = 0; i < 64; ++i)
                codes.at[g][i] = Bits == 4 ? (p[(g / 2) * 64 + i] >> (4 * (g & 1))) & 15 : p[g * 64 + i];
        return codes;
    }
    // Codes less `Less` as pairs: [group of four columns][first and third, second and fourth][row of the tile][which].
    template <int Less, int Bits>
    static void store_pairs(const Codes<Bits>& codes, int16_t* out) {
        for (int g = 0; g < 8; ++g)
            for (int i = 0; i < 64; ++i)
                out[(4 * g + 2 * (i % 2)) * kTile + i / 4 * 2 + i % 4 / 2] = int16_t(codes.at[g][i] - Less);
    }

    struct WidePairs {
        int16_t at[32];
    };
    static WideInt wide_int_zero() { return {}; }
    static WidePairs load_pairs(const int16_t* p) {
        WidePairs pairs;
        __builtin_memcpy(pairs.at, p, sizeof pairs.at);
        return pairs;
    }
    static WidePairs same_pairs(const int8_t* p) {
        WidePairs pairs;
        for (int r = 0; r < 16; ++r) __builtin_memcpy(pairs.at + 2 * r, p, 4);
        return pairs;
    }
    static WideInt add_pairs(WideInt sum, WidePairs a, WidePairs b) {
        for (int r = 0; r < 16; ++r) sum.at[r] += a.at[2 * r] * b.at[2 * r] + a.at[2 * r + 1] * b.at[2 * r + 1];
        return sum;
    }

    // Sum over the columns of groups [From, To) of (code - 2^Shift) * x, exact; minus_sum is -sum(x).
    template <int Bits, int Shift, int From, int To>
    static WideInt dot(const Codes<Bits>& codes, const int8_t* x, const int32_t* minus_sum) {
        WideInt total;
        for (int r = 0; r < 16; ++r) {
            int32_t sum = Shift < 0 ? 0 : *minus_sum * (1 << (Shift < 0 ? 0 : Shift));
            for (int g = From; g < To; ++g)
                for (int c = 0; c < 4; ++c) sum += int32_t(codes.at[g][4 * r + c]) * x[4 * g + c];
            total.at[r] = sum;
        }
        return total;
    }

    // How many bits of `words` words of x differ from those of each of 16 rows, [word][16]: out[16].
    static void differing_bits(const uint64_t* rows, const uint64_t* x, int64_t words, int32_t* out) {
        int64_t sums[kTile] = {};
        for (int64_t w = 0; w < words; ++w)
            for (int r = 0; r < kTile; ++r) {
                uint64_t bits = rows[w * kTile + r] ^ x[w];
                bits -= bits >> 1 & 0x5555555555555555u;
                bits = (bits & 0x3333333333333333u) + (bits >> 2 & 0x3333333333333333u);
                bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0fu;
                sums[r] += int64_t(bits * 0x0101010101010101u >> 56);
            }
        for (int r = 0; r < kTile; ++r) out[r] = int32_t(sums[r]);
    }

    // Bit i is set where x[i] + shift[i] is below 0 or NaN, for up to 64 numbers; a null shift is 0.
    static uint64_t negative_bits(const float* x, const float* shift, int count) {
        return negative_bits_of(x, shift, 0, count);
    }
};

}  // namespace
}  // namespace plait
