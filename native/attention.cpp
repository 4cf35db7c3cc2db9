#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

namespace plait {
namespace {

// Rows of one key/value head that are answered together, of one segment and of several that share a chunk; their
// scores stay in the second-level cache.
constexpr int64_t kBlockRows = 128;
constexpr int64_t kUnitRows = 96;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t floor_to_chunk(int64_t position) {
    return (position >= 0 ? position : position - kKeyChunk + 1) / kKeyChunk * kKeyChunk;
}
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
    if (mask.nearest > 0) high = std::min(high, position - mask.nearest + 1);
    high = clamp(high, 0, length);
    return {clamp(low, 0, high), high};
}

// How far query `i` stands from a position, or from all of them.
int64_t distance_of(const StrandVisit& visit, int64_t i, int64_t position) {
    const Mask& mask = visit.mask;
    if (visit.standing == Standing::distance) return visit.stands_at;
    if (visit.standing == Standing::place) return visit.stands_at - position;
    return mask.first_query + (mask.kind == MaskKind::tree ? mask.depths[i] : i) - position;
}

}  // namespace

// What a chunk's visit points to, in a thread's scratch.
struct AttentionPlan::Ready {
    Visit visit;
    float* q;
    int64_t *low, *high, *distance;  // [piece][query]
    Piece* pieces;
    DraftNodes* nodes;
};

void AttentionPlan::reset(const Heads& heads, int threads) {
    heads_ = heads;
    threads_ = threads;
    group_ = heads.num_heads / heads.num_kv_heads;
    padded_dim_ = round_up(heads.head_dim, kLanes);
    padded_value_ = round_up(heads.value_dim, kLanes);
    visits_.clear();
    segments_.clear();
}

// Put a piece to the last chunk where it continues it: behind it, in the same frame.
void AttentionPlan::add_piece(size_t first_chunk, const PlanPiece& piece, int64_t position) {
    if (chunks_.size() > first_chunk && chunks_.back().position == position) {
        const PlanPiece& last = pieces_.back();
        const bool is_coded = is_coded_piece(last) || is_coded_piece(piece);
        const bool is_behind = piece.is_draft || (!last.is_draft && piece.slot >= last.slot + last.count);
        const StrandVisit &before = visits_[size_t(last.visit)], &visit = visits_[size_t(piece.visit)];
        if (!is_coded && is_behind && before.q == visit.q && before.weight == visit.weight) {
            pieces_.push_back(piece);
            chunks_.back().last_piece = int64_t(pieces_.size());
            return;
        }
    }
    pieces_.push_back(piece);
    chunks_.push_back({int64_t(pieces_.size()) - 1, int64_t(pieces_.size()), position});
}

// Between two neighbours of `borders_` all queries of a segment make the same visits.
void AttentionPlan::find_borders(const SegmentQueries& segment) {
    const auto inside = [&](int64_t query) { return clamp(query, 0, segment.num_queries); };
    borders_ = {0, segment.num_queries};
    for (int64_t v = segment.first_visit; v < segment.last_visit; ++v) {
        borders_.push_back(inside(visits_[size_t(v)].visitors.first));
        borders_.push_back(inside(visits_[size_t(v)].visitors.last));
    }
    std::sort(borders_.begin(), borders_.end());
    borders_.erase(std::unique(borders_.begin(), borders_.end()), borders_.end());
}

