// Products with matrices of low-bit codes: activations in two bytes with exact integer sums, or in fp32.
//
// A code becomes a byte u: itself where levels are evenly spaced, else an entry of a table of 16, plus
// kGridOffset so that no entry is negative. The last code of a table may stand for a value that each row chooses
// in each group. Entries of a wide table are kWideBase times one byte plus another. Lane r belongs to output row r of
// the tile.
//
// Where both bits of a code have scales of their own, the matrix is the sum of two matrices of codes 0 and 1, and a
// product the sum over the blocks of the high bits, then over those of the low bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "kernel_pairs.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace plait {
namespace {

// One of the two matrices of single bits that a matrix is the sum of.
inline GridView plane_of(const GridView& w, int plane) {
    GridView view = w;
    view.plane = plane;
    if (plane == 1) view.scales = w.low_scales;
    return view;
}

#ifdef __AVX512VNNI__

// Sixteen output rows: a tile.
struct GridLanes {
    static constexpr int kCount = 16;
    static constexpr int kRows = 4;  // rows that meet a decoded block together
    static constexpr int kLess = 0;  // what `dot` takes off 8-bit codes
    using F = __m512;
    using I = __m512i;   // one whole number for each row
    using U = __m512i;   // four bytes for each row

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static F load_halves(const uint8_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static F load_bytes(const uint8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F to_float(I x) { return _mm512_cvtepi32_ps(x); }

    static U plane(const uint8_t* p) { return _mm512_loadu_si512(p); }
    template <int Shift, int Mask>
    static U field(U x) {
        return _mm512_and_si512(_mm512_srli_epi16(x, Shift), _mm512_set1_epi8(char(Mask)));
    }
    template <int Shift>
    static U raised(U x) { return _mm512_slli_epi16(x, Shift); }
    static U join(U a, U b) { return _mm512_or_si512(a, b); }

    using Table = __m512i;
    static Table table(const uint8_t* entries) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
    }
    static U look_up(Table t, U codes) { return _mm512_shuffle_epi8(t, codes); }
    // Bytes of `value` where the code is `last`, else 0.
    static U where_last(U codes, int last, U value) {
        return _mm512_maskz_mov_epi8(_mm512_cmpeq_epi8_mask(codes, _mm512_set1_epi8(char(last))), value);
    }
    // Four times the special byte of each row; `types` are 2 bits a row.
    static U specials(const uint8_t* types, int, const uint32_t* fourfold) {
        uint32_t bits;
        std::memcpy(&bits, types, 4);
        const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i type = _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(int(bits)), shifts), _mm512_set1_epi32(3));
        const __m512i values =
            _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(fourfold)));
        return _mm512_permutexvar_epi32(type, values);
    }
    static U no_bytes() { return _mm512_setzero_si512(); }

    static __m512i four(const int8_t* x) {
        int32_t bits;
        std::memcpy(&bits, x, 4);
        return _mm512_set1_epi32(bits);
    }
    // Sum over 32 columns of u * x.
    template <int Top>
    static I dot(const U (&u)[8], const int8_t* x) {
        I even = _mm512_setzero_si512(), odd = even;
        for (int g = 0; g < 8; g += 2) {
            even = _mm512_dpbusd_epi32(even, u[g], four(x + 4 * g));
            odd = _mm512_dpbusd_epi32(odd, u[g + 1], four(x + 4 * g + 4));
        }
        return _mm512_add_epi32(even, odd);
    }
    // kWideBase * high + low.
    static I wide(I high, I low) {
        return _mm512_add_epi32(_mm512_mullo_epi32(high, _mm512_set1_epi32(kWideBase)), low);
    }
    // 128 * high + low + shift * minus_sum, which may leave 32 bits on the way and comes back to them.
    static I whole(I high, I low, int shift, int32_t minus_sum) {
        return _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(high, 7), low), _mm512_set1_epi32(shift * minus_sum));
    }
    // Byte `column` of each row as a number.
    static F number(U u, int column) {
        return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srl_epi32(u, _mm_cvtsi32_si128(8 * column)),
                                                   _mm512_set1_epi32(255)));
    }
};

#elif defined(__AVX2__)

