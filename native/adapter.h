// Adapters of a program: what is added to, or multiplied onto, the products of chosen rows, in fp32.
//
// Every kind is brought to one form before it comes here: y = output_scale * W (input_scale * x) + bias, and
// y[part] += up^T (down x) for each low-rank part; then a bottleneck, where there is one. A row's result depends on that row and its adapter only.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace plait {

// The products of a layer that an adapter may change; gate and up are read by one fused step.
enum Site : int { kQueryKeyValue, kOutput, kGate, kUp, kDown, kSites };

// Outputs [first, first + count) get up^T (down x).
struct LowRank {
    int64_t first, count, rank;
    const float* down;  // (rank, inputs)
    const float* up;    // (rank, count)
};

// y += up^T activation(down z + down_bias) + up_bias, where z is y itself, or what the branch read that ends in y.
struct Bottleneck {
    int64_t rank = 0;  // 0 for none
    const float *down = nullptr, *up = nullptr;            // (rank, outputs) each
    const float *down_bias = nullptr, *up_bias = nullptr;  // (rank,) and (outputs,)
    Activation activation = Activation::relu;
    bool reads_output = false;
};

struct SiteDelta {
    int64_t inputs = 0, outputs = 0;
    const float* input_scale = nullptr;   // (inputs,); of the output and down products only; null for none
    const float* output_scale = nullptr;  // (outputs,)
    const float* bias = nullptr;          // (outputs,)
    std::vector<LowRank> parts;
    Bottleneck bottleneck;  // of the output and down products only

    bool is_empty() const {
        return input_scale == nullptr && output_scale == nullptr && bias == nullptr && parts.empty() && bottleneck.rank == 0;
    }
};

struct Adapter {
    struct OfLayer {
        SiteDelta sites[kSites];
    };
    std::vector<OfLayer> layers;
    int64_t most_rank = 0;
};

// Rows [first, first + count), at most kRowChunk of them, which have one adapter.
struct AdaptedRows {
    int64_t first, count;
    const Adapter* adapter;
};

// What the fused gate step does to one row; everything null for a row without an adapter.
struct GateRow {
    const float *gate_scale = nullptr, *up_scale = nullptr;  // (inner,), null for none
    const float *gate_added = nullptr, *up_added = nullptr;  // (inner,), null for none
    const float* input_scale = nullptr;                      // of the product that reads the result
    float* kept = nullptr;                                   // (inner,): the result in fp32, for that product
};

// y = output_scale * y + bias + up^T (down x) for `rows` rows, then the bottleneck. `room` holds most_rank * kRowChunk
// numbers; `entry` is what the branch read, with row stride ldy, for bottlenecks that do not read y.
void adapt(const SiteDelta& delta, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy, float* room,
           const float* entry = nullptr);

}  // namespace plait