// The chunks that some queries of a segment see, which all make the same visits.
void AttentionPlan::cut_into_chunks(const SegmentQueries& segment, Run queries) {
    const size_t first_chunk = chunks_.size();
    for (int64_t v = segment.first_visit; v < segment.last_visit; ++v) {
        const StrandVisit& visit = visits_[size_t(v)];
        if (visit.visitors.first > queries.first || visit.visitors.last < queries.last) continue;
        const Mask& mask = visit.mask;
        const bool is_tree = mask.kind == MaskKind::tree;
        const int64_t run = is_tree ? clamp(mask.first_query - mask.first_key, 0, visit.length) : visit.length;
        if (visit.coded_keys != nullptr) {
            // Codes are read in blocks of 256 from the first one stored, wherever their tokens stand.
            for (int64_t first = floor_to_chunk(mask.first_shown); first < visit.length; first += kKeyChunk) {
                const int64_t count = std::min<int64_t>(kKeyChunk, visit.length - first);
                add_piece(first_chunk, {v, first, count, 0, first + count > run}, mask.first_key + first);
            }
            continue;
        }
        for (int64_t first = 0; first < run;) {
            const int64_t position = mask.first_key + first, chunk = floor_to_chunk(position);
            const int64_t count = std::min(chunk + kKeyChunk - position, run - first);
            add_piece(first_chunk, {v, first, count, position - chunk, false}, chunk);
            first += count;
        }
        if (run == visit.length || segment.num_queries == 0) continue;
        // A node stands at the position of its depth, wherever it is stored.
        const int64_t deepest = *std::max_element(mask.depths, mask.depths + segment.num_queries);
        const int64_t last = mask.first_query + clamp(deepest, 0, segment.num_queries - 1);
        for (int64_t chunk = floor_to_chunk(mask.first_query); chunk <= last; chunk += kKeyChunk)
            add_piece(first_chunk, {v, run, visit.length - run, 0, true}, chunk);
    }
}

bool AttentionPlan::is_visible(const Block& block, const PlanChunk& chunk) const {
    for (int64_t p = chunk.first_piece; p < chunk.last_piece; ++p) {
        const PlanPiece& piece = pieces_[size_t(p)];
        if (piece.is_draft) return true;
        const StrandVisit& visit = visits_[size_t(piece.visit)];
        const auto sees = [&](Range range) { return range.low < piece.first + piece.count && range.high > piece.first; };
        const int64_t last = block.first_query + block.num_queries - 1;
        if (visit.mask.kind == MaskKind::tree) {
            for (int64_t i = block.first_query; i <= last; ++i)
                if (sees(visible_range(visit.mask, i, visit.length))) return true;
        } else {
            // Ranges move up with the query.
            const Range first = visible_range(visit.mask, block.first_query, visit.length);
            if (sees({first.low, visible_range(visit.mask, last, visit.length).high})) return true;
        }
    }
    return false;
}

void AttentionPlan::add_blocks(int64_t segment, Run queries, int64_t first_chunk, int64_t last_chunk) {
    const int64_t block_queries = std::max<int64_t>(1, kBlockRows / group_);
    for (int64_t first = queries.first; first < queries.last; first += block_queries) {
        Block block{segment, first, std::min(block_queries, queries.last - first), int64_t(steps_.size()), 0};
        for (int64_t c = first_chunk; c < last_chunk; ++c)
            if (is_visible(block, chunks_[size_t(c)])) steps_.push_back({c, -1, 0});
        block.last_step = int64_t(steps_.size());
        blocks_.push_back(block);
    }
}

// Whether two chunks are the same keys of the same strands.
bool AttentionPlan::is_same(const PlanChunk& a, const PlanChunk& b) const {
    if (a.position != b.position || a.last_piece - a.first_piece != b.last_piece - b.first_piece) return false;
    for (int64_t p = 0; p < a.last_piece - a.first_piece; ++p) {
        const PlanPiece &x = pieces_[size_t(a.first_piece + p)], &y = pieces_[size_t(b.first_piece + p)];
        const StrandVisit &u = visits_[size_t(x.visit)], &w = visits_[size_t(y.visit)];
        if (x.is_draft || y.is_draft || x.first != y.first || x.count != y.count || x.slot != y.slot) return false;
        if (u.keys != w.keys || u.values != w.values || u.number != w.number || u.key_stride != w.key_stride) return false;
        if (u.value_stride != w.value_stride || u.key_head_stride != w.key_head_stride) return false;
        if (u.value_head_stride != w.value_head_stride) return false;
        if ((u.standing == Standing::distance) != (w.standing == Standing::distance)) return false;
        if (u.weight.added != w.weight.added || u.weight.temper != w.weight.temper) return false;
        if (u.coded_keys != w.coded_keys || u.coded_values != w.coded_values) return false;
    }
    return true;
}

