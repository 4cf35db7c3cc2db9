// Products with packed matrices (activations in two bytes, exact integer sums) and with dense ones (fp32).
#pragma once

#include <cstring>

#include "kernel_pairs.h"

namespace plait {
namespace {

// Bits of a code (7: a byte up to 127, 8: any byte), 2^Shift to subtract from it (-1 for nothing), the type of
// the scales, whether there are minima, and scales for each 32 columns.
template <int Bits_, int Shift_, class Scale_, bool HasMinima_, int Groups_>
struct Format {
    static constexpr int Bits = Bits_, Shift = Shift_, Groups = Groups_;
    static constexpr bool HasMinima = HasMinima_;
    using Scale = Scale_;
};

template <class S>
struct Linear {
    using F = typename S::F;
    using Wide = typename S::Wide;
    static constexpr int kParts = kTile / S::kWideLanes;
    static constexpr int64_t kAhead = 8;  // blocks

    // Sum over the columns of groups [From, To) of (code - 2^Shift) * q; minus_sum is -sum(q).
    template <class Fmt, int From, int To>
    static Wide dot(const typename S::template Codes<Fmt::Bits>& codes, const int8_t* q, const int32_t* minus_sum) {
        static constexpr int32_t kNothing = 0;
        // What codes are too large by is taken off once, with the low parts; 8-bit codes may need it at each step.
        constexpr int kShiftOfHigh = Fmt::Bits == 8 ? Fmt::Shift : -1;
        return S::to_float(S::join(S::template dot<Fmt::Bits, kShiftOfHigh, From, To>(codes, q, &kNothing),
                                   S::template dot<Fmt::Bits, Fmt::Shift, From, To>(codes, q + kBlock, minus_sum)));
    }

    // The same for some rows side by side, so that no sum waits for its own last step: 8 sums hide the latency.
    template <class Fmt, int From, int To, int Rows, class Minus>
    static void dots(const typename S::template Codes<Fmt::Bits>& codes, const int8_t* x, Minus minus_sum, Wide (&products)[Rows]) {
        constexpr bool kIsApart = Rows < 8;
        using Sums = typename S::WideInt[Rows];
        Sums high, low;
#pragma GCC unroll 8
        for (int m = 0; m < Rows; ++m) high[m] = low[m] = S::wide_int_zero();
#pragma GCC unroll 8
        for (int g = From; g < To; ++g) {
#pragma GCC unroll 8
            for (int m = 0; m < Rows; ++m) high[m] = S::add_products(high[m], codes.at[g], x + m * kBlockCodes + 4 * g);
            if constexpr (kIsApart)
#pragma GCC unroll 8
                for (int m = 0; m < Rows; ++m)
                    low[m] = S::add_products(low[m], codes.at[g], x + m * kBlockCodes + kBlock + 4 * g);
        }
#pragma GCC unroll 8
        for (int m = 0; m < Rows; ++m) {
            low[m] = kIsApart ? S::join(high[m], low[m]) : S::template raised<7>(high[m]);
            if constexpr (Fmt::Shift >= 0) low[m] = S::wide_int_add(low[m], S::correction(minus_sum(m), Fmt::Shift));
        }
        if constexpr (!kIsApart)
#pragma GCC unroll 8
            for (int g = From; g < To; ++g)
#pragma GCC unroll 8
                for (int m = 0; m < Rows; ++m)
                    low[m] = S::add_products(low[m], codes.at[g], x + m * kBlockCodes + kBlock + 4 * g);
#pragma GCC unroll 8
        for (int m = 0; m < Rows; ++m) products[m] = S::to_float(low[m]);
    }

    // Products of a block's groups with each row: those of one row or two by themselves.
    template <class Fmt, int Rows>
    static void block(const typename S::template Codes<Fmt::Bits>& codes, const int8_t* x, const RowBlock* xb,
                      Wide (&products)[Fmt::Groups][Rows]) {
        constexpr int kLast = Fmt::Groups == 1 ? 8 : 4;
        const auto minus_first = [&](int m) { return Fmt::Groups == 1 ? &xb[m].minus_sum : &xb[m].minus_low; };
        const auto minus_second = [&](int m) { return &xb[m].minus_high; };
        if constexpr (Rows > 2) {
            dots<Fmt, 0, kLast, Rows>(codes, x, minus_first, products[0]);
            if constexpr (Fmt::Groups == 2) dots<Fmt, 4, 8, Rows>(codes, x, minus_second, products[1]);
        } else {
#pragma GCC unroll 2
            for (int m = 0; m < Rows; ++m) {
                products[0][m] = dot<Fmt, 0, kLast>(codes, x + m * kBlockCodes, minus_first(m));
                if constexpr (Fmt::Groups == 2) products[1][m] = dot<Fmt, 4, 8>(codes, x + m * kBlockCodes, minus_second(m));
            }
        }
    }

