// Many rows times a tile of codes: codes and activations as whole numbers of 16 bits, multiplied in pairs of columns.
//
// A tile's codes are widened once for all rows. Sums over a block are whole numbers below 2^31 and so exact, whatever
// their order; they meet scales in the order in which one row's do, and a row has the same bits in both forms.
#pragma once

#include "kernel_math.h"

namespace plait {
namespace {

// Whether an instruction set keeps the activations of larger chunks as pairs.
template <class S>
constexpr bool kHasPairs = S::kPairRows <= kRowChunk;

// Blocks of a tile that are widened at a time; they lie in the first-level cache.
constexpr int64_t kPanelBlocks = 18;

struct Panel {
    // [block][pair of columns][row][which]: of each four columns, the first and third, then the second and fourth. Within
    // kWideLanes rows an instruction set has an order of its own.
    alignas(64) int16_t codes[kPanelBlocks][kBlock / 2][kTile][2];
    alignas(64) float scales[kPanelBlocks][2][kTile], minima[kPanelBlocks][2][kTile];  // of each 32, or 16, columns
};

// The scales and minima of some rows of a tile in one block, of its 32 columns or of each 16.
template <class S, int Groups, bool HasMinima>
struct Numbers {
    using Wide = typename S::Wide;
    Wide scale[Groups], minimum[Groups];

    // Those of two groups lie kTile numbers apart.
    template <class Number>
    Numbers(const Number* scales, const Number* minima) {
        for (int group = 0; group < Groups; ++group) {
            scale[group] = S::wide_load(scales + group * kTile);
            if constexpr (HasMinima) minimum[group] = S::wide_load(minima + group * kTile);
        }
    }

    // `total` and what a block adds to it: its products with one row of activations, scaled, and its minima.
    Wide add(Wide total, const Wide (&products)[Groups], const RowBlock& of) const {
        const Wide x_scale = S::wide_set1(&of.scale);
        for (int group = 0; group < Groups; ++group)
            total = S::wide_fma(S::wide_mul(scale[group], x_scale), products[group], total);
        if constexpr (HasMinima && Groups == 1) total = S::wide_fma(minimum[0], S::wide_set1(&of.scaled_sum), total);
        if constexpr (HasMinima && Groups == 2) {
            total = S::wide_fma(minimum[0], S::wide_set1(&of.scaled_low), total);
            total = S::wide_fma(minimum[1], S::wide_set1(&of.scaled_high), total);
        }
        return total;
    }
};

template <class S>
struct Pairs {
    // Rows that meet a widened tile together.
    static constexpr int kTogether = 4;
    using Wide = typename S::Wide;
    using WideInt = typename S::WideInt;
    static constexpr int kParts = kTile / S::kWideLanes;

    // Sums over pairs [From, To) of a block: codes times rows of activations.
    template <int Rows, int From, int To>
    static void products(const int16_t* codes, const int8_t* x, WideInt (&sums)[Rows][kParts]) {
        WideInt own[Rows][kParts];
        for (int m = 0; m < Rows; ++m)
            for (int part = 0; part < kParts; ++part) own[m][part] = S::wide_int_zero();
        for (int pair = From; pair < To; ++pair) {
            typename S::WidePairs code[kParts];
            for (int part = 0; part < kParts; ++part)
                code[part] = S::load_pairs(codes + 2 * (pair * kTile + part * S::kWideLanes));
            for (int m = 0; m < Rows; ++m) {
                const auto two = S::same_pairs(x + m * kBlockCodes + 4 * pair);
                for (int part = 0; part < kParts; ++part) own[m][part] = S::add_pairs(own[m][part], code[part], two);
            }
        }
        for (int m = 0; m < Rows; ++m)
            for (int part = 0; part < kParts; ++part) sums[m][part] = own[m][part];
    }

    template <int Groups, bool HasMinima, int Rows>
    static void multiply(const Panel& panel, int64_t num_blocks, const int8_t* x, const RowBlock* xb, int chunk, float* out) {
        for (int64_t b = 0; b < num_blocks; ++b, x += chunk * kBlockCodes, xb += chunk) {
            const int16_t* codes = &panel.codes[b][0][0][0];
            WideInt sums[Groups][Rows][kParts];
            products<Rows, 0, kBlock / 2 / Groups>(codes, x, sums[0]);
            if constexpr (Groups == 2) products<Rows, kBlock / 4, kBlock / 2>(codes, x, sums[1]);
            for (int part = 0; part < kParts; ++part) {
                const int first = part * S::kWideLanes;
                const Numbers<S, Groups, HasMinima> numbers(panel.scales[b][0] + first, panel.minima[b][0] + first);
                for (int m = 0; m < Rows; ++m) {
                    Wide own[Groups];
                    for (int group = 0; group < Groups; ++group) own[group] = S::to_float(sums[group][m][part]);
                    float* to = out + m * kTile + first;
                    S::wide_store(to, numbers.add(S::wide_load(to), own, xb[m]));
                }
            }
        }
    }

    // The chunks of pairs, of 8 and 4 rows, among rows [first, last) times a tile: out[row - first][16]. `fill` widens blocks
    // [begin, end) of the tile. Added to what is in `out` where `adds`. Returns the first row of a smaller chunk.
    template <int Groups, bool HasMinima, class Fill>
    static int64_t run(const QuantizedRows& x, int64_t first, int64_t last, float* out, Fill fill, bool adds = false) {
        int64_t until = first;
        while (until < last && chunk_rows(x.rows - until) >= S::kPairRows) until += chunk_rows(x.rows - until);
        if (until == first) return first;
        if (!adds) std::memset(out, 0, size_t((until - first) * kTile) * sizeof(float));
        const int64_t num_blocks = x.columns / kBlock;
        Panel panel;
        for (int64_t begin = 0; begin < num_blocks; begin += kPanelBlocks) {
            const int64_t count = num_blocks - begin < kPanelBlocks ? num_blocks - begin : kPanelBlocks;
            fill(panel, begin, begin + count);
            int chunk = 0;
            for (int64_t row = first; row < until; row += chunk) {
                chunk = chunk_rows(x.rows - row);
                for (int m = 0; m < chunk; m += kTogether)
                    multiply<Groups, HasMinima, kTogether>(panel, count, x.codes_of(row, begin, chunk) + m * kBlockCodes,
                                                           x.blocks_of(row, begin, chunk) + m, chunk,
                                                           out + (row - first + m) * kTile);
            }
        }
        return until;
    }
};

}  // namespace
}  // namespace plait
