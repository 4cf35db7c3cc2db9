// Attention over keys and values that are stored in few bits: a chunk of one key/value head is turned into numbers
// once, in cache, and then serves all rows.
//
// A number is one fused multiply-add of its code, so that all paths agree. Rows meet chunks in the same order as they
// do in a plain strand, and the low-rank part adds lanes to a row's sums; it is never multiplied out. Numbers of some
// tokens at a time lie in the first-level cache.
#pragma once

#include <algorithm>

#include "codes.h"
#include "kernel_many_rows.h"

namespace plait {
namespace {

alignas(64) constexpr float kLaneNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class S>
struct Coded {
    using F = typename S::F;
    using A = Attention<S>;
    using Half = Reader<S, Number::fp16>;

    static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
    static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
    static int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

    // The first n lanes, zeros behind them.
    static F first_lanes(F x, int64_t n) {
        return n >= kLanes ? x : S::select_less(S::load(kLaneNumbers), S::set1(float(n)), x, S::zero());
    }

    // n of `available` fp16 numbers as fp32; up to the next 16 anything may stand behind them.
    static void widen_halves(const uint16_t* from, int64_t n, int64_t available, float* to) {
        for (int64_t c = 0; c < n; c += kLanes)
            S::store(to + c, available - c >= kLanes ? Half::load(from, c) : Half::load_some(from, c, n - c));
    }

    // 32 bits of a row from any bit on; zeros where the storage ends.
    static uint32_t word(const uint8_t* row, int64_t bit, const uint8_t* end) {
        const uint8_t* p = row + (bit >> 3);
        uint64_t bits = 0;
        if (end - p >= 8) std::memcpy(&bits, p, 8);
        else if (p < end) std::memcpy(&bits, p, size_t(end - p));
        return uint32_t(bits >> (bit & 7));
    }

    // Call body(bytes) with sixteen codes from a channel on. Fast, where they begin with a byte and the storage goes on for
    // 8 bytes behind them; else from any bit on, and zeros where the storage ends.
    template <int Bits, bool IsFast, class Body>
    static F with_codes(const uint8_t* row, int64_t channel, const uint8_t* end, Body body) {
        const uint8_t* p = row + (channel * Bits >> 3);
        if constexpr (IsFast) return body(p);
        uint8_t some[kLanes + 4] = {};
        if constexpr (Bits == 8) {
            if (p < end) std::memcpy(some, p, size_t(smaller(kLanes, end - p)));
        } else {
            const uint32_t first = word(row, channel * Bits, end), second = word(row, (channel + 8) * Bits, end);
            std::memcpy(some, &first, 4);
            std::memcpy(some + Bits, &second, 4);
        }
        return body(some);
    }

    // Tokens [begin, end), whose scales and minima are those of their group of tokens.
    template <int Bits, bool IsFast>
    [[gnu::noinline]] static void along_tokens(const StoredNumbers& s, int64_t head, int64_t begin, int64_t end, float* out,
                                               int64_t stride) {
        const AffineCodes& a = s.affine;
        const int64_t first = head * s.width, num_scales = a.scale_rows * a.scale_columns;
        const uint8_t* stop = a.codes + a.num_bytes;
        alignas(64) float scale[kMostWidth + kLanes], minimum[kMostWidth + kLanes];
        for (int64_t t = begin; t < end;) {
            const int64_t group = (t + a.skipped) / a.group, at = group * a.scale_columns + first;
            const int64_t last = smaller(end, (group + 1) * a.group - a.skipped);
            widen_halves(a.scale + at, s.width, num_scales - at, scale);
            widen_halves(a.minimum + at, s.width, num_scales - at, minimum);
            // Behind the head both are 0, so that its last channels are followed by zeros.
            for (int64_t c = s.width; c % kLanes != 0; ++c) scale[c] = minimum[c] = 0.0f;
            for (; t < last; ++t) {
                const uint8_t* row = a.codes + t * a.row_bytes;
                float* to = out + (t - begin) * stride;
                for (int64_t c = 0; c < s.width; c += kLanes) {
                    const F code = with_codes<Bits, IsFast>(row, first + c, stop, S::template codes<Bits>);
                    S::store(to + c, S::fma(code, S::load(scale + c), S::load(minimum + c)));
                }
            }
        }
    }

