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
            Vector ones = V::zero(), twos = V::zero(), fours = V::zero(), total = V::zero();
            int64_t w = 0;
            while (w + 8 <= words) {
                // A byte gets at most 8 for each eight words: 31 times that is at most 248.
                Vector bytes = V::zero();
                for (int i = 0; i < 31 && w + 8 <= words; ++i, w += 8) {
                    const Vector twos_a = carry(ones, bits(w), bits(w + 1)), twos_b = carry(ones, bits(w + 2), bits(w + 3));
                    const Vector fours_a = carry(twos, twos_a, twos_b);
                    const Vector twos_c = carry(ones, bits(w + 4), bits(w + 5)), twos_d = carry(ones, bits(w + 6), bits(w + 7));
                    const Vector fours_b = carry(twos, twos_c, twos_d);
                    bytes = V::add_bytes(bytes, V::bits_of_bytes(carry(fours, fours_a, fours_b)));
                }
                total = V::add(total, V::sum_bytes(bytes));
            }
            total = V::add(V::twice(total), V::sum_bytes(V::bits_of_bytes(fours)));
            total = V::add(V::twice(total), V::sum_bytes(V::bits_of_bytes(twos)));
            total = V::add(V::twice(total), V::sum_bytes(V::bits_of_bytes(ones)));
            for (; w < words; ++w) total = V::add(total, V::sum_bytes(V::bits_of_bytes(bits(w))));
            V::store(wide + first, total);
        }
        for (int r = 0; r < kTile; ++r) out[r] = int32_t(wide[r]);
    }
};

}  // namespace
}  // namespace plait
