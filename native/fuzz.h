// What the trials of plait_fuzz share: random sizes and numbers, and the comparison of all instruction sets.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "dispatch.h"
#include "half.h"
#include "kernels.h"
#include "threads.h"

namespace plait {

inline std::mt19937_64 engine;

inline int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }

inline float number() {
    const int64_t kind = pick(0, 200);
    if (kind == 0) return 1e30f;
    if (kind == 1) return 1e-41f;
    if (kind == 2) return 0.0f;
    if (kind == 3) return -0.0f;
    return std::normal_distribution<float>()(engine);
}

inline std::vector<float> numbers(int64_t count) {
    std::vector<float> x(static_cast<size_t>(count));
    for (float& value : x) value = number();
    return x;
}

inline void fail(const char* what) {
    std::fprintf(stderr, "%s differs between instruction sets or numbers of threads\n", what);
    std::exit(1);
}

inline uint64_t digest = 0xcbf29ce484222325u;  // FNV-1a

inline void add_to_digest(const std::vector<float>& results) {
    for (float value : results) digest = (digest ^ bits_of(value)) * 0x100000001b3u;
}

// Run `body(out)` on every set, with other numbers of threads, and compare all results. They belong to the digest unless
// gelu is among what made them: it takes erf from the C library, whose last bit differs between kinds of processors.
template <class Body>
void compare(const char* what, int64_t count, Body body, Activation activation = Activation::relu) {
    std::vector<float> first;
    // One draw, however many sets there are: the trials are the same on every machine.
    int64_t threads = pick(0, 3);
    for (const Kernels* table : available()) {
        use_kernels(table->name);
        Pool::get().resize(int(1 + threads++ % 4));
        std::vector<float> out(static_cast<size_t>(count), 0.0f);
        body(out.data());
        for (float& value : out)
            if (std::isnan(value)) value = 0.125f;  // payloads of NaN may differ
        if (table == available().front()) first = out;
        else if (count > 0 && std::memcmp(first.data(), out.data(), first.size() * sizeof(float)) != 0) fail(what);
    }
    if (activation != Activation::gelu) add_to_digest(first);
}

inline std::vector<uint16_t> halves(int64_t count) {
    const std::vector<float> wide = numbers(count);
    std::vector<uint16_t> narrow(static_cast<size_t>(count));
    kernels().convert(wide.data(), Number::fp16, count, narrow.data());
    return narrow;
}

void fuzz_attention();
void fuzz_coded();
void fuzz_visits();

}  // namespace plait
