// Keys or values of one strand in few bits: what a codec stores, read by address.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace plait {

constexpr int64_t kMostWidth = 1024;     // channels of a head that is stored in codes
constexpr int64_t kCodedTokens = 64;     // tokens that are numbers at once; divides a chunk of keys
constexpr int64_t kLargestGroup = int64_t(1) << 40;

// A matrix (tokens, channels of all heads) as code * scale + minimum. A row of codes is a stream of bits, the lowest
// first; scales and minima are fp16, one for each group of tokens of a channel or of channels of a token.
struct AffineCodes {
    const uint8_t* codes = nullptr;
    int64_t row_bytes = 0, num_bytes = 0;
    const uint16_t* scale = nullptr;
    const uint16_t* minimum = nullptr;
    int64_t scale_rows = 0, scale_columns = 0;
    int bits = 0;  // 2, 3, 4 or 8
    bool is_along_tokens = false;
    int64_t group = 1, skipped = 0;  // tokens of the first group that are not stored
};

// Plain numbers (heads, tokens, width).
struct PlainNumbers {
    const void* data = nullptr;
    int64_t head_stride = 0, stride = 0;
    Number number = Number::fp32;
};

// `width` channels of every head, in one of the two forms.
struct StoredNumbers {
    int64_t num_heads = 0, tokens = 0, width = 0;
    bool is_affine = false;
    AffineCodes affine;
    PlainNumbers plain;
};

// Single places to which something is added, sorted by block of 256 tokens, head and token.
struct Outliers {
    const int32_t* starts = nullptr;   // [block * heads + head], and the end; null for none
    const uint8_t* tokens = nullptr;   // within the block
    const int16_t* channels = nullptr; // within the head
    const uint16_t* numbers = nullptr; // fp16
    int64_t count = 0;
};

// numbers + outliers + factor (tokens, rank) times channels (head, width, rank); of `dim` channels those `kept`, the
// others 0, or their `means` where given.
struct CodedNumbers {
    StoredNumbers stored;
    int64_t dim = 0;
    StoredNumbers factor;              // width is the rank; 0 for none
    const uint16_t* factor_channels = nullptr;
    Outliers outliers;
    const int16_t* kept = nullptr;     // (heads, width); null for all
    const float* means = nullptr;      // (heads, dim)

    int64_t padded(int64_t n) const { return (n + kLanes - 1) / kLanes * kLanes; }
    int64_t rank() const { return factor.width; }
};

// Numbers of a row of keys and of values as attention reads them: the low-rank part stands behind the others.
inline int64_t wide_keys(const CodedNumbers& keys) { return keys.padded(keys.stored.width) + keys.padded(keys.rank()); }
inline int64_t wide_values(const CodedNumbers& values) { return values.padded(values.dim) + values.padded(values.rank()); }

// Whether keys and values lie as plain numbers of one kind, of the values in all channels.
inline bool is_plain(const CodedNumbers& keys, const CodedNumbers& values) {
    const auto alone = [](const CodedNumbers& n) {
        return !n.stored.is_affine && n.rank() == 0 && n.outliers.starts == nullptr;
    };
    return alone(keys) && alone(values) && values.kept == nullptr &&
           keys.stored.plain.number == values.stored.plain.number;
}

// Numbers of scratch that attend_coded needs for this many rows.
inline int64_t coded_scratch(int64_t rows, const CodedNumbers& keys, const CodedNumbers& values) {
    const int64_t wide_k = wide_keys(keys), wide_v = wide_values(values);
    const int64_t widest = wide_k > wide_v ? wide_k : wide_v;
    const int64_t key_factor = keys.stored.width * keys.padded(keys.rank());
    const int64_t value_factor = values.padded(values.rank()) * values.padded(values.dim);
    const int64_t coded = rows * (kScoreStride + wide_k + wide_v) + kCodedTokens * widest +
                          (key_factor > value_factor ? key_factor : value_factor);
    const int64_t plain = attend_scratch(rows, wide_k, wide_v) + rows * wide_k;
    return coded > plain ? coded : plain;
}

}  // namespace plait
