// Attention over keys and values that are stored in few bits: a chunk of one key/value head is turned into numbers
// once, in cache, and then serves all rows.
//
// A number is one fused multiply-add of its code, so that all paths agree. Rows meet chunks in the same order as they
// do in a plain strand, and the low-rank part adds lanes to a row's sums; it is never multiplied out.
#pragma once

#include "codes.h"
#include "kernel_attention.h"

namespace plait {
namespace {

alignas(64) constexpr float kLaneNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class S>
struct Coded {
    using F = typename S::F;
    using A = Attention<S>;
    using Half = Reader<S, Number::fp16>;

    static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
    static int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

    // The first n lanes, zeros behind them.
    static F first_lanes(F x, int64_t n) {
        return n >= kLanes ? x : S::select_less(S::load(kLaneNumbers), S::set1(float(n)), x, S::zero());
    }

    // n fp16 numbers as fp32, zeros up to the next 16.
    static void widen_halves(const uint16_t* from, int64_t n, float* to) {
        for (int64_t c = 0; c < n; c += kLanes)
            S::store(to + c, n - c >= kLanes ? Half::load(from, c) : Half::load_some(from, c, n - c));
    }

    // 32 bits of a row from any bit on; zeros where the storage ends.
    static uint32_t word(const uint8_t* row, int64_t bit, const uint8_t* end) {
        const uint8_t* p = row + (bit >> 3);
        uint64_t bits = 0;
        if (end - p >= 8) std::memcpy(&bits, p, 8);
        else if (p < end) std::memcpy(&bits, p, size_t(end - p));
        return uint32_t(bits >> (bit & 7));
    }

    // Sixteen codes from a channel on. Behind the last code of the storage they are zeros.
    template <int Bits>
    static F codes(const uint8_t* row, int64_t channel, const uint8_t* end) {
        if constexpr (Bits == 8) {
            const uint8_t* p = row + channel;
            if (end - p >= kLanes) return S::bytes(p);
            uint8_t some[kLanes] = {};
            if (p < end) std::memcpy(some, p, size_t(end - p));
            return S::bytes(some);
        } else {
            return S::template codes<Bits>(word(row, channel * Bits, end), word(row, (channel + 8) * Bits, end));
        }
    }

