// Attention of queries over one chunk of positions, and the fold of chunks.
//
// A chunk covers 256 positions from a multiple of 256, in whatever strands they lie. A key's score stands in the slot
// of its position, and a slot that is hidden or empty has weight 0, which changes no sum: a row's result depends
// neither on the rows beside it nor on where strands begin and end. The nodes of a draft tree stand in the slots of
// their depths, so that a path has the bits of the same tokens in a row.
#pragma once

#include <type_traits>

#include "kernel_math.h"

// Functions that are called from many places and are long: one copy of each keeps code and compile time small.
#define PLAIT_APART __attribute__((noinline))

namespace plait {
namespace {

template <int N>
using Count = std::integral_constant<int, N>;

template <class S>
struct Attention {
    using F = typename S::F;
    using M = Math<S>;

    static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
    static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

    // Keys and values are read once each, from memory rather than a cache when the past is long: ask for them
    // some tokens ahead. Asking beyond the end does nothing.
    static constexpr int64_t kAhead = 32;
    template <Number N, int Locality = 3>
    static void fetch(const void* numbers, int64_t first, int64_t count) {
        constexpr int64_t kSize = N == Number::fp32 ? 4 : 2;
        const char* start = static_cast<const char*>(numbers) + first * kSize;
        for (int64_t at = 0; at < count * kSize; at += 64) __builtin_prefetch(start + at, 0, Locality);
    }

    // Numbers of the keys or of the values of a piece.
    struct Source {
        const void* at;
        int64_t stride, dim;
        Number number;
    };

    // Scores of `Rows` rows against `count` keys, four at a time: keys 0, 1, ... or those of `order`. Lane l sums
    // channels l, l + 16, ...; the lanes are added by `sum`. Up to three scores behind the last are meaningless. The
    // values of the keys, where given, are asked for meanwhile.
    template <Number N, int Rows>
    static void scores(const float* q, int64_t padded_dim, Source keys, const int64_t* order, int64_t count,
                       const Source* values, float* out) {
        using R = Reader<S, N>;
        constexpr int kKeys = S::keys_at_once(Rows);
        for (int64_t j = 0; j < count; j += 4) {
            F sum[Rows][4];
            int64_t at[4];
            for (int k = 0; k < 4; ++k) {
                const int64_t key = smaller(j + k, count - 1);
                at[k] = (order == nullptr ? key : order[key]) * keys.stride;
                fetch<N>(keys.at, (j + kAhead + k) * keys.stride, keys.dim);
                if (values != nullptr) fetch<N>(values->at, (j + k) * values->stride, values->dim);
            }
            // Unrolled, sums stay in registers; else they are copied in halves, and every load of a whole waits.
#pragma GCC unroll 4
            for (int first = 0; first < 4; first += kKeys) {
                F own[Rows][kKeys];
                for (int r = 0; r < Rows; ++r)
                    for (int k = 0; k < kKeys; ++k) own[r][k] = S::zero();
                int64_t c = 0;
                for (; c + kLanes <= keys.dim; c += kLanes) {
                    F key[kKeys];
                    for (int k = 0; k < kKeys; ++k) key[k] = R::load(keys.at, at[first + k] + c);
                    for (int r = 0; r < Rows; ++r) {
                        const F v = S::load(q + r * padded_dim + c);
                        for (int k = 0; k < kKeys; ++k) own[r][k] = S::fma(key[k], v, own[r][k]);
                    }
                }
                if (c < keys.dim) {
                    for (int k = 0; k < kKeys; ++k) {
                        const F key = R::load_some(keys.at, at[first + k] + c, keys.dim - c);
                        for (int r = 0; r < Rows; ++r)
                            own[r][k] = S::fma(key, S::load(q + r * padded_dim + c), own[r][k]);
                    }
                }
                for (int r = 0; r < Rows; ++r)
                    for (int k = 0; k < kKeys; ++k) sum[r][first + k] = own[r][k];
            }
            S::template store_sums<Rows>(sum, out + j, kScoreStride);
        }
    }
    template <int Rows>
    PLAIT_APART static void scores_of(const float* q, int64_t padded_dim, Source keys, const int64_t* order, int64_t count,
                          const Source* values, float* out) {
        switch (keys.number) {
            case Number::fp32: return scores<Number::fp32, Rows>(q, padded_dim, keys, order, count, values, out);
            case Number::bf16: return scores<Number::bf16, Rows>(q, padded_dim, keys, order, count, values, out);
            case Number::fp16: return scores<Number::fp16, Rows>(q, padded_dim, keys, order, count, values, out);
        }
    }

