#include "linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace plait {
namespace {

// Rows that pass all tiles of a piece before the next ones: their codes stay in the second-level cache.
constexpr int64_t kRowsAtOnce = 128;
static_assert(kRowsAtOnce % kRowChunk == 0, "whole chunks of rows pass at once");

// Blocks that are asked for beforehand: some tens of kilobytes, which the second-level cache has room for.
constexpr int64_t kBlocksAsked = 160;

// Which part holds tile `tile`.
const Part& part_of(const Projection& projection, int64_t& tile) {
    size_t index = 0;
    while (tile >= projection.parts[index].num_tiles) tile -= projection.parts[index++].num_tiles;
    return projection.parts[index];
}

// A tile of a stack is made in fp32 once for all rows that meet it.
void multiply_stack(const StackView& stack, int64_t tile, const QuantizedRows& x, int64_t first, int64_t last, float* out) {
    thread_local Buffer room;
    const size_t bytes = size_t(kTile * stack.columns) * sizeof(float);
    if (room.size() < bytes) room = Buffer(bytes);
    float* made = reinterpret_cast<float*>(room.data());
    kernels().stack_rows(stack, tile, made);
    for (int64_t row = first; row < last;) {
        const int rows = chunk_rows(x.rows - row);
        kernels().made_tile(made, stack.columns, x.codes_of(row, 0, rows), x.blocks_of(row, 0, rows), rows,
                            out + (row - first) * kTile);
        row += rows;
    }
}

// A tile times rows [first, last), with bias: out[row - first][16].
void multiply(const Projection& projection, int64_t tile, const QuantizedRows& x, int64_t first, int64_t last, float* out) {
    const Part& part = part_of(projection, tile);
    const int64_t at_tile = part.first_tile + tile;
    if (part.matrix->stack != nullptr) multiply_stack(*part.matrix->stack, at_tile, x, first, last, out);
    else if (part.matrix->grid != nullptr) kernels().grid_tile(*part.matrix->grid, at_tile, x, first, last, out);
    else kernels().packed_tile(*part.matrix, at_tile, x, first, last, out);
    if (projection.bias == nullptr) return;
    const int64_t at = part.out + tile * kTile, count = std::min<int64_t>(kTile, part.num_outputs - tile * kTile);
    for (int64_t m = 0; m < last - first; ++m)
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
    return {view().codes_of(start, block, size), view().blocks_of(start, block, size), int(row - start), size};
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

void Projection::ask(int64_t begin, int64_t end) const {
    if (begin >= end) return;
    const Part& part = part_of(*this, begin);
    const PackedView& w = *part.matrix;
    if (w.grid != nullptr || w.stack != nullptr) return;
    const int64_t num_blocks = std::min(w.columns / kBlock * (end - begin), kBlocksAsked);
    const int64_t first = (part.first_tile + begin) * (w.columns / kBlock);
    for (int64_t at = 0; at < num_blocks * w.code_bytes; at += 64) __builtin_prefetch(w.codes + first * w.code_bytes + at, 0, 2);
    for (int64_t at = 0; at < num_blocks * w.parameter_bytes; at += 64)
        __builtin_prefetch(w.parameters + first * w.parameter_bytes + at, 0, 2);
}

void Projection::run(const Activations& x, int64_t begin, int64_t end, float* y, int64_t ldy, bool is_sum) const {
    alignas(64) float out[kRowsAtOnce * kTile];
    const QuantizedRows rows = x.view();
    for (int64_t first = 0; first < rows.rows; first += kRowsAtOnce) {
        const int64_t last = std::min(first + kRowsAtOnce, rows.rows);
        for (int64_t t = begin; t < end; ++t) {
            int64_t tile = t;
            const Part& part = part_of(*this, tile);
            const int64_t at = part.out + tile * kTile;
            const int64_t count = std::min<int64_t>(kTile, part.num_outputs - tile * kTile);
            multiply(*this, t, rows, first, last, out);
            for (int64_t row = first; row < last; ++row) {
                float* to = y + row * ldy + at;
                const float* from = out + (row - first) * kTile;
                if (is_sum) {
                    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
                } else {
                    std::memcpy(to, from, size_t(count) * sizeof(float));
                }
            }
        }
    }
}

void Gate::run(const Activations& x, int64_t begin, int64_t end, const Activations& h, const GateRow* adapted) const {
    const Kernels& k = kernels();
    alignas(64) float opened[kRowsAtOnce * kTile], carried[kRowsAtOnce * kTile], block[kRowsAtOnce * kBlock];
    const QuantizedRows rows = x.view();
    const bool is_gated = !gate.parts.empty();
    for (int64_t first = 0; first < rows.rows; first += kRowsAtOnce) {
        const int64_t last = std::min(first + kRowsAtOnce, rows.rows);
        for (int64_t b = begin; b < end; ++b) {
            for (int half = 0; half < 2; ++half) {
                multiply(up, 2 * b + half, rows, first, last, carried);
                if (is_gated) multiply(gate, 2 * b + half, rows, first, last, opened);
                for (int64_t m = 0; adapted != nullptr && m < last - first; ++m) {
                    const GateRow& of = adapted[first + m];
                    const int64_t at = (2 * b + half) * kTile;
                    change(of.up_scale, of.up_added, at, carried + m * kTile);
                    if (is_gated) change(of.gate_scale, of.gate_added, at, opened + m * kTile);
                }
                for (int64_t m = 0; m < last - first; ++m)
                    k.activate(activation, (is_gated ? opened : carried) + m * kTile,
                               is_gated ? carried + m * kTile : nullptr, kTile, block + m * kBlock + half * kTile);
            }
            for (int64_t m = 0; adapted != nullptr && m < last - first; ++m) {
                const GateRow& of = adapted[first + m];
                float* own = block + m * kBlock;
                if (of.input_scale != nullptr) k.multiply(own, of.input_scale + b * kBlock, kBlock, own);
                if (of.kept != nullptr) std::memcpy(of.kept + b * kBlock, own, kBlock * sizeof(float));
            }
            for (int64_t row = first; row < last; ++row) {
                const Activations::Place at = h.place(row, b);
                k.quantize_row(block + (row - first) * kBlock, 1, at.row, at.rows, at.codes, at.blocks);
            }
        }
    }
}

}  // namespace plait
