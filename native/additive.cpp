#include "additive.h"

#include <algorithm>

namespace plait {

AdditiveMatrix::AdditiveMatrix(const AdditiveView& codes) : codes_(codes) {
    view_.rows = codes.rows;
    view_.columns = codes.columns;
    view_.tiles = (codes.rows + kTile - 1) / kTile;
    view_.additive = &codes_;
}

void AdditiveMatrix::unpack_row(int64_t row, float* out) const { kernels().additive_rows(codes_, row, 1, out); }

void multiply_additive(const AdditiveView& w, int64_t begin, int64_t end, const float* x, int64_t ldx, int64_t rows,
                       float* y, int64_t ldy, float* room) {
    for (int64_t row = begin; row < end; row += kMadeRows) {
        const int64_t count = std::min(kMadeRows, end - row);
        kernels().additive_rows(w, row, count, room);
        kernels().dense_rows(x, ldx, rows, room, w.columns, Number::fp32, w.columns, 0, count, y + (row - begin), ldy);
    }
}

}  // namespace plait