    // Those of the rows from `at` on, the scales of all groups before the minima.
    template <class Fmt>
    static Numbers<S, Fmt::Groups, Fmt::HasMinima> numbers_at(const typename Fmt::Scale* at) {
        return {at, at + Fmt::Groups * kTile};
    }

    // y[row][r] = sum over blocks b of scale[b, r] * x_scale[b] * dot(b) + minimum[b, r] * x_scale[b] * x_sum[b],
    // in the order of b. Nothing here depends on how many rows the chunk has.
    template <class Fmt, int Rows>
    static void tile(const PackedView& w, int64_t tile, const int8_t* x, const RowBlock* xb, float* out) {
        using Scale = typename Fmt::Scale;
        const int64_t num_blocks = w.columns / kBlock;
        const uint8_t* codes_at = w.codes + tile * num_blocks * w.code_bytes;
        const uint8_t* parameters_at = w.parameters + tile * num_blocks * w.parameter_bytes;
        Wide sum[kParts][Rows];
        for (int part = 0; part < kParts; ++part)
            for (int m = 0; m < Rows; ++m) sum[part][m] = S::wide_zero();
        for (int64_t b = 0; b < num_blocks; ++b) {
            const Scale* scales = reinterpret_cast<const Scale*>(parameters_at);
            // The processor's own prefetching stops at the end of a page; this keeps some blocks ahead.
            for (int64_t at = 0; at < kTile * kBlock * (Fmt::Bits == 4 ? 4 : 8) / 8; at += 64)
                __builtin_prefetch(codes_at + kAhead * w.code_bytes + at);
            __builtin_prefetch(parameters_at + kAhead * w.parameter_bytes);
#pragma GCC unroll 2
            for (int part = 0; part < kParts; ++part) {
                const auto codes = S::template load_codes<Fmt::Bits>(codes_at + 4 * S::kWideLanes * part);
                const auto numbers = numbers_at<Fmt>(scales + S::kWideLanes * part);
                Wide products[Fmt::Groups][Rows];
                block<Fmt, Rows>(codes, x, xb, products);
#pragma GCC unroll 8
                for (int m = 0; m < Rows; ++m) {
                    Wide own[Fmt::Groups];
                    for (int group = 0; group < Fmt::Groups; ++group) own[group] = products[group][m];
                    sum[part][m] = numbers.add(sum[part][m], own, xb[m]);
                }
            }
            codes_at += w.code_bytes;
            parameters_at += w.parameter_bytes;
            x += Rows * kBlockCodes;
            xb += Rows;
        }
        for (int m = 0; m < Rows; ++m)
            for (int part = 0; part < kParts; ++part)
                S::wide_store(out + m * kTile + S::kWideLanes * part, sum[part][m]);
    }