    // Tokens [begin, end), whose scales and minima are those of groups of their channels.
    template <int Bits, bool IsFast>
    [[gnu::noinline]] static void along_channels(const StoredNumbers& s, int64_t head, int64_t begin, int64_t end,
                                                 float* out, int64_t stride) {
        const AffineCodes& a = s.affine;
        const int64_t first = head * s.width, num_scales = a.scale_rows * a.scale_columns;
        const uint8_t* stop = a.codes + a.num_bytes;
        alignas(64) float scale[kMostWidth + kLanes], minimum[kMostWidth + kLanes];
        const int64_t first_group = first / a.group, num_groups = (first + s.width - 1) / a.group - first_group + 1;
        // Vectors of channels [begin, end) that lie in one group; or one vector that lies in several.
        struct Vectors {
            int64_t begin, end, group;
        };
        Vectors runs[kMostWidth / kLanes];
        int64_t num_runs = 0;
        for (int64_t c = 0; c < s.width; c += kLanes) {
            const int64_t of_first = (first + c) / a.group, of_last = (first + smaller(c + kLanes, s.width) - 1) / a.group;
            const int64_t group = of_first == of_last ? of_first - first_group : -1;
            if (num_runs > 0 && group >= 0 && runs[num_runs - 1].group == group) runs[num_runs - 1].end = c + kLanes;
            else runs[num_runs++] = {c, c + kLanes, group};
        }
        const int64_t last_vector = padded(s.width) - kLanes;
        for (int64_t t = begin; t < end; ++t) {
            const uint8_t* row = a.codes + t * a.row_bytes;
            float* to = out + (t - begin) * stride;
            const int64_t at = t * a.scale_columns + first_group;
            widen_halves(a.scale + at, num_groups, num_scales - at, scale);
            widen_halves(a.minimum + at, num_groups, num_scales - at, minimum);
            for (int64_t run = 0; run < num_runs; ++run) {
                const auto [from, behind, group] = runs[run];
                if (group >= 0) {
                    const typename S::template Levels<Bits> levels(scale[group], minimum[group]);
                    for (int64_t c = from; c < behind; c += kLanes)
                        S::store(to + c, with_codes<Bits, IsFast>(row, first + c, stop, [&](const uint8_t* p) {
                            return levels.numbers(p);
                        }));
                    continue;
                }
                float scales[kLanes] = {}, minima[kLanes] = {};
                for (int64_t i = 0; i < smaller(kLanes, s.width - from); ++i) {
                    scales[i] = scale[(first + from + i) / a.group - first_group];
                    minima[i] = minimum[(first + from + i) / a.group - first_group];
                }
                const F code = with_codes<Bits, IsFast>(row, first + from, stop, S::template codes<Bits>);
                S::store(to + from, S::fma(code, S::load(scales), S::load(minima)));
            }
            if (s.width % kLanes != 0) S::store(to + last_vector, first_lanes(S::load(to + last_vector), s.width - last_vector));
        }
    }

    template <int Bits>
    static void affine(const StoredNumbers& s, int64_t head, int64_t begin, int64_t end, float* out, int64_t stride) {
        const AffineCodes& a = s.affine;
        const int64_t first = head * s.width, needed = ((first + padded(s.width)) * Bits + 7) / 8 + 8;
        // Tokens behind which enough bytes lie.
        int64_t fast = begin;
        if (first * Bits % 8 == 0 && a.num_bytes >= needed)
            fast = smaller(end, larger(begin, (a.num_bytes - needed) / a.row_bytes + 1));
        float* rest = out + (fast - begin) * stride;
        if (a.is_along_tokens) {
            along_tokens<Bits, true>(s, head, begin, fast, out, stride);
            along_tokens<Bits, false>(s, head, fast, end, rest, stride);
        } else {
            along_channels<Bits, true>(s, head, begin, fast, out, stride);
            along_channels<Bits, false>(s, head, fast, end, rest, stride);
        }
    }

    template <Number N>
    static void plain(const StoredNumbers& s, int64_t head, int64_t begin, int64_t end, float* out, int64_t stride) {
        using R = Reader<S, N>;
        const void* base = A::moved(s.plain.data, head * s.plain.head_stride, N);
        for (int64_t t = begin; t < end; ++t) {
            float* to = out + (t - begin) * stride;
            for (int64_t c = 0; c < s.width; c += kLanes) {
                const int64_t at = t * s.plain.stride + c, left = s.width - c;
                // Where part of a vector takes more than one load: the lanes behind a head are read too, unless they may lie
                // behind the last token of it.
                const bool is_inside = !S::kLoadsSome && at + kLanes <= (s.tokens - 1) * s.plain.stride + s.width;
                if (left >= kLanes) S::store(to + c, R::load(base, at));
                else S::store(to + c, is_inside ? first_lanes(R::load(base, at), left) : R::load_some(base, at, left));
            }
        }
    }

