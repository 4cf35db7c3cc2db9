// Attention of many rows over one chunk: every key and value is read, and widened, once for all of them.
//
// Slots are taken 64 at a time, so that a block stays in the first-level cache while all rows visit it. Every sum has
// the order that it has in `Attention`, so the bits are the same. There the lanes of a vector are channels of one key,
// added up at the end; here they are keys, and the sums of channels l, l + 16, ... are made one after the other and
// added in the order of `S::sum`.
#pragma once

#include "kernel_attention.h"

// Sums that must stay in registers from one function to the next.
#define PLAIT_TOGETHER __attribute__((always_inline)) inline

namespace plait {
namespace {

template <class S>
struct ManyRows {
    using A = Attention<S>;
    using F = typename S::F;
    using Wide = typename S::Wide;
    using Source = typename A::Source;
    using Range = typename A::Range;

    static constexpr int kWide = S::kWideLanes;
    static constexpr int kVectors = S::kScoreVectors;  // of keys that meet a row at once
    static constexpr int64_t kStep = kVectors * kWide;
    static_assert(kKeyBlock % kStep == 0 && kKeyChunk % kKeyBlock == 0, "vectors of keys must fill a block");

#ifdef PLAIT_ANY_ORDER
    static constexpr bool kAnyOrder = true;
#else
    static constexpr bool kAnyOrder = false;
#endif

    // Below this, widening costs more than it saves.
    static constexpr int64_t kLeastRows = 12;

    template <int Rows>
    using Sums = Wide[Rows][kVectors];

    template <int Rows>
    PLAIT_TOGETHER static void add(const Sums<Rows>& a, const Sums<Rows>& b, Sums<Rows>& sums) {
        for (int r = 0; r < Rows; ++r)
            for (int k = 0; k < kVectors; ++k) sums[r][k] = S::wide_add(a[r][k], b[r][k]);
    }
    // Products of channels lane, lane + 16, ... of some rows and of the keys from one on. `Dim` is the number of channels
    // where it is known beforehand, as 64 is for many models; else 0.
    template <int Rows, int Dim>
    PLAIT_TOGETHER static void lane(const float* q, int64_t any_dim, const float* keys, int64_t lane, Sums<Rows>& sums) {
        Sums<Rows> own;
        for (int r = 0; r < Rows; ++r)
            for (int k = 0; k < kVectors; ++k) own[r][k] = S::wide_zero();
        const int64_t padded_dim = Dim == 0 ? any_dim : Dim;
        const float* key_at = keys + lane * kKeyBlock;
        for (int64_t c = lane; c < padded_dim; c += kLanes) {
            Wide key[kVectors];
            for (int k = 0; k < kVectors; ++k) key[k] = S::wide_load(key_at + k * kWide);
            for (int r = 0; r < Rows; ++r) {
                const Wide x = S::wide_set1(q + r * padded_dim + c);
                for (int k = 0; k < kVectors; ++k) own[r][k] = S::wide_fma(key[k], x, own[r][k]);
            }
            key_at += kLanes * kKeyBlock;
        }
        for (int r = 0; r < Rows; ++r)
            for (int k = 0; k < kVectors; ++k) sums[r][k] = own[r][k];
    }
    // The lanes that end in one of the last four.
    template <int Rows, int Dim>
    PLAIT_TOGETHER static void quarter(const float* q, int64_t padded_dim, const float* keys, int64_t first, Sums<Rows>& sums) {
        Sums<Rows> a, b, c;
        lane<Rows, Dim>(q, padded_dim, keys, first, a);
        lane<Rows, Dim>(q, padded_dim, keys, first + 8, b);
        add<Rows>(a, b, a);
        lane<Rows, Dim>(q, padded_dim, keys, first + 4, b);
        lane<Rows, Dim>(q, padded_dim, keys, first + 12, c);
        add<Rows>(b, c, b);
        add<Rows>(a, b, sums);
    }
    // All channels in a row: as fast as can be, but not the bits that one row has. See PLAIT_ANY_ORDER.
    template <int Rows, int Dim>
    PLAIT_TOGETHER static void straight(const float* q, int64_t any_dim, const float* keys, Sums<Rows>& sums) {
        const int64_t padded_dim = Dim == 0 ? any_dim : Dim;
        for (int r = 0; r < Rows; ++r)
            for (int k = 0; k < kVectors; ++k) sums[r][k] = S::wide_zero();
        for (int64_t c = 0; c < padded_dim; ++c)
            for (int k = 0; k < kVectors; ++k) {
                const Wide key = S::wide_load(keys + c * kKeyBlock + k * kWide);
                for (int r = 0; r < Rows; ++r)
                    sums[r][k] = S::wide_fma(key, S::wide_set1(q + r * padded_dim + c), sums[r][k]);
            }
    }
    template <int Rows, int Dim>
    PLAIT_TOGETHER static void in_order(const float* q, int64_t padded_dim, const float* keys, Sums<Rows>& even) {
        Sums<Rows> odd, more;
        quarter<Rows, Dim>(q, padded_dim, keys, 0, even);
        quarter<Rows, Dim>(q, padded_dim, keys, 2, more);
        add<Rows>(even, more, even);
        quarter<Rows, Dim>(q, padded_dim, keys, 1, odd);
        quarter<Rows, Dim>(q, padded_dim, keys, 3, more);
        add<Rows>(odd, more, odd);
        add<Rows>(even, odd, even);
    }
    template <int Rows, int Dim>
    PLAIT_APART static void scores(const float* q, int64_t padded_dim, const float* keys, int64_t first, int64_t last,
                                   float* out) {
        for (int64_t j = first; j < last; j += kStep) {
            Sums<Rows> sums;
            if constexpr (kAnyOrder) straight<Rows, Dim>(q, padded_dim, keys + j, sums);
            else in_order<Rows, Dim>(q, padded_dim, keys + j, sums);
            for (int r = 0; r < Rows; ++r)
                for (int k = 0; k < kVectors; ++k) S::wide_store(out + r * kScoreStride + j + k * kWide, sums[r][k]);
        }
    }

