// Random sizes and numbers for every operation that takes sizes, on every instruction set of this machine.
//
// Each trial draws shapes, fills exactly-sized buffers, runs the operation on every set with one to four threads,
// and asks for the same bits. Built with -DPLAIT_SANITIZE=ON it also shows any read or write outside a buffer. The digest
// that it prints is that of the results: processors of different kinds have the same one for the same trials and seed.
//
// Usage: plait_fuzz [trials] [seed]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "adapter.h"
#include "additive.h"
#include "fuzz.h"
#include "grid.h"
#include "linear.h"
#include "packed.h"
#include "stack.h"

namespace {

using namespace plait;

struct Format {
    const char* name;
    int elements, bytes;
};
const Format kFormats[] = {{"q4_0", 32, 18},  {"q4_1", 32, 20},   {"q5_0", 32, 22},   {"q5_1", 32, 24},
                           {"q8_0", 32, 34},  {"q2_k", 256, 84},  {"q3_k", 256, 110}, {"q4_k", 256, 144},
                           {"q5_k", 256, 176}, {"q6_k", 256, 210}};

PackedMatrix random_matrix(int64_t rows, int64_t columns) {
    const Format& format = kFormats[pick(0, columns % 256 == 0 ? 9 : 4)];
    const int64_t row_bytes = columns / format.elements * format.bytes;
    // Any bytes at all: scales may be NaN or infinite.
    std::vector<uint8_t> blocks(static_cast<size_t>(rows * row_bytes));
    for (uint8_t& byte : blocks) byte = uint8_t(pick(0, 255));
    return PackedMatrix(blocks.data(), rows, row_bytes, format.name);
}

// Rows of a matrix, and its product with activations of two bytes.
void compare_matrix(const char* what, const PackedMatrix& matrix, int64_t rows, int64_t columns, int64_t batch) {
    compare(what, rows * columns, [&](float* out) {
        for (int64_t r = 0; r < rows; ++r) matrix.unpack_row(r, out + r * columns);
    });
    const std::vector<float> x = numbers(batch * columns);
    Projection projection;
    projection.add(matrix.view(), 0, rows);
    compare(what, batch * rows, [&](float* out) {
        Activations a;
        a.resize(batch, columns);
        a.quantize(x.data(), columns, 0, batch);
        Pool::get().run([&](Team& team) {
            team.share(projection.num_tiles, projection.grain(team.size, batch), [&](int64_t begin, int64_t end) {
                projection.run(a, begin, end, out, rows, false);
            });
        });
    });
}

void fuzz_packed() {
    const int64_t columns = pick(0, 1) ? 32 * pick(1, 9) : 256 * pick(1, 2);
    const int64_t rows = pick(0, 70), batch = pick(0, 40);
    compare_matrix("a matrix of a file", random_matrix(rows, columns), rows, columns, batch);
}

void fuzz_gate() {
    const int64_t columns = 32 * pick(1, 6), inner = 32 * pick(1, 5), batch = pick(0, 20), outputs = pick(1, 40);
    const PackedMatrix gate = random_matrix(inner, columns), up = random_matrix(inner, columns);
    const PackedMatrix down = random_matrix(outputs, inner);
    Gate gated;
    gated.activation = Activation(pick(0, 3));
    if (pick(0, 1)) gated.gate.add(gate.view(), 0, inner);
    gated.up.add(up.view(), 0, inner);
    Projection behind;
    behind.add(down.view(), 0, outputs);
    const std::vector<float> x = numbers(batch * columns);
    const bool is_adapted = pick(0, 1) != 0;
    const std::vector<float> scales = numbers(3 * inner), added = numbers(2 * batch * inner);
    // Instruction sets keep activations in other orders, so what is compared is the next product, and what is kept of rows.
    compare("gate", batch * (outputs + inner), [&](float* out) {
        Activations a, h;
        a.resize(batch, columns);
        h.resize(batch, inner);
        a.quantize(x.data(), columns, 0, batch);
        std::vector<GateRow> rows(static_cast<size_t>(batch));
        for (int64_t m = 0; m < batch; m += 2)
            rows[size_t(m)] = {scales.data(), scales.data() + inner, added.data() + m * inner,
                               added.data() + (batch + m) * inner, scales.data() + 2 * inner,
                               out + batch * outputs + m * inner};
        Pool::get().run([&](Team& team) {
            team.share(inner / kBlock, 2, [&](int64_t begin, int64_t end) {
                gated.run(a, begin, end, h, is_adapted ? rows.data() : nullptr);
            });
            team.share(behind.num_tiles, behind.grain(team.size, batch),
                       [&](int64_t begin, int64_t end) { behind.run(h, begin, end, out, outputs, false); });
        });
    }, gated.activation);
}

void fuzz_dense() {
    const int64_t rows = pick(0, 20), outputs = pick(1, 60), columns = pick(1, 130), ld = columns + pick(0, 3);
    const Number kind = Number(pick(0, 2));
    const std::vector<float> x = numbers(rows * columns), dense = numbers(outputs * ld);
    std::vector<uint8_t> weight(static_cast<size_t>(outputs * ld * nbytes_of(kind)));
    kernels().convert(dense.data(), kind, outputs * ld, weight.data());
    compare("dense_rows", rows * outputs, [&](float* out) {
        kernels().dense_rows(x.data(), columns, rows, weight.data(), ld, kind, columns, 0, outputs, out, outputs);
    });
}

// Numbers of which one may be infinite or NaN: a NaN that rounding to bf16 would carry into its sign.
std::vector<float> odd_numbers(int64_t count) {
    const float odd[] = {float_of(0x7fffffffu), HUGE_VALF, -HUGE_VALF};
    std::vector<float> x = numbers(count);
    if (count > 0 && pick(0, 3) == 0) x[size_t(pick(0, count - 1))] = odd[pick(0, 2)];
    return x;
}

void fuzz_rows() {
    const int64_t n = pick(1, 200);
    const std::vector<float> x = odd_numbers(n), w = numbers(n);
    const Activation activation = Activation(pick(0, 3));
    const Number kind = Number(pick(0, 2));
    const int64_t half = pick(0, n / 2);
    compare("row operations", 6 * n + 2, [&](float* out) {
        const Kernels& k = kernels();
        k.rms_norm(x.data(), w.data(), 1e-5f, n, out);
        k.activate(activation, x.data(), w.data(), n, out + n);
        k.exp(x.data(), n, out + 2 * n);
        k.rotate(x.data(), w.data(), w.data(), half, n, 0.5f, out + 3 * n);
        std::vector<uint8_t> narrow(static_cast<size_t>(n * nbytes_of(kind)));
        k.convert(x.data(), kind, n, narrow.data());
        k.widen(narrow.data(), kind, n, out + 4 * n);
        out[6 * n] = k.largest(x.data(), n);
        out[6 * n + 1] = k.exp_sum(x.data(), out[6 * n], n, out + 5 * n);
    }, activation);
}

std::vector<uint8_t> bytes(int64_t count, int64_t most = 255) {
    std::vector<uint8_t> made(static_cast<size_t>(count));
    for (uint8_t& byte : made) byte = uint8_t(pick(0, most));
    return made;
}

template <class T>
const uint8_t* bytes_of(const std::vector<T>& array) {
    return reinterpret_cast<const uint8_t*>(array.data());
}

// Every kind of grid: evenly spaced levels with and without zeros, planes, tables, tables with special values, wide ones.
void fuzz_grid() {
    const int64_t columns = 32 * pick(1, 12), rows = pick(0, 50), batch = pick(0, 40), tiles = (rows + kTile - 1) / kTile;
    enum Kind : int { even, zeroed, planes, table, special, wide };
    const Kind kind = Kind(pick(0, 5));
    const int widths[] = {2, 3, 4, 8};
    GridView w{};
    w.rows = rows;
    w.columns = columns;
    w.bits = kind == planes ? 2 : kind == wide ? 4 : kind >= table ? int(pick(3, 4)) : widths[pick(0, 3)];
    w.group = std::min(columns, 32 * pick(1, 13));
    w.groups = (columns + w.group - 1) / w.group;
    const int64_t numbers_of_groups = tiles * w.groups * kTile;
    const std::vector<uint8_t> codes = bytes(tiles * columns / kBlock * 64 * w.bits), types = bytes(tiles * w.groups * 4);
    const std::vector<uint8_t> steps = bytes(numbers_of_groups);
    const std::vector<uint16_t> scales = halves(numbers_of_groups), others = halves(numbers_of_groups);
    const std::vector<float> row_scales = numbers(tiles * kTile);
    w.codes = codes.data();
    w.scales = bytes_of(scales);
    w.offset = kind == planes ? 0 : 1 << (w.bits - 1);
    if (kind == zeroed) w.zeros = bytes_of(others);
    if (kind == planes) w.low_scales = bytes_of(others);
    if (kind >= table) {
        w.is_table = true;
        w.is_wide = kind == wide;
        w.offset = w.is_wide ? kWideOffset : kGridOffset;
        for (int i = 0; i < 1 << w.bits; ++i) {
            w.table[i] = uint8_t(pick(0, w.is_wide ? kWideBase - 1 : 2 * kGridOffset));
            w.low_table[i] = uint8_t(w.is_wide ? pick(0, kWideBase - 1) : 0);
        }
    }
    if (kind == special) {
        w.types = types.data();
        w.table[(1 << w.bits) - 1] = 0;
        for (uint32_t& value : w.specials) value = 0x01010101u * uint32_t(pick(0, 2 * kGridOffset));
    }
    if (kind != planes && pick(0, 1)) {
        w.scales = steps.data();
        w.row_scales = row_scales.data();
    }
    const GridMatrix matrix(w);
    compare_matrix("a matrix of codes", matrix, rows, columns, batch);
    const int64_t ldx = columns + pick(0, 3);
    const std::vector<float> x = numbers(4 * ldx);
    const int taken[] = {1, 2, 4};
    const int some = taken[pick(0, 2)];
    compare("an exact product of codes", tiles * some * kTile, [&](float* out) {
        for (int64_t t = 0; t < tiles; ++t) kernels().grid_exact(matrix.grid(), t, x.data(), ldx, some, out + t * some * kTile);
    });
}

void fuzz_stack() {
    const int64_t columns = 32 * pick(1, 9), rows = pick(0, 50), batch = pick(0, 40), rank = pick(1, kMaxStackRank);
    StackMatrix matrix(rows, columns, rank);
    std::vector<std::vector<uint8_t>> blocks;
    std::vector<const uint8_t*> held;
    for (int64_t i = pick(1, 4); i > 0; --i) blocks.push_back(bytes(matrix.block_bytes()));
    for (const std::vector<uint8_t>& block : blocks) held.push_back(block.data());
    matrix.hold(held);
    compare_matrix("a stack", matrix, rows, columns, batch);
    const int64_t tiles = (rows + kTile - 1) / kTile, ldx = columns + pick(0, 3);
    const std::vector<float> x = numbers(kRowChunk * ldx);
    const int some = chunk_rows(pick(1, kRowChunk));
    compare("an exact product of a stack", tiles * some * kTile, [&](float* out) {
        std::vector<float> tile(static_cast<size_t>(kTile * columns));
        for (int64_t t = 0; t < tiles; ++t) {
            kernels().stack_rows(matrix.stack(), t, tile.data());
            kernels().made_exact(tile.data(), columns, x.data(), ldx, some, out + t * some * kTile);
        }
    });
}

void fuzz_additive() {
    const int64_t widths[] = {1, 2, 3, 4, 6, 8, 12, 16, 32, 48};
    const int64_t width = widths[pick(0, 9)], columns = (width % 3 == 0 ? 96 : 32) * pick(1, 6), rows = pick(0, 50), batch = pick(0, 40), books = pick(1, 4);
    const std::vector<uint8_t> codes = bytes(rows * (columns / width) * books);
    const std::vector<uint16_t> entries = halves(books * kEntries * width), scales = halves(rows);
    const AdditiveMatrix matrix({rows, columns, width, books, codes.data(), entries.data(), scales.data()});
    compare_matrix("a matrix of vector codes", matrix, rows, columns, batch);
    const int64_t ldx = columns + pick(0, 3);
    const std::vector<float> x = numbers(batch * ldx);
    compare("an exact product of vector codes", batch * rows, [&](float* out) {
        std::vector<float> room(static_cast<size_t>(kMadeRows * columns));
        multiply_additive(matrix.codes(), 0, rows, x.data(), ldx, batch, out, rows, room.data());
    });
}

void fuzz_adapter() {
    const int64_t inputs = pick(1, 70), outputs = pick(1, 70), rows = pick(1, kRowChunk);
    const int64_t ldx = inputs + pick(0, 3), ldy = outputs + pick(0, 3);
    const std::vector<float> x = numbers(rows * ldx), y = numbers(rows * ldy), entry = numbers(rows * ldy);
    const std::vector<float> scale = numbers(outputs), bias = numbers(outputs);
    std::vector<std::vector<float>> factors;
    SiteDelta delta;
    delta.inputs = inputs;
    delta.outputs = outputs;
    if (pick(0, 1)) delta.output_scale = scale.data();
    if (pick(0, 1)) delta.bias = bias.data();
    int64_t most_rank = 1;
    const auto kept = [&](int64_t count) {
        factors.push_back(numbers(count));
        return factors.back().data();
    };
    for (int64_t i = pick(0, 3); i > 0; --i) {
        const int64_t rank = pick(1, 40), first = pick(0, outputs - 1), count = pick(1, outputs - first);
        const float *down = kept(rank * inputs), *up = kept(rank * count);
        delta.parts.push_back({first, count, rank, down, up});
        most_rank = std::max(most_rank, rank);
    }
    if (pick(0, 1)) {
        const int64_t rank = pick(1, 40);
        const float *down = kept(rank * outputs), *up = kept(rank * outputs), *down_bias = kept(rank), *up_bias = kept(outputs);
        delta.bottleneck = {rank, down, up, down_bias, up_bias, Activation(pick(0, 3)), pick(0, 1) != 0};
        most_rank = std::max(most_rank, rank);
    }
    compare("an adapter", rows * ldy, [&](float* out) {
        std::vector<float> room(static_cast<size_t>(most_rank * kRowChunk));
        std::copy(y.begin(), y.end(), out);
        adapt(delta, x.data(), ldx, rows, out, ldy, room.data(), entry.data());
    }, delta.bottleneck.activation);
}

void fuzz_bits() {
    // Beyond 248 words the counts of bytes are emptied on the way.
    const int64_t words = pick(0, 5) ? pick(0, 40) : pick(240, 300), columns = pick(0, 64);
    std::vector<uint64_t> rows(static_cast<size_t>(words * kTile)), x(static_cast<size_t>(words));
    const uint64_t kinds[] = {0, ~uint64_t(0)};
    // Words of one bit each, rows that differ in every bit, or any words.
    const int64_t kind = pick(0, 3);
    for (uint64_t& word : rows) word = kind == 0 ? kinds[pick(0, 1)] : kind == 1 ? ~uint64_t(0) : engine();
    for (uint64_t& word : x) word = kind == 0 ? kinds[pick(0, 1)] : kind == 1 ? 0 : engine();
    compare("counts of bits", kTile, [&](float* out) {
        int32_t counts[kTile];
        kernels().differing_bits(rows.data(), x.data(), words, counts);
        for (int r = 0; r < kTile; ++r) {
            int64_t wanted = 0;
            for (int64_t w = 0; w < words; ++w)
                for (uint64_t bits = rows[size_t(w * kTile + r)] ^ x[size_t(w)]; bits != 0; bits &= bits - 1) ++wanted;
            if (counts[r] != wanted) fail("a count of bits");
            out[r] = float(counts[r]);
        }
    });
    const std::vector<float> signs = odd_numbers(columns), shift = numbers(columns);
    const float* moved = pick(0, 1) ? shift.data() : nullptr;
    compare("signs", 64, [&](float* out) {
        const uint64_t bits = kernels().negative_bits(signs.data(), moved, int(columns));
        for (int i = 0; i < 64; ++i) out[i] = float((bits >> i) & 1);
    });
}

}  // namespace

int main(int argc, char** argv) {
    const long trials = argc > 1 ? std::atol(argv[1]) : 200;
    engine.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
    for (long trial = 0; trial < trials; ++trial) {
        fuzz_packed();
        fuzz_gate();
        fuzz_dense();
        fuzz_rows();
        fuzz_attention();
        fuzz_coded();
        fuzz_visits();
        fuzz_grid();
        fuzz_stack();
        fuzz_additive();
        fuzz_adapter();
        fuzz_bits();
    }
    std::string sets;
    for (const Kernels* table : available()) sets += std::string(sets.empty() ? "" : ", ") + table->name;
    std::printf("%ld trials on %s: the same bits\ndigest %016llx\n", trials, sets.c_str(),
                static_cast<unsigned long long>(digest));
    return 0;
}
