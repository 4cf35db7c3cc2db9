// Attention of queries over one chunk of a strand, and the fold of chunks.
//
// A chunk starts at a multiple of 256 keys counted from the strand's first, whatever the queries. A hidden key
// has weight 0, which changes no sum, so a row's result does not depend on the rows beside it.
#pragma once

#include "kernel_math.h"

namespace plait {
namespace {

template <class S>
struct Attention {
    using F = typename S::F;
    using M = Math<S>;

    static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
    static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

    // Keys and values are read once each, from memory rather than a cache when the past is long: ask for them
    // some tokens ahead. Asking beyond the end does nothing.
    static constexpr int64_t kAhead = 32;
    template <Number N>
    static void fetch(const void* numbers, int64_t first, int64_t count) {
        constexpr int64_t kSize = N == Number::fp32 ? 4 : 2;
        const char* start = static_cast<const char*>(numbers) + first * kSize;
        for (int64_t at = 0; at < count * kSize; at += 64) __builtin_prefetch(start + at);
    }

    // Scores of `Rows` rows against keys [0, count) of `keys`, four at a time. Lane l sums channels
    // l, l + 16, ...; the lanes are added by `sum`. Scores behind the last key are meaningless. The values of the
    // keys, where given, are asked for meanwhile.
    template <Number N, int Rows>
    static void scores(const float* q, int64_t padded_dim, const void* keys, int64_t stride, int64_t head_dim,
                       int64_t count, const void* values, int64_t value_stride, int64_t value_dim, float* out) {
        using R = Reader<S, N>;
        for (int64_t j = 0; j < count; j += 4) {
            F sum[Rows][4];
            int64_t at[4];
            for (int r = 0; r < Rows; ++r)
                for (int k = 0; k < 4; ++k) sum[r][k] = S::zero();
            for (int k = 0; k < 4; ++k) at[k] = smaller(j + k, count - 1) * stride;
            for (int k = 0; k < 4; ++k) {
                fetch<N>(keys, (j + kAhead + k) * stride, head_dim);
                if (values != nullptr) fetch<N>(values, (j + k) * value_stride, value_dim);
            }
            int64_t c = 0;
            for (; c + kLanes <= head_dim; c += kLanes) {
                F key[4];
                for (int k = 0; k < 4; ++k) key[k] = R::load(keys, at[k] + c);
                for (int r = 0; r < Rows; ++r) {
                    const F v = S::load(q + r * padded_dim + c);
                    for (int k = 0; k < 4; ++k) sum[r][k] = S::fma(key[k], v, sum[r][k]);
                }
            }
            if (c < head_dim) {
                for (int k = 0; k < 4; ++k) {
                    const F key = R::load_some(keys, at[k] + c, head_dim - c);
                    for (int r = 0; r < Rows; ++r)
                        sum[r][k] = S::fma(key, S::load(q + r * padded_dim + c), sum[r][k]);
                }
            }
            S::template store_sums<Rows>(sum, out + j, kKeyChunk);
        }
    }

    // sum[row] += weight[row][j] * value[j], j ascending, for four vectors of channels at a time.
    template <Number N, int Rows>
    static void values(const float* weights, const void* values, int64_t stride, int64_t value_dim,
                       int64_t padded_value, int64_t first, int64_t last, float* sum) {
        using R = Reader<S, N>;
        int64_t c = 0;
        for (; c + 4 * kLanes <= value_dim; c += 4 * kLanes) {
            F total[Rows][4];
            for (int r = 0; r < Rows; ++r)
                for (int k = 0; k < 4; ++k) total[r][k] = S::zero();
            for (int64_t j = first; j < last; ++j) {
                F v[4];
                for (int k = 0; k < 4; ++k) v[k] = R::load(values, j * stride + c + k * kLanes);
                for (int r = 0; r < Rows; ++r) {
                    const F w = S::set1(weights[r * kKeyChunk + j]);
                    for (int k = 0; k < 4; ++k) total[r][k] = S::fma(w, v[k], total[r][k]);
                }
            }
            for (int r = 0; r < Rows; ++r)
                for (int k = 0; k < 4; ++k) S::store(sum + r * padded_value + c + k * kLanes, total[r][k]);
        }
        for (; c < value_dim; c += kLanes) {
            const int64_t n = smaller(value_dim - c, kLanes);
            F total[Rows];
            for (int r = 0; r < Rows; ++r) total[r] = S::zero();
            for (int64_t j = first; j < last; ++j) {
                const F v = n == kLanes ? R::load(values, j * stride + c) : R::load_some(values, j * stride + c, n);
                for (int r = 0; r < Rows; ++r)
                    total[r] = S::fma(S::set1(weights[r * kKeyChunk + j]), v, total[r]);
            }
            for (int r = 0; r < Rows; ++r) S::store(sum + r * padded_value + c, total[r]);
        }
    }

