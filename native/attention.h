// Attention of packed segments over their strands, shared out among the threads of a team.
#pragma once

#include <cstdint>
#include <vector>

#include "codes.h"
#include "kernels.h"
#include "packed.h"
#include "threads.h"

namespace plait {

enum class MaskKind : int { everything = 0, causal = 1, tree = 2 };

// Which keys the queries of a segment see of a strand; the rules of plait.ops.masks.
struct Mask {
    MaskKind kind = MaskKind::everything;
    int64_t first_query = 0, first_key = 0;
    int64_t window = 0;                // 0 for no limit
    const int64_t* depths = nullptr;   // tree: of each query
    const uint64_t* ancestors = nullptr;  // tree: per query, `words` words of bits
    int64_t words = 0;
    int64_t first_shown = 0;           // keys before this index are hidden from all
};

struct Heads {
    int64_t num_heads, num_kv_heads, head_dim, value_dim;
    float scale, softcap;  // softcap 0 for none
};

// One strand, and the queries of one segment in its frame.
struct StrandVisit {
    const float* q;  // (queries, num_heads, head_dim), contiguous heads; rotated, not scaled
    int64_t q_stride;
    const void* keys;
    const void* values;
    int64_t key_head_stride, key_stride, value_head_stride, value_stride;  // in numbers
    int64_t length;
    Number number;
    Mask mask;
    // Where the strand is stored in few bits; `keys` and `values` are not used then.
    const CodedNumbers* coded_keys = nullptr;
    const CodedNumbers* coded_values = nullptr;
};

// The queries of one segment: its visits are [first_visit, last_visit) of the plan, oldest first.
struct SegmentQueries {
    int64_t num_queries;
    int64_t first_visit, last_visit;
    float* out;  // (queries, num_heads, value_dim)
    int64_t out_stride;
    float* lse;  // (queries, num_heads) or null
};

// Working memory of a plan; plans that run one after the other may share it.
struct AttentionScratch {
    Buffer scratch, folds;
};

// The work of one layer, cut into pieces that depend on shapes only.
class AttentionPlan {
public:
    void reset(const Heads& heads, int threads);
    void add_visit(const StrandVisit& visit) { visits_.push_back(visit); }
    void add_segment(const SegmentQueries& segment) { segments_.push_back(segment); }
    int64_t num_visits() const { return int64_t(visits_.size()); }
    // Makes room in `scratch`; call before `run`, with all segments added.
    void finish(AttentionScratch& scratch);
    void run(Team& team);

private:
    // One key/value head and one block of queries of one segment.
    struct Job {
        int64_t segment, kv_head, first_query, num_queries;
        int64_t first_unit, last_unit;
    };
    // One chunk of one visit of a job.
    struct Unit {
        int64_t job, visit, begin, end;
    };
    void prepare(const Job& job, const StrandVisit& visit, Team& team, Visit& prepared);
    void attend(const Unit& unit, const Visit& prepared, float* scratch, Fold fold) const;
    void finish_job(const Job& job, Fold fold);
    bool is_visible(const Job& job, const StrandVisit& visit, int64_t begin, int64_t end) const;
    Fold fold_at(float* base) const;
    float* scratch_of(int thread) const;

    Heads heads_{};
    int threads_ = 1;
    int64_t group_ = 1, padded_dim_ = 0, padded_value_ = 0, block_queries_ = 1;
    int64_t block_rows_ = 1, fold_numbers_ = 0, scratch_numbers_ = 0, attend_numbers_ = 0;
    bool is_split_ = false;
    std::vector<StrandVisit> visits_;
    std::vector<SegmentQueries> segments_;
    std::vector<Job> jobs_;
    std::vector<Unit> units_;
    AttentionScratch* room_ = nullptr;
};

}  // namespace plait