    // Two tiles that lie one behind the other, for four of the rows of a chunk of `chunk`: each vector of activations
    // meets both, and 16 sums hide how long a product takes. The bits are those of `tile`.
    template <class Fmt>
    static void two_tiles(const PackedView& w, int64_t tile, const int8_t* x, const RowBlock* xb, int chunk, float* out, int64_t stride) {
        constexpr int kRows = 4, kTiles = 2, kEach = 8 / Fmt::Groups;
        const int64_t num_blocks = w.columns / kBlock;
        const uint8_t* codes_at = w.codes + tile * num_blocks * w.code_bytes;
        const uint8_t* parameters_at = w.parameters + tile * num_blocks * w.parameter_bytes;
        const int64_t next_codes = num_blocks * w.code_bytes, next_parameters = num_blocks * w.parameter_bytes;
        Wide sum[kTiles][kRows];
        for (int t = 0; t < kTiles; ++t)
            for (int m = 0; m < kRows; ++m) sum[t][m] = S::wide_zero();
        for (int64_t b = 0; b < num_blocks; ++b) {
            const typename S::template Codes<Fmt::Bits> codes[kTiles] = {
                S::template load_codes<Fmt::Bits>(codes_at), S::template load_codes<Fmt::Bits>(codes_at + next_codes)};
            Wide products[kTiles][kRows][Fmt::Groups];
#pragma GCC unroll 2
            for (int group = 0; group < Fmt::Groups; ++group) {
                typename S::WideInt high[kTiles][kRows], low[kTiles][kRows];
                for (int t = 0; t < kTiles; ++t)
                    for (int m = 0; m < kRows; ++m) high[t][m] = low[t][m] = S::wide_int_zero();
#pragma GCC unroll 8
                for (int g = group * kEach; g < (group + 1) * kEach; ++g)
#pragma GCC unroll 4
                    for (int m = 0; m < kRows; ++m) {
                        const int8_t* four = x + m * kBlockCodes + 4 * g;
#pragma GCC unroll 2
                        for (int t = 0; t < kTiles; ++t) {
                            high[t][m] = S::add_products(high[t][m], codes[t].at[g], four);
                            low[t][m] = S::add_products(low[t][m], codes[t].at[g], four + kBlock);
                        }
                    }
#pragma GCC unroll 4
                for (int m = 0; m < kRows; ++m) {
                    const int32_t* minus = Fmt::Groups == 1 ? &xb[m].minus_sum : group == 0 ? &xb[m].minus_low : &xb[m].minus_high;
#pragma GCC unroll 2
                    for (int t = 0; t < kTiles; ++t) {
                        auto whole = S::join(high[t][m], low[t][m]);
                        if constexpr (Fmt::Shift >= 0) whole = S::wide_int_add(whole, S::correction(minus, Fmt::Shift));
                        products[t][m][group] = S::to_float(whole);
                    }
                }
            }
#pragma GCC unroll 2
            for (int t = 0; t < kTiles; ++t) {
                const auto numbers = numbers_at<Fmt>(reinterpret_cast<const typename Fmt::Scale*>(parameters_at + t * next_parameters));
#pragma GCC unroll 4
                for (int m = 0; m < kRows; ++m) sum[t][m] = numbers.add(sum[t][m], products[t][m], xb[m]);
            }
            codes_at += w.code_bytes;
            parameters_at += w.parameter_bytes;
            x += chunk * kBlockCodes;
            xb += chunk;
        }
        for (int t = 0; t < kTiles; ++t)
            for (int m = 0; m < kRows; ++m) S::wide_store(out + t * stride + m * kTile, sum[t][m]);
    }

    // Blocks [begin, end) of a tile for many rows.
    template <class Fmt>
    static void fill(const PackedView& w, int64_t tile, int64_t begin, int64_t end, Panel& panel) {
        using Scale = typename Fmt::Scale;
        constexpr int kLess = Fmt::Shift < 0 ? 0 : 1 << (Fmt::Shift < 0 ? 0 : Fmt::Shift);
        for (int64_t b = begin; b < end; ++b) {
            const int64_t at = tile * (w.columns / kBlock) + b;
            const Scale* scales = reinterpret_cast<const Scale*>(w.parameters + at * w.parameter_bytes);
            for (int part = 0; part < kParts; ++part) {
                const int first = part * S::kWideLanes;
                S::template store_pairs<kLess>(S::template load_codes<Fmt::Bits>(w.codes + at * w.code_bytes + 4 * first),
                                               &panel.codes[b - begin][0][first][0]);
                for (int group = 0; group < Fmt::Groups; ++group) {
                    S::wide_store(panel.scales[b - begin][group] + first, S::wide_load(scales + group * kTile + first));
                    if constexpr (Fmt::HasMinima)
                        S::wide_store(panel.minima[b - begin][group] + first, S::wide_load(scales + (Fmt::Groups + group) * kTile + first));
                }
            }
        }
    }

    // Whether one vector holds a row of a tile, so that registers are enough for the sums of two.
    static constexpr bool kHasTwoTiles = kParts == 1 && !kHasPairs<S>;

    template <class Fmt>
    static void tiles_of(const PackedView& w, int64_t t, int64_t count, const QuantizedRows& x, int64_t first, int64_t last, float* out) {
        const int64_t stride = (last - first) * kTile;
        int64_t row = first;
        if constexpr (kHasTwoTiles) {
            for (; count == 2 && row < last && chunk_rows(x.rows - row) >= 4; row += chunk_rows(x.rows - row)) {
                const int chunk = chunk_rows(x.rows - row);
                for (int m = 0; m < chunk; m += 4)
                    two_tiles<Fmt>(w, t, x.codes_of(row, 0, chunk) + m * kBlockCodes, x.blocks_of(row, 0, chunk) + m, chunk,
                                   out + (row - first + m) * kTile, stride);
            }
        }
        for (int64_t k = 0; k < count; ++k) tile_of<Fmt>(w, t + k, x, row, last, out + k * stride + (row - first) * kTile);
    }