// Eight output rows: the parts of a tile that one register holds.
struct GridLanes {
    static constexpr int kCount = 8;
    static constexpr int kRows = 4;  // rows that meet a decoded block together
    static constexpr int kLess = 128;  // what `dot` takes off 8-bit codes
    using F = __m256;
    using I = __m256i;   // one whole number for each row
    using U = __m256i;   // four bytes for each row

    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float x) { return _mm256_set1_ps(x); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static F load_halves(const uint8_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static F load_bytes(const uint8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F to_float(I x) { return _mm256_cvtepi32_ps(x); }

    static U plane(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    template <int Shift, int Mask>
    static U field(U x) {
        return _mm256_and_si256(_mm256_srli_epi16(x, Shift), _mm256_set1_epi8(char(Mask)));
    }
    template <int Shift>
    static U raised(U x) { return _mm256_slli_epi16(x, Shift); }
    static U join(U a, U b) { return _mm256_or_si256(a, b); }

    // Bytes, or what two bytes of a wide table stand for, less `less` as pairs; see `Panel`.
    template <bool IsWide>
    static void store_pairs(const U (&u)[8], const U (&low)[8], int less, int16_t* out) {
        const __m256i minus = _mm256_set1_epi16(int16_t(less)), base = _mm256_set1_epi16(kWideBase);
        const auto pair_of = [](U bytes, int i) {
            return i == 0 ? _mm256_and_si256(bytes, _mm256_set1_epi16(255)) : _mm256_srli_epi16(bytes, 8);
        };
        for (int g = 0; g < 8; ++g) {
            for (int i = 0; i < 2; ++i) {
                __m256i pair = pair_of(u[g], i);
                if constexpr (IsWide) pair = _mm256_add_epi16(_mm256_mullo_epi16(pair, base), pair_of(low[g], i));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (4 * g + 2 * i) * kTile), _mm256_sub_epi16(pair, minus));
            }
        }
    }

    using Table = __m256i;
    static Table table(const uint8_t* entries) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
    }
    static U look_up(Table t, U codes) { return _mm256_shuffle_epi8(t, codes); }
    // Bytes of `value` where the code is `last`, else 0.
    static U where_last(U codes, int last, U value) {
        return _mm256_and_si256(_mm256_cmpeq_epi8(codes, _mm256_set1_epi8(char(last))), value);
    }
    // Four times the special byte of each row; `types` are 2 bits a row.
    static U specials(const uint8_t* types, int first, const uint32_t* fourfold) {
        uint32_t bits;
        std::memcpy(&bits, types, 4);
        const __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
        const __m256i type = _mm256_and_si256(
            _mm256_srlv_epi32(_mm256_set1_epi32(int(bits >> (2 * first))), shifts), _mm256_set1_epi32(3));
        const __m256i values =
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(fourfold)));
        return _mm256_permutevar8x32_epi32(values, type);
    }
    static U no_bytes() { return _mm256_setzero_si256(); }

    static __m256i four(const int8_t* x) {
        int32_t bits;
        std::memcpy(&bits, x, 4);
        return _mm256_set1_epi32(bits);
    }
    // Sum over 32 columns of u * x, for u up to Top.
    template <int Top>
    static I dot(const U (&u)[8], const int8_t* x) {
        const __m256i ones = _mm256_set1_epi16(1);
        if constexpr (Top <= 15) {
            // A pair of products is at most 2 * 15 * 127 = 3810, so eight pairs stay below 2^15.
            __m256i sum = _mm256_maddubs_epi16(u[0], four(x));
            for (int g = 1; g < 8; ++g) sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(u[g], four(x + 4 * g)));
            return _mm256_madd_epi16(sum, ones);
        } else if constexpr (Top <= 32) {
            // At most 2 * 32 * 127 = 8128, so four pairs stay below 2^15.
            __m256i total = _mm256_setzero_si256();
            for (int half = 0; half < 8; half += 4) {
                __m256i sum = _mm256_maddubs_epi16(u[half], four(x + 4 * half));
                for (int g = half + 1; g < half + 4; ++g)
                    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(u[g], four(x + 4 * g)));
                total = _mm256_add_epi32(total, _mm256_madd_epi16(sum, ones));
            }
            return total;
        } else if constexpr (Top < kWideBase) {
            // At most 2 * 64 * 127 = 16256, so two pairs stay below 2^15.
            __m256i total = _mm256_setzero_si256();
            for (int g = 0; g < 8; g += 2) {
                const __m256i sum = _mm256_add_epi16(_mm256_maddubs_epi16(u[g], four(x + 4 * g)),
                                                     _mm256_maddubs_epi16(u[g + 1], four(x + 4 * g + 4)));
                total = _mm256_add_epi32(total, _mm256_madd_epi16(sum, ones));
            }
            return total;
        } else {
            // Codes up to 255 would saturate. The sign of code - 128 is given to x instead: a pair of products is
            // then at most 2 * 128 * 127 = 32512. This is the sum of (u - 128) * x.
            __m256i total = _mm256_setzero_si256();
            for (int g = 0; g < 8; ++g) {
                const __m256i code = _mm256_xor_si256(u[g], _mm256_set1_epi8(-128));
                const __m256i pairs =
                    _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(four(x + 4 * g), code));
                total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, ones));
            }
            return total;
        }
    }
    // kWideBase * high + low.
    static I wide(I high, I low) {
        return _mm256_add_epi32(_mm256_mullo_epi32(high, _mm256_set1_epi32(kWideBase)), low);
    }
    // 128 * high + low + shift * minus_sum, which may leave 32 bits on the way and comes back to them.
    static I whole(I high, I low, int shift, int32_t minus_sum) {
        return _mm256_add_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, 7), low),
                                _mm256_set1_epi32(shift * minus_sum));
    }
    // Byte `column` of each row as a number.
    static F number(U u, int column) {
        return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(u, _mm_cvtsi32_si128(8 * column)),
                                                   _mm256_set1_epi32(255)));
    }
};