    // Tokens [begin, end) of a head, `stride` apart, with zeros up to the next 16 channels. Several calls of one
    // copy: inlined, they would take a compiler minutes.
    [[gnu::noinline]] static void numbers(const StoredNumbers& s, int64_t head, int64_t begin, int64_t end, float* out, int64_t stride) {
        if (s.is_affine) {
            switch (s.affine.bits) {
                case 2: return affine<2>(s, head, begin, end, out, stride);
                case 3: return affine<3>(s, head, begin, end, out, stride);
                case 4: return affine<4>(s, head, begin, end, out, stride);
                default: return affine<8>(s, head, begin, end, out, stride);
            }
        }
        switch (s.plain.number) {
            case Number::fp32: return plain<Number::fp32>(s, head, begin, end, out, stride);
            case Number::bf16: return plain<Number::bf16>(s, head, begin, end, out, stride);
            case Number::fp16: return plain<Number::fp16>(s, head, begin, end, out, stride);
        }
    }

    // Outliers of tokens [begin, end) of one block; `next` is the first of them, or 0, and then the first behind them.
    static void add_outliers(const CodedNumbers& n, int64_t head, int64_t begin, int64_t end, int64_t* next, float* out,
                             int64_t stride) {
        const Outliers& o = n.outliers;
        if (o.starts == nullptr) return;
        const int64_t run = begin / kKeyChunk * n.stored.num_heads + head;
        const uint8_t* stop = o.tokens + o.starts[run + 1];
        const int64_t first = begin % kKeyChunk;
        // They are sorted by token.
        const auto from_token = [&](const uint8_t* from, int64_t token) {
            return std::partition_point(from, stop, [&](uint8_t own) { return own < token; }) - o.tokens;
        };
        int64_t i = *next > 0 ? *next : from_token(o.tokens + o.starts[run], first);
        const int64_t last = from_token(o.tokens + i, first + end - begin);
        float* to = out - first * stride;
        float some[kLanes];
        const auto add = [&](int64_t count) {
            for (int64_t j = 0; j < count; ++j) to[o.tokens[i + j] * stride + o.channels[i + j]] += some[j];
        };
        for (; i + kLanes <= last; i += kLanes) {
            S::store(some, Half::load(o.numbers, i));
            add(kLanes);
        }
        if (i < last) {
            S::store(some, Half::load_some(o.numbers, i, last - i));
            add(last - i);
        }
        *next = last;
    }

    // Stored channels to their places among all of a head; the others become their means.
    static void spread(const CodedNumbers& n, int64_t head, int64_t count, float* out, int64_t stride) {
        if (n.kept == nullptr) return;
        const int16_t* kept = n.kept + head * n.stored.width;
        float row[kMostWidth];
        for (int64_t t = 0; t < count; ++t) {
            float* to = out + t * stride;
            std::memcpy(row, to, size_t(n.stored.width) * sizeof(float));
            std::memset(to, 0, size_t(padded(n.dim)) * sizeof(float));
            if (n.means != nullptr) std::memcpy(to, n.means + head * n.dim, size_t(n.dim) * sizeof(float));
            for (int64_t c = 0; c < n.stored.width; ++c) to[kept[c]] = row[c];
        }
    }

    // Scaled queries (row, dim) as rows that meet the keys: the stored channels, then their products with the
    // low-rank part's channels.
    static void widen_queries(const Visit& v, const CodedNumbers& keys, int64_t head, float* room, float* out) {
        const int64_t width = keys.stored.width, padded_width = padded(width), rank = keys.rank();
        const int64_t wide = wide_keys(keys), padded_rank = padded(rank);
        const int16_t* kept = keys.kept == nullptr ? nullptr : keys.kept + head * width;
        const int64_t num_factors = keys.stored.num_heads * width * rank;
        for (int64_t c = 0; rank > 0 && c < width; ++c) {
            const int64_t at = (head * width + c) * rank;
            widen_halves(keys.factor_channels + at, rank, num_factors - at, room + c * padded_rank);
            for (int64_t k = rank; k < padded_rank; ++k) room[c * padded_rank + k] = 0.0f;
        }
        for (int64_t r = 0; r < v.rows; ++r) {
            const float* q = v.q + r * v.padded_dim;
            float* to = out + r * wide;
            for (int64_t c = 0; c < padded_width; ++c) to[c] = c < width ? q[kept == nullptr ? c : kept[c]] : 0.0f;
            for (int64_t k = 0; k < padded_rank; k += kLanes) {
                F sum = S::zero();
                for (int64_t c = 0; c < width; ++c)
                    sum = S::fma(S::set1(to[c]), S::load(room + c * padded_rank + k), sum);
                S::store(to + padded_width + k, sum);
            }
        }
    }

