// A matrix of vector codes that is multiplied where it lies: tensors of Python, borrowed.
#pragma once

#include <cstdint>

#include "packed.h"

namespace plait {

// Rows that are in fp32 at once: as many as a dense product takes together, so that they stay in the first-level cache.
constexpr int64_t kMadeRows = 4;

class AdditiveMatrix : public PackedMatrix {
public:
    // `codes` points at arrays that outlive this matrix, each as long as the shape says.
    explicit AdditiveMatrix(const AdditiveView& codes);

    int64_t nbytes() const override { return 0; }  // nothing of its own
    void unpack_row(int64_t row, float* out) const override;
    const AdditiveView& codes() const { return codes_; }

private:
    AdditiveView codes_;
};

// y[m][r - begin] = x[m] . w[r] for output rows [begin, end), in fp32; `room` holds kMadeRows rows of w.
void multiply_additive(const AdditiveView& w, int64_t begin, int64_t end, const float* x, int64_t ldx, int64_t rows,
                       float* y, int64_t ldy, float* room);

}  // namespace plait