#endif

#ifdef __AVX2__

// Bits of a code, whether codes are looked up, whether the last one is special, the one bit that is looked at, if any,
// and whether the table is wide.
template <int Bits_, bool IsTable_, bool HasSpecials_, int Plane_ = -1, bool IsWide_ = false>
struct GridFormat {
    static constexpr int Bits = Bits_, Plane = Plane_;
    static constexpr bool IsTable = IsTable_, HasSpecials = HasSpecials_, IsWide = IsWide_;
    static constexpr int Top = Bits == 8 ? 255 : IsWide ? kWideBase - 1 : IsTable ? 2 * kGridOffset : 15;
};

template <class S>
struct GridKernels {
    using L = GridLanes;
    using F = L::F;
    using U = L::U;
    static constexpr int kParts = kTile / L::kCount;
    static constexpr int64_t kAhead = 8;  // blocks

    // The bytes of 8 groups of 4 columns.
    template <class Fmt>
    static void decode(const uint8_t* p, L::Table table, const U& special, U (&u)[8]) {
        if constexpr (Fmt::Bits == 8) {
            for (int g = 0; g < 8; ++g) u[g] = L::plane(p + 64 * g);
        } else if constexpr (Fmt::Bits == 4) {
            for (int j = 0; j < 4; ++j) {
                const U packed = L::plane(p + 64 * j);
                u[2 * j] = L::field<0, 15>(packed);
                u[2 * j + 1] = L::field<4, 15>(packed);
            }
        } else if constexpr (Fmt::Plane >= 0) {
            constexpr int bit = 1 - Fmt::Plane;
            for (int j = 0; j < 2; ++j) {
                const U packed = L::plane(p + 64 * j);
                u[4 * j] = L::field<bit, 1>(packed);
                u[4 * j + 1] = L::field<2 + bit, 1>(packed);
                u[4 * j + 2] = L::field<4 + bit, 1>(packed);
                u[4 * j + 3] = L::field<6 + bit, 1>(packed);
            }
        } else {
            for (int j = 0; j < 2; ++j) {
                const U packed = L::plane(p + 64 * j);
                u[4 * j] = L::field<0, 3>(packed);
                u[4 * j + 1] = L::field<2, 3>(packed);
                u[4 * j + 2] = L::field<4, 3>(packed);
                u[4 * j + 3] = L::field<6, 3>(packed);
            }
            if constexpr (Fmt::Bits == 3) {
                const U third = L::plane(p + 128);
                u[0] = L::join(u[0], L::raised<2>(L::field<0, 1>(third)));
                u[1] = L::join(u[1], L::raised<2>(L::field<1, 1>(third)));
                u[2] = L::join(u[2], L::field<0, 4>(third));
                u[3] = L::join(u[3], L::field<1, 4>(third));
                u[4] = L::join(u[4], L::field<2, 4>(third));
                u[5] = L::join(u[5], L::field<3, 4>(third));
                u[6] = L::join(u[6], L::field<4, 4>(third));
                u[7] = L::join(u[7], L::field<5, 4>(third));
            }
        }
        if constexpr (Fmt::IsTable) {
            constexpr int last = (1 << Fmt::Bits) - 1;
            for (int g = 0; g < 8; ++g) {
                const U codes = u[g];
                u[g] = L::look_up(table, codes);
                if constexpr (Fmt::HasSpecials) u[g] = L::join(u[g], L::where_last(codes, last, special));
            }
        }
    }

