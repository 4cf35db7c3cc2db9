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
    int64_t nearest = 0;               // keys fewer positions than this before a query are hidden; 0 for no limit
};

// Queries [first, last) of a segment.
struct Run {
    int64_t first = 0, last = INT64_MAX;
};

// How a visit counts. Visits of one group, which follow each other, are merged among themselves first: their scores are
// multiplied by `temper`, and the log-sum-exp of all of them by `share`.
struct Weight {
    float added = 0;     // to the log-sum-exp of the visit
    int64_t group = 0;   // 0 for none
    float temper = 1, share = 1;

    bool operator==(const Weight& other) const {
        return added == other.added && group == other.group && temper == other.temper && share == other.share;
    }
};

struct Heads {
    int64_t num_heads, num_kv_heads, head_dim, value_dim;
    float scale, softcap;  // softcap 0 for none
    const float* slopes = nullptr;  // (num_heads): slope * growth[distance] is taken off a score; null for no bias
    const float* growth = nullptr;  // at distance 0; as far to either side as distances reach
};

// How far queries stand from the keys of a visit, for a bias: each at its own place, all at one, or at one distance of all
// keys.
enum class Standing : int { own = 0, place = 1, distance = 2 };

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
    Run visitors = {};  // the other queries do not make this visit
    Weight weight = {};
    Standing standing = Standing::own;
    int64_t stands_at = 0;  // the place, or the distance
    // Where the strand is stored in few bits; `keys` and `values` are not used then.
    const CodedNumbers* coded_keys = nullptr;
    const CodedNumbers* coded_values = nullptr;

    const void* stored_keys() const { return coded_keys != nullptr ? coded_keys : keys; }
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
//
// Every segment sees chunks of 256 positions from multiples of 256, each made of pieces of its strands. A chunk that
// several segments have in common is visited once with the queries of all. The folds of a row's chunks are merged in
// their order, so the bits of a row depend on what it sees and at which positions, on nothing else.
class AttentionPlan {
public:
    void reset(const Heads& heads, int threads);
    void add_visit(const StrandVisit& visit) { visits_.push_back(visit); }
    void add_segment(const SegmentQueries& segment) { segments_.push_back(segment); }
    int64_t num_visits() const { return int64_t(visits_.size()); }
    // Makes room in `scratch`; call before `run`, with all segments added.
    void finish(AttentionScratch& scratch);
    void run(Team& team);
    // Visits to chunks, of one key/value head each, that were not made because blocks share one.
    int64_t saved_visits() const { return int64_t(members_.size() - units_.size()) * heads_.num_kv_heads; }

private:
    // Keys [first, first + count) of a visited strand; nodes of a draft, or a run of tokens.
    struct PlanPiece {
        int64_t visit, first, count, slot;
        bool is_draft;
    };
    // Pieces that lie in one chunk and are visited in one frame with one weight; or one piece of a coded strand, a block of it.
    struct PlanChunk {
        int64_t first_piece, last_piece, position;
    };
    struct Block {
        int64_t segment, first_query, num_queries;
        int64_t first_step, last_step;
    };
    // A chunk that a block sees. Its fold is computed with the block, or stored in a unit from `row` on.
    struct Step {
        int64_t chunk, unit, row;
    };
    // Blocks that visit one chunk together: members [first, last).
    struct Unit {
        int64_t first_member, last_member, num_rows;
        int64_t fold;  // where the fold of key/value head 0 is, in numbers
    };
    struct Member {
        int64_t block, step;
    };
    struct Ready;  // a visit of the kernel and what it points to

    void find_borders(const SegmentQueries& segment);
    void cut_into_chunks(const SegmentQueries& segment, Run queries);
    const StrandVisit& visit_of(const PlanChunk& chunk) const {
        return visits_[size_t(pieces_[size_t(chunk.first_piece)].visit)];
    }
    bool is_coded_piece(const PlanPiece& piece) const { return visits_[size_t(piece.visit)].coded_keys != nullptr; }
    void add_piece(size_t first_chunk, const PlanPiece& piece, int64_t position);
    void add_blocks(int64_t segment, Run queries, int64_t first_chunk, int64_t last_chunk);
    void share_chunks();
    void add_unit(const Member* members, int64_t count);
    bool is_visible(const Block& block, const PlanChunk& chunk) const;
    bool is_same(const PlanChunk& a, const PlanChunk& b) const;
    void prepare(const Member* members, int64_t count, int64_t kv_head, float* scratch, Ready& ready) const;
    void attend(const Member* members, int64_t count, int64_t kv_head, float* scratch, Fold fold) const;
    void close_group(float share, int64_t rows, Fold group, Fold total) const;
    void finish_block(const Block& block, int64_t kv_head, Fold fold) const;
    Fold fold_at(float* base, int64_t rows) const;
    int64_t fold_numbers(int64_t rows) const;

    Heads heads_{};
    int threads_ = 1;
    int64_t group_ = 1, padded_dim_ = 0, padded_value_ = 0;
    int64_t most_rows_ = 1, most_pieces_ = 1, most_queries_ = 1, attend_numbers_ = 0, scratch_numbers_ = 0;
    std::vector<StrandVisit> visits_;
    std::vector<SegmentQueries> segments_;
    std::vector<PlanPiece> pieces_;
    std::vector<PlanChunk> chunks_;
    std::vector<Block> blocks_;
    std::vector<Step> steps_;
    std::vector<Unit> units_;
    std::vector<Member> members_, together_;
    std::vector<const void*> strands_;
    std::vector<int64_t> borders_;
    AttentionScratch* room_ = nullptr;
};

}  // namespace plait
