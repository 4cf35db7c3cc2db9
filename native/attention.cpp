#include "attention.h"

#include <algorithm>
#include <cstring>

namespace plait {
namespace {

// Rows of one key/value head that are answered together; their scores stay in the second-level cache.
constexpr int64_t kBlockRows = 64;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t clamp(int64_t x, int64_t low, int64_t high) { return std::min(std::max(x, low), high); }

struct Range {
    int64_t low, high;
};

// Keys [low, high) that query `i` of the segment may see (a tree's bits come on top).
Range visible_range(const Mask& mask, int64_t i, int64_t length) {
    const int64_t position = mask.first_query - mask.first_key + (mask.kind == MaskKind::tree ? mask.depths[i] : i);
    int64_t low = mask.first_shown, high = length;
    if (mask.window > 0) low = std::max(low, position - mask.window + 1);
    if (mask.kind == MaskKind::causal) high = position + 1;
    if (mask.kind == MaskKind::everything && mask.window > 0) high = position + mask.window;
    high = clamp(high, 0, length);
    return {clamp(low, 0, high), high};
}

}  // namespace

void AttentionPlan::reset(const Heads& heads, int threads) {
    heads_ = heads;
    threads_ = threads;
    group_ = heads.num_heads / heads.num_kv_heads;
    padded_dim_ = round_up(heads.head_dim, kLanes);
    padded_value_ = round_up(heads.value_dim, kLanes);
    block_queries_ = std::max<int64_t>(1, kBlockRows / group_);
    visits_.clear();
    segments_.clear();
    jobs_.clear();
    units_.clear();
}

bool AttentionPlan::is_visible(const Job& job, const StrandVisit& visit, int64_t begin, int64_t end) const {
    // Ranges move up with the query except in a tree, whose queries are few.
    for (int64_t i = job.first_query; i < job.first_query + job.num_queries; ++i) {
        const Range range = visible_range(visit.mask, i, visit.length);
        if (range.low < std::min(end, range.high) && range.high > begin) return true;
    }
    return false;
}

void AttentionPlan::finish(AttentionScratch& room) {
    room_ = &room;
    int64_t most_queries = 1;
    for (size_t s = 0; s < segments_.size(); ++s) {
        const SegmentQueries& segment = segments_[s];
        most_queries = std::max(most_queries, std::min(segment.num_queries, block_queries_));
        for (int64_t first = 0; first < segment.num_queries; first += block_queries_) {
            const int64_t count = std::min(block_queries_, segment.num_queries - first);
            for (int64_t g = 0; g < heads_.num_kv_heads; ++g) {
                Job job{int64_t(s), g, first, count, int64_t(units_.size()), 0};
                for (int64_t v = segment.first_visit; v < segment.last_visit; ++v)
                    for (int64_t begin = 0; begin < visits_[size_t(v)].length; begin += kKeyChunk) {
                        const int64_t end = std::min(begin + kKeyChunk, visits_[size_t(v)].length);
                        if (is_visible(job, visits_[size_t(v)], begin, end))
                            units_.push_back({int64_t(jobs_.size()), v, begin, end});
                    }
                job.last_unit = int64_t(units_.size());
                jobs_.push_back(job);
            }
        }
    }
    // Chunks of one job go to several threads only where jobs are too few to keep all busy. Each chunk is
    // folded by itself and the folds are merged in order either way, so the result is the same.
    is_split_ = threads_ > 1 && int64_t(jobs_.size()) < 8 * threads_ && units_.size() > jobs_.size();
    block_rows_ = most_queries * group_;
    fold_numbers_ = round_up(block_rows_ * (2 + padded_value_), kLanes);
    attend_numbers_ = attend_scratch(block_rows_, padded_dim_, padded_value_);
    for (const StrandVisit& visit : visits_)
        if (visit.coded_keys != nullptr)
            attend_numbers_ = std::max(attend_numbers_, coded_scratch(block_rows_, *visit.coded_keys, *visit.coded_values));
    attend_numbers_ = round_up(attend_numbers_, kLanes);
    scratch_numbers_ = attend_numbers_ + block_rows_ * padded_dim_ +
                       2 * fold_numbers_ + round_up(4 * most_queries, kLanes);
    const size_t scratch = sizeof(float) * size_t(scratch_numbers_) * size_t(threads_);
    if (room.scratch.size() < scratch) room.scratch = Buffer(scratch);
    const size_t folds = is_split_ ? sizeof(float) * size_t(fold_numbers_) * units_.size() : 0;
    if (room.folds.size() < folds) room.folds = Buffer(folds);
}

float* AttentionPlan::scratch_of(int thread) const {
    return reinterpret_cast<float*>(room_->scratch.data()) + scratch_numbers_ * thread;
}

Fold AttentionPlan::fold_at(float* base) const {
    return {base, base + block_rows_, base + 2 * block_rows_};
}

// Scale and pad the job's queries, and find what each sees.
void AttentionPlan::prepare(const Job& job, const StrandVisit& visit, Team& team, Visit& prepared) {
    float* base = scratch_of(team.index) + attend_numbers_;
    float* q = base;
    int64_t* low = reinterpret_cast<int64_t*>(base + block_rows_ * padded_dim_ + 2 * fold_numbers_);
    int64_t* high = low + job.num_queries;
    const Kernels& k = kernels();
    for (int64_t i = 0; i < job.num_queries; ++i) {
        const Range range = visible_range(visit.mask, job.first_query + i, visit.length);
        low[i] = range.low;
        high[i] = range.high;
        const float* from = visit.q + (job.first_query + i) * visit.q_stride + job.kv_head * group_ * heads_.head_dim;
        for (int64_t h = 0; h < group_; ++h) {
            float* to = q + (i * group_ + h) * padded_dim_;
            k.scale(from + h * heads_.head_dim, heads_.scale, heads_.head_dim, to);
            for (int64_t c = heads_.head_dim; c < padded_dim_; ++c) to[c] = 0.0f;
        }
    }
    const int64_t width = nbytes_of(visit.number);
    const bool is_tree = visit.mask.kind == MaskKind::tree;
    prepared = {q, job.num_queries * group_, group_, heads_.head_dim, heads_.value_dim, padded_dim_, padded_value_,
                static_cast<const char*>(visit.keys) + job.kv_head * visit.key_head_stride * width,
                static_cast<const char*>(visit.values) + job.kv_head * visit.value_head_stride * width,
                visit.key_stride, visit.value_stride, visit.number, heads_.softcap, low, high,
                is_tree ? visit.mask.ancestors + job.first_query * visit.mask.words : nullptr,
                is_tree ? visit.mask.words : 0,
                is_tree ? std::min(visit.mask.first_query - visit.mask.first_key, visit.length) : 0,
                segments_[size_t(job.segment)].num_queries, visit.mask.window,
                is_tree ? visit.mask.depths + job.first_query : nullptr, visit.mask.depths};
}

void AttentionPlan::attend(const Unit& unit, const Visit& prepared, float* scratch, Fold fold) const {
    const StrandVisit& visit = visits_[size_t(unit.visit)];
    if (visit.coded_keys == nullptr) return kernels().attend_chunk(prepared, unit.begin, unit.end, scratch, fold);
    kernels().attend_coded(prepared, *visit.coded_keys, *visit.coded_values, jobs_[size_t(unit.job)].kv_head, unit.begin,
                           unit.end, scratch, fold);
}

void AttentionPlan::finish_job(const Job& job, Fold fold) {
    const SegmentQueries& segment = segments_[size_t(job.segment)];
    for (int64_t i = 0; i < job.num_queries; ++i)
        for (int64_t h = 0; h < group_; ++h) {
            const int64_t query = job.first_query + i, head = job.kv_head * group_ + h;
            kernels().finish_fold(fold, i * group_ + h, heads_.value_dim, padded_value_,
                                  segment.out + query * segment.out_stride + head * heads_.value_dim,
                                  segment.lse == nullptr ? nullptr : segment.lse + query * heads_.num_heads + head);
        }
}

void AttentionPlan::run(Team& team) {
    const Kernels& k = kernels();
    float* scratch = scratch_of(team.index);
    float* own_folds = scratch + attend_numbers_ + block_rows_ * padded_dim_;
    const Fold total = fold_at(own_folds), fresh = fold_at(own_folds + fold_numbers_);
    const auto clear = [&](Fold fold, int64_t rows) {
        std::fill(fold.top, fold.top + rows, -__builtin_inff());
        std::fill(fold.total, fold.total + rows, 0.0f);
    };
    if (!is_split_) {
        team.share(int64_t(jobs_.size()), 1, [&](int64_t begin, int64_t end) {
            for (int64_t j = begin; j < end; ++j) {
                const Job& job = jobs_[size_t(j)];
                const int64_t rows = job.num_queries * group_;
                clear(total, rows);
                Visit visit;
                int64_t prepared = -1;
                for (int64_t u = job.first_unit; u < job.last_unit; ++u) {
                    const Unit& unit = units_[size_t(u)];
                    if (unit.visit != prepared) prepare(job, visits_[size_t(unit.visit)], team, visit);
                    prepared = unit.visit;
                    attend(unit, visit, scratch, fresh);
                    k.merge_folds(total, fresh, rows, padded_value_);
                }
                finish_job(job, total);
            }
        });
        return;
    }
    float* folds = reinterpret_cast<float*>(room_->folds.data());
    team.share(int64_t(units_.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end; ++u) {
            const Unit& unit = units_[size_t(u)];
            Visit visit;
            prepare(jobs_[size_t(unit.job)], visits_[size_t(unit.visit)], team, visit);
            attend(unit, visit, scratch, fold_at(folds + u * fold_numbers_));
        }
    });
    team.share(int64_t(jobs_.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
            const Job& job = jobs_[size_t(j)];
            const int64_t rows = job.num_queries * group_;
            clear(total, rows);
            for (int64_t u = job.first_unit; u < job.last_unit; ++u)
                k.merge_folds(total, fold_at(folds + u * fold_numbers_), rows, padded_value_);
            finish_job(job, total);
        }
    });
}

}  // namespace plait