    // Keys [first, last) of a piece: out[channel][key].
    template <Number N>
    static void turn(Source from, int64_t first, int64_t last, float* out) {
        using R = Reader<S, N>;
        const auto load = [&](int64_t key, int64_t c) {
            const int64_t at = key * from.stride + c, left = from.dim - c;
            return left >= kLanes ? R::load(from.at, at) : R::load_some(from.at, at, left);
        };
        if (last - first < 4) {
            for (int64_t j = first; j < last; ++j)
                for (int64_t c = 0; c < from.dim; c += kLanes) {
                    float lanes[kLanes];
                    S::store(lanes, load(j, c));
                    for (int l = 0; l < kLanes; ++l) out[(c + l) * kKeyBlock + j - first] = lanes[l];
                }
            return;
        }
        for (int64_t j = first; j < last; j += 4) {
            // The last four may be in part those before them.
            const int64_t four = A::smaller(j, last - 4);
            for (int64_t c = 0; c < from.dim; c += kLanes) {
                const F keys[4] = {load(four, c), load(four + 1, c), load(four + 2, c), load(four + 3, c)};
                S::store_turned(keys, out + c * kKeyBlock + four - first, kKeyBlock);
            }
        }
    }
    // Values [first, last) of a piece: out[value][padded].
    template <Number N>
    static void widen(Source from, int64_t padded, int64_t first, int64_t last, float* out) {
        using R = Reader<S, N>;
        for (int64_t j = first; j < last; ++j, out += padded)
            for (int64_t c = 0; c < from.dim; c += kLanes) {
                const int64_t left = from.dim - c, at = j * from.stride + c;
                S::store(out + c, left >= kLanes ? R::load(from.at, at) : R::load_some(from.at, at, left));
            }
    }
    template <Number N>
    static void copy(bool is_value_pass, Source from, int64_t padded, int64_t first, int64_t last, int64_t slot, float* block) {
        if (is_value_pass) widen<N>(from, padded, first, last, block + slot * padded);
        else turn<N>(from, first, last, block + slot);
    }

