// Products with matrices of low-bit codes in plain C++: their definition, for sets without vectors of their own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "kernel_grid.h"

namespace plait {
namespace {

template <class S>
struct GridKernels<S, void> {
    static constexpr int kBytes = 64;

    // The bytes u of a block: [group of 4 columns][row][column].
    static void decode(const GridView& w, const uint8_t* p, const uint8_t* types, int16_t (&u)[8][kBytes]) {
        const int last = (1 << w.bits) - 1;
        for (int g = 0; g < 8; ++g) {
            for (int i = 0; i < kBytes; ++i) {
                int code;
                if (w.bits == 8) code = p[64 * g + i];
                else if (w.bits == 4) code = (p[64 * (g / 2) + i] >> (4 * (g & 1))) & 15;
                else code = (p[64 * (g / 4) + i] >> (2 * (g & 3))) & 3;
                if (w.low_scales != nullptr) code = (code >> (1 - w.plane)) & 1;
                if (w.bits == 3) code |= ((p[128 + i] >> g) & 1) << 2;
                if (w.is_table) {
                    const int row = i / 4;
                    code = types != nullptr && code == last
                               ? int(w.specials[(types[row / 4] >> (2 * (row % 4))) & 3] & 255)
                               : entry_of(w, code);
                }
                u[g][i] = int16_t(code);
            }
        }
    }

    static float half_at(const uint8_t* base, int64_t index) {
        uint16_t half;
        std::memcpy(&half, base + 2 * index, 2);
        return fp16_to_float(half);
    }
    static float scale_of(const GridView& w, int64_t at) {
        return w.row_scales != nullptr ? float(w.scales[at]) : half_at(w.scales, at);
    }
    static const uint8_t* types_of(const GridView& w, int64_t group) {
        return w.types == nullptr ? nullptr : w.types + 4 * group;
    }

    // Blocks [begin, end) of a tile for many rows.
    static void fill(const GridView& w, int64_t tile, int64_t begin, int64_t end, Panel& panel) {
        const int64_t num_blocks = w.columns / kBlock, per_group = w.group / kBlock;
        int16_t u[8][kBytes];
        for (int64_t b = begin; b < end; ++b) {
            const int64_t group = tile * w.groups + b / per_group;
            decode(w, w.codes + (tile * num_blocks + b) * 64 * w.bits, types_of(w, group), u);
            for (int g = 0; g < 8; ++g)
                for (int i = 0; i < kBytes; ++i)
                    panel.codes[b - begin][2 * g + i % 2][i / 4][i % 4 / 2] =
                        int16_t(u[g][i] - (w.zeros != nullptr ? 0 : w.offset));
            for (int r = 0; r < kTile; ++r) {
                const float scale = panel.scales[b - begin][0][r] = scale_of(w, group * kTile + r);
                if (w.zeros != nullptr) panel.minima[b - begin][0][r] = -(scale * half_at(w.zeros, group * kTile + r));
            }
        }
    }

    static void grid_tile(const GridView& w, int64_t t, const QuantizedRows& x, int64_t first, int64_t last, float* out) {
        std::fill_n(out, (last - first) * kTile, 0.0f);
        for (int plane = 0; plane < (w.low_scales != nullptr ? 2 : 1); ++plane) {
            const GridView of = w.low_scales != nullptr ? plane_of(w, plane) : w;
            const auto widen = [&](Panel& panel, int64_t begin, int64_t end) { fill(of, t, begin, end, panel); };
            int64_t row = w.zeros != nullptr ? Pairs<S>::template run<1, true>(x, first, last, out, widen, true)
                                             : Pairs<S>::template run<1, false>(x, first, last, out, widen, true);
            for (int rows = 0; row < last; row += rows) {
                rows = chunk_rows(x.rows - row);
                add_small_chunk(of, t, x.codes_of(row, 0, rows), x.blocks_of(row, 0, rows), rows, out + (row - first) * kTile);
            }
        }
        finish(w, t, last - first, out);
    }

