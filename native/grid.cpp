#include "grid.h"

#include <cstring>

#include "half.h"

namespace plait {
namespace {

float half_at(const uint8_t* base, int64_t index) {
    uint16_t half;
    std::memcpy(&half, base + 2 * index, 2);
    return fp16_to_float(half);
}

// The code of lane r and column c of a block; see plait/weights/tiles.py.
int code_at(const uint8_t* block, int bits, int r, int c) {
    const int group = c / 4, byte = 4 * r + c % 4;
    if (bits == 8) return block[64 * group + byte];
    if (bits == 4) return (block[64 * (group / 2) + byte] >> (4 * (group & 1))) & 15;
    const int low = (block[64 * (group / 4) + byte] >> (2 * (group & 3))) & 3;
    return bits == 2 ? low : low | ((block[128 + byte] >> group) & 1) << 2;
}

}  // namespace

GridMatrix::GridMatrix(const GridView& grid) : grid_(grid) {
    view_.rows = grid.rows;
    view_.columns = grid.columns;
    view_.tiles = (grid.rows + kTile - 1) / kTile;
    view_.grid = &grid_;
}

void GridMatrix::unpack_row(int64_t row, float* out) const {
    const GridView& w = grid_;
    const int64_t tile = row / kTile, r = row % kTile, num_blocks = w.columns / kBlock;
    const int last = (1 << w.bits) - 1;
    for (int64_t column = 0; column < w.columns; ++column) {
        const int64_t group = tile * w.groups + column / w.group, at = group * kTile + r;
        const int code = code_at(w.codes + (tile * num_blocks + column / kBlock) * 64 * w.bits, w.bits, int(r), int(column % kBlock));
        float value;
        if (w.low_scales != nullptr) {
            out[column] = (code & 2 ? half_at(w.scales, at) : 0.0f) + (code & 1 ? half_at(w.low_scales, at) : 0.0f);
            continue;
        }
        if (w.is_table) {
            int u = entry_of(w, code);
            if (w.types != nullptr && code == last) u = w.specials[(w.types[4 * group + r / 4] >> (2 * (r % 4))) & 3] & 255;
            value = float(u - w.offset);
        } else {
            value = float(code) - (w.zeros != nullptr ? half_at(w.zeros, at) : float(1 << (w.bits - 1)));
        }
        if (w.row_scales != nullptr) {
            value *= float(w.scales[at]);
            value *= w.row_scales[tile * kTile + r];
        } else {
            value *= half_at(w.scales, at);
        }
        out[column] = value;
    }
}

}  // namespace plait