    // sum[row] += weight[row][j] * value[j], j ascending, for some vectors of channels at a time. Meanwhile, the keys where
    // the next chunk's would be, if given, are asked to come to the second level: memory would rest else.
    template <Number N, int Rows, int Vectors>
    static void some_values(const float* weights, Source values, int64_t channel, int64_t padded_value, int64_t first,
                            int64_t last, const Source* next, float* sum) {
        using R = Reader<S, N>;
        F total[Rows][Vectors];
        for (int r = 0; r < Rows; ++r)
            for (int k = 0; k < Vectors; ++k) total[r][k] = S::load(sum + r * padded_value + channel + k * kLanes);
        const int64_t width = values.dim - channel;
        for (int64_t j = first; j < last; ++j) {
            if (next != nullptr) fetch<N, 2>(next->at, j * next->stride, next->dim);
            F v[Vectors];
            for (int k = 0; k < Vectors; ++k) {
                const int64_t at = j * values.stride + channel + k * kLanes;
                v[k] = Vectors == 1 && width < kLanes ? R::load_some(values.at, at, width) : R::load(values.at, at);
            }
            for (int r = 0; r < Rows; ++r) {
                const F w = S::set1(weights[r * kScoreStride + j]);
                for (int k = 0; k < Vectors; ++k) total[r][k] = S::fma(w, v[k], total[r][k]);
            }
        }
        for (int r = 0; r < Rows; ++r)
            for (int k = 0; k < Vectors; ++k) S::store(sum + r * padded_value + channel + k * kLanes, total[r][k]);
    }
    template <Number N, int Rows>
    static void values(const float* weights, Source values, int64_t padded_value, int64_t first, int64_t last, const Source* next,
                       float* sum) {
        constexpr int kVectors = S::vectors_at_once(Rows);
        int64_t c = 0;
        for (; c + kVectors * kLanes <= values.dim; c += kVectors * kLanes, next = nullptr)
            some_values<N, Rows, kVectors>(weights, values, c, padded_value, first, last, next, sum);
        for (; c < values.dim; c += kLanes, next = nullptr)
            some_values<N, Rows, 1>(weights, values, c, padded_value, first, last, next, sum);
    }
    template <int Rows>
    PLAIT_APART static void values_of(const float* weights, Source from, int64_t padded_value, int64_t first, int64_t last,
                                      const Source* next, float* sum) {
        switch (from.number) {
            case Number::fp32: return values<Number::fp32, Rows>(weights, from, padded_value, first, last, next, sum);
            case Number::bf16: return values<Number::bf16, Rows>(weights, from, padded_value, first, last, next, sum);
            case Number::fp16: return values<Number::fp16, Rows>(weights, from, padded_value, first, last, next, sum);
        }
    }

    static bool is_finite(const float* sum, int64_t padded_value) {
        F poison = S::zero();
        for (int64_t c = 0; c < padded_value; c += kLanes) poison = S::fma(S::load(sum + c), S::zero(), poison);
        return S::sum(poison) == 0.0f;
    }

    static bool is_shown(const DraftNodes& of, int64_t query, int64_t node) {
        if (node >= of.num_nodes || node >= 64 * of.words) return false;
        if (!(of.ancestors[query * of.words + node / 64] >> (node % 64) & 1)) return false;
        return of.window == 0 || of.query_depths[query] - of.node_depths[node] < of.window;
    }
    // Slot of the node that key `key` of a piece is, where the query sees it in this chunk; else -1.
    static int64_t node_slot(const Piece& piece, int64_t query, int64_t key) {
        const DraftNodes& of = *piece.nodes;
        const int64_t node = of.first_node + key;
        if (!is_shown(of, query, node)) return -1;
        const int64_t slot = of.first_slot + of.node_depths[node];
        return slot >= 0 && slot < kKeyChunk ? slot : -1;
    }
    // Call body(key, slot) for the nodes of a piece that a query sees, in their order.
    template <class Body>
    static void each_node(const Piece& piece, int64_t query, Body body) {
        for (int64_t key = piece.low[query]; key < piece.high[query]; ++key) {
            const int64_t slot = node_slot(piece, query, key);
            if (slot >= 0) body(key, slot);
        }
    }

