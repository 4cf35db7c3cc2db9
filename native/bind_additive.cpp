// Matrices of vector codes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <vector>

#include "additive.h"
#include "arrays.h"
#include "bindings.h"
#include "threads.h"

namespace plait {

using namespace nb::literals;

namespace {

// Rows of activations that pass a tile together: they stay in the second-level cache.
constexpr int64_t kRowsAtOnce = 64;

// The matrix, and the arrays that it reads.
struct BoundAdditive : AdditiveMatrix {
    BoundAdditive(const AdditiveView& codes, std::vector<ConstArray> arrays)
        : AdditiveMatrix(codes), arrays_(std::move(arrays)) {}

private:
    std::vector<ConstArray> arrays_;
};

const uint16_t* halves_of(const ConstArray& array, const char* name) {
    if (number_of(array, name) != Number::fp16) refuse(std::string(name) + " must be float16.");
    check_contiguous(array, name);
    if (reinterpret_cast<uintptr_t>(array.data()) % 2 != 0) refuse(std::string(name) + " must lie at an even address.");
    return static_cast<const uint16_t*>(array.data());
}

void make_additive(BoundAdditive* self, int64_t rows, int64_t columns, const ConstArray& codes, const ConstArray& books,
                   const ConstArray& scales) {
    if (rows < 0 || columns < kBlock || columns % kBlock != 0) refuse("A matrix of vector codes needs a multiple of 32 columns.");
    check_shape(books, "books", {-1, kEntries, -1});
    const int64_t count = int64_t(books.shape(0)), width = int64_t(books.shape(2));
    if (count < 1 || width < 1 || columns % width != 0) refuse("books must have entries that cut the columns into runs.");
    check_type<uint8_t>(codes, "codes", "uint8");
    check_shape(codes, "codes", {rows, columns / width, count});
    check_contiguous(codes, "codes");
    check_shape(scales, "scales", {rows});
    new (self) BoundAdditive({rows, columns, width, count, static_cast<const uint8_t*>(codes.data()),
                              halves_of(books, "books"), halves_of(scales, "scales")},
                             {codes, books, scales});
}

void additive_exact(const BoundAdditive& matrix, const ConstArray& x, const Array& y) {
    const AdditiveView& w = matrix.codes();
    const ProductRows of(x, y, w.columns, w.rows);
    nb::gil_scoped_release free;
    Pool::get().run([&](Team& team) {
        std::vector<float> room(size_t(kMadeRows * w.columns));
        team.share(matrix.view().tiles, of.rows >= 32 ? 1 : 4, [&](int64_t begin, int64_t end) {
            const int64_t first = begin * kTile, last = std::min(end * kTile, w.rows);
            for (int64_t row = 0; row < of.rows; row += kRowsAtOnce)
                multiply_additive(w, first, last, of.x + row * of.ldx, of.ldx, std::min(kRowsAtOnce, of.rows - row),
                                  of.y + row * of.ldy + first, of.ldy, room.data());
        });
    }, (0.3 * double(of.rows) + 0.5 * double(w.books)) * double(w.rows) * double(w.columns));
}

}  // namespace

void bind_additive(nb::module_& m) {
    nb::class_<BoundAdditive, PackedMatrix>(m, "AdditiveMatrix")
        .def("__init__", &make_additive, "rows"_a, "columns"_a, "codes"_a, "books"_a, "scales"_a);
    m.def("additive_exact", &additive_exact, "matrix"_a, "x"_a, "y"_a);
}

}  // namespace plait
