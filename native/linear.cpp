#include "linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace plait {
namespace {

// Rows that pass all tiles of a piece before the next ones: their codes stay in the second-level cache.
constexpr int64_t kRowsAtOnce = 256;

// Which part holds tile `tile`.
const Part& part_of(const Projection& projection, int64_t& tile) {
    size_t index = 0;
    while (tile >= projection.parts[index].num_tiles) tile -= projection.parts[index++].num_tiles;
    return projection.parts[index];
}

// A tile times a chunk of rows, with bias: out[row][16].
void multiply(const Projection& projection, int64_t tile, const Activations& x, int64_t row, int rows, float* out) {
    const Part& part = part_of(projection, tile);
    if (part.matrix->grid != nullptr)
        kernels().grid_tile(*part.matrix->grid, part.first_tile + tile, x.codes(row), x.blocks(row), rows, out);
    else
        kernels().packed_tile(*part.matrix, part.first_tile + tile, x.codes(row), x.blocks(row), rows, out);
    if (projection.bias == nullptr) return;
    const int64_t at = part.out + tile * kTile, count = std::min<int64_t>(kTile, part.num_outputs - tile * kTile);
    for (int m = 0; m < rows; ++m)
        for (int64_t i = 0; i < count; ++i) out[m * kTile + i] += projection.bias[at + i];
}

// What an adapter makes of 16 outputs of one row, from output `at` on.
void change(const float* scale, const float* added, int64_t at, float* y) {
    if (scale != nullptr)
        for (int i = 0; i < kTile; ++i) y[i] *= scale[at + i];
    if (added != nullptr)
        for (int i = 0; i < kTile; ++i) y[i] += added[at + i];
}

}  // namespace

void Activations::resize(int64_t rows, int64_t columns) {
    rows_ = rows;
    columns_ = columns;
    const size_t codes = size_t(2 * rows * columns), blocks = size_t(rows * (columns / kBlock)) * sizeof(RowBlock);
    if (codes_.size() < codes) codes_ = Buffer(codes);
    if (blocks_.size() < blocks) blocks_ = Buffer(blocks);
}

Activations::Place Activations::place(int64_t row, int64_t block) const {
    // Chunks of 8 come first; the last rows, fewer than 8, follow in chunks of 4, 2 and 1.
    int64_t start = row / kRowChunk * kRowChunk;
    int size = chunk_rows(rows_ - start);
    while (row >= start + size) {
        start += size;
        size = chunk_rows(rows_ - start);
    }
    const int64_t num_blocks = columns_ / kBlock;
    return {reinterpret_cast<int8_t*>(codes_.data()) + 2 * start * columns_ + block * size * kBlockCodes,
            reinterpret_cast<RowBlock*>(blocks_.data()) + start * num_blocks + block * size, int(row - start), size};
}

void Activations::quantize_row(const float* x, int64_t row) {
    const Place at = place(row, 0);
    kernels().quantize_row(x, columns_ / kBlock, at.row, at.rows, at.codes, at.blocks);
}

void Activations::quantize(const float* x, int64_t ldx, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) quantize_row(x + row * ldx, row);
}

void Projection::add(const PackedView& matrix, int64_t first, int64_t count) {
    if (first % kTile != 0 || first < 0 || count < 0 || first + count > matrix.rows)
        throw std::invalid_argument("A part must start at a multiple of 16 rows and lie within its matrix.");
    if (!parts.empty() && matrix.columns != columns)
        throw std::invalid_argument("All parts of a projection must have the same number of columns.");
    columns = matrix.columns;
    const int64_t tiles = (count + kTile - 1) / kTile;
    parts.push_back({&matrix, first / kTile, tiles, num_outputs, count});
    num_outputs += count;
    num_tiles += tiles;
}

int64_t Projection::grain(int threads, int64_t rows) const {
    // Small pieces even out the threads, large ones cost less to hand out: about 16 for each thread.
    const int64_t pieces = int64_t(threads) * 16;
    const int64_t most = rows >= 32 ? 8 : 64;
    return std::min(most, std::max<int64_t>(1, (num_tiles + pieces - 1) / pieces));
}

void Projection::run(const Activations& x, int64_t begin, int64_t end, float* y, int64_t ldy, bool is_sum) const {
    alignas(64) float out[kRowChunk * kTile];
    for (int64_t first = 0; first < x.rows(); first += kRowsAtOnce) {
        const int64_t last = std::min(first + kRowsAtOnce, x.rows());
        for (int64_t t = begin; t < end; ++t) {
            int64_t tile = t;
            const Part& part = part_of(*this, tile);
            const int64_t at = part.out + tile * kTile;
            const int64_t count = std::min<int64_t>(kTile, part.num_outputs - tile * kTile);
            for (int64_t row = first; row < last;) {
                const int rows = chunk_rows(x.rows() - row);
                multiply(*this, t, x, row, rows, out);
                for (int m = 0; m < rows; ++m) {
                    float* to = y + (row + m) * ldy + at;
                    const float* from = out + m * kTile;
                    if (is_sum) {
                        for (int64_t i = 0; i < count; ++i) to[i] += from[i];
                    } else {
                        std::memcpy(to, from, size_t(count) * sizeof(float));
                    }
                }
                row += rows;
            }
        }
    }
}

void Gate::run(const Activations& x, int64_t begin, int64_t end, const Activations& h, const GateRow* adapted) const {
    const Kernels& k = kernels();
    alignas(64) float opened[kRowChunk * kTile], carried[kRowChunk * kTile], block[kRowChunk * kBlock];
    for (int64_t first = 0; first < x.rows(); first += kRowsAtOnce) {
        const int64_t last = std::min(first + kRowsAtOnce, x.rows());
        for (int64_t b = begin; b < end; ++b) {
            for (int64_t row = first; row < last;) {
                const int rows = chunk_rows(x.rows() - row);
                for (int half = 0; half < 2; ++half) {
                    multiply(up, 2 * b + half, x, row, rows, carried);
                    const bool is_gated = !gate.parts.empty();
                    if (is_gated) multiply(gate, 2 * b + half, x, row, rows, opened);
                    for (int m = 0; adapted != nullptr && m < rows; ++m) {
                        const GateRow& of = adapted[row + m];
                        const int64_t at = (2 * b + half) * kTile;
                        change(of.up_scale, of.up_added, at, carried + m * kTile);
                        if (is_gated) change(of.gate_scale, of.gate_added, at, opened + m * kTile);
                    }
                    for (int m = 0; m < rows; ++m)
                        k.activate(activation, (is_gated ? opened : carried) + m * kTile,
                                   is_gated ? carried + m * kTile : nullptr, kTile, block + m * kBlock + half * kTile);
                }
                for (int m = 0; adapted != nullptr && m < rows; ++m) {
                    const GateRow& of = adapted[row + m];
                    float* own = block + m * kBlock;
                    if (of.input_scale != nullptr) k.multiply(own, of.input_scale + b * kBlock, kBlock, own);
                    if (of.kept != nullptr) std::memcpy(of.kept + b * kBlock, own, kBlock * sizeof(float));
                }
                for (int m = 0; m < rows; ++m) {
                    const Activations::Place at = h.place(row + m, b);
                    k.quantize_row(block + m * kBlock, 1, at.row, at.rows, at.codes, at.blocks);
                }
                row += rows;
            }
        }
    }
}

}  // namespace plait