    // What one group of one part of a tile shares.
    struct Group {
        F scale, zero;
        U special;
    };
    template <class Fmt>
    static Group group_of(const GridView& w, int64_t tile, int64_t g, int part) {
        const int first = part * L::kCount;
        const int64_t at = tile * w.groups + g;
        Group group{L::zero(), L::zero(), L::no_bytes()};
        group.scale = w.row_scales != nullptr ? L::load_bytes(w.scales + at * kTile + first)
                                              : L::load_halves(w.scales + 2 * (at * kTile + first));
        if (w.zeros != nullptr) group.zero = L::load_halves(w.zeros + 2 * (at * kTile + first));
        if constexpr (Fmt::HasSpecials) group.special = L::specials(w.types + 4 * at, first, w.specials);
        return group;
    }

    template <int Rows>
    static void clear(F (&sum)[kParts][Rows]) {
        for (int part = 0; part < kParts; ++part)
            for (int m = 0; m < Rows; ++m) sum[part][m] = L::zero();
    }

    // y[row][r] = row_scale[r] * sum over blocks b of scale[b, r] * x_scale[b] * sum(u * q), less what zeros take
    // off, in the order of b. Nothing here depends on how many rows the chunk has: `stride`, of which `Rows` are taken.
    template <class Fmt, int Rows>
    static void tile(const GridView& w, int64_t tile, const int8_t* x, const RowBlock* xb, int stride, float* out) {
        F sum[kParts][Rows];
        clear<Rows>(sum);
        add_tile<Fmt, Rows>(w, tile, x, xb, stride, sum);
        finish<Rows>(w, tile, sum, out);
    }

    template <class Fmt, int Rows>
    static void add_tile(const GridView& w, int64_t tile, const int8_t* x, const RowBlock* xb, int stride, F (&sum)[kParts][Rows]) {
        constexpr int64_t kBytes = 64 * Fmt::Bits;
        const int64_t num_blocks = w.columns / kBlock, per_group = w.group / kBlock;
        const int shift = (w.zeros != nullptr ? 0 : w.offset) - (Fmt::Bits == 8 ? L::kLess : 0);
        const L::Table table = L::table(w.table), low_table = L::table(w.low_table);
        const uint8_t* at = w.codes + tile * num_blocks * kBytes;
        for (int64_t g = 0; g < w.groups; ++g) {
            Group groups[kParts];
            for (int part = 0; part < kParts; ++part) groups[part] = group_of<Fmt>(w, tile, g, part);
            const int64_t last = (g + 1) * per_group < num_blocks ? (g + 1) * per_group : num_blocks;
            for (int64_t b = g * per_group; b < last; ++b, at += kBytes, x += stride * kBlockCodes, xb += stride) {
                if constexpr (Rows == 1)
                    for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(at + kAhead * kBytes + line);
                for (int part = 0; part < kParts; ++part) {
                    U u[8], lower[8];
                    decode<Fmt>(at + 4 * L::kCount * part, table, groups[part].special, u);
                    if constexpr (Fmt::IsWide) decode<Fmt>(at + 4 * L::kCount * part, low_table, groups[part].special, lower);
                    const auto dot = [&](const int8_t* q) {
                        if constexpr (Fmt::IsWide) return L::wide(L::dot<Fmt::Top>(u, q), L::dot<Fmt::Top>(lower, q));
                        else return L::dot<Fmt::Top>(u, q);
                    };
                    for (int m = 0; m < Rows; ++m) {
                        const int8_t* q = x + m * kBlockCodes;
                        const RowBlock& of = xb[m];
                        const F product = L::to_float(L::whole(dot(q), dot(q + kBlock), shift, of.minus_sum));
                        const F scale = groups[part].scale;
                        F total = L::fma(L::mul(scale, L::set1(of.scale)), product, sum[part][m]);
                        if (w.zeros != nullptr)
                            total = L::fma(L::mul(scale, groups[part].zero), L::set1(-of.scaled_sum), total);
                        sum[part][m] = total;
                    }
                }
            }
        }
    }

