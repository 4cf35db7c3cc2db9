// Trials of attention, over plain and over coded keys and values.
#include <algorithm>
#include <vector>

#include "attention.h"
#include "fuzz.h"

namespace plait {
namespace {

constexpr int64_t kReach = 2000;  // larger than any distance here

// Coded keys or values with storage of their own, each array of exactly its size.
struct CodedCase {
    CodedNumbers numbers;
    std::vector<uint8_t> codes, factor_codes, outlier_tokens;
    std::vector<uint16_t> scale, minimum, factor_scale, factor_minimum, factor_channels, outlier_numbers;
    std::vector<float> plain, means;
    std::vector<int16_t> kept, outlier_channels;
    std::vector<int32_t> starts;
};

void fill_affine(StoredNumbers& stored, int64_t heads, int64_t tokens, int64_t width, std::vector<uint8_t>& codes,
                 std::vector<uint16_t>& scale, std::vector<uint16_t>& minimum) {
    const int widths[] = {2, 3, 4, 8};
    const int bits = widths[pick(0, 3)];
    const bool is_along_tokens = pick(0, 1) != 0;
    const int64_t channels = heads * width, group = is_along_tokens ? pick(1, 300) : pick(1, channels);
    const int64_t skipped = is_along_tokens ? pick(0, group - 1) : 0, row_bytes = bits * ((channels + 7) / 8);
    const int64_t rows = is_along_tokens ? (tokens + skipped + group - 1) / group : tokens;
    const int64_t columns = is_along_tokens ? channels : (channels + group - 1) / group;
    codes.resize(static_cast<size_t>(tokens * row_bytes));
    for (uint8_t& code : codes) code = uint8_t(pick(0, 255));
    scale = halves(rows * columns);
    minimum = halves(rows * columns);
    stored = {heads, tokens, width, true, {codes.data(), row_bytes, tokens * row_bytes, scale.data(), minimum.data(), rows,
              columns, bits, is_along_tokens, group, skipped}, {}};
}

// Where `is_bare`, plain numbers and nothing besides.
void fill_coded(CodedCase& c, int64_t heads, int64_t tokens, int64_t dim, bool is_thin, bool is_bare) {
    const int64_t width = is_thin ? pick(1, dim) : dim;
    if (is_bare || pick(0, 3) == 0) {
        c.plain = numbers(heads * tokens * width);
        c.numbers.stored = {heads, tokens, width, false, {}, {c.plain.data(), tokens * width, width, Number::fp32}};
    } else {
        fill_affine(c.numbers.stored, heads, tokens, width, c.codes, c.scale, c.minimum);
    }
    c.numbers.dim = dim;
    if (!is_bare && pick(0, 1)) {
        const int64_t rank = pick(1, 20);
        fill_affine(c.numbers.factor, heads, tokens, rank, c.factor_codes, c.factor_scale, c.factor_minimum);
        c.factor_channels = halves(heads * width * rank);
        c.numbers.factor_channels = c.factor_channels.data();
    }
    if (!is_bare && pick(0, 1)) {
        const int64_t blocks = (tokens + kKeyChunk - 1) / kKeyChunk;
        c.starts.push_back(0);
        for (int64_t run = 0; run < blocks * heads; ++run) {
            const int64_t left = std::min<int64_t>(kKeyChunk, tokens - run / heads * kKeyChunk);
            for (int64_t i = pick(0, 40); i > 0; --i) {
                c.outlier_tokens.push_back(uint8_t(pick(0, left - 1)));
                c.outlier_channels.push_back(int16_t(pick(0, width - 1)));
            }
            std::sort(c.outlier_tokens.begin() + c.starts.back(), c.outlier_tokens.end());
            c.starts.push_back(int32_t(c.outlier_tokens.size()));
        }
        c.outlier_numbers = halves(int64_t(c.outlier_tokens.size()));
        c.numbers.outliers = {c.starts.data(), c.outlier_tokens.data(), c.outlier_channels.data(), c.outlier_numbers.data(),
                              int64_t(c.outlier_tokens.size())};
    }
    if (!is_thin) return;
    for (int64_t head = 0; head < heads; ++head)
        for (int64_t i = 0; i < width; ++i) c.kept.push_back(int16_t(i + pick(0, 1) * (dim - width)));
    c.numbers.kept = c.kept.data();
    if (pick(0, 1)) {
        c.means = numbers(heads * dim);
        c.numbers.means = c.means.data();
    }
}

}  // namespace

void fuzz_attention() {
    const int64_t group = pick(1, 5), kv_heads = pick(1, 3), heads = group * kv_heads;
    const int64_t dim = pick(0, 2) ? 16 * pick(1, 6) : pick(1, 90), value_dim = pick(0, 2) ? dim : pick(1, 90);
    const int64_t queries = pick(0, 30), length = pick(0, 3) ? pick(0, 300) : pick(0, 1200);
    const int64_t capacity = length + pick(0, 2);
    const Number kind = Number(pick(0, 2));
    const std::vector<float> q = numbers(queries * heads * dim);
    const std::vector<float> k = numbers(kv_heads * capacity * dim), v = numbers(kv_heads * capacity * value_dim);
    std::vector<uint8_t> keys(k.size() * size_t(nbytes_of(kind))), values(v.size() * size_t(nbytes_of(kind)));
    kernels().convert(k.data(), kind, int64_t(k.size()), keys.data());
    kernels().convert(v.data(), kind, int64_t(v.size()), values.data());
    Mask mask;
    mask.kind = MaskKind(pick(0, 2));
    mask.first_query = pick(0, 400);
    mask.first_key = pick(0, 100);
    mask.window = pick(0, 1) ? pick(1, 300) : 0;
    mask.words = pick(1, 2);
    std::vector<int64_t> depths(static_cast<size_t>(queries));
    std::vector<uint64_t> ancestors(static_cast<size_t>(queries * mask.words));
    for (int64_t& depth : depths) depth = pick(0, 20);
    for (uint64_t& bits : ancestors) bits = engine();
    if (mask.kind == MaskKind::tree) {
        mask.depths = depths.data();
        mask.ancestors = ancestors.data();
    }
    const float softcap = pick(0, 1) ? 10.0f : 0.0f;
    const bool is_biased = pick(0, 1) != 0;
    const std::vector<float> slopes = numbers(heads), growth = numbers(2 * kReach + 1);
    compare("attention", queries * heads * (value_dim + 1), [&](float* out) {
        AttentionPlan plan;
        AttentionScratch room;
        plan.reset({heads, kv_heads, dim, value_dim, 0.3f, softcap, is_biased ? slopes.data() : nullptr, growth.data() + kReach},
                   Pool::get().size());
        if (length > 0)
            plan.add_visit({q.data(), heads * dim, keys.data(), values.data(), capacity * dim, dim, capacity * value_dim,
                            value_dim, length, kind, mask});
        plan.add_segment({queries, 0, plan.num_visits(), out, heads * value_dim, out + queries * heads * value_dim});
        plan.finish(room);
        Pool::get().run([&](Team& team) { plan.run(team); });
    });
}

void fuzz_coded() {
    const int64_t group = pick(1, 4), kv_heads = pick(1, 3), heads = group * kv_heads, dim = pick(1, 90);
    const int64_t value_dim = pick(1, 90), queries = pick(0, 30), tokens = pick(1, 600);
    CodedCase keys, values;
    // Those that are read where they lie come up too seldom by themselves.
    const bool is_bare = pick(0, 3) == 0;
    fill_coded(keys, kv_heads, tokens, dim, pick(0, 1) != 0, is_bare);
    fill_coded(values, kv_heads, tokens, value_dim, !is_bare && pick(0, 1) != 0, is_bare);
    const std::vector<float> q = numbers(queries * heads * dim);
    StrandVisit visit{};
    visit.q = q.data();
    visit.q_stride = heads * dim;
    visit.length = pick(1, tokens);
    visit.mask.kind = MaskKind(pick(0, 1));
    visit.mask.first_query = pick(0, 700);
    visit.mask.window = pick(0, 1) ? pick(1, 300) : 0;
    visit.mask.first_shown = pick(0, visit.length);
    visit.coded_keys = &keys.numbers;
    visit.coded_values = &values.numbers;
    const bool is_biased = pick(0, 1) != 0;
    const std::vector<float> slopes = numbers(heads), growth = numbers(2 * kReach + 1);
    compare("coded attention", queries * heads * (value_dim + 1), [&](float* out) {
        AttentionPlan plan;
        AttentionScratch room;
        plan.reset({heads, kv_heads, dim, value_dim, 0.05f, 0.0f, is_biased ? slopes.data() : nullptr, growth.data() + kReach},
                   Pool::get().size());
        plan.add_visit(visit);
        plan.add_segment({queries, 0, 1, out, heads * value_dim, out + queries * heads * value_dim});
        plan.finish(room);
        Pool::get().run([&](Team& team) { plan.run(team); });
    });
}

// Several segments over strands that some of them share, cut at other places; visits of some of the queries, with weights,
// in groups and with a bias.
void fuzz_visits() {
    const int64_t group = pick(1, 4), kv_heads = pick(1, 2), heads = group * kv_heads, dim = pick(1, 70);
    const int64_t num_strands = pick(1, 4), num_segments = pick(1, 4);
    const float softcap = pick(0, 1) ? 10.0f : 0.0f;
    const bool is_biased = pick(0, 1) != 0;
    const std::vector<float> slopes = numbers(heads), growth = numbers(2 * kReach + 1);
    std::vector<std::vector<float>> keys, values, queries;
    std::vector<int64_t> lengths, firsts;
    for (int64_t i = 0; i < num_strands; ++i) {
        lengths.push_back(pick(0, 300));
        firsts.push_back(pick(0, 300));
        keys.push_back(numbers(kv_heads * lengths.back() * dim));
        values.push_back(numbers(kv_heads * lengths.back() * dim));
    }
    struct Asking {
        int64_t queries;
        std::vector<StrandVisit> visits;
    };
    std::vector<Asking> segments;
    int64_t total = 0;
    for (int64_t s = 0; s < num_segments; ++s) {
        Asking asking{pick(0, 40), {}};
        queries.push_back(numbers(2 * asking.queries * heads * dim));
        total += asking.queries;
        Weight weight;
        const int64_t first_query = pick(0, 600);
        for (int64_t v = pick(0, 8); v > 0; --v) {
            const size_t strand = size_t(pick(0, num_strands - 1));
            if (pick(0, 2) == 0) {
                weight = {};
                if (pick(0, 1)) weight = {0, 1000 * s + v, float(pick(1, 8)) / 4, float(pick(1, 8)) / 4};
            }
            weight.added = pick(0, 1) ? float(pick(-8, 8)) / 4 : 0.0f;
            StrandVisit visit{};
            visit.q = queries.back().data() + pick(0, 1) * asking.queries * heads * dim;
            visit.q_stride = heads * dim;
            visit.keys = keys[strand].data();
            visit.values = values[strand].data();
            visit.key_head_stride = visit.value_head_stride = lengths[strand] * dim;
            visit.key_stride = visit.value_stride = dim;
            visit.length = pick(0, lengths[strand]);
            visit.number = Number::fp32;
            visit.mask.kind = MaskKind(pick(0, 1));
            visit.mask.first_query = first_query;
            visit.mask.first_key = firsts[strand];
            visit.mask.window = pick(0, 2) ? 0 : pick(1, 300);
            visit.mask.nearest = pick(0, 2) ? 0 : pick(1, 300);
            visit.mask.first_shown = pick(0, visit.length);
            if (pick(0, 1)) {
                visit.visitors.first = pick(0, asking.queries + 3);
                visit.visitors.last = visit.visitors.first + pick(0, 30);
            }
            visit.weight = weight;
            visit.standing = Standing(pick(0, 2));
            visit.stands_at = pick(0, 900);
            if (visit.length > 0) asking.visits.push_back(visit);
        }
        segments.push_back(asking);
    }
    compare("visits", total * heads * (dim + 1), [&](float* out) {
        AttentionPlan plan;
        AttentionScratch room;
        plan.reset({heads, kv_heads, dim, dim, 0.2f, softcap, is_biased ? slopes.data() : nullptr, growth.data() + kReach},
                   Pool::get().size());
        float* lse = out + total * heads * dim;
        for (const Asking& asking : segments) {
            const int64_t first = plan.num_visits();
            for (const StrandVisit& visit : asking.visits) plan.add_visit(visit);
            plan.add_segment({asking.queries, first, plan.num_visits(), out, heads * dim, lse});
            out += asking.queries * heads * dim;
            lse += asking.queries * heads;
        }
        plan.finish(room);
        Pool::get().run([&](Team& team) { plan.run(team); });
    });
}

}  // namespace plait