    // The same sums for one row, leaving out keys of weight 0: where a hidden key's value is infinite or NaN,
    // 0 times it would be NaN.
    template <Number N>
    static void careful_values(const float* weights, const void* values, int64_t stride, int64_t value_dim, int64_t first,
                               int64_t last, float* sum) {
        using R = Reader<S, N>;
        for (int64_t c = 0; c < value_dim; c += kLanes) {
            const int64_t n = smaller(value_dim - c, kLanes);
            F total = S::zero();
            for (int64_t j = first; j < last; ++j) {
                if (weights[j] == 0.0f) continue;
                const F v = n == kLanes ? R::load(values, j * stride + c) : R::load_some(values, j * stride + c, n);
                total = S::fma(S::set1(weights[j]), v, total);
            }
            S::store(sum + c, total);
        }
    }

    static bool is_finite(const float* sum, int64_t padded_value) {
        F poison = S::zero();
        for (int64_t c = 0; c < padded_value; c += kLanes) poison = S::fma(S::load(sum + c), S::zero(), poison);
        return S::sum(poison) == 0.0f;
    }

    static bool is_shown(const Visit& v, int64_t query, int64_t key) {
        if (v.tree == nullptr || key < v.tree_start) return true;
        const int64_t node = key - v.tree_start;
        if (node >= v.num_nodes || node >= 64 * v.tree_words) return false;
        if (v.window > 0 && v.query_depths[query] - v.node_depths[node] >= v.window) return false;
        return v.tree[query * v.tree_words + node / 64] >> (node % 64) & 1;
    }

    // Scores of a row to weights, in place, over the whole chunk; returns (top, total).
    static void soften(const Visit& v, int64_t query, int64_t begin, int64_t end, float* row, float* top, float* total) {
        const int64_t low = smaller(larger(v.low[query] - begin, 0), end - begin);
        const int64_t high = larger(smaller(v.high[query] - begin, end - begin), low);
        const float hidden = -__builtin_inff();
        const int64_t padded = (end - begin + kLanes - 1) / kLanes * kLanes;
        for (int64_t j = 0; j < low; ++j) row[j] = hidden;
        for (int64_t j = high; j < padded; ++j) row[j] = hidden;
        if (v.softcap != 0.0f) {
            const F cap = S::set1(v.softcap);
            M::map(high - low, row + low, [&](int64_t at, int64_t n) {
                return S::mul(cap, M::tanh(S::div(M::at(row + low, at, n), cap)));
            });
        }
        if (v.tree != nullptr && begin + high > v.tree_start) {
            for (int64_t j = larger(low, v.tree_start - begin); j < high; ++j)
                if (!is_shown(v, query, begin + j)) row[j] = hidden;
        }
        // A NaN score passes max (which returns its second operand) and so poisons its own row only.
        F most = S::set1(hidden);
        F poison = S::zero();
        for (int64_t j = 0; j < padded; j += kLanes) {
            const F s = S::load(row + j);
            most = S::max(s, most);
            poison = S::add(poison, S::select_less(S::set1(0.0f), S::abs(s), S::zero(), S::mul(s, S::zero())));
        }
        *top = S::largest(most);
        const float nan = S::sum(poison);
        if (nan != 0.0f) *top = nan;
        if (*top == hidden) {
            *total = 0.0f;
            return;
        }
        const F shift = S::set1(*top);
        F sum = S::zero();
        for (int64_t j = 0; j < padded; j += kLanes) {
            const F weight = M::exp(S::sub(S::load(row + j), shift));
            S::store(row + j, weight);
            sum = S::add(sum, weight);
        }
        *total = S::sum(sum);
    }

