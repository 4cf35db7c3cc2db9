#include "program.h"

#include <algorithm>
#include <cstring>

namespace plait {
namespace {

// Up to this many rows, every thread normalises and quantises all of them for itself, which is cheaper than a barrier,
// and has a fixed part of every matrix, which it reads in one run.
constexpr int64_t kFewRows = 4;

float* floats_of(const Buffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

void reserve(Buffer& buffer, int64_t numbers) {
    const size_t bytes = size_t(numbers) * sizeof(float);
    if (buffer.size() < bytes) buffer = Buffer(bytes);
}

}  // namespace

StrandVisit visit_of(const int64_t* row, Mask mask) {
    const int64_t first = row[8];
    mask.first_key = row[9] - first;
    mask.first_shown = first;
    StrandVisit visit{nullptr, 0, nullptr, nullptr, row[2], row[3], row[4], row[5], first + row[10], Number::fp32, mask};
    if (row[7] == kCodedFormat) {
        visit.coded_keys = reinterpret_cast<const CodedNumbers*>(row[0]);
        visit.coded_values = reinterpret_cast<const CodedNumbers*>(row[1]);
    } else {
        visit.keys = reinterpret_cast<const void*>(row[0]);
        visit.values = reinterpret_cast<const void*>(row[1]);
        visit.number = Number(row[7]);
    }
    return visit;
}

int64_t Program::run(const RunArguments& a) {
    Pool& pool = Pool::get();
    threads_ = pool.size();
    int64_t widest_qkv = 0, widest_q = 0, widest_out = 0, widest_inner = 0, widest_head = 0;
    for (const Layer& layer : layers) {
        widest_qkv = std::max(widest_qkv, layer.query_key_value.num_outputs);
        widest_q = std::max(widest_q, layer.heads.num_heads * layer.heads.head_dim);
        widest_out = std::max(widest_out, layer.output.columns);
        widest_inner = std::max(widest_inner, layer.down.columns);
        widest_head = std::max(widest_head, layer.heads.head_dim);
    }
    reserve(qkv_, a.rows * widest_qkv);
    reserve(queries_, a.rows * widest_q * std::max<int64_t>(1, int64_t(a.tables.size())));
    reserve(attended_, a.rows * widest_out);
    reserve(branch_, a.rows * width);
    reserve(rows_, threads_ * (std::max(width, widest_out) + widest_head));
    reserve(hidden_, int64_t(a.logit_rows.size()) * width);
    own_.resize(size_t(threads_));
    own_mixed_.resize(size_t(threads_));
    for (Activations& own : own_) own.resize(std::min(a.rows, kFewRows), width);
    for (Activations& own : own_mixed_) own.resize(std::min(a.rows, kFewRows), widest_out);
    shared_.resize(a.rows, width);
    last_.resize(int64_t(a.logit_rows.size()), width);
    mixed_.resize(a.rows, widest_out);
    inner_.resize(a.rows, widest_inner);

    plan_adapters(a);

    find_tables(a);
    plans_.resize(layers.size());
    failure_ = nullptr;
    int64_t most_scores = 0;
    for (size_t index = 0; index < layers.size(); ++index) {
        int64_t scores = 0;
        for (const ChoiceArgument& choice : a.choices[index]) scores += choice.candidates;
        most_scores = std::max(most_scores, scores);
        // What is chosen is known when the layer's queries are.
        if (a.choices[index].empty()) plan(a, index);
    }
    reserve(scores_, most_scores);
    if (most_scores > 0) reserve(means_, threads_ * widest_q);
    pool.run([&](Team& team) { walk(team, a); });
    if (failure_) std::rethrow_exception(failure_);
    int64_t saved = 0;
    for (const AttentionPlan& of_layer : plans_) saved += of_layer.saved_visits();
    return saved;
}

// Each table once, by which the queries of a segment are rotated in a layer.
void Program::find_tables(const RunArguments& a) {
    const size_t num_segments = a.segments.size();
    tables_.resize(layers.size() * num_segments);
    for (auto& tables : tables_) tables.clear();
    for (size_t index = 0; index < layers.size(); ++index) {
        const auto add = [&](int64_t segment, int64_t table) {
            std::vector<int64_t>& tables = tables_[index * num_segments + size_t(segment)];
            if (std::find(tables.begin(), tables.end(), table) == tables.end()) tables.push_back(table);
        };
        for (const StrandArgument& strand : a.visits[index]) add(strand.segment, strand.table);
        for (const ChoiceArgument& choice : a.choices[index]) add(choice.segment, choice.table);
        for (const Observed& observed : a.observed[index]) add(observed.segment, observed.table);
    }
}

// What the segments visit in a layer, their choices made.
void Program::plan(const RunArguments& a, size_t index) {
    Heads heads = layers[index].heads;
    if (!layers[index].slopes.empty()) {
        heads.slopes = layers[index].slopes.data();
        heads.growth = a.growth;
    }
    const int64_t q_width = heads.num_heads * heads.head_dim, out_width = heads.num_heads * heads.value_dim;
    AttentionPlan& plan = plans_[index];
    plan.reset(heads, threads_);
    size_t next = 0, next_choice = 0, next_observed = 0;
    for (size_t s = 0; s < a.segments.size(); ++s) {
        const SegmentArgument& segment = a.segments[s];
        const int64_t first = plan.num_visits();
        const auto add = [&](StrandVisit visit, int64_t table) {
            visit.q = floats_of(queries_) + (std::max<int64_t>(0, table) * a.rows + segment.first_row) * q_width;
            visit.q_stride = q_width;
            if (visit.length > 0) plan.add_visit(visit);
        };
        const auto& visits = a.visits[index];
        const auto& choices = a.choices[index];
        for (int64_t place = 0;; ++place) {
            for (; next_choice < choices.size() && choices[next_choice].segment == int64_t(s) &&
                   choices[next_choice].place == place;
                 ++next_choice) {
                const ChoiceArgument& choice = choices[next_choice];
                for (int64_t i = 0; i < choice.most && choice.found[i] >= 0; ++i) {
                    StrandVisit visit = visit_of(choice.strands + choice.found[i] * kStrandColumns, choice.mask);
                    visit.standing = Standing::distance;
                    visit.stands_at = choice.distance;
                    add(visit, choice.table);
                }
            }
            if (next == visits.size() || visits[next].segment != int64_t(s)) break;
            add(visits[next].visit, visits[next].table);
            ++next;
        }
        float* lse = nullptr;
        if (next_observed < a.observed[index].size() && a.observed[index][next_observed].segment == int64_t(s))
            lse = a.observed[index][next_observed++].lse;
        plan.add_segment({segment.num_rows, first, plan.num_visits(),
                          floats_of(attended_) + segment.first_row * out_width, out_width, lse});
    }
    plan.finish(room_);
}

// How well each candidate of a layer matches, behind each other for all choices.
void Program::score(Team& team, const RunArguments& a, size_t index) {
    const Kernels& k = kernels();
    const int64_t width_of = layers[index].heads.num_heads * layers[index].heads.head_dim;
    float* mean = floats_of(means_) + team.index * width_of;
    float* scores = floats_of(scores_);
    for (const ChoiceArgument& choice : a.choices[index]) {
        if (choice.candidates > choice.most) {
            const SegmentArgument& segment = a.segments[size_t(choice.segment)];
            const float* q = floats_of(queries_) + (std::max<int64_t>(0, choice.table) * a.rows + segment.first_row) * width_of;
            std::memcpy(mean, q, size_t(width_of) * sizeof(float));
            for (int64_t i = 1; i < segment.num_rows; ++i) k.add(mean, q + i * width_of, width_of, mean);
            k.scale(mean, 1.0f / float(segment.num_rows), width_of, mean);
            team.share(choice.candidates, 32, [&](int64_t begin, int64_t end) {
                k.dense_rows(mean, width_of, 1, choice.index, width_of, Number::fp32, width_of, begin, end, scores, 0);
            });
        }
        scores += choice.candidates;
    }
}

// The numbers of the best candidates, in rising order; the earlier of two that match alike.
void Program::choose(const ChoiceArgument& choice, const float* scores) {
    const int64_t count = std::min(choice.most, choice.candidates);
    order_.resize(size_t(choice.candidates));
    for (int64_t i = 0; i < choice.candidates; ++i) order_[size_t(i)] = i;
    if (count < choice.candidates) {
        // NaN matches nothing; compared as a number it would break the order.
        const auto value = [&](int64_t i) { return scores[i] == scores[i] ? scores[i] : -__builtin_inff(); };
        std::nth_element(order_.begin(), order_.begin() + count, order_.end(), [&](int64_t i, int64_t j) {
            return value(i) != value(j) ? value(i) > value(j) : i < j;
        });
        std::sort(order_.begin(), order_.begin() + count);
    }
    std::copy_n(order_.begin(), count, choice.found);
    std::fill(choice.found + count, choice.found + choice.most, int64_t(-1));
}

// x += norm(added) where that is given, then norm(x) in int8.
const Activations& Program::read(Team& team, const RunArguments& a, const float* norm, float epsilon, const float* added,
                                 const float* added_norm, bool keeps) {
    const Kernels& k = kernels();
    float* room = floats_of(rows_) + team.index * int64_t(rows_.size() / sizeof(float) / size_t(threads_));
    if (a.rows <= kFewRows && added == nullptr && !keeps) {
        Activations& own = own_[size_t(team.index)];
        for (int64_t r = 0; r < a.rows; ++r) {
            k.rms_norm(a.x + r * width, norm, epsilon, width, room);
            own.quantize_row(room, r);
        }
        return own;
    }
    team.share(a.rows, 4, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            float* x = a.x + r * width;
            if (added != nullptr) {
                k.rms_norm(added + r * width, added_norm, epsilon, width, room);
                k.add(x, room, width, x);
            }
            if (norm == nullptr) continue;
            k.rms_norm(x, norm, epsilon, width, room);
            if (keeps) std::memcpy(floats_of(normed_) + r * width, room, size_t(width) * sizeof(float));
            shared_.quantize_row(room, r);
        }
    });
    return shared_;
}

