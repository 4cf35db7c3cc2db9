// Products with matrices of low-bit codes: activations in two bytes with exact integer sums, or in fp32.
//
// A code becomes a byte u: itself where levels are evenly spaced, else an entry of a table of 16, plus
// kGridOffset so that no entry is negative. The last code of a table may stand for a value that each row chooses
// in each group. Entries of a wide table are kWideBase times one byte plus another. Lane r belongs to output row r of
// the tile.
//
// Where both bits of a code have scales of their own, the matrix is the sum of two matrices of codes 0 and 1, and a
// product the sum over the blocks of the high bits, then over those of the low bits.
#pragma once

#include <type_traits>

#include "kernel_pairs.h"

namespace plait {
namespace {

// One of the two matrices of single bits that a matrix is the sum of.
inline GridView plane_of(const GridView& w, int plane) {
    GridView view = w;
    view.plane = plane;
    if (plane == 1) view.scales = w.low_scales;
    return view;
}

// Bits of a code, whether codes are looked up, whether the last one is special, the one bit that is looked at, if any,
// and whether the table is wide.
template <int Bits_, bool IsTable_, bool HasSpecials_, int Plane_ = -1, bool IsWide_ = false>
struct GridFormat {
    static constexpr int Bits = Bits_, Plane = Plane_;
    static constexpr bool IsTable = IsTable_, HasSpecials = HasSpecials_, IsWide = IsWide_;
    static constexpr int Top = Bits == 8 ? 255 : IsWide ? kWideBase - 1 : IsTable ? 2 * kGridOffset : 15;
};

// L has vectors of some output rows of a tile; see kernel_grid_plain.h for sets that have none.
template <class S, class L = typename S::GridLanes>
struct GridKernels {
    using F = typename L::F;
    using U = typename L::U;
    using Table = typename L::Table;
    static constexpr int kParts = kTile / L::kCount;
    static constexpr int64_t kAhead = 8;  // blocks

    // The bytes of 8 groups of 4 columns.
    template <class Fmt>
    static void decode(const uint8_t* p, Table table, const U& special, U (&u)[8]) {
        if constexpr (Fmt::Bits == 8) {
            for (int g = 0; g < 8; ++g) u[g] = L::plane(p + 64 * g);
        } else if constexpr (Fmt::Bits == 4) {
            for (int j = 0; j < 4; ++j) {
                const U packed = L::plane(p + 64 * j);
                u[2 * j] = L::template field<0, 15>(packed);
                u[2 * j + 1] = L::template field<4, 15>(packed);
            }
        } else if constexpr (Fmt::Plane >= 0) {
            constexpr int bit = 1 - Fmt::Plane;
            for (int j = 0; j < 2; ++j) {
                const U packed = L::plane(p + 64 * j);
                u[4 * j] = L::template field<bit, 1>(packed);
                u[4 * j + 1] = L::template field<2 + bit, 1>(packed);
                u[4 * j + 2] = L::template field<4 + bit, 1>(packed);
                u[4 * j + 3] = L::template field<6 + bit, 1>(packed);
            }
        } else {
            for (int j = 0; j < 2; ++j) {
                const U packed = L::plane(p + 64 * j);
                u[4 * j] = L::template field<0, 3>(packed);
                u[4 * j + 1] = L::template field<2, 3>(packed);
                u[4 * j + 2] = L::template field<4, 3>(packed);
                u[4 * j + 3] = L::template field<6, 3>(packed);
            }
            if constexpr (Fmt::Bits == 3) {
                const U third = L::plane(p + 128);
                u[0] = L::join(u[0], L::template raised<2>(L::template field<0, 1>(third)));
                u[1] = L::join(u[1], L::template raised<2>(L::template field<1, 1>(third)));
                u[2] = L::join(u[2], L::template field<0, 4>(third));
                u[3] = L::join(u[3], L::template field<1, 4>(third));
                u[4] = L::join(u[4], L::template field<2, 4>(third));
                u[5] = L::join(u[5], L::template field<3, 4>(third));
                u[6] = L::join(u[6], L::template field<4, 4>(third));
                u[7] = L::join(u[7], L::template field<5, 4>(third));
            }
        }
        if constexpr (Fmt::IsTable) {
            constexpr int last = (1 << Fmt::Bits) - 1;
            for (int g = 0; g < 8; ++g) {
                const U codes = u[g];
                u[g] = L::look_up(table, codes);
                if constexpr (Fmt::HasSpecials) u[g] = L::join(u[g], L::where_last(codes, last, special));
            }
        }
    }

