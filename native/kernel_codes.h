// Attention over keys and values that are stored in few bits: a chunk of one key/value head is turned into numbers
// once, in cache, and then serves all rows.
//
// A number is one fused multiply-add of its code, so that all paths agree. Rows meet chunks in the same order as they
// do in a plain strand, and the low-rank part adds lanes to a row's sums; it is never multiplied out. Numbers of some
// tokens at a time lie in the first-level cache.
#pragma once

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

    // Sixteen codes from a channel on. Fast, where that begins with a byte and the storage goes on for 8 bytes behind
    // them; else from any bit on, and zeros where the storage ends.
    template <int Bits, bool IsFast>
    static F codes(const uint8_t* row, int64_t channel, const uint8_t* end) {
        const uint8_t* p = row + (channel * Bits >> 3);
        if constexpr (Bits == 8) {
            if (IsFast || end - p >= kLanes) return S::bytes(p);
            uint8_t some[kLanes] = {};
            if (p < end) std::memcpy(some, p, size_t(end - p));
            return S::bytes(some);
        } else if constexpr (IsFast) {
            uint32_t first, second;
            std::memcpy(&first, p, 4);
            std::memcpy(&second, p + Bits, 4);
            return S::template codes<Bits>(first, second);
        } else {
            return S::template codes<Bits>(word(row, channel * Bits, end), word(row, (channel + 8) * Bits, end));
        }
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
                    const F code = codes<Bits, IsFast>(row, first + c, stop);
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
        int64_t group_of[kMostWidth / kLanes];
        for (int64_t c = 0; c < s.width; c += kLanes) {
            const int64_t of_first = (first + c) / a.group, of_last = (first + smaller(c + kLanes, s.width) - 1) / a.group;
            group_of[c / kLanes] = of_first == of_last ? of_first - first_group : -1;
        }
        for (int64_t t = begin; t < end; ++t) {
            const uint8_t* row = a.codes + t * a.row_bytes;
            float* to = out + (t - begin) * stride;
            const int64_t at = t * a.scale_columns + first_group;
            widen_halves(a.scale + at, num_groups, num_scales - at, scale);
            widen_halves(a.minimum + at, num_groups, num_scales - at, minimum);
            for (int64_t c = 0; c < s.width; c += kLanes) {
                const F code = codes<Bits, IsFast>(row, first + c, stop);
                const int64_t group = group_of[c / kLanes];
                F number;
                if (group >= 0) {
                    number = S::fma(code, S::set1(scale[group]), S::set1(minimum[group]));
                } else {
                    float scales[kLanes] = {}, minima[kLanes] = {};
                    for (int64_t i = 0; i < smaller(kLanes, s.width - c); ++i) {
                        scales[i] = scale[(first + c + i) / a.group - first_group];
                        minima[i] = minimum[(first + c + i) / a.group - first_group];
                    }
                    number = S::fma(code, S::load(scales), S::load(minima));
                }
                S::store(to + c, first_lanes(number, s.width - c));
            }
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
                const int64_t at = t * s.plain.stride + c;
                // The lanes behind a head are read too, where they cannot lie behind the last token of it.
                const bool is_inside = at + kLanes <= (s.tokens - 1) * s.plain.stride + s.width;
                S::store(to + c, is_inside ? first_lanes(R::load(base, at), s.width - c)
                                           : R::load_some(base, at, smaller(kLanes, s.width - c)));
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

    // Outliers of tokens [begin, end) of one block; `next` is the first of them, and then the first behind them.
    static void add_outliers(const CodedNumbers& n, int64_t head, int64_t begin, int64_t end, int64_t* next, float* out,
                             int64_t stride) {
        const Outliers& o = n.outliers;
        if (o.starts == nullptr) return;
        const int64_t run = begin / kKeyChunk * n.stored.num_heads + head, stop = o.starts[run + 1];
        const int64_t first = begin % kKeyChunk, last = first + end - begin;
        float some[kLanes];
        int64_t i = larger(*next, o.starts[run]);
        while (i < stop && o.tokens[i] < last) {
            const int64_t count = smaller(kLanes, stop - i);
            S::store(some, o.count - i >= kLanes ? Half::load(o.numbers, i) : Half::load_some(o.numbers, i, o.count - i));
            int64_t j = 0;
            for (; j < count && o.tokens[i + j] < last; ++j)
                if (o.tokens[i + j] >= first) out[(o.tokens[i + j] - first) * stride + o.channels[i + j]] += some[j];
            i += j;
        }
        *next = i;
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
            S::template store_sums<Rows>(sum, out + j, kKeyChunk);
        }
    }

    // sum += weight[j] * value[j] for j in [first, last), in vectors of 16 channels.
    template <int Vectors>
    static void add_values(const float* weights, const float* block, int64_t wide, int64_t first, int64_t last, float* sum) {
        F total[Vectors];
        for (int k = 0; k < Vectors; ++k) total[k] = S::load(sum + k * kLanes);
        for (int64_t j = first; j < last; ++j) {
            const F w = S::set1(weights[j]);
            for (int k = 0; k < Vectors; ++k) total[k] = S::fma(w, S::load(block + j * wide + k * kLanes), total[k]);
        }
        for (int k = 0; k < Vectors; ++k) S::store(sum + k * kLanes, total[k]);
    }
    [[gnu::noinline]] static void mix(const float* weights, const float* block, int64_t wide, int64_t first, int64_t last,
                                      float* sum) {
        int64_t c = 0;
        for (; wide - c > 5 * kLanes; c += 4 * kLanes) add_values<4>(weights, block + c, wide, first, last, sum + c);
        switch ((wide - c) / kLanes) {
            case 5: return add_values<5>(weights, block + c, wide, first, last, sum + c);
            case 4: return add_values<4>(weights, block + c, wide, first, last, sum + c);
            case 3: return add_values<3>(weights, block + c, wide, first, last, sum + c);
            case 2: return add_values<2>(weights, block + c, wide, first, last, sum + c);
            default: return add_values<1>(weights, block + c, wide, first, last, sum + c);
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
        float* block = weights + v.rows * kKeyChunk;
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
            int64_t r = 0;
            for (; r + S::kQueryRows <= v.rows; r += S::kQueryRows)
                dots<S::kQueryRows>(queries + r * wide_k, wide_k, block, last - first, weights + r * kKeyChunk + at);
            for (; r < v.rows; ++r) dots<1>(queries + r * wide_k, wide_k, block, last - first, weights + r * kKeyChunk + at);
        }
        for (int64_t r = 0; r < v.rows; ++r)
            soften(v, r, start, padded(highest), weights + r * kKeyChunk, fold.top + r, fold.total + r);

        float* sums = values.rank() > 0 ? aside : fold.sum;
        std::memset(sums, 0, size_t(v.rows * wide_v) * sizeof(float));
        next = 0;
        for (int64_t at = start; at < highest; at += kCodedTokens) {
            const int64_t first = begin + at, last = smaller(first + kCodedTokens, end);
            numbers(values.stored, head, first, last, block, wide_v);
            add_outliers(values, head, first, last, &next, block, wide_v);
            spread(values, head, last - first, block, wide_v);
            if (values.rank() > 0) numbers(values.factor, head, first, last, block + padded(values.dim), wide_v);
            for (int64_t r = 0; r < v.rows; ++r)
                if (fold.top[r] != -__builtin_inff())
                    // A key that is hidden from a row is left out, so that it need not be finite.
                    mix(weights + r * kKeyChunk + at, block, wide_v, larger(low(r) - at, 0),
                        smaller(high(r) - at, last - first), sums + r * wide_v);
        }
        if (values.rank() > 0) narrow_sums(values, head, v.rows, room, aside, v.padded_value, fold.sum);
    }
};

}  // namespace
}  // namespace plait