void AttentionPlan::add_unit(const Member* members, int64_t count) {
    Unit unit{int64_t(members_.size()), 0, 0, 0};
    for (const Member* m = members; m != members + count; ++m) {
        Step& step = steps_[size_t(m->step)];
        step.unit = int64_t(units_.size());
        step.row = unit.num_rows;
        unit.num_rows += blocks_[size_t(m->block)].num_queries * group_;
        members_.push_back(*m);
    }
    unit.last_member = int64_t(members_.size());
    units_.push_back(unit);
}

// Units of the chunks that several blocks see: one product for the queries of all.
void AttentionPlan::share_chunks() {
    strands_.clear();
    for (const StrandVisit& visit : visits_) strands_.push_back(visit.stored_keys());
    std::sort(strands_.begin(), strands_.end());
    const auto is_shared = [&](const void* keys) {
        const auto found = std::lower_bound(strands_.begin(), strands_.end(), keys);
        return found + 1 != strands_.end() && found[1] == keys;
    };
    together_.clear();
    for (size_t b = 0; b < blocks_.size(); ++b) {
        if (2 * blocks_[b].num_queries * group_ > kUnitRows) continue;
        for (int64_t s = blocks_[b].first_step; s < blocks_[b].last_step; ++s) {
            const PlanChunk& chunk = chunks_[size_t(steps_[size_t(s)].chunk)];
            const PlanPiece& last = pieces_[size_t(chunk.last_piece) - 1];
            if (!last.is_draft && is_shared(visits_[size_t(last.visit)].stored_keys())) together_.push_back({int64_t(b), s});
        }
    }
    const auto chunk_of = [&](const Member& m) -> const PlanChunk& { return chunks_[size_t(steps_[size_t(m.step)].chunk)]; };
    const auto place = [&](const Member& m) {
        const PlanPiece& last = pieces_[size_t(chunk_of(m).last_piece) - 1];
        return std::make_tuple(chunk_of(m).position, visits_[size_t(last.visit)].stored_keys(), last.slot + last.count, m.block);
    };
    std::sort(together_.begin(), together_.end(), [&](const Member& a, const Member& b) { return place(a) < place(b); });
    for (size_t first = 0; first < together_.size();) {
        size_t last = first;
        int64_t rows = 0;
        while (last < together_.size() && is_same(chunk_of(together_[first]), chunk_of(together_[last]))) {
            const int64_t more = blocks_[size_t(together_[last].block)].num_queries * group_;
            if (rows + more > kUnitRows) break;
            rows += more;
            ++last;
        }
        if (last - first > 1) add_unit(&together_[first], int64_t(last - first));
        first = last;
    }
}

