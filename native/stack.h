// A matrix that is a sum of blocks, each an array of Python, borrowed; how many there are may change between passes.
#pragma once

#include <cstdint>
#include <vector>

#include "packed.h"

namespace plait {

class StackMatrix : public PackedMatrix {
public:
    StackMatrix(int64_t rows, int64_t columns, int64_t rank);

    // Bytes of one block.
    int64_t block_bytes() const;
    // Be the sum of these, each `block_bytes` long and at an even address. Not while a product is computed.
    void hold(std::vector<const uint8_t*> blocks);

    int64_t nbytes() const override { return 0; }  // nothing of its own
    void unpack_row(int64_t row, float* out) const override;
    const StackView& stack() const { return stack_; }

private:
    StackView stack_{};
    std::vector<const uint8_t*> blocks_;
};

}  // namespace plait
