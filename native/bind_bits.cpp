// Products of numbers that are -1 or 1, as bits: sums are counts of bits that differ, exact in any order.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "dispatch.h"
#include "threads.h"

namespace plait {

using namespace nb::literals;

namespace {

constexpr int64_t kWord = 64;
// Products of bits that cost about as much as one multiply-add.
constexpr double kBitsOfOne = 8;

int64_t words_of(int64_t columns) { return (columns + kWord - 1) / kWord; }

const uint64_t* words_in(const ConstArray& array) { return static_cast<const uint64_t*>(array.data()); }

// Rows of numbers, ldx apart, whose signs are taken.
struct Signed {
    const float* x;
    const float* shift;  // null for none
    int64_t rows, columns, ldx;

    Signed(const ConstArray& from, const std::optional<ConstArray>& by) {
        check_fp32(from, "x");
        check_shape(from, "x", {-1, -1});
        rows = int64_t(from.shape(0)), columns = int64_t(from.shape(1)), ldx = stride_of(from, 0);
        if (by) {
            check_fp32(*by, "shift");
            check_shape(*by, "shift", {columns});
        }
        x = floats(from);
        shift = by ? floats(*by) : nullptr;
    }

    void take(Team& team, uint64_t* words) const {
        const int64_t count = words_of(columns);
        team.share(rows, 64, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                for (int64_t w = 0; w < count; ++w)
                    words[row * count + w] =
                        kernels().negative_bits(x + row * ldx + w * kWord, shift == nullptr ? nullptr : shift + w * kWord,
                                                int(std::min(kWord, columns - w * kWord)));
        });
    }
};

// y[n][o] = scales[o] * (columns - 2 * differing bits of row n and output o); weight is [tile][word][16 outputs].
struct Product {
    const uint64_t* weight;
    const float* scales;
    float* y;
    int64_t rows, outputs, words, columns, ldy;

    Product(const ConstArray& matrix, int64_t num_rows, int64_t num_words, int64_t num_columns,
            const ConstArray& factors, const Array& to)
        : rows(num_rows), words(num_words), columns(num_columns) {
        check_type<int64_t>(matrix, "weight", "int64");
        check_fp32(factors, "scales");
        check_shape(factors, "scales", {-1});
        outputs = int64_t(factors.shape(0));
        check_shape(matrix, "weight", {(outputs + kTile - 1) / kTile, words, kTile});
        check_contiguous(matrix, "weight");
        check_fp32(to, "y");
        check_shape(to, "y", {rows, outputs});
        if (columns < 0 || columns > words * kWord || words > std::numeric_limits<int32_t>::max() / kWord)
            refuse("There cannot be more columns than bits, nor more bits than 32 bits count.");
        weight = words_in(matrix);
        scales = floats(factors);
        y = floats_out(to);
        ldy = stride_of(to, 0);
    }

    double work() const { return double(rows) * double(outputs) * double(words * kWord) / kBitsOfOne; }

    void compute(Team& team, const uint64_t* x) const {
        team.share((outputs + kTile - 1) / kTile, 4, [&](int64_t begin, int64_t end) {
            int32_t differing[kTile];
            for (int64_t t = begin; t < end; ++t) {
                const int64_t count = std::min<int64_t>(kTile, outputs - t * kTile);
                for (int64_t row = 0; row < rows; ++row) {
                    kernels().differing_bits(weight + t * words * kTile, x + row * words, words, differing);
                    float* to = y + row * ldy + t * kTile;
                    for (int64_t r = 0; r < count; ++r)
                        to[r] = scales[t * kTile + r] * float(columns - 2 * int64_t(differing[r]));
                }
            }
        });
    }
};

// Rows of numbers (N, C) to words (N, ceil(C / 64)).
void sign_words(const ConstArray& x, const std::optional<ConstArray>& shift, const Array& words) {
    const Signed from(x, shift);
    check_type<int64_t>(words, "words", "int64");
    check_shape(words, "words", {from.rows, words_of(from.columns)});
    check_contiguous(words, "words");
    auto* to = static_cast<uint64_t*>(words.data());
    nb::gil_scoped_release free;
    Pool::get().run([&](Team& team) { from.take(team, to); }, double(from.rows) * double(from.columns));
}

void binary_product(const ConstArray& weight, const ConstArray& x, int64_t columns, const ConstArray& scales,
                    const Array& y) {
    check_type<int64_t>(x, "x", "int64");
    check_shape(x, "x", {-1, -1});
    check_contiguous(x, "x");
    const Product product(weight, int64_t(x.shape(0)), int64_t(x.shape(1)), columns, scales, y);
    nb::gil_scoped_release free;
    Pool::get().run([&](Team& team) { product.compute(team, words_in(x)); }, product.work());
}

// Both at once.
void binary_linear(const ConstArray& weight, const ConstArray& x, const std::optional<ConstArray>& shift,
                   const ConstArray& scales, const Array& y) {
    const Signed from(x, shift);
    const int64_t count = words_of(from.columns);
    const Product product(weight, from.rows, count, from.columns, scales, y);
    nb::gil_scoped_release free;
    std::vector<uint64_t> words(size_t(from.rows * count));
    Pool::get().run([&](Team& team) {
        from.take(team, words.data());
        product.compute(team, words.data());
    }, product.work() + double(from.rows) * double(from.columns));
}

}  // namespace

void bind_bits(nb::module_& m) {
    m.def("sign_words", &sign_words, "x"_a, "shift"_a.none(), "words"_a);
    m.def("binary_product", &binary_product, "weight"_a, "x"_a, "columns"_a, "scales"_a, "y"_a);
    m.def("binary_linear", &binary_linear, "weight"_a, "x"_a, "shift"_a.none(), "scales"_a, "y"_a);
}

}  // namespace plait