    // The scores of the nodes that a query sees, in their slots.
    PLAIT_APART static void score_nodes(const Visit& v, const Piece& piece, int64_t r, const float* q, float* row) {
        const int64_t query = r / v.group;
        int64_t keys[64], slots[64], count = 0;
        alignas(64) float found[64 + kLanes];
        const auto write = [&] {
            scores_of<1>(q, v.padded_dim, keys_of(v, piece), keys, count, nullptr, found);
            if (v.softcap != 0.0f) cap(v.softcap, found, count);
            if (v.slopes != nullptr) take_bias(v, piece, r, slots, count, found);
            for (int64_t i = 0; i < count; ++i) row[slots[i]] = found[i];
            count = 0;
        };
        each_node(piece, query, [&](int64_t key, int64_t slot) {
            keys[count] = key;
            slots[count++] = slot;
            if (count == 64) write();
        });
        if (count > 0) write();
    }

    // Take the bias of row r off its scores of keys in slots from `slot` on.
    PLAIT_APART static void take_bias(const Visit& v, const Piece& piece, int64_t r, int64_t slot, int64_t count, float* x) {
        const F slope = S::set1(-v.slopes[r % v.group] * v.slope_factor);
        const int64_t distance = piece.distance[r / v.group];
        if (piece.step == 0) {
            const F growth = S::set1(v.growth[distance]);
            return M::map(count, x, [&](int64_t at, int64_t n) { return S::fma(slope, growth, M::at(x, at, n)); });
        }
        // Growth is the same in both directions, so that it is read forwards.
        const float* growth = v.growth + slot - distance;
        M::map(count, x, [&](int64_t at, int64_t n) { return S::fma(slope, M::at(growth, at, n), M::at(x, at, n)); });
    }
    // The same for up to a chunk of keys in any slots.
    PLAIT_APART static void take_bias(const Visit& v, const Piece& piece, int64_t r, const int64_t* slots, int64_t count, float* x) {
        alignas(64) float growth[kKeyChunk + kLanes];
        const int64_t distance = piece.distance[r / v.group];
        for (int64_t i = 0; i < count; ++i) growth[i] = v.growth[piece.step * slots[i] - distance];
        const F slope = S::set1(-v.slopes[r % v.group] * v.slope_factor);
        M::map(count, x, [&](int64_t at, int64_t n) { return S::fma(slope, M::at(growth, at, n), M::at(x, at, n)); });
    }

    PLAIT_APART static void cap(float softcap, float* x, int64_t count) {
        const F most = S::set1(softcap);
        M::map(count, x, [&](int64_t at, int64_t n) {
            return S::mul(most, M::tanh(S::div(M::at(x, at, n), most)));
        });
    }

    // Scores of row r to weights, in place, over slots [begin, end), multiples of 16; returns (top, total).
    PLAIT_APART static void soften(const Visit& v, int64_t r, const float* q, int64_t begin, int64_t end, float* row, float* top,
                       float* total) {
        const float hidden = -__builtin_inff();
        const int64_t query = r / v.group;
        int64_t at = begin;
        for (int64_t i = 0; i < v.num_pieces; ++i) {
            const Piece& piece = v.pieces[i];
            if (piece.nodes != nullptr) break;
            const int64_t low = piece.slot + piece.low[query], high = piece.slot + piece.high[query];
            if (low >= high) continue;
            for (; at < low; ++at) row[at] = hidden;
            if (v.softcap != 0.0f) cap(v.softcap, row + low, high - low);
            if (v.slopes != nullptr) take_bias(v, piece, r, low, high - low, row + low);
            at = high;
        }
        for (; at < end; ++at) row[at] = hidden;
        for (int64_t i = 0; i < v.num_pieces; ++i)
            if (v.pieces[i].nodes != nullptr) score_nodes(v, v.pieces[i], r, q, row);
        // A NaN score passes max (which returns its second operand) and so poisons its own row only.
        F most = S::set1(hidden);
        F poison = S::zero();
        for (int64_t j = begin; j < end; j += kLanes) {
            const F s = S::load(row + j);
            most = S::max(s, most);
            poison = S::add(poison, S::select_less(S::set1(0.0f), S::abs(s), S::zero(), S::mul(s, S::zero())));
        }
        *top = S::largest(most);
        const float nan = S::sum(poison);
        if (nan != 0.0f) *top = nan;
        if (*top == hidden) {
            *total = 0.0f;
            for (int64_t j = begin; j < end; ++j) row[j] = 0.0f;
            return;
        }
        const F shift = S::set1(*top);
        F sum = S::zero();
        for (int64_t j = begin; j < end; j += kLanes) {
            const F weight = M::exp(S::sub(S::load(row + j), shift));
            S::store(row + j, weight);
            sum = S::add(sum, weight);
        }
        *total = S::sum(sum);
    }