    // The same with activations in fp32: x has row stride ldx.
    template <class Fmt, int Rows>
    static void exact(const GridView& w, int64_t tile, const float* x, int64_t ldx, float* out) {
        F sum[kParts][Rows];
        clear<Rows>(sum);
        add_exact<Fmt, Rows>(w, tile, x, ldx, sum);
        finish<Rows>(w, tile, sum, out);
    }

    template <class Fmt, int Rows>
    static void add_exact(const GridView& w, int64_t tile, const float* x, int64_t ldx, F (&sum)[kParts][Rows]) {
        constexpr int64_t kBytes = 64 * Fmt::Bits;
        const int64_t num_blocks = w.columns / kBlock, per_group = w.group / kBlock;
        const L::Table table = L::table(w.table), low_table = L::table(w.low_table);
        const F offset = L::set1(float(w.offset)), base = L::set1(float(kWideBase));
        for (int64_t g = 0; g < w.groups; ++g) {
            const int64_t first = g * per_group;
            const int64_t last = first + per_group < num_blocks ? first + per_group : num_blocks;
            for (int part = 0; part < kParts; ++part) {
                const Group group = group_of<Fmt>(w, tile, g, part);
                const F zero = w.zeros != nullptr ? group.zero : offset;
                F inner[Rows];
                for (int m = 0; m < Rows; ++m) inner[m] = L::zero();
                for (int64_t b = first; b < last; ++b) {
                    U u[8], lower[8];
                    const uint8_t* at = w.codes + (tile * num_blocks + b) * kBytes + 4 * L::kCount * part;
                    decode<Fmt>(at, table, group.special, u);
                    if constexpr (Fmt::IsWide) decode<Fmt>(at, low_table, group.special, lower);
                    for (int c = 0; c < kBlock; ++c) {
                        F entry = L::number(u[c / 4], c % 4);
                        if constexpr (Fmt::IsWide) entry = L::fma(entry, base, L::number(lower[c / 4], c % 4));
                        const F weight = L::sub(entry, zero);
                        for (int m = 0; m < Rows; ++m)
                            inner[m] = L::fma(weight, L::set1(x[m * ldx + b * kBlock + c]), inner[m]);
                    }
                }
                for (int m = 0; m < Rows; ++m) sum[part][m] = L::fma(group.scale, inner[m], sum[part][m]);
            }
        }
    }

    template <int Rows>
    static void finish(const GridView& w, int64_t tile, const F (&sum)[kParts][Rows], float* out) {
        for (int part = 0; part < kParts; ++part) {
            const int first = part * L::kCount;
            for (int m = 0; m < Rows; ++m) {
                F y = sum[part][m];
                if (w.row_scales != nullptr) y = L::mul(y, L::load(w.row_scales + tile * kTile + first));
                L::store(out + m * kTile + first, y);
            }
        }
    }

    // What bytes are too large by; zeros take that off apart.
    static int less(const GridView& w) { return w.zeros != nullptr ? 0 : w.offset; }

    // Blocks [begin, end) of a tile for many rows.
    template <class Fmt, class Lanes = L>
    static void fill(const GridView& w, int64_t tile, int64_t begin, int64_t end, Panel& panel) {
        const int64_t num_blocks = w.columns / kBlock, per_group = w.group / kBlock;
        const L::Table table = L::table(w.table), low_table = L::table(w.low_table);
        for (int64_t b = begin; b < end; ++b) {
            const uint8_t* at = w.codes + (tile * num_blocks + b) * 64 * Fmt::Bits;
            for (int part = 0; part < kParts; ++part) {
                const Group group = group_of<Fmt>(w, tile, b / per_group, part);
                U u[8], lower[8];
                decode<Fmt>(at + 4 * L::kCount * part, table, group.special, u);
                if constexpr (Fmt::IsWide) decode<Fmt>(at + 4 * L::kCount * part, low_table, group.special, lower);
                Lanes::template store_pairs<Fmt::IsWide>(u, lower, less(w), &panel.codes[b - begin][0][part * L::kCount][0]);
                L::store(panel.scales[b - begin][0] + part * L::kCount, group.scale);
                L::store(panel.minima[b - begin][0] + part * L::kCount,
                         L::sub(L::zero(), L::mul(group.scale, group.zero)));
            }
        }
    }

