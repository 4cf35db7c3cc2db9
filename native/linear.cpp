#include "linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "additive.h"

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

float* room_of(Buffer& buffer, int64_t numbers) {
    const size_t bytes = size_t(numbers) * sizeof(float);
    if (buffer.size() < bytes) buffer = Buffer(bytes);
    return reinterpret_cast<float*>(buffer.data());
}

// Rows [first, last) of activations, whole chunks, as they were quantised; in fp32 for those matrices that are made in fp32.
class Rows {
public:
    Rows(const QuantizedRows& x, int64_t first, int64_t last) : x(x), first(first), last(last) {}

    const QuantizedRows& x;
    const int64_t first, last;

    // [row - first][column], made when it is first asked for; until another is made on this thread.
    const float* plain() {
        if (plain_ != nullptr) return plain_;
        thread_local Buffer room;
        float* made = room_of(room, (last - first) * x.columns);
        for (int64_t row = first; row < last;) {
            const int rows = chunk_rows(x.rows - row);
            kernels().dequantize_chunk(x.codes_of(row, 0, rows), x.blocks_of(row, 0, rows), rows, x.columns / kBlock,
                                       made + (row - first) * x.columns);
            row += rows;
        }
        return plain_ = made;
    }

private:
    const float* plain_ = nullptr;
};

// A tile of a stack is made in fp32 once for all rows that meet it.
void multiply_stack(const StackView& stack, int64_t tile, Rows& rows, float* out) {
    thread_local Buffer room;
    float* made = room_of(room, kTile * stack.columns);
    kernels().stack_rows(stack, tile, made);
    const float* x = rows.plain();
    for (int64_t row = 0, count = rows.last - rows.first; row < count;) {
        const int taken = chunk_rows(count - row);
        kernels().made_exact(made, stack.columns, x + row * stack.columns, stack.columns, taken, out + row * kTile);
        row += taken;
    }
}

void multiply_vectors(const AdditiveView& w, int64_t tile, Rows& rows, float* out) {
    thread_local Buffer room;
    const int64_t begin = tile * kTile;
    multiply_additive(w, begin, std::min(begin + kTile, w.rows), rows.plain(), w.columns, rows.last - rows.first, out, kTile,
                      room_of(room, kMadeRows * w.columns));
}

// Tiles [tile, tile + count) of one part, at most two, times some rows, with bias: out[tile][row][16].
void multiply(const Projection& projection, const Part& part, int64_t tile, int64_t count, Rows& rows, float* out) {
    const PackedView& w = *part.matrix;
    const int64_t at_tile = part.first_tile + tile, num_rows = rows.last - rows.first;
    const bool is_plain = w.additive == nullptr && w.stack == nullptr && w.grid == nullptr;
    if (is_plain) kernels().packed_tiles(w, at_tile, count, rows.x, rows.first, rows.last, out);
    for (int64_t k = 0; k < count; ++k) {
        float* own = out + k * num_rows * kTile;
        if (w.additive != nullptr) multiply_vectors(*w.additive, at_tile + k, rows, own);
        else if (w.stack != nullptr) multiply_stack(*w.stack, at_tile + k, rows, own);
        else if (w.grid != nullptr) kernels().grid_tile(*w.grid, at_tile + k, rows.x, rows.first, rows.last, own);
        if (projection.bias == nullptr) continue;
        const int64_t first = (tile + k) * kTile, outputs = std::min<int64_t>(kTile, part.num_outputs - first);
        for (int64_t m = 0; m < num_rows; ++m)
            for (int64_t i = 0; i < outputs; ++i) own[m * kTile + i] += projection.bias[part.out + first + i];
    }
}

// Tiles 2 pair and 2 pair + 1 of a projection, which may be of two parts.
void multiply_pair(const Projection& projection, int64_t pair, Rows& rows, float* out) {
    for (int64_t k = 0, taken = 0; k < 2; k += taken) {
        int64_t tile = 2 * pair + k;
        const Part& part = part_of(projection, tile);
        taken = std::min(2 - k, part.num_tiles - tile);
        multiply(projection, part, tile, taken, rows, out + k * (rows.last - rows.first) * kTile);
    }
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
    if (w.grid != nullptr || w.stack != nullptr || w.additive != nullptr) return;
    const int64_t num_blocks = std::min(w.columns / kBlock * (end - begin), kBlocksAsked);
    const int64_t first = (part.first_tile + begin) * (w.columns / kBlock);
    for (int64_t at = 0; at < num_blocks * w.code_bytes; at += 64) __builtin_prefetch(w.codes + first * w.code_bytes + at, 0, 2);
    for (int64_t at = 0; at < num_blocks * w.parameter_bytes; at += 64)
        __builtin_prefetch(w.parameters + first * w.parameter_bytes + at, 0, 2);
}

void Projection::run(const Activations& x, int64_t begin, int64_t end, float* y, int64_t ldy, bool is_sum) const {
    alignas(64) float out[2 * kRowsAtOnce * kTile];
    const QuantizedRows all = x.view();
    for (int64_t first = 0; first < all.rows; first += kRowsAtOnce) {
        const int64_t last = std::min(first + kRowsAtOnce, all.rows);
        Rows rows(all, first, last);
        for (int64_t t = begin, taken = 0; t < end; t += taken) {
            int64_t tile = t;
            const Part& part = part_of(*this, tile);
            taken = std::min<int64_t>({2, end - t, part.num_tiles - tile});
            multiply(*this, part, tile, taken, rows, out);
            for (int64_t k = 0; k < taken; ++k) {
                const int64_t begins = (tile + k) * kTile, count = std::min<int64_t>(kTile, part.num_outputs - begins);
                for (int64_t row = first; row < last; ++row) {
                    float* to = y + row * ldy + part.out + begins;
                    const float* from = out + (k * (last - first) + row - first) * kTile;
                    if (is_sum) {
                        for (int64_t i = 0; i < count; ++i) to[i] += from[i];
                    } else {
                        std::memcpy(to, from, size_t(count) * sizeof(float));
                    }
                }
            }
        }
    }
}

void Gate::run(const Activations& x, int64_t begin, int64_t end, const Activations& h, const GateRow* adapted) const {
    const Kernels& k = kernels();
    alignas(64) float opened[2 * kRowsAtOnce * kTile], carried[2 * kRowsAtOnce * kTile], block[kRowsAtOnce * kBlock];
    const QuantizedRows all = x.view();
    const bool is_gated = !gate.parts.empty();
    for (int64_t first = 0; first < all.rows; first += kRowsAtOnce) {
        const int64_t last = std::min(first + kRowsAtOnce, all.rows);
        Rows rows(all, first, last);
        for (int64_t b = begin; b < end; ++b) {
            multiply_pair(up, b, rows, carried);
            if (is_gated) multiply_pair(gate, b, rows, opened);
            for (int half = 0; half < 2; ++half) {
                float* own_carried = carried + half * (last - first) * kTile;
                float* own_opened = opened + half * (last - first) * kTile;
                for (int64_t m = 0; adapted != nullptr && m < last - first; ++m) {
                    const GateRow& of = adapted[first + m];
                    const int64_t at = (2 * b + half) * kTile;
                    change(of.up_scale, of.up_added, at, own_carried + m * kTile);
                    if (is_gated) change(of.gate_scale, of.gate_added, at, own_opened + m * kTile);
                }
                for (int64_t m = 0; m < last - first; ++m)
                    k.activate(activation, (is_gated ? own_opened : own_carried) + m * kTile,
                               is_gated ? own_carried + m * kTile : nullptr, kTile, block + m * kBlock + half * kTile);
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
