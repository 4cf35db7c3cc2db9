// A matrix of low-bit codes that is multiplied where it lies: tensors of Python, borrowed.
#pragma once

#include <cstdint>

#include "packed.h"

namespace plait {

class GridMatrix : public PackedMatrix {
public:
    // `grid` points at arrays that outlive this matrix, each as long as the shape says.
    explicit GridMatrix(const GridView& grid);

    int64_t nbytes() const override { return 0; }  // nothing of its own
    void unpack_row(int64_t row, float* out) const override;
    const GridView& grid() const { return grid_; }

private:
    GridView grid_;
};

}  // namespace plait