void AttentionPlan::finish(AttentionScratch& room) {
    room_ = &room;
    pieces_.clear();
    chunks_.clear();
    blocks_.clear();
    steps_.clear();
    units_.clear();
    members_.clear();
    for (size_t s = 0; s < segments_.size(); ++s) {
        find_borders(segments_[s]);
        for (size_t border = 1; border < borders_.size(); ++border) {
            const Run queries{borders_[border - 1], borders_[border]};
            const int64_t first = int64_t(chunks_.size());
            cut_into_chunks(segments_[s], queries);
            add_blocks(int64_t(s), queries, first, int64_t(chunks_.size()));
        }
    }
    if (segments_.size() > 1) share_chunks();
    // Chunks of one block go to several threads only where blocks are too few to keep all busy. Each chunk is
    // folded by itself and the folds are merged in order either way, so the result is the same.
    const int64_t jobs = int64_t(blocks_.size()) * heads_.num_kv_heads;
    if (threads_ > 1 && jobs < 8 * threads_ && steps_.size() > blocks_.size()) {
        for (size_t b = 0; b < blocks_.size(); ++b)
            for (int64_t s = blocks_[b].first_step; s < blocks_[b].last_step; ++s) {
                const Member alone{int64_t(b), s};
                if (steps_[size_t(s)].unit < 0) add_unit(&alone, 1);
            }
    }
    most_rows_ = group_;
    most_pieces_ = 1;
    int64_t folds = 0;
    for (const Block& block : blocks_) most_rows_ = std::max(most_rows_, block.num_queries * group_);
    for (const PlanChunk& chunk : chunks_) most_pieces_ = std::max(most_pieces_, chunk.last_piece - chunk.first_piece);
    for (Unit& unit : units_) {
        most_rows_ = std::max(most_rows_, unit.num_rows);
        unit.fold = folds;
        folds += fold_numbers(unit.num_rows) * heads_.num_kv_heads;
    }
    most_queries_ = most_rows_ / group_;
    attend_numbers_ = attend_scratch(most_rows_, padded_dim_, padded_value_);
    for (const StrandVisit& visit : visits_)
        if (visit.coded_keys != nullptr)
            attend_numbers_ = std::max(attend_numbers_, coded_scratch(most_rows_, *visit.coded_keys, *visit.coded_values));
    attend_numbers_ = round_up(attend_numbers_, kLanes);
    const int64_t ready = most_pieces_ * int64_t(sizeof(Piece) + sizeof(DraftNodes)) / int64_t(sizeof(float));
    scratch_numbers_ = round_up(attend_numbers_ + most_rows_ * padded_dim_ +
                                    3 * fold_numbers(most_rows_) + ready + 6 * most_pieces_ * most_queries_, kLanes);
    const size_t scratch = sizeof(float) * size_t(scratch_numbers_) * size_t(threads_);
    if (room.scratch.size() < scratch) room.scratch = Buffer(scratch);
    if (room.folds.size() < sizeof(float) * size_t(folds)) room.folds = Buffer(sizeof(float) * size_t(folds));
}

int64_t AttentionPlan::fold_numbers(int64_t rows) const { return round_up(rows * (2 + padded_value_), kLanes); }

Fold AttentionPlan::fold_at(float* base, int64_t rows) const { return {base, base + rows, base + 2 * rows}; }

