// Random sizes and numbers for every operation that takes sizes, on every instruction set of this machine.
//
// Each trial draws shapes, fills exactly-sized buffers, runs the operation on every set with one to four threads,
// and asks for the same bits. Built with -DPLAIT_SANITIZE=ON it also shows any read or write outside a buffer.
//
// Usage: plait_fuzz [trials] [seed]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention.h"
#include "dispatch.h"
#include "half.h"
#include "linear.h"
#include "packed.h"
#include "threads.h"

namespace {

using namespace plait;

std::mt19937_64 engine;

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }

float number() {
    const int64_t kind = pick(0, 200);
    if (kind == 0) return 1e30f;
    if (kind == 1) return 1e-41f;
    if (kind == 2) return 0.0f;
    return std::normal_distribution<float>()(engine);
}

std::vector<float> numbers(int64_t count) {
    std::vector<float> x(static_cast<size_t>(count));
    for (float& value : x) value = number();
    return x;
}

void fail(const char* what) {
    std::fprintf(stderr, "%s differs between instruction sets or numbers of threads\n", what);
    std::exit(1);
}

// Run `body(out)` on every set, with other numbers of threads, and compare all results.
template <class Body>
void compare(const char* what, int64_t count, Body body) {
    std::vector<float> first;
    for (const Kernels* table : available()) {
        use_kernels(table->name);
        Pool::get().resize(int(pick(1, 4)));
        std::vector<float> out(static_cast<size_t>(count), 0.0f);
        body(out.data());
        for (float& value : out)
            if (std::isnan(value)) value = 0.125f;  // payloads of NaN may differ
        if (table == available().front()) first = out;
        else if (count > 0 && std::memcmp(first.data(), out.data(), first.size() * sizeof(float)) != 0) fail(what);
    }
}

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

void fuzz_packed() {
    const int64_t columns = pick(0, 1) ? 32 * pick(1, 9) : 256 * pick(1, 2);
    const int64_t rows = pick(0, 70), batch = pick(0, 40);
    const PackedMatrix matrix = random_matrix(rows, columns);
    compare("unpack_row", rows * columns, [&](float* out) {
        for (int64_t r = 0; r < rows; ++r) matrix.unpack_row(r, out + r * columns);
    });
    const std::vector<float> x = numbers(batch * columns);
    Projection projection;
    projection.add(matrix.view(), 0, rows);
    compare("projection", batch * rows, [&](float* out) {
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

void fuzz_gate() {
    const int64_t columns = 32 * pick(1, 6), inner = 32 * pick(1, 5), batch = pick(0, 20);
    const PackedMatrix gate = random_matrix(inner, columns), up = random_matrix(inner, columns);
    Gate gated;
    gated.activation = Activation(pick(0, 3));
    if (pick(0, 1)) gated.gate.add(gate.view(), 0, inner);
    gated.up.add(up.view(), 0, inner);
    const std::vector<float> x = numbers(batch * columns);
    compare("gate", batch * inner, [&](float* out) {
        Activations a, h;
        a.resize(batch, columns);
        h.resize(batch, inner);
        a.quantize(x.data(), columns, 0, batch);
        Pool::get().run([&](Team& team) {
            team.share(inner / kBlock, 2, [&](int64_t begin, int64_t end) { gated.run(a, begin, end, h); });
        });
        for (int64_t i = 0; i < batch * inner; ++i) out[i] = float(h.codes(0)[2 * i]) + 256 * float(h.codes(0)[2 * i + 1]);
    });
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

void fuzz_rows() {
    const int64_t n = pick(1, 200);
    const std::vector<float> x = numbers(n), w = numbers(n);
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
    });
}

void fuzz_attention() {
    const int64_t group = pick(1, 5), kv_heads = pick(1, 3), heads = group * kv_heads;
    const int64_t dim = pick(0, 2) ? 16 * pick(1, 6) : pick(1, 90), value_dim = pick(0, 2) ? dim : pick(1, 90);
    const int64_t queries = pick(0, 30), length = pick(0, 3) ? pick(0, 300) : pick(0, 1200);
    const int64_t capacity = length + pick(0, 2);
    const Number kind = Number(pick(0, 2));
    const std::vector<float> q = numbers(queries * heads * dim);
    const std::vector<float> k = numbers(kv_heads * capacity * dim), v = numbers(kv_heads * capacity * value_dim);
    std::vector<uint8_t> keys(k.size() * size_t(nbytes_of(kind))), values(v.size() * size_t(nbytes_of(kind)));
    kernels().convert(k.data(), kind, int64_t(k.size()), keys.data());
    kernels().convert(v.data(), kind, int64_t(v.size()), values.data());
    Mask mask;
    mask.kind = MaskKind(pick(0, 2));
    mask.first_query = pick(0, 400);
    mask.first_key = pick(0, 100);
    mask.window = pick(0, 1) ? pick(1, 300) : 0;
    mask.words = pick(1, 2);
    std::vector<int64_t> depths(static_cast<size_t>(queries));
    std::vector<uint64_t> ancestors(static_cast<size_t>(queries * mask.words));
    for (int64_t& depth : depths) depth = pick(0, 20);
    for (uint64_t& bits : ancestors) bits = engine();
    if (mask.kind == MaskKind::tree) {
        mask.depths = depths.data();
        mask.ancestors = ancestors.data();
    }
    const float softcap = pick(0, 1) ? 10.0f : 0.0f;
    compare("attention", queries * heads * (value_dim + 1), [&](float* out) {
        AttentionPlan plan;
        AttentionScratch room;
        plan.reset({heads, kv_heads, dim, value_dim, 0.3f, softcap}, Pool::get().size());
        if (length > 0)
            plan.add_visit({q.data(), heads * dim, keys.data(), values.data(), capacity * dim, dim, capacity * value_dim,
                            value_dim, length, kind, mask});
        plan.add_segment({queries, 0, plan.num_visits(), out, heads * value_dim, out + queries * heads * value_dim});
        plan.finish(room);
        Pool::get().run([&](Team& team) { plan.run(team); });
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
    }
    std::printf("%ld trials on %zu instruction sets: the same bits\n", trials, available().size());
    return 0;
}