    template <int Bits>
    static void affine(const StoredNumbers& s, int64_t head, int64_t begin, int64_t end, float* out, int64_t stride) {
        const AffineCodes& a = s.affine;
        const int64_t first = head * s.width;
        const uint8_t* stop = a.codes + a.num_bytes;
        alignas(64) float scale[kMostWidth + kLanes], minimum[kMostWidth + kLanes];
        if (a.is_along_tokens) {
            for (int64_t t = begin; t < end;) {
                const int64_t group = (t + a.skipped) / a.group;
                const int64_t last = smaller(end, (group + 1) * a.group - a.skipped);
                widen_halves(a.scale + group * a.scale_columns + first, s.width, scale);
                widen_halves(a.minimum + group * a.scale_columns + first, s.width, minimum);
                for (; t < last; ++t) {
                    const uint8_t* row = a.codes + t * a.row_bytes;
                    float* to = out + (t - begin) * stride;
                    // Behind the head, scale and minimum are 0.
                    for (int64_t c = 0; c < s.width; c += kLanes)
                        S::store(to + c, S::fma(codes<Bits>(row, first + c, stop), S::load(scale + c), S::load(minimum + c)));
                }
            }
            return;
        }
        const int64_t first_group = first / a.group, num_groups = (first + s.width - 1) / a.group - first_group + 1;
        int64_t group_of[kMostWidth / kLanes];
        for (int64_t c = 0; c < s.width; c += kLanes) {
            const int64_t of_first = (first + c) / a.group, of_last = (first + smaller(c + kLanes, s.width) - 1) / a.group;
            group_of[c / kLanes] = of_first == of_last ? of_first - first_group : -1;
        }
        for (int64_t t = begin; t < end; ++t) {
            const uint8_t* row = a.codes + t * a.row_bytes;
            float* to = out + (t - begin) * stride;
            widen_halves(a.scale + t * a.scale_columns + first_group, num_groups, scale);
            widen_halves(a.minimum + t * a.scale_columns + first_group, num_groups, minimum);
            for (int64_t c = 0; c < s.width; c += kLanes) {
                const F code = codes<Bits>(row, first + c, stop);
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

    template <Number N>
    static void plain(const StoredNumbers& s, int64_t head, int64_t begin, int64_t end, float* out, int64_t stride) {
        using R = Reader<S, N>;
        const void* base = A::template at<N>(s.plain.data, head * s.plain.head_stride);
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

    // Outliers of a whole block of tokens; `out` has room for them also where a strand ends before.
    static void add_outliers(const CodedNumbers& n, int64_t head, int64_t begin, float* out, int64_t stride) {
        const Outliers& o = n.outliers;
        if (o.starts == nullptr) return;
        const int32_t* starts = o.starts + begin / kKeyChunk * n.stored.num_heads + head;
        float some[kLanes];
        for (int64_t i = starts[0]; i < starts[1]; i += kLanes) {
            const int64_t count = smaller(kLanes, starts[1] - i);
            S::store(some, o.count - i >= kLanes ? Half::load(o.numbers, i) : Half::load_some(o.numbers, i, o.count - i));
            for (int64_t j = 0; j < count; ++j) out[o.tokens[i + j] * stride + o.channels[i + j]] += some[j];
        }
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
        for (int64_t c = 0; rank > 0 && c < width; ++c)
            widen_halves(keys.factor_channels + (head * width + c) * rank, rank, room + c * padded_rank);
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
            widen_halves(values.factor_channels + (head * width + c) * rank, rank, some);
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

    [[gnu::noinline]] static void rows(const Visit& v, int64_t begin, int64_t end, const float* block, int64_t stride,
                                       bool is_value_pass, float* weights, Fold fold) {
        const float* keys = is_value_pass ? nullptr : block;
        const float* value_rows = is_value_pass ? block : nullptr;
        A::template all_rows<Number::fp32>(v, begin, end, keys, stride, value_rows, stride, is_value_pass, weights, fold);
    }

    static void attend(const Visit& v, const CodedNumbers& keys, const CodedNumbers& values, int64_t head, int64_t begin,
                       int64_t end, float* scratch, Fold fold) {
        const int64_t wide_k = wide_keys(keys), wide_v = wide_values(values), count = end - begin;
        float* weights = scratch;
        float* block = weights + v.rows * kKeyChunk;
        float* queries = block + kKeyChunk * (wide_k > wide_v ? wide_k : wide_v);
        float* sums = queries + v.rows * wide_k;
        float* room = sums + v.rows * wide_v;

        numbers(keys.stored, head, begin, end, block, wide_k);
        add_outliers(keys, head, begin, block, wide_k);
        if (keys.rank() > 0) numbers(keys.factor, head, begin, end, block + padded(keys.stored.width), wide_k);
        widen_queries(v, keys, head, room, queries);
        Visit wide = v;
        wide.q = queries;
        wide.head_dim = wide.padded_dim = wide_k;
        wide.value_dim = wide.padded_value = wide_v;
        rows(wide, begin, end, block, wide_k, false, weights, fold);

        numbers(values.stored, head, begin, end, block, wide_v);
        add_outliers(values, head, begin, block, wide_v);
        spread(values, head, count, block, wide_v);
        if (values.rank() == 0) {
            rows(wide, begin, end, block, wide_v, true, weights, fold);
            return;
        }
        numbers(values.factor, head, begin, end, block + padded(values.dim), wide_v);
        const Fold aside{fold.top, fold.total, sums};
        rows(wide, begin, end, block, wide_v, true, weights, aside);
        narrow_sums(values, head, v.rows, room, sums, v.padded_value, fold.sum);
    }
};

}  // namespace
}  // namespace plait
