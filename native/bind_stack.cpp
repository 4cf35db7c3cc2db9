// Matrices that are sums of blocks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "stack.h"
#include "threads.h"

namespace plait {

using namespace nb::literals;

namespace {

// The matrix, and the arrays that it reads.
struct BoundStack : StackMatrix {
    using StackMatrix::StackMatrix;
    std::vector<ConstArray> arrays;
};

void hold(BoundStack& self, std::vector<ConstArray> blocks) {
    std::vector<const uint8_t*> bytes;
    if (blocks.empty()) refuse("A stack needs at least one block.");
    for (const ConstArray& block : blocks) {
        check_type<uint8_t>(block, "a block", "uint8");
        check_shape(block, "a block", {self.block_bytes()});
        const auto* data = static_cast<const uint8_t*>(block.data());
        if (reinterpret_cast<uintptr_t>(data) % 2 != 0) refuse("A block must lie at an even address.");
        bytes.push_back(data);
    }
    self.hold(std::move(bytes));
    self.arrays = std::move(blocks);
}

void make_stack(BoundStack* self, int64_t rows, int64_t columns, int64_t rank, std::vector<ConstArray> blocks) {
    if (rows < 0 || columns < kBlock || columns % kBlock != 0) refuse("A stack needs a multiple of 32 columns.");
    if (rank < 1 || rank > kMaxStackRank) refuse("The rank of a stack must be from 1 to 16.");
    new (self) BoundStack(rows, columns, rank);
    hold(*self, std::move(blocks));
}

void stack_exact(const BoundStack& matrix, const ConstArray& x, const Array& y) {
    const StackView& w = matrix.stack();
    const ProductRows of(x, y, w.columns, w.rows);
    nb::gil_scoped_release free;
    Pool::get().run([&](Team& team) {
        std::vector<float> tile(size_t(kTile * w.columns));
        team.share(matrix.view().tiles, 1, [&](int64_t begin, int64_t end) {
            alignas(64) float out[kRowChunk * kTile];
            for (int64_t t = begin; t < end; ++t) {
                const int64_t count = std::min<int64_t>(kTile, w.rows - t * kTile);
                kernels().stack_rows(w, t, tile.data());
                for (int64_t row = 0; row < of.rows;) {
                    const int taken = chunk_rows(of.rows - row);
                    kernels().made_exact(tile.data(), w.columns, of.x + row * of.ldx, of.ldx, taken, out);
                    for (int m = 0; m < taken; ++m)
                        std::copy_n(out + m * kTile, count, of.y + (row + m) * of.ldy + t * kTile);
                    row += taken;
                }
            }
        });
    }, (0.5 * double(of.rows) + double(w.count)) * double(w.rows) * double(w.columns));
}

}  // namespace

void bind_stack(nb::module_& m) {
    nb::class_<BoundStack, PackedMatrix>(m, "StackMatrix")
        .def("__init__", &make_stack, "rows"_a, "columns"_a, "rank"_a, "blocks"_a)
        .def("hold", &hold, "blocks"_a);
    m.def("stack_exact", &stack_exact, "matrix"_a, "x"_a, "y"_a);
}

}  // namespace plait