    // What one group of one part of a tile shares.
    struct Group {
        F scale, zero;
        U special;
    };
    template <class Fmt>
    static Group group_of(const GridView& w, int64_t tile, int64_t g, int part) {
        const int first = part * L::kCount;
        const int64_t at = tile * w.groups + g;
        Group group{L::zero(), L::zero(), L::no_bytes()};
        group.scale = w.row_scales != nullptr ? L::load_bytes(w.scales + at * kTile + first)
                                              : L::load_halves(w.scales + 2 * (at * kTile + first));
        if (w.zeros != nullptr) group.zero = L::load_halves(w.zeros + 2 * (at * kTile + first));
        if constexpr (Fmt::HasSpecials) group.special = L::specials(w.types + 4 * at, first, w.specials);
        return group;
    }

    template <int Rows>
    static void clear(F (&sum)[kParts][Rows]) {
        for (int part = 0; part < kParts; ++part)
            for (int m = 0; m < Rows; ++m) sum[part][m] = L::zero();
    }

    // y[row][r] = row_scale[r] * sum over blocks b of scale[b, r] * x_scale[b] * sum(u * q), less what zeros take
    // off, in the order of b. Nothing here depends on how many rows the chunk has: `stride`, of which `Rows` are taken.
    template <class Fmt, int Rows>
    static void tile(const GridView& w, int64_t tile, const int8_t* x, const RowBlock* xb, int stride, float* out) {
        F sum[kParts][Rows];
        clear<Rows>(sum);
        add_tile<Fmt, Rows>(w, tile, x, xb, stride, sum);
        finish<Rows>(w, tile, sum, out);
    }

    template <class Fmt, int Rows>
    static void add_tile(const GridView& w, int64_t tile, const int8_t* x, const RowBlock* xb, int stride, F (&sum)[kParts][Rows]) {
        constexpr int64_t kBytes = 64 * Fmt::Bits;
        const int64_t num_blocks = w.columns / kBlock, per_group = w.group / kBlock;
        const int shift = (w.zeros != nullptr ? 0 : w.offset) - (Fmt::Bits == 8 ? L::kLess : 0);
        const Table table = L::table(w.table), low_table = L::table(w.low_table);
        const uint8_t* at = w.codes + tile * num_blocks * kBytes;
        for (int64_t g = 0; g < w.groups; ++g) {
            Group groups[kParts];
            for (int part = 0; part < kParts; ++part) groups[part] = group_of<Fmt>(w, tile, g, part);
            const int64_t last = (g + 1) * per_group < num_blocks ? (g + 1) * per_group : num_blocks;
            for (int64_t b = g * per_group; b < last; ++b, at += kBytes, x += stride * kBlockCodes, xb += stride) {
                if constexpr (Rows == 1)
                    for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(at + kAhead * kBytes + line);
                for (int part = 0; part < kParts; ++part) {
                    U u[8], lower[8];
                    decode<Fmt>(at + 4 * L::kCount * part, table, groups[part].special, u);
                    if constexpr (Fmt::IsWide) decode<Fmt>(at + 4 * L::kCount * part, low_table, groups[part].special, lower);
                    const auto dot = [&](const int8_t* q) {
                        if constexpr (Fmt::IsWide) return L::wide(L::template dot<Fmt::Top>(u, q), L::template dot<Fmt::Top>(lower, q));
                        else return L::template dot<Fmt::Top>(u, q);
                    };
                    for (int m = 0; m < Rows; ++m) {
                        const int8_t* q = x + m * kBlockCodes;
                        const RowBlock& of = xb[m];
                        const F product = L::to_float(L::whole(dot(q), dot(q + kBlock), shift, of.minus_sum));
                        const F scale = groups[part].scale;
                        F total = L::fma(L::mul(scale, L::set1(of.scale)), product, sum[part][m]);
                        if (w.zeros != nullptr)
                            total = L::fma(L::mul(scale, groups[part].zero), L::set1(-of.scaled_sum), total);
                        sum[part][m] = total;
                    }
                }
            }
        }
    }

    // The same with activations in fp32: x has row stride ldx.
    template <class Fmt, int Rows>
    static void exact(const GridView& w, int64_t tile, const float* x, int64_t ldx, float* out) {
        F sum[kParts][Rows];
        clear<Rows>(sum);
        add_exact<Fmt, Rows>(w, tile, x, ldx, sum);
        finish<Rows>(w, tile, sum, out);
    }

