// Matrices of low-bit codes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "grid.h"
#include "threads.h"

namespace plait {

using namespace nb::literals;

namespace {

using Half = std::optional<ConstArray>;

// The matrix, and the arrays that it reads.
struct BoundGrid : GridMatrix {
    BoundGrid(const GridView& grid, std::vector<ConstArray> arrays) : GridMatrix(grid), arrays_(std::move(arrays)) {}

private:
    std::vector<ConstArray> arrays_;
};

const uint8_t* bytes_of(const ConstArray& array) { return static_cast<const uint8_t*>(array.data()); }

void make_grid(BoundGrid* self, int64_t rows, int64_t columns, int bits, int64_t group, const ConstArray& codes,
               const ConstArray& scales, const Half& zeros, const Half& types, const Half& row_scales,
               const std::vector<int>& values, const std::vector<int>& specials, const Half& low_scales) {
    if (rows < 0 || columns < kBlock || columns % kBlock != 0) refuse("A grid matrix needs a multiple of 32 columns.");
    if (bits != 2 && bits != 3 && bits != 4 && bits != 8) refuse("A grid matrix has codes of 2, 3, 4 or 8 bits.");
    if (group < kBlock || (group % kBlock != 0 && group < columns)) refuse("A group must be a multiple of 32 columns.");
    const bool is_table = !values.empty();
    if (is_table && ((bits != 3 && bits != 4) || values.size() != size_t(1 << bits)))
        refuse("A table must have one value for each code of 3 or 4 bits.");
    if (specials.size() != (types ? 4u : 0u) || (types && !is_table)) refuse("A table with types must have four special values.");
    if (is_table && zeros) refuse("A table has no zeros.");
    if (low_scales && (bits != 2 || is_table || zeros || row_scales)) refuse("Only codes of 2 bits have scales of each bit, and nothing else.");
    GridView w{};
    w.rows = rows;
    w.columns = columns;
    w.bits = bits;
    // Beyond the row there is nothing, so a group of any size that covers it is the row in whole blocks.
    w.group = std::min(group, columns);
    w.groups = (columns + w.group - 1) / w.group;
    w.is_table = is_table;
    w.is_wide = std::any_of(values.begin(), values.end(), [](int value) { return value < -kGridOffset || value > kGridOffset; });
    if (w.is_wide && (bits != 4 || types)) refuse("Only a table of 16 values without special ones has values beyond [-16, 16].");
    w.offset = w.is_wide ? kWideOffset : is_table ? kGridOffset : low_scales ? 0 : 1 << (bits - 1);
    const int64_t tiles = (rows + kTile - 1) / kTile;
    std::vector<ConstArray> arrays{codes, scales};
    check_type<uint8_t>(codes, "codes", "uint8");
    check_shape(codes, "codes", {tiles, columns / kBlock, 64 * bits});
    check_contiguous(codes, "codes");
    check_shape(scales, "scales", {tiles, w.groups, kTile});
    check_contiguous(scales, "scales");
    w.codes = bytes_of(codes);
    w.scales = bytes_of(scales);
    if (row_scales) {
        check_type<uint8_t>(scales, "scales", "uint8");
        check_fp32(*row_scales, "row_scales");
        check_shape(*row_scales, "row_scales", {tiles, kTile});
        check_contiguous(*row_scales, "row_scales");
        w.row_scales = floats(*row_scales);
        arrays.push_back(*row_scales);
    } else if (number_of(scales, "scales") != Number::fp16) {
        refuse("scales must be float16.");
    }
    if (zeros) {
        if (number_of(*zeros, "zeros") != Number::fp16) refuse("zeros must be float16.");
        check_shape(*zeros, "zeros", {tiles, w.groups, kTile});
        check_contiguous(*zeros, "zeros");
        w.zeros = bytes_of(*zeros);
        arrays.push_back(*zeros);
    }
    if (low_scales) {
        if (number_of(*low_scales, "low_scales") != Number::fp16) refuse("low_scales must be float16.");
        check_shape(*low_scales, "low_scales", {tiles, w.groups, kTile});
        check_contiguous(*low_scales, "low_scales");
        w.low_scales = bytes_of(*low_scales);
        arrays.push_back(*low_scales);
    }
    if (types) {
        check_type<uint8_t>(*types, "types", "uint8");
        check_shape(*types, "types", {tiles, w.groups, 4});
        check_contiguous(*types, "types");
        w.types = bytes_of(*types);
        arrays.push_back(*types);
    }
    const auto byte_of = [](int value) {
        if (value < -kGridOffset || value > kGridOffset) refuse("Special values of a table must be in [-16, 16].");
        return uint8_t(value + kGridOffset);
    };
    for (size_t i = 0; i < values.size(); ++i) {
        if (values[i] < -kWideOffset || values[i] > kWideOffset) refuse("Values of a table must be in [-2112, 2112].");
        const int entry = values[i] + w.offset;
        w.table[i] = uint8_t(w.is_wide ? entry / kWideBase : entry);
        w.low_table[i] = uint8_t(w.is_wide ? entry % kWideBase : 0);
    }
    // The special byte is joined to the entry of the last code, which must then be empty.
    if (types) w.table[(1 << bits) - 1] = 0;
    for (size_t i = 0; i < specials.size(); ++i) w.specials[i] = 0x01010101u * byte_of(specials[i]);
    new (self) BoundGrid(w, std::move(arrays));
}

void grid_exact(const BoundGrid& matrix, const ConstArray& x, const Array& y) {
    const GridView& w = matrix.grid();
    const ProductRows of(x, y, w.columns, w.rows);
    nb::gil_scoped_release free;
    Pool::get().run([&](Team& team) {
        team.share(matrix.view().tiles, of.rows >= 32 ? 1 : 4, [&](int64_t begin, int64_t end) {
            alignas(64) float out[4 * kTile];
            for (int64_t t = begin; t < end; ++t) {
                const int64_t count = std::min<int64_t>(kTile, w.rows - t * kTile);
                for (int64_t row = 0; row < of.rows;) {
                    const int taken = std::min(4, chunk_rows(of.rows - row));
                    kernels().grid_exact(w, t, of.x + row * of.ldx, of.ldx, taken, out);
                    for (int m = 0; m < taken; ++m)
                        std::copy_n(out + m * kTile, count, of.y + (row + m) * of.ldy + t * kTile);
                    row += taken;
                }
            }
        });
    }, 0.5 * double(of.rows) * double(w.rows) * double(w.columns));
}

}  // namespace

void bind_grid(nb::module_& m) {
    nb::class_<BoundGrid, PackedMatrix>(m, "GridMatrix")
        .def("__init__", &make_grid, "rows"_a, "columns"_a, "bits"_a, "group"_a, "codes"_a, "scales"_a,
             "zeros"_a.none(), "types"_a.none(), "row_scales"_a.none(), "values"_a, "specials"_a,
             "low_scales"_a.none() = nb::none());
    m.def("grid_exact", &grid_exact, "matrix"_a, "x"_a, "y"_a);
}

}  // namespace plait