// Norm, rotate and store what one row has of one key/value head and its query heads.
void Program::rotate(const RunArguments& a, size_t index, int64_t segment, int64_t row, int64_t kv_head, float* room) {
    const Kernels& k = kernels();
    const Layer& layer = layers[index];
    const Heads& heads = layer.heads;
    const int64_t dim = heads.head_dim, group = heads.num_heads / heads.num_kv_heads;
    const float* q = floats_of(qkv_) + row * layer.query_key_value.num_outputs;
    const float* key = q + heads.num_heads * dim + kv_head * dim;
    const float* value = q + (heads.num_heads + heads.num_kv_heads) * dim + kv_head * heads.value_dim;
    const auto turned = [&](const float* from, const std::vector<float>& norm, int64_t table, float* to) {
        if (!norm.empty()) {
            k.rms_norm(from, norm.data(), layer.epsilon, dim, room);
            from = room;
        }
        if (table < 0) {
            if (from != to) std::memcpy(to, from, size_t(dim) * sizeof(float));
            return;
        }
        const AngleTable& angles = a.tables[size_t(table)];
        k.rotate(from, angles.cos + row * angles.half, angles.sin + row * angles.half, angles.half, dim, 1.0f, to);
    };
    const auto queries_in = [&](int64_t table) {
        return floats_of(queries_) + (std::max<int64_t>(0, table) * a.rows + row) * heads.num_heads * dim + kv_head * group * dim;
    };
    for (const int64_t table : tables_[index * a.segments.size() + size_t(segment)])
        for (int64_t h = 0; h < group; ++h)
            turned(q + (kv_head * group + h) * dim, layer.query_norm, table, queries_in(table) + h * dim);
    const int64_t own_row = row - a.segments[size_t(segment)].first_row;
    for (const Observed& observed : a.observed[index])
        if (observed.segment == segment)
            std::memcpy(observed.queries + (own_row * heads.num_heads + kv_head * group) * dim, queries_in(observed.table),
                        size_t(group * dim) * sizeof(float));
    const Target& target = a.targets[index][size_t(segment)];
    const int64_t at = target.at + own_row, width_of = nbytes_of(target.number);
    float* key_out = room + dim;
    turned(key, layer.key_norm, target.table, key_out);
    k.convert(key_out, target.number, dim,
              static_cast<char*>(target.keys) + (kv_head * target.key_head_stride + at * target.key_stride) * width_of);
    k.convert(value, target.number, heads.value_dim,
              static_cast<char*>(target.values) + (kv_head * target.value_head_stride + at * target.value_stride) * width_of);
}