    // sum[c] += (sums over the low-rank part's tokens) . (its channels)
    static void narrow_sums(const CodedNumbers& values, int64_t head, int64_t rows, float* room, const float* wide_sums,
                            int64_t padded_value, float* sums) {
        const int64_t width = values.stored.width, rank = values.rank(), padded_dim = padded(values.dim);
        const int64_t wide = wide_values(values), padded_rank = padded(rank);
        const int16_t* kept = values.kept == nullptr ? nullptr : values.kept + head * width;
        std::memset(room, 0, size_t(padded_rank * padded_dim) * sizeof(float));
        alignas(64) float some[kMostWidth + kLanes];
        for (int64_t c = 0; c < width; ++c) {
            const int64_t at = (head * width + c) * rank;
            widen_halves(values.factor_channels + at, rank, values.stored.num_heads * width * rank - at, some);
            for (int64_t k = 0; k < rank; ++k) room[k * padded_dim + (kept == nullptr ? c : kept[c])] = some[k];
        }
        for (int64_t r = 0; r < rows; ++r) {
            const float* from = wide_sums + r * wide;
            float* to = sums + r * padded_value;
            for (int64_t c = 0; c < padded_dim; c += kLanes) {
                F sum = S::load(from + c);
                for (int64_t k = 0; k < rank; ++k)
                    sum = S::fma(S::set1(from[padded_dim + k]), S::load(room + k * padded_dim + c), sum);
                S::store(to + c, sum);
            }
        }
    }

    // Products of rows with keys [0, count), four at a time, as in a plain strand.
    template <int Rows>
    static void dots(const float* q, int64_t wide, const float* block, int64_t count, float* out) {
        for (int64_t j = 0; j < count; j += 4) {
            F sum[Rows][4];
            const float* key[4];
            for (int r = 0; r < Rows; ++r)
                for (int k = 0; k < 4; ++k) sum[r][k] = S::zero();
            for (int k = 0; k < 4; ++k) key[k] = block + smaller(j + k, count - 1) * wide;
            for (int64_t c = 0; c < wide; c += kLanes)
                for (int r = 0; r < Rows; ++r) {
                    const F v = S::load(q + r * wide + c);
                    for (int k = 0; k < 4; ++k) sum[r][k] = S::fma(S::load(key[k] + c), v, sum[r][k]);
                }
            S::template store_sums<Rows>(sum, out + j, kScoreStride);
        }
    }

    // Scores of row r to weights, in place, over slots [begin, end), multiples of 16. Keys that are nodes of a draft
    // stand where they are stored.
    static void soften(const Visit& v, int64_t r, int64_t begin, int64_t end, float* row, float* top, float* total) {
        const Piece& piece = v.pieces[0];
        if (piece.nodes == nullptr) return A::soften(v, r, nullptr, begin, end, row, top, total);
        const int64_t query = r / v.group;
        if (v.softcap != 0.0f && piece.low[query] < piece.high[query])
            A::cap(v.softcap, row + piece.low[query], piece.high[query] - piece.low[query]);
        if (v.slopes != nullptr && piece.low[query] < piece.high[query]) {
            // Where a node stands, its depth says.
            int64_t slots[kKeyChunk], count = 0;
            for (int64_t key = piece.low[query]; key < piece.high[query]; ++key) {
                const DraftNodes& of = *piece.nodes;
                const int64_t node = of.first_node + key;
                slots[count++] = node < 0 || node >= of.num_nodes ? key : of.first_slot + of.node_depths[node];
            }
            A::take_bias(v, piece, r, slots, count, row + piece.low[query]);
        }
        for (int64_t key = larger(piece.low[query], -piece.nodes->first_node); key < piece.high[query]; ++key)
            if (!A::is_shown(*piece.nodes, query, piece.nodes->first_node + key)) row[key] = -__builtin_inff();
        Piece run = piece;
        run.nodes = nullptr;
        Visit capped = v;
        capped.pieces = &run;
        capped.softcap = 0.0f;
        capped.slopes = nullptr;
        A::soften(capped, r, nullptr, begin, end, row, top, total);
    }

