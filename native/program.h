// A decoder of gated attention blocks as one list of steps, run for a packed batch of rows in one call.
//
// Each thread walks all layers; within a step the threads share tiles of the output, and a barrier separates
// the steps. What a row computes depends on that row and its strands only.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

#include "adapter.h"
#include "attention.h"
#include "linear.h"
#include "threads.h"

namespace plait {

// One block: x += attention(norm(x)), then x += feed_forward(norm(x)), each with an optional norm on its output.
struct Layer {
    float epsilon = 0;
    std::vector<float> mixer_norm, feed_forward_norm;
    std::vector<float> mixer_output_norm, feed_forward_output_norm;  // empty for none
    std::vector<float> query_norm, key_norm;                         // over a head; empty for none
    Projection query_key_value, output;
    Gate gate;
    Projection down;
    Heads heads{};
    std::vector<float> slopes;  // of a bias by distance; empty for none
};

// Cosine and sine of every row in one frame, (rows, half) each.
struct AngleTable {
    const float* cos;
    const float* sin;
    int64_t half;
};

// Where the new keys and values of a segment go in one layer.
struct Target {
    void* keys;
    void* values;
    int64_t key_head_stride, key_stride, value_head_stride, value_stride, at;
    Number number;
    int64_t table;  // angles of the keys; -1 for no rotation
};

// A strand that a segment visits in one layer; `table` gives the angles of the queries in the strand's frame.
struct StrandArgument {
    int64_t segment;
    StrandVisit visit;
    int64_t table;
};

// A strand as a row of numbers: addresses of keys and values, their four strides, capacity, number format, index of its
// first key in that storage, its position and its length. Where the format is kCodedFormat the addresses are of CodedNumbers.
constexpr int64_t kStrandColumns = 11, kCodedFormat = 3;

// Its visit under a mask that knows all but where the keys are.
StrandVisit visit_of(const int64_t* row, Mask mask);

// Strands of which a segment sees, in one layer, those whose vectors match its mean query best. The query is compared
// in the frame of `table`, in which the strands are visited too.
struct ChoiceArgument {
    int64_t segment;
    int64_t place;         // how many of the segment's visits come before
    const float* index;    // (candidates, num_heads * head_dim)
    int64_t candidates;
    const int64_t* strands;  // (candidates, kStrandColumns)
    int64_t most;          // strands that are seen, or all where there are no more
    int64_t* found;        // (most), receives the numbers of those, in rising order; -1 behind the last one
    Mask mask;             // but for the place of the keys
    int64_t table;
    int64_t distance;      // at which all of them are seen, for a bias
};

// What of a segment's queries in one layer is told to whoever observes.
struct Observed {
    int64_t segment;
    int64_t table;   // the frame of the queries
    float* queries;  // (queries, num_heads, head_dim)
    float* lse;      // (queries, num_heads)
};

struct SegmentArgument {
    int64_t first_row, num_rows;
};

struct RunArguments {
    float* x;  // (rows, width), overwritten with the rows behind the last block, not normalised
    int64_t rows;
    std::vector<SegmentArgument> segments;
    std::vector<AngleTable> tables;
    std::vector<std::vector<Target>> targets;         // [layer][segment]
    std::vector<std::vector<StrandArgument>> visits;  // [layer], grouped by segment, oldest first
    std::vector<std::vector<ChoiceArgument>> choices;  // [layer], grouped by segment, in the order of their places
    std::vector<std::vector<Observed>> observed;       // [layer], by segment
    std::vector<const Adapter*> adapters;             // of each segment, null for none; empty where none has one
    const float* growth = nullptr;                    // of biases by distance, at distance 0; see Heads
    std::vector<int64_t> logit_rows;
    float* hidden = nullptr;  // (logit rows, width), normalised; may be null
    float* logits = nullptr;  // (logit rows, outputs of the head); may be null
};

class Program {
public:
    int64_t width = 0;
    float epsilon = 0;
    std::vector<float> final_norm;
    std::vector<Layer> layers;
    Projection head;

    // One run at a time; checks nothing: the binding does. Returns the visits to chunks that sharing has saved.
    int64_t run(const RunArguments& arguments);

private:
    void walk(Team& team, const RunArguments& arguments);
    void attention(Team& team, const RunArguments& arguments, size_t index);
    void plan(const RunArguments& arguments, size_t index);
    void find_tables(const RunArguments& arguments);
    void score(Team& team, const RunArguments& arguments, size_t index);
    void choose(const ChoiceArgument& choice, const float* scores);
    void rotate(const RunArguments& arguments, size_t index, int64_t segment, int64_t row, int64_t kv_head, float* room);
    const Activations& read(Team& team, const RunArguments& a, const float* norm, float epsilon, const float* added,
                            const float* added_norm, bool keeps = false);
    void plan_adapters(const RunArguments& arguments);
    bool has_delta(size_t index, Site site) const { return changes_[index * kSites + size_t(site)]; }
    bool reads_entry(size_t index, Site site) const { return reads_entry_[index * kSites + size_t(site)]; }
    void adapt_site(Team& team, size_t index, Site site, const float* x, int64_t ldx, float* y, int64_t ldy);
    void scale_inputs(Team& team, size_t index);
    const GateRow* adapt_gate(Team& team, size_t index, int64_t rows);

    int threads_ = 1;
    std::vector<AttentionPlan> plans_;
    std::vector<std::vector<int64_t>> tables_;  // [layer * segments + segment], those that its queries are rotated by
    std::vector<int64_t> order_;                // of candidates, while the best are found
    // Why a plan could not be made while the threads ran; they stop then.
    std::exception_ptr failure_;
    std::vector<Activations> own_, own_mixed_;  // of each thread, for few rows
    Activations shared_, mixed_, inner_, last_;
    AttentionScratch room_;
    Buffer qkv_, queries_, attended_, branch_, rows_, hidden_, means_, scores_;

    // For the rows that have adapters: which they are, whether a layer and site changes any, or what its branch read, and what is
    // kept of them.
    std::vector<AdaptedRows> adapted_;
    std::vector<bool> changes_, reads_entry_;
    std::vector<GateRow> gate_rows_;
    Buffer normed_, kept_, gate_added_, up_added_, low_;
    int64_t low_size_ = 0;
};

}  // namespace plait
