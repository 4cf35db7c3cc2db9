// A matrix of bits that stand for -1 and 1, with a scale for each row: tensors of Python, borrowed.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace plait {

constexpr int64_t kWord = 64;

inline int64_t words_of(int64_t columns) { return (columns + kWord - 1) / kWord; }

struct BitView {
    int64_t outputs, words, columns;  // columns: how many of the bits of `words` count
    const uint64_t* weight;           // [tile][word][16 outputs]
    const float* scales;
};

// Words of rows [begin, end) whose numbers, plus a shift where there is one, are below 0: [row][word].
void take_signs(const float* x, int64_t ldx, const float* shift, int64_t columns, int64_t begin, int64_t end, uint64_t* words);

// y[n][o] = scales[o] * (columns - 2 * differing bits of row n and output o) for tiles [begin, end) of outputs.
void multiply_bits(const BitView& w, int64_t begin, int64_t end, const uint64_t* x, int64_t rows, float* y, int64_t ldy);

}  // namespace plait
