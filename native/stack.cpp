#include "stack.h"

#include <utility>

namespace plait {

StackMatrix::StackMatrix(int64_t rows, int64_t columns, int64_t rank) {
    stack_.rows = view_.rows = rows;
    stack_.columns = view_.columns = columns;
    stack_.rank = rank;
    view_.tiles = (rows + kTile - 1) / kTile;
    view_.stack = &stack_;
}

int64_t StackMatrix::block_bytes() const {
    return view_.tiles * (2 * view_.columns + 2 * kTile * stack_.rank) + 2 * view_.columns * stack_.rank;
}

void StackMatrix::hold(std::vector<const uint8_t*> blocks) {
    blocks_ = std::move(blocks);
    stack_.blocks = blocks_.data();
    stack_.count = int64_t(blocks_.size());
}

void StackMatrix::unpack_row(int64_t row, float* out) const {
    std::vector<float> tile(size_t(kTile * view_.columns));
    kernels().stack_rows(stack_, row / kTile, tile.data());
    for (int64_t c = 0; c < view_.columns; ++c) out[c] = tile[size_t(c * kTile + row % kTile)];
}

}  // namespace plait