    template <class Fmt, int Rows>
    static void add_exact(const GridView& w, int64_t tile, const float* x, int64_t ldx, F (&sum)[kParts][Rows]) {
        constexpr int64_t kBytes = 64 * Fmt::Bits;
        const int64_t num_blocks = w.columns / kBlock, per_group = w.group / kBlock;
        const Table table = L::table(w.table), low_table = L::table(w.low_table);
        const F offset = L::set1(float(w.offset)), base = L::set1(float(kWideBase));
        for (int64_t g = 0; g < w.groups; ++g) {
            const int64_t first = g * per_group;
            const int64_t last = first + per_group < num_blocks ? first + per_group : num_blocks;
            for (int part = 0; part < kParts; ++part) {
                const Group group = group_of<Fmt>(w, tile, g, part);
                const F zero = w.zeros != nullptr ? group.zero : offset;
                F inner[Rows];
                for (int m = 0; m < Rows; ++m) inner[m] = L::zero();
                for (int64_t b = first; b < last; ++b) {
                    U u[8], lower[8];
                    const uint8_t* at = w.codes + (tile * num_blocks + b) * kBytes + 4 * L::kCount * part;
                    decode<Fmt>(at, table, group.special, u);
                    if constexpr (Fmt::IsWide) decode<Fmt>(at, low_table, group.special, lower);
                    for (int c = 0; c < kBlock; ++c) {
                        F entry = L::number(u[c / 4], c % 4);
                        if constexpr (Fmt::IsWide) entry = L::fma(entry, base, L::number(lower[c / 4], c % 4));
                        const F weight = L::sub(entry, zero);
                        for (int m = 0; m < Rows; ++m)
                            inner[m] = L::fma(weight, L::set1(x[m * ldx + b * kBlock + c]), inner[m]);
                    }
                }
                for (int m = 0; m < Rows; ++m) sum[part][m] = L::fma(group.scale, inner[m], sum[part][m]);
            }
        }
    }

    template <int Rows>
    static void finish(const GridView& w, int64_t tile, const F (&sum)[kParts][Rows], float* out) {
        for (int part = 0; part < kParts; ++part) {
            const int first = part * L::kCount;
            for (int m = 0; m < Rows; ++m) {
                F y = sum[part][m];
                if (w.row_scales != nullptr) y = L::mul(y, L::load(w.row_scales + tile * kTile + first));
                L::store(out + m * kTile + first, y);
            }
        }
    }

    // What bytes are too large by; zeros take that off apart.
    static int less(const GridView& w) { return w.zeros != nullptr ? 0 : w.offset; }

    // Blocks [begin, end) of a tile for many rows.
    template <class Fmt>
    static void fill(const GridView& w, int64_t tile, int64_t begin, int64_t end, Panel& panel) {
        const int64_t num_blocks = w.columns / kBlock, per_group = w.group / kBlock;
        const Table table = L::table(w.table), low_table = L::table(w.low_table);
        for (int64_t b = begin; b < end; ++b) {
            const uint8_t* at = w.codes + (tile * num_blocks + b) * 64 * Fmt::Bits;
            for (int part = 0; part < kParts; ++part) {
                const Group group = group_of<Fmt>(w, tile, b / per_group, part);
                U u[8], lower[8];
                decode<Fmt>(at + 4 * L::kCount * part, table, group.special, u);
                if constexpr (Fmt::IsWide) decode<Fmt>(at + 4 * L::kCount * part, low_table, group.special, lower);
                L::template store_pairs<Fmt::IsWide>(u, lower, less(w), &panel.codes[b - begin][0][part * L::kCount][0]);
                L::store(panel.scales[b - begin][0] + part * L::kCount, group.scale);
                L::store(panel.minima[b - begin][0] + part * L::kCount,
                         L::sub(L::zero(), L::mul(group.scale, group.zero)));
            }
        }
    }

    template <class Fmt>
    static void tile_of(const GridView& w, int64_t t, const QuantizedRows& x, int64_t first, int64_t last, float* out) {
        int64_t row = first;
        if constexpr (kHasPairs<S>) {
            const auto widen = [&](Panel& panel, int64_t begin, int64_t end) { fill<Fmt>(w, t, begin, end, panel); };
            row = w.zeros != nullptr ? Pairs<S>::template run<1, true>(x, first, last, out, widen)
                                     : Pairs<S>::template run<1, false>(x, first, last, out, widen);
            if (w.row_scales != nullptr)
                for (int64_t i = 0; i < (row - first) * kTile; ++i) out[i] *= w.row_scales[t * kTile + i % kTile];
        }
        for (int rows = 0; row < last; row += rows) {
            rows = chunk_rows(x.rows - row);
            const auto some = [&](auto taken, int m) {
                tile<Fmt, taken>(w, t, x.codes_of(row, 0, rows) + m * kBlockCodes, x.blocks_of(row, 0, rows) + m, rows,
                                 out + (row - first + m) * kTile);
            };
            int m = 0;
            if constexpr (!kHasPairs<S>)
                for (; m + L::kRows <= rows; m += L::kRows) some(std::integral_constant<int, L::kRows>{}, m);
            for (; m < rows; ++m) some(std::integral_constant<int, 1>{}, m);
        }
    }