// Scale and pad the queries of all members, and find what each sees of the pieces of its chunk.
void AttentionPlan::prepare(const Member* members, int64_t count, int64_t kv_head, float* base, Ready& ready) const {
    ready.q = base;
    ready.low = reinterpret_cast<int64_t*>(base + most_rows_ * padded_dim_);
    ready.high = ready.low + most_pieces_ * most_queries_;
    ready.distance = ready.high + most_pieces_ * most_queries_;
    ready.pieces = reinterpret_cast<Piece*>(ready.distance + most_pieces_ * most_queries_);
    ready.nodes = reinterpret_cast<DraftNodes*>(ready.pieces + most_pieces_);
    const Kernels& k = kernels();
    int64_t query = 0, num_pieces = 0;
    for (const Member* m = members; m != members + count; ++m) {
        const Block& block = blocks_[size_t(m->block)];
        const PlanChunk& chunk = chunks_[size_t(steps_[size_t(m->step)].chunk)];
        num_pieces = chunk.last_piece - chunk.first_piece;
        for (int64_t i = 0; i < block.num_queries; ++i, ++query) {
            const StrandVisit& frame = visit_of(chunk);
            const float* from = frame.q + (block.first_query + i) * frame.q_stride + kv_head * group_ * heads_.head_dim;
            for (int64_t h = 0; h < group_; ++h) {
                float* to = ready.q + (query * group_ + h) * padded_dim_;
                k.scale(from + h * heads_.head_dim, heads_.scale * frame.weight.temper, heads_.head_dim, to);
                for (int64_t c = heads_.head_dim; c < padded_dim_; ++c) to[c] = 0.0f;
            }
            for (int64_t p = 0; p < num_pieces; ++p) {
                const PlanPiece& piece = pieces_[size_t(chunk.first_piece + p)];
                const StrandVisit& visit = visits_[size_t(piece.visit)];
                const Range range = visible_range(visit.mask, block.first_query + i, visit.length);
                const int64_t low = clamp(range.low - piece.first, 0, piece.count);
                ready.low[p * most_queries_ + query] = low;
                ready.high[p * most_queries_ + query] = clamp(range.high - piece.first, low, piece.count);
                ready.distance[p * most_queries_ + query] = distance_of(visit, block.first_query + i, chunk.position);
            }
        }
    }
    // What is left is the same for all members; a draft has one.
    const Block& block = blocks_[size_t(members->block)];
    const PlanChunk& chunk = chunks_[size_t(steps_[size_t(members->step)].chunk)];
    for (int64_t p = 0; p < num_pieces; ++p) {
        const PlanPiece& piece = pieces_[size_t(chunk.first_piece + p)];
        const StrandVisit& visit = visits_[size_t(piece.visit)];
        const Mask& mask = visit.mask;
        const int64_t width = nbytes_of(visit.number);
        const int64_t key = kv_head * visit.key_head_stride + piece.first * visit.key_stride;
        const int64_t value = kv_head * visit.value_head_stride + piece.first * visit.value_stride;
        if (piece.is_draft)
            ready.nodes[p] = {mask.ancestors + block.first_query * mask.words,
                              mask.words,
                              segments_[size_t(block.segment)].num_queries,
                              piece.first - (mask.first_query - mask.first_key),
                              mask.window,
                              mask.depths + block.first_query,
                              mask.depths,
                              mask.first_query - chunk.position};
        const bool is_coded = visit.coded_keys != nullptr;
        ready.pieces[p] = {is_coded ? nullptr : static_cast<const char*>(visit.keys) + key * width,
                           is_coded ? nullptr : static_cast<const char*>(visit.values) + value * width,
                           visit.key_stride,
                           visit.value_stride,
                           piece.count,
                           piece.slot,
                           visit.number,
                           ready.low + p * most_queries_,
                           ready.high + p * most_queries_,
                           ready.distance + p * most_queries_,
                           visit.standing == Standing::distance ? 0 : 1,
                           piece.is_draft ? &ready.nodes[p] : nullptr};
    }
    const float temper = visit_of(chunk).weight.temper;
    ready.visit = {ready.q,     query * group_, group_,         heads_.head_dim, heads_.value_dim, padded_dim_,
                   padded_value_, heads_.softcap * temper,
                   heads_.slopes == nullptr ? nullptr : heads_.slopes + kv_head * group_, temper, heads_.growth,
                   ready.pieces,  num_pieces};
}

void AttentionPlan::attend(const Member* members, int64_t count, int64_t kv_head, float* scratch, Fold fold) const {
    Ready ready;
    prepare(members, count, kv_head, scratch + attend_numbers_, ready);
    const PlanPiece& piece = pieces_[size_t(chunks_[size_t(steps_[size_t(members->step)].chunk)].first_piece)];
    const StrandVisit& visit = visits_[size_t(piece.visit)];
    if (is_coded_piece(piece))
        kernels().attend_coded(ready.visit, *visit.coded_keys, *visit.coded_values, kv_head, piece.first, scratch, fold);
    else
        kernels().attend_chunk(ready.visit, scratch, fold);
    if (visit.weight.added == 0) return;
    for (int64_t r = 0; r < ready.visit.rows; ++r) fold.top[r] += visit.weight.added;
}

// Put what a group of visits gave to what the others gave.
void AttentionPlan::close_group(float share, int64_t rows, Fold group, Fold total) const {
    for (int64_t r = 0; r < rows; ++r) {
        if (group.top[r] == -__builtin_inff()) continue;
        float* sum = group.sum + r * padded_value_;
        kernels().scale(sum, 1.0f / group.total[r], padded_value_, sum);
        group.top[r] = share * float(double(group.top[r]) + std::log(double(group.total[r])));
        group.total[r] = 1.0f;
    }
    kernels().merge_folds(total, group, rows, padded_value_);
}