    // Keys or values of the runs in slots [slot, slot + 64); zeros where there is none.
    PLAIT_APART static void fill(const Visit& v, bool is_value_pass, int64_t slot, float* block) {
        const int64_t padded = is_value_pass ? v.padded_value : v.padded_dim;
        const auto part = [&](const Piece& piece) {
            return Range{A::larger(slot - piece.slot, 0), A::smaller(slot + kKeyBlock - piece.slot, piece.count)};
        };
        int64_t found = 0;
        for (int64_t i = 0; i < v.num_pieces; ++i)
            if (v.pieces[i].nodes == nullptr) found += A::larger(part(v.pieces[i]).high - part(v.pieces[i]).low, 0);
        if (found < kKeyBlock) std::memset(block, 0, size_t(kKeyBlock * padded) * sizeof(float));
        for (int64_t i = 0; i < v.num_pieces; ++i) {
            const Piece& piece = v.pieces[i];
            const Range keys = part(piece);
            if (piece.nodes != nullptr || keys.low >= keys.high) continue;
            const Source from = is_value_pass ? A::values_of_piece(v, piece) : A::keys_of(v, piece);
            const int64_t to = piece.slot + keys.low - slot;
            switch (from.number) {
                case Number::fp32: copy<Number::fp32>(is_value_pass, from, padded, keys.low, keys.high, to, block); break;
                case Number::bf16: copy<Number::bf16>(is_value_pass, from, padded, keys.low, keys.high, to, block); break;
                case Number::fp16: copy<Number::fp16>(is_value_pass, from, padded, keys.low, keys.high, to, block); break;
            }
        }
    }

    static void attend(const Visit& v, float* weights, Fold fold) {
        float* block = weights + v.rows * kScoreStride;
        const Range all = A::runs_seen(v, 0, int(v.rows));
        const int64_t start = all.low / kKeyBlock * kKeyBlock;
        // Call body(row, rows, first, last) for the blocks of rows that see slots [first, last) of those from `slot` on.
        const auto each_rows = [&](int64_t slot, auto body) {
            A::each_rows(v, [&](int64_t row, auto rows) {
                const Range seen = A::runs_seen(v, row, rows);
                const int64_t first = A::larger(seen.low - slot, 0), last = A::smaller(seen.high - slot, kKeyBlock);
                if (first < last) body(row, rows, first, last);
            });
        };
        for (int64_t slot = start; slot < all.high; slot += kKeyBlock) {
            fill(v, false, slot, block);
            each_rows(slot, [&](int64_t row, auto rows, int64_t first, int64_t last) {
                const auto of = v.padded_dim == 64 ? scores<rows, 64> : scores<rows, 0>;
                of(v.q + row * v.padded_dim, v.padded_dim, block, first / kStep * kStep, last, weights + row * kScoreStride + slot);
            });
        }
        A::each_rows(v, [&](int64_t row, auto rows) { A::soften_rows(v, row, rows, weights, fold); });
        std::memset(fold.sum, 0, size_t(v.rows * v.padded_value) * sizeof(float));
        const Source values{block, v.padded_value, v.padded_value, Number::fp32};
        for (int64_t slot = start; slot < all.high; slot += kKeyBlock) {
            fill(v, true, slot, block);
            each_rows(slot, [&](int64_t row, auto rows, int64_t first, int64_t last) {
                A::template values<Number::fp32, rows>(weights + row * kScoreStride + slot, values, v.padded_value, first,
                                                       last, nullptr, fold.sum + row * v.padded_value);
            });
        }
        A::each_rows(v, [&](int64_t row, auto rows) { A::finish_rows(v, row, rows, weights, fold); });
    }

    static void attend_chunk(const Visit& v, float* scratch, Fold fold) {
        if (v.rows >= kLeastRows) attend(v, scratch, fold);
        else A::attend(v, scratch, fold);
    }
};

}  // namespace
}  // namespace plait