    template <class Fmt>
    static void exact_of(const GridView& w, int64_t t, const float* x, int64_t ldx, int rows, float* out) {
        int m = 0;
        for (; m + L::kRows <= rows; m += L::kRows) exact<Fmt, L::kRows>(w, t, x + m * ldx, ldx, out + m * kTile);
        for (; m < rows; ++m) exact<Fmt, 1>(w, t, x + m * ldx, ldx, out + m * kTile);
    }

    // Call `function` with the GridFormat of a matrix.
    template <class Function>
    static void with_format(const GridView& w, Function function) {
        if (!w.is_table) {
            switch (w.bits) {
                case 2: return function(GridFormat<2, false, false>{});
                case 3: return function(GridFormat<3, false, false>{});
                case 4: return function(GridFormat<4, false, false>{});
                default: return function(GridFormat<8, false, false>{});
            }
        }
        if (w.bits == 3) return w.types != nullptr ? function(GridFormat<3, true, true>{}) : function(GridFormat<3, true, false>{});
        if (w.is_wide) return function(GridFormat<4, true, false, -1, true>{});
        return w.types != nullptr ? function(GridFormat<4, true, true>{}) : function(GridFormat<4, true, false>{});
    }

    using High = GridFormat<2, false, false, 0>;
    using Low = GridFormat<2, false, false, 1>;

    // Tile `t` of a matrix of two planes times rows [first, last).
    static void planes_tile(const GridView& w, int64_t t, const QuantizedRows& x, int64_t first, int64_t last, float* out) {
        const GridView high = plane_of(w, 0), low = plane_of(w, 1);
        int64_t row = first;
        if constexpr (kHasPairs<S>) {
            const auto widen_high = [&](Panel& panel, int64_t begin, int64_t end) { fill<High>(high, t, begin, end, panel); };
            const auto widen_low = [&](Panel& panel, int64_t begin, int64_t end) { fill<Low>(low, t, begin, end, panel); };
            Pairs<S>::template run<1, false>(x, first, last, out, widen_high);
            row = Pairs<S>::template run<1, false>(x, first, last, out, widen_low, true);
        }
        for (int rows = 0; row < last; row += rows) {
            rows = chunk_rows(x.rows - row);
            const auto some = [&](auto taken, int m) {
                const int8_t* codes = x.codes_of(row, 0, rows) + m * kBlockCodes;
                const RowBlock* blocks = x.blocks_of(row, 0, rows) + m;
                F sum[kParts][taken];
                clear<taken>(sum);
                add_tile<High, taken>(high, t, codes, blocks, rows, sum);
                add_tile<Low, taken>(low, t, codes, blocks, rows, sum);
                finish<taken>(w, t, sum, out + (row - first + m) * kTile);
            };
            int m = 0;
            if constexpr (!kHasPairs<S>)
                for (; m + L::kRows <= rows; m += L::kRows) some(std::integral_constant<int, L::kRows>{}, m);
            for (; m < rows; ++m) some(std::integral_constant<int, 1>{}, m);
        }
    }

    template <int Rows>
    static void planes_exact(const GridView& high, const GridView& low, int64_t t, const float* x, int64_t ldx, float* out) {
        F sum[kParts][Rows];
        clear<Rows>(sum);
        add_exact<High, Rows>(high, t, x, ldx, sum);
        add_exact<Low, Rows>(low, t, x, ldx, sum);
        finish<Rows>(high, t, sum, out);
    }

    static void grid_tile(const GridView& w, int64_t t, const QuantizedRows& x, int64_t first, int64_t last, float* out) {
        if (w.low_scales != nullptr) return planes_tile(w, t, x, first, last, out);
        with_format(w, [&](auto format) { tile_of<decltype(format)>(w, t, x, first, last, out); });
    }

    static void grid_exact(const GridView& w, int64_t t, const float* x, int64_t ldx, int rows, float* out) {
        if (w.low_scales != nullptr) {
            const GridView high = plane_of(w, 0), low = plane_of(w, 1);
            int m = 0;
            for (; m + L::kRows <= rows; m += L::kRows)
                planes_exact<L::kRows>(high, low, t, x + m * ldx, ldx, out + m * kTile);
            for (; m < rows; ++m) planes_exact<1>(high, low, t, x + m * ldx, ldx, out + m * kTile);
            return;
        }
        with_format(w, [&](auto format) { exact_of<decltype(format)>(w, t, x, ldx, rows, out); });
    }
};

}  // namespace
}  // namespace plait