void AttentionPlan::finish_block(const Block& block, int64_t kv_head, Fold fold) const {
    const SegmentQueries& segment = segments_[size_t(block.segment)];
    for (int64_t i = 0; i < block.num_queries; ++i)
        for (int64_t h = 0; h < group_; ++h) {
            const int64_t query = block.first_query + i, head = kv_head * group_ + h;
            kernels().finish_fold(fold, i * group_ + h, heads_.value_dim, padded_value_,
                                  segment.out + query * segment.out_stride + head * heads_.value_dim,
                                  segment.lse == nullptr ? nullptr : segment.lse + query * heads_.num_heads + head);
        }
}

void AttentionPlan::run(Team& team) {
    const Kernels& k = kernels();
    float* scratch = reinterpret_cast<float*>(room_->scratch.data()) + scratch_numbers_ * team.index;
    float* folds = reinterpret_cast<float*>(room_->folds.data());
    float* own = scratch + scratch_numbers_ - 3 * fold_numbers(most_rows_);
    const int64_t num_units = int64_t(units_.size()), num_blocks = int64_t(blocks_.size()), num_heads = heads_.num_kv_heads;
    const auto stored = [&](const Unit& unit, int64_t head) {
        return fold_at(folds + unit.fold + head * fold_numbers(unit.num_rows), unit.num_rows);
    };
    const auto attend_unit = [&](const Unit& unit, int64_t head) {
        attend(&members_[size_t(unit.first_member)], unit.last_member - unit.first_member, head, scratch, stored(unit, head));
    };
    const auto visit = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) attend_unit(units_[size_t(i % num_units)], i / num_units);
    };
    const bool has_codes = std::any_of(visits_.begin(), visits_.end(), [](const StrandVisit& v) {
        return v.coded_keys != nullptr && !is_plain(*v.coded_keys, *v.coded_values);
    });
    if (has_codes && num_units >= 8 * team.size) {
        // Codes of all heads lie side by side, and time goes by work rather than by what is read.
        team.share(num_units, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                for (int64_t head = 0; head < num_heads; ++head) attend_unit(units_[size_t(i)], head);
        });
    } else if (num_units > 0 && num_blocks == 1) {
        // The chunks of few rows are read once, from memory: each thread has a run of them, asked for ahead.
        const Team::Range part = team.part(num_units * num_heads);
        visit(part.begin, part.end);
        team.barrier();
    } else if (num_units > 0) {
        team.share(num_units * num_heads, 1, visit);
    }
    team.share(num_blocks * num_heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Block& block = blocks_[size_t(i % num_blocks)];
            const int64_t head = i / num_blocks, rows = block.num_queries * group_;
            const Fold total = fold_at(own, rows), fresh = fold_at(own + fold_numbers(most_rows_), rows);
            const Fold together = fold_at(own + 2 * fold_numbers(most_rows_), rows);
            const auto empty = [&](Fold fold) {
                std::fill(fold.top, fold.top + rows, -__builtin_inff());
                std::fill(fold.total, fold.total + rows, 0.0f);
            };
            empty(total);
            Weight open;
            for (int64_t s = block.first_step; s < block.last_step; ++s) {
                const Step& step = steps_[size_t(s)];
                Fold from = fresh;
                if (step.unit >= 0) {
                    from = stored(units_[size_t(step.unit)], head);
                    from = {from.top + step.row, from.total + step.row, from.sum + step.row * padded_value_};
                } else {
                    const Member alone{i % num_blocks, s};
                    attend(&alone, 1, head, scratch, fresh);
                }
                const Weight& weight = visit_of(chunks_[size_t(step.chunk)]).weight;
                if (weight.group != open.group) {
                    if (open.group != 0) close_group(open.share, rows, together, total);
                    if (weight.group != 0) empty(together);
                    open = weight;
                }
                k.merge_folds(open.group == 0 ? total : together, from, rows, padded_value_);
            }
            if (open.group != 0) close_group(open.share, rows, together, total);
            finish_block(block, head, total);
        }
    });
}

}  // namespace plait