    template <class Fmt>
    static void tile_of(const PackedView& w, int64_t t, const QuantizedRows& x, int64_t first, int64_t last, float* out) {
        int64_t row = first;
        if constexpr (kHasPairs<S>)
            row = Pairs<S>::template run<Fmt::Groups, Fmt::HasMinima>(
                x, first, last, out, [&](Panel& panel, int64_t begin, int64_t end) { fill<Fmt>(w, t, begin, end, panel); });
        for (int rows = 0; row < last; row += rows) {
            rows = chunk_rows(x.rows - row);
            const int8_t* codes = x.codes_of(row, 0, rows);
            const RowBlock* blocks = x.blocks_of(row, 0, rows);
            float* to = out + (row - first) * kTile;
            if (rows == 1) tile<Fmt, 1>(w, t, codes, blocks, to);
            else if (rows == 2) tile<Fmt, 2>(w, t, codes, blocks, to);
            else if constexpr (!kHasPairs<S>) {
                if (rows == 4) tile<Fmt, 4>(w, t, codes, blocks, to);
                else tile<Fmt, 8>(w, t, codes, blocks, to);
            }
        }
    }

    static void packed_tiles(const PackedView& w, int64_t t, int64_t count, const QuantizedRows& x, int64_t first, int64_t last, float* out) {
        using Half = uint16_t;
        switch (w.layout) {
            case Layout::u4_f16: return tiles_of<Format<4, 3, Half, false, 1>>(w, t, count, x, first, last, out);
            case Layout::u4_f16_min: return tiles_of<Format<4, -1, Half, true, 1>>(w, t, count, x, first, last, out);
            case Layout::u4_f32_min: return tiles_of<Format<4, -1, float, true, 1>>(w, t, count, x, first, last, out);
            case Layout::u4_f32_pair: return tiles_of<Format<4, 2, float, false, 2>>(w, t, count, x, first, last, out);
            case Layout::u4_f32_min_pair: return tiles_of<Format<4, -1, float, true, 2>>(w, t, count, x, first, last, out);
            case Layout::u7_f16_16: return tiles_of<Format<7, 4, Half, false, 1>>(w, t, count, x, first, last, out);
            case Layout::u7_f16_min: return tiles_of<Format<7, -1, Half, true, 1>>(w, t, count, x, first, last, out);
            case Layout::u7_f32_min: return tiles_of<Format<7, -1, float, true, 1>>(w, t, count, x, first, last, out);
            case Layout::u7_f32_pair: return tiles_of<Format<7, 5, float, false, 2>>(w, t, count, x, first, last, out);
            default: return tiles_of<Format<8, 7, Half, false, 1>>(w, t, count, x, first, last, out);
        }
    }

    // A block that holds NaN or infinity becomes NaN as a whole; one below 1e-33 becomes 0, as 16256 / size
    // would overflow.
    static void quantize_row(const float* x, int64_t num_blocks, int row, int rows, int8_t* codes, RowBlock* blocks) {
        for (int64_t b = 0; b < num_blocks; ++b) {
            const F low = S::load(x + b * kBlock), high = S::load(x + b * kBlock + kLanes);
            const float size = S::largest(S::max(S::abs(low), S::abs(high)));
            const float poison = S::sum(S::fma(low, S::zero(), S::mul(high, S::zero())));
            float scale = size / 16256.0f, inverse = 16256.0f / size;
            if (!(size >= 1e-33f)) scale = inverse = 0.0f;
            int8_t* out = codes + (b * rows + row) * kBlockCodes;
            RowBlock& block = blocks[b * rows + row];
            if (poison != 0.0f) {
                std::memset(out, 0, kBlockCodes);
                const float nan = __builtin_nanf("");
                block = {nan, nan, nan, nan, 0, 0, 0, 0};
                continue;
            }
            const F factor = S::set1(inverse);
            const F limit = S::set1(16256.0f), floor = S::set1(-16256.0f);
            const F q_low = S::max(S::min(S::round(S::mul(low, factor)), limit), floor);
            const F q_high = S::max(S::min(S::round(S::mul(high, factor)), limit), floor);
            const F over = S::set1(1.0f / 128.0f), minus = S::set1(-128.0f);
            const F top_low = S::round(S::mul(q_low, over)), top_high = S::round(S::mul(q_high, over));
            bool is_pairs = false;
            if constexpr (kHasPairs<S>) {
                is_pairs = rows >= S::kPairRows;
                if (is_pairs) {
                    S::store_pairs(out, q_low);
                    S::store_pairs(out + 2 * kLanes, q_high);
                }
            }
            if (!is_pairs) {
                S::store_int8(out, top_low);
                S::store_int8(out + kLanes, top_high);
                S::store_int8(out + kBlock, S::fma(top_low, minus, q_low));
                S::store_int8(out + kBlock + kLanes, S::fma(top_high, minus, q_high));
            }
            const float sum_low = S::sum(q_low), sum_high = S::sum(q_high);  // whole numbers: exact
            block = {scale, scale * (sum_low + sum_high), scale * sum_low, scale * sum_high,
                     -int32_t(sum_low + sum_high), -int32_t(sum_low), -int32_t(sum_high), 0};
        }
    }

