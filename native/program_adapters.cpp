// What a program does for the rows that have adapters; nothing here runs where no row has one.
#include <algorithm>
#include <cstring>

#include "program.h"

namespace plait {
namespace {

float* floats_of(const Buffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

void reserve(Buffer& buffer, int64_t numbers) {
    const size_t bytes = size_t(numbers) * sizeof(float);
    if (buffer.size() < bytes) buffer = Buffer(bytes);
}

}  // namespace

void Program::plan_adapters(const RunArguments& a) {
    adapted_.clear();
    changes_.assign(layers.size() * kSites, false);
    reads_entry_.assign(layers.size() * kSites, false);
    gate_rows_.clear();
    if (a.adapters.empty()) return;
    int64_t most_rank = 1;
    std::vector<const Adapter*> seen;
    for (size_t s = 0; s < a.segments.size(); ++s) {
        const Adapter* adapter = a.adapters[s];
        if (adapter == nullptr) continue;
        // Segments that follow each other with one adapter meet its matrices together.
        for (int64_t row = a.segments[s].first_row, end = row + a.segments[s].num_rows; row < end;) {
            AdaptedRows* last = adapted_.empty() ? nullptr : &adapted_.back();
            if (last != nullptr && last->adapter == adapter && last->first + last->count == row && last->count < kRowChunk) {
                const int64_t more = std::min(kRowChunk - last->count, end - row);
                last->count += more;
                row += more;
                continue;
            }
            const int64_t count = std::min<int64_t>(kRowChunk, end - row);
            adapted_.push_back({row, count, adapter});
            row += count;
        }
        if (std::find(seen.begin(), seen.end(), adapter) != seen.end()) continue;
        seen.push_back(adapter);
        most_rank = std::max(most_rank, adapter->most_rank);
        for (size_t layer = 0; layer < layers.size(); ++layer)
            for (int site = 0; site < kSites; ++site) {
                const SiteDelta& delta = adapter->layers[layer].sites[site];
                const size_t at = layer * kSites + size_t(site);
                if (!delta.is_empty()) changes_[at] = true;
                if (delta.bottleneck.rank > 0 && !delta.bottleneck.reads_output) reads_entry_[at] = true;
            }
    }
    int64_t inner = 0;
    for (const Layer& layer : layers) inner = std::max(inner, layer.down.columns);
    low_size_ = most_rank * kRowChunk;
    reserve(low_, low_size_ * threads_);
    reserve(normed_, a.rows * width);
    reserve(kept_, a.rows * inner);
    reserve(gate_added_, a.rows * inner);
    reserve(up_added_, a.rows * inner);
    gate_rows_.resize(size_t(a.rows));
}

void Program::adapt_site(Team& team, size_t index, Site site, const float* x, int64_t ldx, float* y, int64_t ldy) {
    if (!has_delta(index, site)) return;
    float* room = floats_of(low_) + team.index * low_size_;
    team.share(int64_t(adapted_.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const AdaptedRows& of = adapted_[size_t(i)];
            const SiteDelta& delta = of.adapter->layers[index].sites[site];
            // Only the products that end a branch read its entry, and they are as wide.
            const float* entry = floats_of(normed_) + of.first * width;
            if (!delta.is_empty()) adapt(delta, x + of.first * ldx, ldx, of.count, y + of.first * ldy, ldy, room, entry);
        }
    });
}

// Scale what attention gave, for adapters that change the inputs of the output product.
void Program::scale_inputs(Team& team, size_t index) {
    if (!has_delta(index, kOutput)) return;
    const int64_t columns = layers[index].output.columns;
    team.share(int64_t(adapted_.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const AdaptedRows& of = adapted_[size_t(i)];
            const float* scale = of.adapter->layers[index].sites[kOutput].input_scale;
            for (int64_t row = of.first; scale != nullptr && row < of.first + of.count; ++row)
                kernels().multiply(floats_of(attended_) + row * columns, scale, columns, floats_of(attended_) + row * columns);
        }
    });
}

// What the fused gate step is to do to each row; null where it does nothing to any.
const GateRow* Program::adapt_gate(Team& team, size_t index, int64_t rows) {
    if (!has_delta(index, kGate) && !has_delta(index, kUp) && !has_delta(index, kDown)) return nullptr;
    const int64_t inner = layers[index].down.columns;
    float* room = floats_of(low_) + team.index * low_size_;
    if (team.index == 0) std::fill(gate_rows_.begin(), gate_rows_.begin() + rows, GateRow{});
    team.barrier();
    team.share(int64_t(adapted_.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const AdaptedRows& of = adapted_[size_t(i)];
            const SiteDelta* sites = of.adapter->layers[index].sites;
            const auto added = [&](Site site, const Buffer& buffer) -> float* {
                const SiteDelta& delta = sites[site];
                if (delta.bias == nullptr && delta.parts.empty()) return nullptr;
                float* to = floats_of(buffer) + of.first * inner;
                std::memset(to, 0, size_t(of.count * inner) * sizeof(float));
                SiteDelta sum = delta;
                sum.output_scale = nullptr;  // the product itself is scaled
                adapt(sum, floats_of(normed_) + of.first * width, width, of.count, to, inner, room);
                return to;
            };
            const float* gate_added = added(kGate, gate_added_);
            const float* up_added = added(kUp, up_added_);
            for (int64_t m = 0; m < of.count; ++m) {
                GateRow& row = gate_rows_[size_t(of.first + m)];
                row.gate_scale = sites[kGate].output_scale;
                row.up_scale = sites[kUp].output_scale;
                row.gate_added = gate_added == nullptr ? nullptr : gate_added + m * inner;
                row.up_added = up_added == nullptr ? nullptr : up_added + m * inner;
                row.input_scale = sites[kDown].input_scale;
                row.kept = sites[kDown].parts.empty() ? nullptr : floats_of(kept_) + (of.first + m) * inner;
            }
        }
    });
    return gate_rows_.data();
}

}  // namespace plait