    static void add_small_chunk(const GridView& w, int64_t t, const int8_t* x, const RowBlock* xb, int rows, float* out) {
        const int64_t num_blocks = w.columns / kBlock, per_group = w.group / kBlock;
        const int less = w.bits == 8 ? 128 : 0;  // of every byte, as the vector path has it
        const int shift = (w.zeros != nullptr ? 0 : w.offset) - less;
        int16_t u[8][kBytes];
        for (int64_t b = 0; b < num_blocks; ++b, x += rows * kBlockCodes, xb += rows) {
            const int64_t group = t * w.groups + b / per_group;
            decode(w, w.codes + (t * num_blocks + b) * 64 * w.bits, types_of(w, group), u);
            for (int m = 0; m < rows; ++m) {
                const int8_t* q = x + m * kBlockCodes;
                for (int r = 0; r < kTile; ++r) {
                    int32_t high = 0, low = 0;
                    for (int c = 0; c < kBlock; ++c) {
                        const int32_t code = int32_t(u[c / 4][4 * r + c % 4]) - less;
                        high += code * q[c];
                        low += code * q[kBlock + c];
                    }
                    // Of a wide table the parts may be larger than their sum, which 32 bits hold.
                    const float product = float(int32_t(int64_t(high) * 128 + low + int64_t(shift) * xb[m].minus_sum));
                    const float scale = scale_of(w, group * kTile + r);
                    float total = std::fma(scale * xb[m].scale, product, out[m * kTile + r]);
                    if (w.zeros != nullptr)
                        total = std::fma(scale * half_at(w.zeros, group * kTile + r), -xb[m].scaled_sum, total);
                    out[m * kTile + r] = total;
                }
            }
        }
    }

    static void grid_exact(const GridView& w, int64_t t, const float* x, int64_t ldx, int rows, float* out) {
        std::fill_n(out, rows * kTile, 0.0f);
        for (int plane = 0; plane < (w.low_scales != nullptr ? 2 : 1); ++plane)
            add_exact(w.low_scales != nullptr ? plane_of(w, plane) : w, t, x, ldx, rows, out);
        finish(w, t, rows, out);
    }

    static void add_exact(const GridView& w, int64_t t, const float* x, int64_t ldx, int rows, float* out) {
        const int64_t num_blocks = w.columns / kBlock, per_group = w.group / kBlock;
        int16_t u[8][kBytes];
        float inner[kRowChunk * kTile];
        for (int64_t g = 0; g < w.groups; ++g) {
            const int64_t group = t * w.groups + g, first = g * per_group;
            const int64_t last = first + per_group < num_blocks ? first + per_group : num_blocks;
            for (int i = 0; i < rows * kTile; ++i) inner[i] = 0.0f;
            for (int64_t b = first; b < last; ++b) {
                decode(w, w.codes + (t * num_blocks + b) * 64 * w.bits, types_of(w, group), u);
                for (int c = 0; c < kBlock; ++c) {
                    for (int r = 0; r < kTile; ++r) {
                        const float zero = w.zeros != nullptr ? half_at(w.zeros, group * kTile + r) : float(w.offset);
                        const float weight = float(u[c / 4][4 * r + c % 4]) - zero;
                        for (int m = 0; m < rows; ++m)
                            inner[m * kTile + r] = std::fma(weight, x[m * ldx + b * kBlock + c], inner[m * kTile + r]);
                    }
                }
            }
            for (int i = 0; i < rows * kTile; ++i)
                out[i] = std::fma(scale_of(w, group * kTile + i % kTile), inner[i], out[i]);
        }
    }

    static void finish(const GridView& w, int64_t t, int64_t rows, float* out) {
        if (w.row_scales == nullptr) return;
        for (int64_t i = 0; i < rows * kTile; ++i) out[i] *= w.row_scales[t * kTile + i % kTile];
    }
};

}  // namespace
}  // namespace plait
