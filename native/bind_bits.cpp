// Products of numbers that are -1 or 1, as bits: sums are counts of bits that differ, exact in any order.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <limits>
#include <optional>

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

// Rows of numbers (N, C) to words (N, ceil(C / 64)).
void sign_words(const ConstArray& x, const std::optional<ConstArray>& shift, const Array& words) {
    check_fp32(x, "x");
    check_shape(x, "x", {-1, -1});
    check_type<int64_t>(words, "words", "int64");
    const int64_t rows = int64_t(x.shape(0)), columns = int64_t(x.shape(1)), ldx = stride_of(x, 0);
    const int64_t count = (columns + kWord - 1) / kWord;
    check_shape(words, "words", {rows, count});
    check_contiguous(words, "words");
    if (shift) {
        check_fp32(*shift, "shift");
        check_shape(*shift, "shift", {columns});
    }
    const float* by = shift ? floats(*shift) : nullptr;
    auto* to = static_cast<uint64_t*>(words.data());
    nb::gil_scoped_release free;
    Pool::get().run([&](Team& team) {
        team.share(rows, 64, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                for (int64_t w = 0; w < count; ++w)
                    to[row * count + w] = kernels().negative_bits(
                        floats(x) + row * ldx + w * kWord, by == nullptr ? nullptr : by + w * kWord,
                        int(std::min(kWord, columns - w * kWord)));
        });
    }, double(rows) * double(columns));
}

// y[n][o] = scales[o] * (columns - 2 * differing bits of x[n] and row o); weight is [tile][word][16 rows].
void binary_product(const ConstArray& weight, const ConstArray& x, int64_t columns, const ConstArray& scales,
                    const Array& y) {
    check_type<int64_t>(weight, "weight", "int64");
    check_type<int64_t>(x, "x", "int64");
    check_shape(x, "x", {-1, -1});
    check_contiguous(x, "x");
    check_fp32(scales, "scales");
    check_shape(scales, "scales", {-1});
    const int64_t rows = int64_t(x.shape(0)), words = int64_t(x.shape(1)), outputs = int64_t(scales.shape(0));
    const int64_t tiles = (outputs + kTile - 1) / kTile;
    check_shape(weight, "weight", {tiles, words, kTile});
    check_contiguous(weight, "weight");
    check_fp32(y, "y");
    check_shape(y, "y", {rows, outputs});
    if (columns < 0 || columns > words * kWord || words > std::numeric_limits<int32_t>::max() / kWord)
        refuse("There cannot be more columns than bits, nor more bits than 32 bits count.");
    const int64_t ldy = stride_of(y, 0);
    const auto* tile_words = static_cast<const uint64_t*>(weight.data());
    const auto* row_words = static_cast<const uint64_t*>(x.data());
    nb::gil_scoped_release free;
    Pool::get().run([&](Team& team) {
        team.share(tiles, 4, [&](int64_t begin, int64_t end) {
            int32_t differing[kTile];
            for (int64_t t = begin; t < end; ++t) {
                const int64_t count = std::min<int64_t>(kTile, outputs - t * kTile);
                for (int64_t row = 0; row < rows; ++row) {
                    kernels().differing_bits(tile_words + t * words * kTile, row_words + row * words, words, differing);
                    float* to = floats_out(y) + row * ldy + t * kTile;
                    for (int64_t r = 0; r < count; ++r)
                        to[r] = floats(scales)[t * kTile + r] * float(columns - 2 * int64_t(differing[r]));
                }
            }
        });
    }, double(rows) * double(outputs) * double(words * kWord) / kBitsOfOne);
}

}  // namespace

void bind_bits(nb::module_& m) {
    m.def("sign_words", &sign_words, "x"_a, "shift"_a.none(), "words"_a);
    m.def("binary_product", &binary_product, "weight"_a, "x"_a, "columns"_a, "scales"_a, "y"_a);
}

}  // namespace plait