    template <Number N, int Rows>
    static void rows_of(const Visit& v, int64_t row, int64_t begin, int64_t end, const void* keys, int64_t key_stride,
                        const void* value_rows, int64_t value_stride, bool is_value_pass, float* weights, Fold fold) {
        // Keys that some row of this block sees.
        int64_t low = end, high = begin;
        for (int64_t query = row / v.group; query <= (row + Rows - 1) / v.group; ++query) {
            low = smaller(low, v.low[query]);
            high = larger(high, v.high[query]);
        }
        low = larger(low, begin) - begin;
        high = smaller(high, end) - begin;
        float* own = weights + row * kKeyChunk;
        if (!is_value_pass) {
            if (low < high) {
                // Four keys at a time from a fixed place; a score depends on its own key only.
                const int64_t first = low / 4 * 4;
                scores<N, Rows>(v.q + row * v.padded_dim, v.padded_dim, at<N>(keys, first * key_stride), key_stride,
                                v.head_dim, high - first, row == 0 ? value_rows : nullptr, value_stride, v.value_dim,
                                own + first);
            }
            for (int r = 0; r < Rows; ++r)
                soften(v, (row + r) / v.group, begin, end, own + r * kKeyChunk, fold.top + row + r, fold.total + row + r);
            return;
        }
        float* sum = fold.sum + row * v.padded_value;
        bool is_seen = false;
        for (int r = 0; r < Rows; ++r) is_seen = is_seen || fold.top[row + r] != -__builtin_inff();
        if (low >= high || !is_seen) {
            std::memset(sum, 0, size_t(Rows * v.padded_value) * sizeof(float));
            return;
        }
        for (int r = 0; r < Rows; ++r)
            if (fold.top[row + r] == -__builtin_inff())
                for (int64_t j = low; j < high; ++j) own[r * kKeyChunk + j] = 0.0f;
        values<N, Rows>(own, value_rows, value_stride, v.value_dim, v.padded_value, low, high, sum);
        for (int r = 0; r < Rows; ++r)
            if (!is_finite(sum + r * v.padded_value, v.padded_value))
                careful_values<N>(own + r * kKeyChunk, value_rows, value_stride, v.value_dim, low, high,
                                  sum + r * v.padded_value);
    }

    template <Number N>
    static const void* at(const void* base, int64_t index) {
        return static_cast<const char*>(base) + index * (N == Number::fp32 ? 4 : 2);
    }

    template <Number N>
    static void all_rows(const Visit& v, int64_t begin, int64_t end, const void* keys, int64_t key_stride,
                         const void* value_rows, int64_t value_stride, bool is_value_pass, float* weights, Fold fold) {
        constexpr int kMost = S::kQueryRows;
        int64_t row = 0;
        for (; row + kMost <= v.rows; row += kMost)
            rows_of<N, kMost>(v, row, begin, end, keys, key_stride, value_rows, value_stride, is_value_pass, weights, fold);
        if constexpr (kMost == 4) {
            if (v.rows - row == 3) {
                rows_of<N, 3>(v, row, begin, end, keys, key_stride, value_rows, value_stride, is_value_pass, weights, fold);
                row += 3;
            }
            if (v.rows - row == 2) {
                rows_of<N, 2>(v, row, begin, end, keys, key_stride, value_rows, value_stride, is_value_pass, weights, fold);
                row += 2;
            }
        }
        for (; row < v.rows; ++row)
            rows_of<N, 1>(v, row, begin, end, keys, key_stride, value_rows, value_stride, is_value_pass, weights, fold);
    }

    // Keys or values of the chunk as fp32, `dim` apart.
    template <Number N>
    static void widen(const void* from, int64_t stride, int64_t dim, int64_t padded, int64_t count, float* out) {
        for (int64_t j = 0; j < count; ++j)
            for (int64_t c = 0; c < dim; c += kLanes)
                S::store(out + j * padded + c, dim - c >= kLanes ? Reader<S, N>::load(from, j * stride + c)
                                                                 : Reader<S, N>::load_some(from, j * stride + c, dim - c));
    }

    template <Number N>
    static void chunk_of(const Visit& v, int64_t begin, int64_t end, float* scratch, Fold fold) {
        float* weights = scratch;
        const void* keys = at<N>(v.keys, begin * v.key_stride);
        const void* value_rows = at<N>(v.values, begin * v.value_stride);
        // With many rows, 16-bit numbers are widened once instead of once for each block of rows.
        if (N != Number::fp32 && v.rows >= 12) {
            float* wide = scratch + v.rows * kKeyChunk;
            widen<N>(keys, v.key_stride, v.head_dim, v.padded_dim, end - begin, wide);
            all_rows<Number::fp32>(v, begin, end, wide, v.padded_dim, nullptr, 0, false, weights, fold);
            widen<N>(value_rows, v.value_stride, v.value_dim, v.padded_value, end - begin, wide);
            all_rows<Number::fp32>(v, begin, end, nullptr, 0, wide, v.padded_value, true, weights, fold);
            return;
        }
        all_rows<N>(v, begin, end, keys, v.key_stride, value_rows, v.value_stride, false, weights, fold);
        all_rows<N>(v, begin, end, nullptr, 0, value_rows, v.value_stride, true, weights, fold);
    }

    static void attend_chunk(const Visit& v, int64_t begin, int64_t end, float* scratch, Fold fold) {
        switch (v.number) {
            case Number::fp32: return chunk_of<Number::fp32>(v, begin, end, scratch, fold);
            case Number::bf16: return chunk_of<Number::bf16>(v, begin, end, scratch, fold);
            case Number::fp16: return chunk_of<Number::fp16>(v, begin, end, scratch, fold);
        }
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
