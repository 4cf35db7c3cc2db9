// Products of rows with packed matrices, shared out among the threads of a team.
#pragma once

#include <cstdint>
#include <vector>

#include "adapter.h"
#include "kernels.h"
#include "packed.h"
#include "threads.h"

namespace plait {

// Room for `rows` rows of `columns` quantised activations.
class Activations {
public:
    void resize(int64_t rows, int64_t columns);
    // Quantise rows [begin, end); x has row stride ldx.
    void quantize(const float* x, int64_t ldx, int64_t begin, int64_t end);
    void quantize_row(const float* x, int64_t row);
    int64_t rows() const { return rows_; }
    int64_t columns() const { return columns_; }

    QuantizedRows view() const {
        return {reinterpret_cast<int8_t*>(codes_.data()), reinterpret_cast<RowBlock*>(blocks_.data()), rows_, columns_};
    }
    // Where block `block` of `row` goes.
    struct Place {
        int8_t* codes;
        RowBlock* blocks;
        int row, rows;
    };
    Place place(int64_t row, int64_t block) const;

private:
    int64_t rows_ = 0, columns_ = 0;
    Buffer codes_, blocks_;
};

// Tiles of one packed matrix whose outputs go to columns [out, out + 16 * count) of y.
struct Part {
    const PackedView* matrix;
    int64_t first_tile, num_tiles;
    int64_t out, num_outputs;
};

// y = x W^T (+ bias), or y += that. All parts read the same activations.
struct Projection {
    std::vector<Part> parts;
    const float* bias = nullptr;
    int64_t num_outputs = 0, num_tiles = 0, columns = 0;

    // Rows [first, first + count) of the matrix, `first` a multiple of 16, as the next outputs.
    void add(const PackedView& matrix, int64_t first, int64_t count);
    // One thread's share: tiles [begin, end), counted over all parts.
    void run(const Activations& x, int64_t begin, int64_t end, float* y, int64_t ldy, bool is_sum) const;
    int64_t grain(int threads, int64_t rows) const;
    // Ask for the first numbers of tiles [begin, end), so that they come while the thread waits.
    void ask(int64_t begin, int64_t end) const;
};

// h = activation(gate x) * (up x), or activation(up x) when there is no gate, quantised for the next product.
struct Gate {
    Projection gate, up;  // no parts in `gate`: not gated
    Activation activation;

    int64_t num_blocks() const { return up.num_outputs / kBlock; }
    // One thread's share: blocks [begin, end) of 32 outputs. `adapted` has an entry for each row, or is null.
    void run(const Activations& x, int64_t begin, int64_t end, const Activations& h,
             const GateRow* adapted = nullptr) const;
};

}  // namespace plait
