// Products of numbers that are -1 or 1, as bits: sums are counts of bits that differ, exact in any order.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <limits>
#include <optional>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "bits.h"
#include "threads.h"

namespace plait {

using namespace nb::literals;

namespace {

// Products of bits that cost about as much as one multiply-add.
constexpr double kBitsOfOne = 8;

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

    double work() const { return double(rows) * double(columns); }

    void take(Team& team, uint64_t* words) const {
        team.share(rows, 64, [&](int64_t begin, int64_t end) { take_signs(x, ldx, shift, columns, begin, end, words); });
    }
};

// The matrix, and the arrays that it reads.
class BitMatrix {
public:
    BitMatrix(const ConstArray& weight, int64_t columns, const ConstArray& scales) : arrays_{weight, scales} {
        check_fp32(scales, "scales");
        check_shape(scales, "scales", {-1});
        check_contiguous(scales, "scales");
        const int64_t outputs = int64_t(scales.shape(0));
        check_type<int64_t>(weight, "weight", "int64");
        check_shape(weight, "weight", {(outputs + kTile - 1) / kTile, -1, kTile});
        check_contiguous(weight, "weight");
        // Each place of a window has whole words, so that there may be more bits than columns.
        const int64_t words = int64_t(weight.shape(1));
        if (columns < 0 || columns > words * kWord || words > std::numeric_limits<int32_t>::max() / kWord)
            refuse("There cannot be more columns than bits, nor more bits than 32 bits count.");
        view_ = {outputs, words, columns, words_in(weight), floats(scales)};
    }

    const BitView& view() const { return view_; }
    double work(int64_t rows) const { return double(rows) * double(view_.outputs) * double(view_.words * kWord) / kBitsOfOne; }

    void multiply(Team& team, const uint64_t* x, int64_t rows, float* y, int64_t ldy) const {
        team.share((view_.outputs + kTile - 1) / kTile, 4,
                   [&](int64_t begin, int64_t end) { multiply_bits(view_, begin, end, x, rows, y, ldy); });
    }

private:
    BitView view_;
    std::vector<ConstArray> arrays_;
};

// Where the product of some rows goes.
struct Outputs {
    float* y;
    int64_t ldy;

    Outputs(const Array& to, int64_t rows, const BitMatrix& matrix) {
        check_fp32(to, "y");
        check_shape(to, "y", {rows, matrix.view().outputs});
        y = floats_out(to);
        ldy = stride_of(to, 0);
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
    Pool::get().run([&](Team& team) { from.take(team, to); }, from.work());
}

void multiply_words(const BitMatrix& matrix, const ConstArray& x, const Array& y) {
    check_type<int64_t>(x, "x", "int64");
    check_shape(x, "x", {-1, matrix.view().words});
    check_contiguous(x, "x");
    const int64_t rows = int64_t(x.shape(0));
    const Outputs out(y, rows, matrix);
    nb::gil_scoped_release free;
    Pool::get().run([&](Team& team) { matrix.multiply(team, words_in(x), rows, out.y, out.ldy); }, matrix.work(rows));
}

// Both at once.
void multiply_signs(const BitMatrix& matrix, const ConstArray& x, const std::optional<ConstArray>& shift, const Array& y) {
    const Signed from(x, shift);
    if (from.columns != matrix.view().columns || words_of(from.columns) != matrix.view().words)
        refuse("The rows must have as many numbers as the matrix has columns, in whole words.");
    const Outputs out(y, from.rows, matrix);
    nb::gil_scoped_release free;
    std::vector<uint64_t> words(size_t(from.rows * matrix.view().words));
    Pool::get().run([&](Team& team) {
        from.take(team, words.data());
        matrix.multiply(team, words.data(), from.rows, out.y, out.ldy);
    }, matrix.work(from.rows) + from.work());
}

}  // namespace

void bind_bits(nb::module_& m) {
    m.def("sign_words", &sign_words, "x"_a, "shift"_a.none(), "words"_a);
    nb::class_<BitMatrix>(m, "BitMatrix")
        .def(nb::init<const ConstArray&, int64_t, const ConstArray&>(), "weight"_a, "columns"_a, "scales"_a)
        .def("product", &multiply_words, "x"_a, "y"_a)
        .def("linear", &multiply_signs, "x"_a, "shift"_a.none(), "y"_a);
}

}  // namespace plait