    template <class Fmt>
    static void tile_of(const GridView& w, int64_t t, const QuantizedRows& x, int64_t first, int64_t last, float* out) {
        int64_t row = first;
        if constexpr (kHasPairs<S>) {
            const auto widen = [&](Panel& panel, int64_t begin, int64_t end) { fill<Fmt>(w, t, begin, end, panel); };
            row = w.zeros != nullptr ? Pairs<S>::template run<1, true>(x, first, last, out, widen)
                                     : Pairs<S>::template run<1, false>(x, first, last, out, widen);
            if (w.row_scales != nullptr)
                for (int64_t i = 0; i < (row - first) * kTile; ++i) out[i] *= w.row_scales[t * kTile + i % kTile];
        }
        for (int rows = 0; row < last; row += rows) {
            rows = chunk_rows(x.rows - row);
            const auto some = [&](auto taken, int m) {
                tile<Fmt, taken>(w, t, x.codes_of(row, 0, rows) + m * kBlockCodes, x.blocks_of(row, 0, rows) + m, rows,
                                 out + (row - first + m) * kTile);
            };
            int m = 0;
            if constexpr (!kHasPairs<S>)
                for (; m + L::kRows <= rows; m += L::kRows) some(std::integral_constant<int, L::kRows>{}, m);
            for (; m < rows; ++m) some(std::integral_constant<int, 1>{}, m);
        }
    }

    template <class Fmt>
    static void exact_of(const GridView& w, int64_t t, const float* x, int64_t ldx, int rows, float* out) {
        int m = 0;
        for (; m + L::kRows <= rows; m += L::kRows) exact<Fmt, L::kRows>(w, t, x + m * ldx, ldx, out + m * kTile);
        for (; m < rows; ++m) exact<Fmt, 1>(w, t, x + m * ldx, ldx, out + m * kTile);
    }

    // Call `function` with the GridFormat of a matrix.
    template <class Function>
    static void with_format(const GridView& w, Function function) {
        if (!w.is_table) {
            switch (w.bits) {
                case 2: return function(GridFormat<2, false, false>{});
                case 3: return function(GridFormat<3, false, false>{});
                case 4: return function(GridFormat<4, false, false>{});
                default: return function(GridFormat<8, false, false>{});
            }
        }
        if (w.bits == 3) return w.types != nullptr ? function(GridFormat<3, true, true>{}) : function(GridFormat<3, true, false>{});
        if (w.is_wide) return function(GridFormat<4, true, false, -1, true>{});
        return w.types != nullptr ? function(GridFormat<4, true, true>{}) : function(GridFormat<4, true, false>{});
    }

    using High = GridFormat<2, false, false, 0>;
    using Low = GridFormat<2, false, false, 1>;

    // Tile `t` of a matrix of two planes times rows [first, last).
    static void planes_tile(const GridView& w, int64_t t, const QuantizedRows& x, int64_t first, int64_t last, float* out) {
        const GridView high = plane_of(w, 0), low = plane_of(w, 1);
        int64_t row = first;
        if constexpr (kHasPairs<S>) {
            const auto widen_high = [&](Panel& panel, int64_t begin, int64_t end) { fill<High>(high, t, begin, end, panel); };
            const auto widen_low = [&](Panel& panel, int64_t begin, int64_t end) { fill<Low>(low, t, begin, end, panel); };
            Pairs<S>::template run<1, false>(x, first, last, out, widen_high);
            row = Pairs<S>::template run<1, false>(x, first, last, out, widen_low, true);
        }
        for (int rows = 0; row < last; row += rows) {
            rows = chunk_rows(x.rows - row);
            const auto some = [&](auto taken, int m) {
                const int8_t* codes = x.codes_of(row, 0, rows) + m * kBlockCodes;
                const RowBlock* blocks = x.blocks_of(row, 0, rows) + m;
                F sum[kParts][taken];
                clear<taken>(sum);
                add_tile<High, taken>(high, t, codes, blocks, rows, sum);
                add_tile<Low, taken>(low, t, codes, blocks, rows, sum);
                finish<taken>(w, t, sum, out + (row - first + m) * kTile);
            };
            int m = 0;
            if constexpr (!kHasPairs<S>)
                for (; m + L::kRows <= rows; m += L::kRows) some(std::integral_constant<int, L::kRows>{}, m);
            for (; m < rows; ++m) some(std::integral_constant<int, 1>{}, m);
        }
    }

    template <int Rows>
    static void planes_exact(const GridView& high, const GridView& low, int64_t t, const float* x, int64_t ldx, float* out) {
        F sum[kParts][Rows];
        clear<Rows>(sum);
        add_exact<High, Rows>(high, t, x, ldx, sum);
        add_exact<Low, Rows>(low, t, x, ldx, sum);
        finish<Rows>(high, t, sum, out);
    }