void Program::attention(Team& team, const RunArguments& a, size_t index) {
    const Heads& heads = layers[index].heads;
    alignas(64) float room[2 * 1024];
    team.share(a.rows * heads.num_kv_heads, 8, [&](int64_t begin, int64_t end) {
        int64_t segment = 0;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / heads.num_kv_heads;
            while (row >= a.segments[size_t(segment)].first_row + a.segments[size_t(segment)].num_rows) ++segment;
            rotate(a, index, segment, row, i % heads.num_kv_heads, room);
        }
    });
    if (!a.choices[index].empty()) {
        score(team, a, index);
        if (team.index == 0) {
            try {
                const float* scores = floats_of(scores_);
                for (const ChoiceArgument& choice : a.choices[index]) {
                    choose(choice, scores);
                    scores += choice.candidates;
                }
                plan(a, index);
            } catch (...) {
                failure_ = std::current_exception();
            }
        }
        team.barrier();
        if (failure_) return;
    }
    plans_[index].run(team);
}

void Program::walk(Team& team, const RunArguments& a) {
    const Kernels& k = kernels();
    float* branch = floats_of(branch_);
    const float* added = nullptr;
    const float* added_norm = nullptr;
    const bool is_few = a.rows <= kFewRows;
    const auto ask = [&](const Projection& next) {
        const Team::Range tiles = team.part(next.num_tiles);
        next.ask(tiles.begin, tiles.end);
    };
    // Products of few rows end by asking for the first numbers of the matrix behind them.
    const auto project = [&](const Projection& p, const Activations& x, float* y, int64_t ldy, bool is_sum, const Projection* next) {
        if (!is_few) {
            team.share(p.num_tiles, p.grain(team.size, x.rows()),
                       [&](int64_t begin, int64_t end) { p.run(x, begin, end, y, ldy, is_sum); });
            return;
        }
        const Team::Range tiles = team.part(p.num_tiles);
        p.run(x, tiles.begin, tiles.end, y, ldy, is_sum);
        if (next != nullptr) ask(*next);
        team.barrier();
    };
    // A branch goes straight onto x, or aside when it is adapted or normalised first. `plain` is what it reads, in fp32.
    const auto join = [&](size_t index, Site site, const Projection& p, const Activations& x, const float* plain,
                          const std::vector<float>& norm, const Projection* next) {
        const bool is_changed = has_delta(index, site), is_sum = norm.empty() && !is_changed;
        added = norm.empty() ? nullptr : branch;
        added_norm = norm.empty() ? nullptr : norm.data();
        project(p, x, is_sum ? a.x : branch, width, is_sum, next);
        if (!is_changed) return;
        adapt_site(team, index, site, plain, p.columns, branch, width);
        if (norm.empty())
            team.share(a.rows, 4, [&](int64_t begin, int64_t end) {
                k.add(a.x + begin * width, branch + begin * width, (end - begin) * width, a.x + begin * width);
            });
    };
    const auto mixed = [&](const Layer& layer) -> const Activations& {
        const int64_t columns = layer.output.columns;
        if (is_few) {
            Activations& own = own_mixed_[size_t(team.index)];
            own.quantize(floats_of(attended_), columns, 0, a.rows);
            return own;
        }
        team.share(a.rows, 1, [&](int64_t begin, int64_t end) { mixed_.quantize(floats_of(attended_), columns, begin, end); });
        return mixed_;
    };
    const auto open = [&](const Layer& layer, const Activations& x, const GateRow* adapted) {
        if (!is_few) {
            team.share(layer.gate.num_blocks(), a.rows >= 32 ? 2 : 1,
                       [&](int64_t begin, int64_t end) { layer.gate.run(x, begin, end, inner_, adapted); });
            return;
        }
        const Team::Range blocks = team.part(layer.gate.num_blocks());
        layer.gate.run(x, blocks.begin, blocks.end, inner_, adapted);
        ask(layer.down);
        team.barrier();
    };
    for (size_t index = 0; index < layers.size(); ++index) {
        const Layer& layer = layers[index];
        const Projection& next = index + 1 < layers.size() ? layers[index + 1].query_key_value : head;
        const Activations& x = read(team, a, layer.mixer_norm.data(), layer.epsilon, added, added_norm,
                                    has_delta(index, kQueryKeyValue) || reads_entry(index, kOutput));
        project(layer.query_key_value, x, floats_of(qkv_), layer.query_key_value.num_outputs, false, &layer.output);
        adapt_site(team, index, kQueryKeyValue, floats_of(normed_), width, floats_of(qkv_),
                   layer.query_key_value.num_outputs);
        attention(team, a, index);
        if (failure_) return;
        scale_inputs(team, index);
        join(index, kOutput, layer.output, mixed(layer), floats_of(attended_), layer.mixer_output_norm, &layer.gate.up);
        const Activations& y = read(team, a, layer.feed_forward_norm.data(), layer.epsilon, added, added_norm,
                                    has_delta(index, kGate) || has_delta(index, kUp) || reads_entry(index, kDown));
        open(layer, y, adapt_gate(team, index, a.rows));
        join(index, kDown, layer.down, inner_, floats_of(kept_), layer.feed_forward_output_norm, &next);
    }
    if (added != nullptr) read(team, a, nullptr, layers.back().epsilon, added, added_norm);
    const int64_t count = int64_t(a.logit_rows.size());
    team.share(count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            float* row = (a.hidden == nullptr ? floats_of(hidden_) : a.hidden) + i * width;
            const float* from = a.x + a.logit_rows[size_t(i)] * width;
            if (final_norm.empty()) std::memcpy(row, from, size_t(width) * sizeof(float));
            else k.rms_norm(from, final_norm.data(), epsilon, width, row);
            last_.quantize_row(row, i);
        }
    });
    if (a.logits != nullptr && count > 0) project(head, last_, a.logits, head.num_outputs, false, nullptr);
}

}  // namespace plait