    static void dequantize_chunk(const int8_t* codes, const RowBlock* blocks, int rows, int64_t num_blocks, float* y) {
        for (int64_t b = 0; b < num_blocks; ++b)
            for (int m = 0; m < rows; ++m, codes += kBlockCodes) {
                const float scale = blocks[b * rows + m].scale;
                float* out = y + (m * num_blocks + b) * kBlock;
                if (rows < S::kPairRows) {
                    for (int c = 0; c < kBlock; ++c)
                        out[c] = scale * float(128 * int32_t(codes[c]) + int32_t(codes[kBlock + c]));
                    continue;
                }
                int16_t whole[kBlock];
                std::memcpy(whole, codes, sizeof whole);
                for (int c = 0; c < kBlock; c += 4) {
                    out[c] = scale * float(whole[c]);
                    out[c + 1] = scale * float(whole[c + 2]);
                    out[c + 2] = scale * float(whole[c + 1]);
                    out[c + 3] = scale * float(whole[c + 3]);
                }
            }
    }

    // Lane l sums the products of columns l, l + 16, l + 32, ...; the lanes are added by `sum`.
    template <Number N, int Rows>
    static void dense_block(const float* x, int64_t ldx, const void* weight, int64_t stride, int64_t columns,
                            int64_t row, int outputs, float* y, int64_t ldy) {
        using R = Reader<S, N>;
        F sum[Rows][4];
        int64_t at[4];
        for (int m = 0; m < Rows; ++m)
            for (int k = 0; k < 4; ++k) sum[m][k] = S::zero();
        // Outputs that do not exist repeat the last one, and are thrown away.
        for (int k = 0; k < 4; ++k) at[k] = (row + (k < outputs ? k : outputs - 1)) * stride;
        int64_t c = 0;
        for (; c + kLanes <= columns; c += kLanes) {
            F w[4];
            for (int k = 0; k < 4; ++k) w[k] = R::load(weight, at[k] + c);
            for (int m = 0; m < Rows; ++m) {
                const F v = S::load(x + m * ldx + c);
                for (int k = 0; k < 4; ++k) sum[m][k] = S::fma(w[k], v, sum[m][k]);
            }
        }
        if (c < columns) {
            F w[4];
            for (int k = 0; k < 4; ++k) w[k] = R::load_some(weight, at[k] + c, columns - c);
            for (int m = 0; m < Rows; ++m) {
                const F v = S::load_some(x + m * ldx + c, columns - c);
                for (int k = 0; k < 4; ++k) sum[m][k] = S::fma(w[k], v, sum[m][k]);
            }
        }
        float block[4][4];
        S::template store_sums<Rows>(sum, &block[0][0], 4);
        for (int m = 0; m < Rows; ++m)
            for (int k = 0; k < outputs; ++k) y[m * ldy + row + k] = block[m][k];
    }

    template <Number N>
    static void dense_of(const float* x, int64_t ldx, int64_t rows, const void* weight, int64_t stride,
                         int64_t columns, int64_t begin, int64_t end, float* y, int64_t ldy) {
        constexpr int kRows = S::kDenseRows;
        for (int64_t row = begin; row < end; row += 4) {
            const int outputs = int(end - row < 4 ? end - row : 4);
            int64_t m = 0;
            for (; m + kRows <= rows; m += kRows)
                dense_block<N, kRows>(x + m * ldx, ldx, weight, stride, columns, row, outputs, y + m * ldy, ldy);
            for (; m < rows; ++m)
                dense_block<N, 1>(x + m * ldx, ldx, weight, stride, columns, row, outputs, y + m * ldy, ldy);
        }
    }

    static void dense_rows(const float* x, int64_t ldx, int64_t rows, const void* weight, int64_t stride,
                           Number number, int64_t columns, int64_t begin, int64_t end, float* y, int64_t ldy) {
        switch (number) {
            case Number::fp32: return dense_of<Number::fp32>(x, ldx, rows, weight, stride, columns, begin, end, y, ldy);
            case Number::bf16: return dense_of<Number::bf16>(x, ldx, rows, weight, stride, columns, begin, end, y, ldy);
            case Number::fp16: return dense_of<Number::fp16>(x, ldx, rows, weight, stride, columns, begin, end, y, ldy);
        }
    }
};

}  // namespace
}  // namespace plait
