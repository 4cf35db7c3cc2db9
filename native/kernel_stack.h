// Matrices that are sums of blocks of signs times a product of thin factors: tiles of 16 rows are made in fp32,
// and multiplied with as many rows of activations as there are.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace plait {
namespace {

template <class S>
struct Stacks {
    using F = typename S::F;
    static constexpr int64_t kPanel = 128;  // columns of a tile that stay in the first-level cache over all blocks

    // Add (or put, for the first) what one block has in columns [first, last) of a tile: out[column][16].
    template <int Rank>
    static void add_block(const float* u, const float* v, int rank, const uint8_t* signs, int64_t columns, bool is_first,
                          float* out) {
        if constexpr (Rank > 0) rank = Rank;
        constexpr int held = Rank > 0 ? Rank : kMaxStackRank;
        F factor[held];
        for (int r = 0; r < rank; ++r) factor[r] = S::load(u + r * kTile);
        for (int64_t c = 0; c < columns; ++c, v += rank, out += kTile) {
            F size = S::mul(factor[0], S::set1(v[0]));
            for (int r = 1; r < rank; ++r) size = S::fma(factor[r], S::set1(v[r]), size);
            // The bits of this column and, which is not looked at, what lies behind them.
            uint32_t bits;
            std::memcpy(&bits, signs + 2 * c, 4);
            const F value = S::negated(size, bits);
            S::store(out, is_first ? value : S::add(S::load(out), value));
        }
    }

    // One tile in fp32: out[column][16].
    static void stack_rows(const StackView& w, int64_t tile, float* out) {
        const int64_t tiles = (w.rows + kTile - 1) / kTile;
        const int64_t sign_bytes = 2 * w.columns, u_bytes = 2 * kTile * w.rank;
        alignas(64) float u[kMaxStackRank * kTile], v[kPanel * kMaxStackRank];
        for (int64_t first = 0; first < w.columns; first += kPanel) {
            const int64_t count = w.columns - first < kPanel ? w.columns - first : kPanel;
            for (int64_t i = 0; i < w.count; ++i) {
                const uint8_t* block = w.blocks[i];
                const auto* u_halves =
                    reinterpret_cast<const uint16_t*>(block + tiles * sign_bytes + tile * u_bytes);
                const auto* v_halves =
                    reinterpret_cast<const uint16_t*>(block + tiles * (sign_bytes + u_bytes)) + first * w.rank;
                for (int64_t n = 0; n < kTile * w.rank; n += kLanes) S::store(u + n, S::load(u_halves + n, false));
                for (int64_t n = 0; n < count * w.rank; n += kLanes) S::store(v + n, S::load(v_halves + n, false));
                const uint8_t* signs = block + tile * sign_bytes + 2 * first;
                float* to = out + first * kTile;
                switch (w.rank) {
                    case 1: add_block<1>(u, v, 1, signs, count, i == 0, to); break;
                    case 2: add_block<2>(u, v, 2, signs, count, i == 0, to); break;
                    case 4: add_block<4>(u, v, 4, signs, count, i == 0, to); break;
                    case 6: add_block<6>(u, v, 6, signs, count, i == 0, to); break;
                    default: add_block<0>(u, v, int(w.rank), signs, count, i == 0, to);
                }
            }
        }
    }

    // out[row][16] from a tile in fp32 and rows of fp32, ldx apart. Sums run over every fourth column, in four chains,
    // whatever the number of rows.
    static void made_exact(const float* w, int64_t columns, const float* x, int64_t ldx, int rows, float* out) {
        alignas(64) float sums[kRowChunk][4 * kTile];
        std::memset(sums, 0, size_t(rows) * sizeof(sums[0]));
        for (int64_t b = 0; b < columns / kBlock; ++b, w += kBlock * kTile) {
            for (int m = 0; m < rows; ++m) {
                const float* row = x + m * ldx + b * kBlock;
                F a[4];
                for (int i = 0; i < 4; ++i) a[i] = S::load(sums[m] + i * kTile);
                for (int c = 0; c < kBlock; c += 4)
                    for (int i = 0; i < 4; ++i) a[i] = S::fma(S::load(w + (c + i) * kTile), S::set1(row[c + i]), a[i]);
                for (int i = 0; i < 4; ++i) S::store(sums[m] + i * kTile, a[i]);
            }
        }
        for (int m = 0; m < rows; ++m) {
            const F even = S::add(S::load(sums[m]), S::load(sums[m] + 2 * kTile));
            const F odd = S::add(S::load(sums[m] + kTile), S::load(sums[m] + 3 * kTile));
            S::store(out + m * kTile, S::add(even, odd));
        }
    }
};

}  // namespace
}  // namespace plait
