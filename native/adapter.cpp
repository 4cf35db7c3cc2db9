#include "adapter.h"

namespace plait {

void adapt(const SiteDelta& delta, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy, float* room,
           const float* entry) {
    const Kernels& k = kernels();
    for (int64_t m = 0; m < rows; ++m) {
        if (delta.output_scale != nullptr) k.multiply(y + m * ldy, delta.output_scale, delta.outputs, y + m * ldy);
        if (delta.bias != nullptr) k.add(y + m * ldy, delta.bias, delta.outputs, y + m * ldy);
    }
    for (const LowRank& part : delta.parts) {
        k.dense_rows(x, ldx, rows, part.down, delta.inputs, Number::fp32, delta.inputs, 0, part.rank, room, part.rank);
        for (int64_t m = 0; m < rows; ++m)
            k.add_combination(room + m * part.rank, part.rank, part.up, part.count, part.count,
                              y + m * ldy + part.first);
    }
    const Bottleneck& neck = delta.bottleneck;
    if (neck.rank == 0) return;
    k.dense_rows(neck.reads_output ? y : entry, ldy, rows, neck.down, delta.outputs, Number::fp32, delta.outputs, 0, neck.rank,
                 room, neck.rank);
    for (int64_t m = 0; m < rows; ++m) {
        float* inside = room + m * neck.rank;
        k.add(inside, neck.down_bias, neck.rank, inside);
        k.activate(neck.activation, inside, nullptr, neck.rank, inside);
        k.add_combination(inside, neck.rank, neck.up, delta.outputs, delta.outputs, y + m * ldy);
        k.add(y + m * ldy, neck.up_bias, delta.outputs, y + m * ldy);
    }
}

}  // namespace plait