    // Keys of some channels and whole values, both plain, are read where they lie: only the queries are made anew.
    static void attend_plain(const Visit& v, const CodedNumbers& keys, const CodedNumbers& values, int64_t head,
                             int64_t begin, float* scratch, Fold fold) {
        const PlainNumbers &key = keys.stored.plain, &value = values.stored.plain;
        Visit own = v;
        own.head_dim = keys.stored.width;
        own.padded_dim = wide_keys(keys);
        float* queries = scratch + attend_scratch(v.rows, own.padded_dim, v.padded_value);
        widen_queries(v, keys, head, nullptr, queries);
        own.q = queries;
        Piece piece = v.pieces[0];
        piece.number = key.number;
        piece.keys = A::moved(key.data, head * key.head_stride + begin * key.stride, key.number);
        piece.key_stride = key.stride;
        piece.values = A::moved(value.data, head * value.head_stride + begin * value.stride, value.number);
        piece.value_stride = value.stride;
        own.pieces = &piece;
        ManyRows<S>::attend_chunk(own, scratch, fold);
    }

    static void attend(const Visit& v, const CodedNumbers& keys, const CodedNumbers& values, int64_t head, int64_t begin,
                       float* scratch, Fold fold) {
        const Piece& piece = v.pieces[0];
        if (is_plain(keys, values) && piece.nodes == nullptr)
            return attend_plain(v, keys, values, head, begin, scratch, fold);
        const int64_t end = begin + piece.count;
        const int64_t wide_k = wide_keys(keys), wide_v = wide_values(values);
        float* weights = scratch;
        float* block = weights + v.rows * kScoreStride;
        float* queries = block + kCodedTokens * larger(wide_k, wide_v);
        float* aside = queries + v.rows * wide_k;
        float* room = aside + v.rows * wide_v;
        // Keys that a row, and that any row sees, counted from the block's first.
        const auto low = [&](int64_t row) { return piece.low[row / v.group]; };
        const auto high = [&](int64_t row) { return piece.high[row / v.group]; };
        int64_t lowest = end - begin, highest = 0;
        for (int64_t r = 0; r < v.rows; r += v.group) {
            if (low(r) >= high(r)) continue;
            lowest = smaller(lowest, low(r));
            highest = larger(highest, high(r));
        }
        const int64_t start = lowest / kCodedTokens * kCodedTokens;

        widen_queries(v, keys, head, room, queries);
        int64_t next = 0;
        for (int64_t at = start; at < highest; at += kCodedTokens) {
            const int64_t first = begin + at, last = smaller(first + kCodedTokens, end);
            numbers(keys.stored, head, first, last, block, wide_k);
            add_outliers(keys, head, first, last, &next, block, wide_k);
            if (keys.rank() > 0) numbers(keys.factor, head, first, last, block + padded(keys.stored.width), wide_k);
            A::each_rows(v, [&](int64_t row, auto rows) {
                dots<rows>(queries + row * wide_k, wide_k, block, last - first, weights + row * kScoreStride + at);
            });
        }
        for (int64_t r = 0; r < v.rows; ++r)
            soften(v, r, start, padded(highest), weights + r * kScoreStride, fold.top + r, fold.total + r);

        float* sums = values.rank() > 0 ? aside : fold.sum;
        std::memset(sums, 0, size_t(v.rows * wide_v) * sizeof(float));
        next = 0;
        for (int64_t at = start; at < highest; at += kCodedTokens) {
            const int64_t first = begin + at, last = smaller(first + kCodedTokens, end);
            numbers(values.stored, head, first, last, block, wide_v);
            add_outliers(values, head, first, last, &next, block, wide_v);
            spread(values, head, last - first, block, wide_v);
            if (values.rank() > 0) numbers(values.factor, head, first, last, block + padded(values.dim), wide_v);
            const typename A::Source from{block, wide_v, wide_v, Number::fp32};
            const auto add = [&](int64_t row, auto rows) {
                A::template values<Number::fp32, rows>(weights + row * kScoreStride + at, from, wide_v, larger(low(row) - at, 0),
                                                       smaller(high(row) - at, last - first), nullptr, sums + row * wide_v);
            };
            A::each_rows(v, [&](int64_t row, auto rows) {
                // A key that is hidden from a row is left out, so that it need not be finite.
                const auto is_like_first = [&](int64_t r) {
                    return low(r) == low(row) && high(r) == high(row) && fold.top[r] != -__builtin_inff();
                };
                bool is_alike = true;
                for (int64_t r = row; r < row + rows; ++r) is_alike &= is_like_first(r);
                if (is_alike) return add(row, rows);
                for (int64_t r = row; r < row + rows; ++r)
                    if (fold.top[r] != -__builtin_inff()) add(r, Count<1>());
            });
        }
        if (values.rank() > 0) narrow_sums(values, head, v.rows, room, aside, v.padded_value, fold.sum);
    }
};

}  // namespace
}  // namespace plait