    struct Range {
        int64_t low, high;
    };
    // Keys of a piece that some row of a block sees.
    static Range seen(const Visit& v, const Piece& piece, int64_t row, int rows) {
        Range range{piece.count, 0};
        for (int64_t query = row / v.group; query <= (row + rows - 1) / v.group; ++query) {
            if (piece.low[query] >= piece.high[query]) continue;
            range.low = smaller(range.low, piece.low[query]);
            range.high = larger(range.high, piece.high[query]);
        }
        return range;
    }

    static const void* moved(const void* base, int64_t index, Number number) {
        return static_cast<const char*>(base) + index * nbytes_of(number);
    }
    static Source keys_of(const Visit& v, const Piece& piece) {
        return {piece.keys, piece.key_stride, v.head_dim, piece.number};
    }
    static Source values_of_piece(const Visit& v, const Piece& piece) {
        return {piece.values, piece.value_stride, v.value_dim, piece.number};
    }

    // From the first to the last slot of the runs that some row of a block sees.
    static Range runs_seen(const Visit& v, int64_t row, int rows) {
        Range slots{kKeyChunk, 0};
        for (int64_t i = 0; i < v.num_pieces; ++i) {
            const Piece& piece = v.pieces[i];
            const Range range = seen(v, piece, row, rows);
            if (piece.nodes != nullptr || range.low >= range.high) continue;
            slots.low = smaller(slots.low, piece.slot + range.low);
            slots.high = larger(slots.high, piece.slot + range.high);
        }
        return slots;
    }

    // Scores of a block of rows to weights. A draft may have nodes in all slots from its first one on.
    static void soften_rows(const Visit& v, int64_t row, int rows, float* weights, Fold fold) {
        Range slots = runs_seen(v, row, rows);
        for (int64_t i = 0; i < v.num_pieces; ++i) {
            const Range range = seen(v, v.pieces[i], row, rows);
            if (v.pieces[i].nodes != nullptr && range.low < range.high)
                slots = {smaller(slots.low, larger(v.pieces[i].nodes->first_slot, 0)), kKeyChunk};
        }
        const int64_t begin = slots.low / kLanes * kLanes, end = (slots.high + kLanes - 1) / kLanes * kLanes;
        for (int64_t r = row; r < row + rows; ++r)
            soften(v, r, v.q + r * v.padded_dim, begin, end, weights + r * kScoreStride, fold.top + r, fold.total + r);
    }

    template <int Rows>
    static void weigh(const Visit& v, int64_t row, float* weights, Fold fold) {
        for (int64_t i = 0; i < v.num_pieces; ++i) {
            const Piece& piece = v.pieces[i];
            const Range range = seen(v, piece, row, Rows);
            if (piece.nodes != nullptr || range.low >= range.high) continue;
            Source keys = keys_of(v, piece), later = values_of_piece(v, piece);
            keys.at = moved(keys.at, range.low * keys.stride, keys.number);
            later.at = moved(later.at, range.low * later.stride, later.number);
            scores_of<Rows>(v.q + row * v.padded_dim, v.padded_dim, keys, nullptr, range.high - range.low,
                            row == 0 ? &later : nullptr, weights + row * kScoreStride + piece.slot + range.low);
        }
        soften_rows(v, row, Rows, weights, fold);
    }

    // sum += weight * value over the nodes that a row sees; over the keys of a run with a weight where `is_careful`.
    PLAIT_APART static void add_rows(const Visit& v, const Piece& piece, int64_t query, const float* weights, bool is_careful, float* sum) {
        const Source from = values_of_piece(v, piece);
        const auto add = [&](int64_t key, int64_t slot) {
            if (is_careful && weights[slot] == 0.0f) return;
            Source own = from;
            own.at = moved(from.at, key * from.stride, from.number);
            values_of<1>(weights + slot, own, v.padded_value, 0, 1, nullptr, sum);
        };
        if (piece.nodes != nullptr) return each_node(piece, query, add);
        for (int64_t key = piece.low[query]; key < piece.high[query]; ++key) add(key, piece.slot + key);
    }

