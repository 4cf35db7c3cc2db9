// Matrices of vector codes: rows are made in fp32, and multiplied as dense ones.
//
// A run of 8 columns is half a vector, so a look-up in tables of products of the activations with all entries would
// not save more than the tables cost: a row's product takes one load and one add an entry either way.
#pragma once

#include "half.h"
#include "kernels.h"

namespace plait {
namespace {

template <class S>
struct Additive {
    using F = typename S::F;

    // Sixteen numbers of the runs whose codes start at `codes`, `at` columns into the first of them.
    template <int Width>
    static F sixteen(const uint16_t* book, const uint8_t* codes, int64_t books, int64_t width, int64_t at) {
        if constexpr (Width == 4)
            return S::load_quarters(book + 4 * codes[0], book + 4 * codes[books], book + 4 * codes[2 * books],
                                    book + 4 * codes[3 * books]);
        else if constexpr (Width == 8)
            return S::load_halves(book + 8 * codes[0], book + 8 * codes[books]);
        else
            return S::load(book + width * codes[0] + at, false);
    }

    // Runs of 4 or 8 columns, or (Width 16) of any multiple of 16. `Books` is their number, or 0 where it is another.
    template <int Width, int Books>
    static void whole_row(const AdditiveView& w, const uint8_t* codes, float scale, float* out) {
        const int64_t books = Books > 0 ? Books : w.books, width = Width < kLanes ? Width : w.width;
        const int64_t step = kEntries * width, runs = Width < kLanes ? kLanes / Width : 1;
        const F factor = S::set1(scale);
        for (int64_t c = 0; c < w.columns; codes += runs * books)
            for (int64_t at = 0; at < width * runs; at += kLanes, c += kLanes) {
                F sum = sixteen<Width>(w.entries, codes, books, width, at);
                for (int64_t b = 1; b < books; ++b)
                    sum = S::add(sum, sixteen<Width>(w.entries + b * step, codes + b, books, width, at));
                S::store(out + c, S::mul(sum, factor));
            }
    }

    template <int Width>
    static void whole_row(const AdditiveView& w, const uint8_t* codes, float scale, float* out) {
        switch (w.books) {
            case 1: return whole_row<Width, 1>(w, codes, scale, out);
            case 2: return whole_row<Width, 2>(w, codes, scale, out);
            default: whole_row<Width, 0>(w, codes, scale, out);
        }
    }

    static void odd_row(const AdditiveView& w, const uint8_t* codes, float scale, float* out) {
        const int64_t step = kEntries * w.width;
        for (int64_t c = 0; c < w.columns; c += w.width, codes += w.books)
            for (int64_t i = 0; i < w.width; ++i) {
                float sum = fp16_to_float(w.entries[w.width * codes[0] + i]);
                for (int64_t b = 1; b < w.books; ++b) sum += fp16_to_float(w.entries[b * step + w.width * codes[b] + i]);
                out[c + i] = sum * scale;
            }
    }

    static void additive_rows(const AdditiveView& w, int64_t first, int64_t count, float* out) {
        const int64_t row_bytes = w.columns / w.width * w.books;
        for (int64_t row = first; row < first + count; ++row, out += w.columns) {
            const uint8_t* codes = w.codes + row * row_bytes;
            const float scale = fp16_to_float(w.scales[row]);
            if (w.width == 8) whole_row<8>(w, codes, scale, out);
            else if (w.width == 4) whole_row<4>(w, codes, scale, out);
            else if (w.width % kLanes == 0) whole_row<kLanes>(w, codes, scale, out);
            else odd_row(w, codes, scale, out);
        }
    }
};

}  // namespace
}  // namespace plait
