// Counting bits that differ, for vectors of any width: carry-save adders leave one count of bits for eight words.
//
// After Harley and Seal; see Mula, Kurz and Lemire 2018, arXiv:1611.07612, section 3.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace plait {
namespace {

// V has vectors of V::kWords words, one word for each of as many rows.
template <class V>
struct CountBits {
    using Vector = typename V::Vector;

    // low + 2 * the result = a + b + low, bit by bit.
    static Vector carry(Vector& low, Vector a, Vector b) {
        const Vector high = V::majority(low, a, b);
        low = V::odd(low, a, b);
        return high;
    }

    // How many bits of `words` words of x differ from those of each of 16 rows, [word][16]: out[16].
    static void differing_bits(const uint64_t* rows, const uint64_t* x, int64_t words, int32_t* out) {
        alignas(64) int64_t wide[kTile];
        for (int first = 0; first < kTile; first += V::kWords) {
            const auto bits = [&](int64_t word) { return V::differing(rows + word * kTile + first, x[word]); };
            Vector ones = V::zero(), twos = V::zero(), fours = V::zero(), total = V::zero(), bytes = V::zero();
            int64_t w = 0;
            int taken = 0;
            const auto flush = [&] {
                total = V::add(total, V::sum_bytes(bytes));
                bytes = V::zero(), taken = 0;
            };
            for (; w + 8 <= words; w += 8) {
                const Vector twos_a = carry(ones, bits(w), bits(w + 1)), twos_b = carry(ones, bits(w + 2), bits(w + 3));
                const Vector fours_a = carry(twos, twos_a, twos_b);
                const Vector twos_c = carry(ones, bits(w + 4), bits(w + 5)), twos_d = carry(ones, bits(w + 6), bits(w + 7));
                const Vector fours_b = carry(twos, twos_c, twos_d);
                bytes = V::add_bytes(bytes, V::bits_of_bytes(carry(fours, fours_a, fours_b)));
                // A byte gets at most 8 for each eight words: 31 times that is at most 248.
                if (++taken == 31) flush();
            }
            // Eight times what twice eight words leave is at most 128; fours, twos and ones add 56, words behind them 56.
            if (taken > 2) flush();
            for (const Vector& less : {fours, twos, ones}) bytes = V::add_bytes(V::add_bytes(bytes, bytes), V::bits_of_bytes(less));
            for (; w < words; ++w) bytes = V::add_bytes(bytes, V::bits_of_bytes(bits(w)));
            total = V::add(V::twice(V::twice(V::twice(total))), V::sum_bytes(bytes));
            V::store(wide + first, total);
        }
        for (int r = 0; r < kTile; ++r) out[r] = int32_t(wide[r]);
    }
};

}  // namespace
}  // namespace plait