    static void grid_tile(const GridView& w, int64_t t, const QuantizedRows& x, int64_t first, int64_t last, float* out) {
        if (w.low_scales != nullptr) return planes_tile(w, t, x, first, last, out);
        with_format(w, [&](auto format) { tile_of<decltype(format)>(w, t, x, first, last, out); });
    }

    static void grid_exact(const GridView& w, int64_t t, const float* x, int64_t ldx, int rows, float* out) {
        if (w.low_scales != nullptr) {
            const GridView high = plane_of(w, 0), low = plane_of(w, 1);
            int m = 0;
            for (; m + L::kRows <= rows; m += L::kRows)
                planes_exact<L::kRows>(high, low, t, x + m * ldx, ldx, out + m * kTile);
            for (; m < rows; ++m) planes_exact<1>(high, low, t, x + m * ldx, ldx, out + m * kTile);
            return;
        }
        with_format(w, [&](auto format) { exact_of<decltype(format)>(w, t, x, ldx, rows, out); });
    }
};

#else

// The definition of both products, in plain C++.
template <class S>
struct GridKernels {
    static constexpr int kBytes = 64;

    // The bytes u of a block: [group of 4 columns][row][column].
    static void decode(const GridView& w, const uint8_t* p, const uint8_t* types, int16_t (&u)[8][kBytes]) {
        const int last = (1 << w.bits) - 1;
        for (int g = 0; g < 8; ++g) {
            for (int i = 0; i < kBytes; ++i) {
                int code;
                if (w.bits == 8) code = p[64 * g + i];
                else if (w.bits == 4) code = (p[64 * (g / 2) + i] >> (4 * (g & 1))) & 15;
                else code = (p[64 * (g / 4) + i] >> (2 * (g & 3))) & 3;
                if (w.low_scales != nullptr) code = (code >> (1 - w.plane)) & 1;
                if (w.bits == 3) code |= ((p[128 + i] >> g) & 1) << 2;
                if (w.is_table) {
                    const int row = i / 4;
                    code = types != nullptr && code == last
                               ? int(w.specials[(types[row / 4] >> (2 * (row % 4))) & 3] & 255)
                               : entry_of(w, code);
                }
                u[g][i] = int16_t(code);
            }
        }
    }

    static float half_at(const uint8_t* base, int64_t index) {
        uint16_t half;
        std::memcpy(&half, base + 2 * index, 2);
        return fp16_to_float(half);
    }
    static float scale_of(const GridView& w, int64_t at) {
        return w.row_scales != nullptr ? float(w.scales[at]) : half_at(w.scales, at);
    }
    static const uint8_t* types_of(const GridView& w, int64_t group) {
        return w.types == nullptr ? nullptr : w.types + 4 * group;
    }

    // Blocks [begin, end) of a tile for many rows.
    static void fill(const GridView& w, int64_t tile, int64_t begin, int64_t end, Panel& panel) {
        const int64_t num_blocks = w.columns / kBlock, per_group = w.group / kBlock;
        int16_t u[8][kBytes];
        for (int64_t b = begin; b < end; ++b) {
            const int64_t group = tile * w.groups + b / per_group;
            decode(w, w.codes + (tile * num_blocks + b) * 64 * w.bits, types_of(w, group), u);
            for (int g = 0; g < 8; ++g)
                for (int i = 0; i < kBytes; ++i)
                    panel.codes[b - begin][2 * g + i % 2][i / 4][i % 4 / 2] =
                        int16_t(u[g][i] - (w.zeros != nullptr ? 0 : w.offset));
            for (int r = 0; r < kTile; ++r) {
                const float scale = panel.scales[b - begin][0][r] = scale_of(w, group * kTile + r);
                if (w.zeros != nullptr) panel.minima[b - begin][0][r] = -(scale * half_at(w.zeros, group * kTile + r));
            }
        }
    }