    // What drafts add to the sums of a block of rows whose values of runs are in.
    static void finish_rows(const Visit& v, int64_t row, int rows, const float* weights, Fold fold) {
        for (int64_t r = row; r < row + rows; ++r) {
            const float* own = weights + r * kScoreStride;
            float* sum = fold.sum + r * v.padded_value;
            for (int64_t i = 0; i < v.num_pieces; ++i)
                if (v.pieces[i].nodes != nullptr) add_rows(v, v.pieces[i], r / v.group, own, false, sum);
            // Where a hidden key's value is infinite or NaN, 0 times it is NaN: leave keys of weight 0 out then.
            if (is_finite(sum, v.padded_value)) continue;
            std::memset(sum, 0, size_t(v.padded_value) * sizeof(float));
            for (int64_t i = 0; i < v.num_pieces; ++i) add_rows(v, v.pieces[i], r / v.group, own, true, sum);
        }
    }

    template <int Rows>
    static void combine(const Visit& v, int64_t row, const float* weights, Fold fold) {
        float* sum = fold.sum + row * v.padded_value;
        std::memset(sum, 0, size_t(Rows * v.padded_value) * sizeof(float));
        for (int64_t i = 0; i < v.num_pieces; ++i) {
            const Piece& piece = v.pieces[i];
            const Range range = seen(v, piece, row, Rows);
            if (piece.nodes != nullptr || range.low >= range.high) continue;
            Source next = keys_of(v, piece);
            next.at = moved(next.at, piece.count * next.stride, next.number);
            values_of<Rows>(weights + row * kScoreStride + piece.slot, values_of_piece(v, piece), v.padded_value, range.low,
                            range.high, row == 0 ? &next : nullptr, sum);
        }
        finish_rows(v, row, Rows, weights, fold);
    }

    // Call body(first row, how many as a constant) for the blocks of rows that meet a key at once.
    template <class Body>
    static void each_rows(const Visit& v, Body body) {
        constexpr int kMost = S::kQueryRows;
        int64_t row = 0;
        for (; row + kMost <= v.rows; row += kMost) body(row, Count<kMost>());
        if constexpr (kMost > 3) {
            if (v.rows - row == 3) return body(row, Count<3>());
        }
        if constexpr (kMost > 2) {
            if (v.rows - row == 2) return body(row, Count<2>());
        }
        for (; row < v.rows; ++row) body(row, Count<1>());
    }

    // Few rows: keys and values are read where they lie.
    static void attend(const Visit& v, float* weights, Fold fold) {
        each_rows(v, [&](int64_t row, auto rows) { weigh<rows>(v, row, weights, fold); });
        each_rows(v, [&](int64_t row, auto rows) { combine<rows>(v, row, weights, fold); });
    }

    static void merge_folds(Fold into, Fold from, int64_t rows, int64_t padded_value) {
        for (int64_t r = 0; r < rows; ++r) {
            if (from.top[r] == -__builtin_inff()) continue;
            float* sum = into.sum + r * padded_value;
            const float* add = from.sum + r * padded_value;
            if (into.top[r] == -__builtin_inff()) {
                into.top[r] = from.top[r];
                into.total[r] = from.total[r];
                std::memcpy(sum, add, size_t(padded_value) * sizeof(float));
                continue;
            }
            const float top = into.top[r] > from.top[r] ? into.top[r] : from.top[r];
            float shift[kLanes] = {into.top[r] - top, from.top[r] - top}, factor[kLanes];
            S::store(factor, M::exp(S::load(shift)));
            into.total[r] = into.total[r] * factor[0] + from.total[r] * factor[1];
            into.top[r] = top;
            const F keep = S::set1(factor[0]), join = S::set1(factor[1]);
            for (int64_t c = 0; c < padded_value; c += kLanes)
                S::store(sum + c, S::fma(S::load(add + c), join, S::mul(S::load(sum + c), keep)));
        }
    }

    static void finish_fold(Fold fold, int64_t row, int64_t value_dim, int64_t padded_value, float* out, float* lse) {
        const float* sum = fold.sum + row * padded_value;
        if (fold.top[row] == -__builtin_inff()) {
            std::memset(out, 0, size_t(value_dim) * sizeof(float));
            if (lse != nullptr) *lse = -__builtin_inff();
            return;
        }
        const F inverse = S::set1(1.0f / fold.total[row]);
        M::map(value_dim, out, [&](int64_t i, int64_t n) { return S::mul(M::at(sum, i, n), inverse); });
        if (lse != nullptr) *lse = float(double(fold.top[row]) + std::log(double(fold.total[row])));
    }
};

}  // namespace
}  // namespace plait