    static void grid_tile(const GridView& w, int64_t t, const QuantizedRows& x, int64_t first, int64_t last, float* out) {
        std::fill_n(out, (last - first) * kTile, 0.0f);
        for (int plane = 0; plane < (w.low_scales != nullptr ? 2 : 1); ++plane) {
            const GridView of = w.low_scales != nullptr ? plane_of(w, plane) : w;
            const auto widen = [&](Panel& panel, int64_t begin, int64_t end) { fill(of, t, begin, end, panel); };
            int64_t row = w.zeros != nullptr ? Pairs<S>::template run<1, true>(x, first, last, out, widen, true)
                                             : Pairs<S>::template run<1, false>(x, first, last, out, widen, true);
            for (int rows = 0; row < last; row += rows) {
                rows = chunk_rows(x.rows - row);
                add_small_chunk(of, t, x.codes_of(row, 0, rows), x.blocks_of(row, 0, rows), rows, out + (row - first) * kTile);
            }
        }
        finish(w, t, last - first, out);
    }

    static void add_small_chunk(const GridView& w, int64_t t, const int8_t* x, const RowBlock* xb, int rows, float* out) {
        const int64_t num_blocks = w.columns / kBlock, per_group = w.group / kBlock;
        const int less = w.bits == 8 ? 128 : 0;  // of every byte, as the vector path has it
        const int shift = (w.zeros != nullptr ? 0 : w.offset) - less;
        int16_t u[8][kBytes];
        for (int64_t b = 0; b < num_blocks; ++b, x += rows * kBlockCodes, xb += rows) {
            const int64_t group = t * w.groups + b / per_group;
            decode(w, w.codes + (t * num_blocks + b) * 64 * w.bits, types_of(w, group), u);
            for (int m = 0; m < rows; ++m) {
                const int8_t* q = x + m * kBlockCodes;
                for (int r = 0; r < kTile; ++r) {
                    int32_t high = 0, low = 0;
                    for (int c = 0; c < kBlock; ++c) {
                        const int32_t code = int32_t(u[c / 4][4 * r + c % 4]) - less;
                        high += code * q[c];
                        low += code * q[kBlock + c];
                    }
                    // Of a wide table the parts may be larger than their sum, which 32 bits hold.
                    const float product = float(int32_t(int64_t(high) * 128 + low + int64_t(shift) * xb[m].minus_sum));
                    const float scale = scale_of(w, group * kTile + r);
                    float total = std::fma(scale * xb[m].scale, product, out[m * kTile + r]);
                    if (w.zeros != nullptr)
                        total = std::fma(scale * half_at(w.zeros, group * kTile + r), -xb[m].scaled_sum, total);
                    out[m * kTile + r] = total;
                }
            }
        }
    }

    static void grid_exact(const GridView& w, int64_t t, const float* x, int64_t ldx, int rows, float* out) {
        std::fill_n(out, rows * kTile, 0.0f);
        for (int plane = 0; plane < (w.low_scales != nullptr ? 2 : 1); ++plane)
            add_exact(w.low_scales != nullptr ? plane_of(w, plane) : w, t, x, ldx, rows, out);
        finish(w, t, rows, out);
    }

    static void add_exact(const GridView& w, int64_t t, const float* x, int64_t ldx, int rows, float* out) {
        const int64_t num_blocks = w.columns / kBlock, per_group = w.group / kBlock;
        int16_t u[8][kBytes];
        float inner[kRowChunk * kTile];
        for (int64_t g = 0; g < w.groups; ++g) {
            const int64_t group = t * w.groups + g, first = g * per_group;
            const int64_t last = first + per_group < num_blocks ? first + per_group : num_blocks;
            for (int i = 0; i < rows * kTile; ++i) inner[i] = 0.0f;
            for (int64_t b = first; b < last; ++b) {
                decode(w, w.codes + (t * num_blocks + b) * 64 * w.bits, types_of(w, group), u);
                for (int c = 0; c < kBlock; ++c) {
                    for (int r = 0; r < kTile; ++r) {
                        const float zero = w.zeros != nullptr ? half_at(w.zeros, group * kTile + r) : float(w.offset);
                        const float weight = float(u[c / 4][4 * r + c % 4]) - zero;
                        for (int m = 0; m < rows; ++m)
                            inner[m * kTile + r] = std::fma(weight, x[m * ldx + b * kBlock + c], inner[m * kTile + r]);
                    }
                }
            }
            for (int i = 0; i < rows * kTile; ++i)
                out[i] = std::fma(scale_of(w, group * kTile + i % kTile), inner[i], out[i]);
        }
    }

    static void finish(const GridView& w, int64_t t, int64_t rows, float* out) {
        if (w.row_scales == nullptr) return;
        for (int64_t i = 0; i < rows * kTile; ++i) out[i] *= w.row_scales[t * kTile + i % kTile];
    }
};

#endif

}  // namespace
}  // namespace plait
