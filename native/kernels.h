// The kernels that every instruction set provides, and the plain data they work on.
//
// All paths compute the same bits: a vector is always 16 fp32 lanes, sums over lanes follow one tree, integer
// sums are exact, and every multiply-add is fused. Compile without contraction (-ffp-contract=off).
#pragma once

#include <cstdint>
#include <cstring>

namespace plait {

constexpr int kLanes = 16;
constexpr int kTile = 16;    // output rows of a packed matrix that are stored together
constexpr int kBlock = 32;   // columns that share one scale
constexpr int kRowChunk = 8; // most rows of activations that meet a decoded tile at once
constexpr int kKeyChunk = 256;  // positions that one chunk of attention covers, from position 0 of the sequence
constexpr int kKeyBlock = 64;   // of them, those that many rows visit at a time
constexpr int kScoreStride = kKeyChunk + kLanes;  // numbers between the scores of two rows

// Sixteen codes as code * scale + minimum.
template <class S, int Bits>
struct PlainLevels {
    typename S::F scale, minimum;

    PlainLevels(float scale, float minimum) : scale(S::set1(scale)), minimum(S::set1(minimum)) {}
    typename S::F numbers(const uint8_t* p) const { return S::fma(S::template codes<Bits>(p), scale, minimum); }
};

// Fewer than 16 numbers, zeros behind them.
template <class T>
struct SomeLanes {
    T at[kLanes] = {};
    SomeLanes(const T* p, int64_t n) { std::memcpy(at, p, size_t(n) * sizeof(T)); }
};

enum class Number : int { fp32 = 0, bf16 = 1, fp16 = 2 };

inline int64_t nbytes_of(Number number) { return number == Number::fp32 ? 4 : 2; }

constexpr int kBlockCodes = 64;  // bytes of 32 activations

// One block of 32 activations as whole numbers q in [-16256, 16256]: x = scale * q. Each is kept
// in two bytes, q = 128 * high + low with high in [-127, 127] and low in [-64, 64], first all high ones, so that 8-bit
// products add up to exact sums; in chunks of an instruction set's `kPairRows` rows or more, as numbers of 16 bits,
// those of four columns in the order 0, 2, 1, 3.
struct RowBlock {
    float scale;
    float scaled_sum, scaled_low, scaled_high;    // scale * sum(q): of all, of the first and last 16
    int32_t minus_sum, minus_low, minus_high;     // -sum(q)
    int32_t unused;
};

// Quantised activations, for rows of `columns` numbers (a multiple of 32).
//
// Rows are taken in chunks of 8, 4, 2 and 1 (`chunk_rows`). A chunk of m rows that starts at row r keeps
// codes [block][row of the chunk][64] from 2 * r * columns, and row blocks [block][row] from r * columns / 32.
struct QuantizedRows {
    int8_t* codes;
    RowBlock* blocks;
    int64_t rows, columns;

    // From a block on, those of a chunk of `chunk` rows that starts at `row`.
    int8_t* codes_of(int64_t row, int64_t block, int chunk) const { return codes + 2 * row * columns + block * chunk * kBlockCodes; }
    RowBlock* blocks_of(int64_t row, int64_t block, int chunk) const { return blocks + row * (columns / kBlock) + block * chunk; }
};

inline int chunk_rows(int64_t rows_left) { return rows_left >= 8 ? 8 : rows_left >= 4 ? 4 : rows_left >= 2 ? 2 : 1; }

// How the codes and scales of a packed matrix are kept.
enum class Layout : int {
    u4_f16,        // 4-bit codes less 8, fp16 scales
    u4_f16_min,    // 4-bit codes, fp16 scales and minima
    u4_f32_min,    // 4-bit codes, fp32 scales and minima
    u4_f32_pair,   // 4-bit codes less 4, two fp32 scales for each 32 columns
    u4_f32_min_pair,
    u7_f16_16,     // bytes less 16
    u7_f16_min,
    u7_f32_min,
    u7_f32_pair,   // bytes less 32, two scales
    u8_f16,        // bytes less 128
    count
};

// A matrix in tiles of 16 rows: for each tile and each block of 32 columns,
//   codes: 8 groups of 4 columns, [group][row][column]; two groups share 64 bytes when codes have 4 bits;
//   parameters: [scale group][16 scales], then [scale group][16 minima] where the layout has them.
// Rows beyond the last one are zeros.
struct PackedView {
    int64_t rows, columns, tiles;
    Layout layout;
    const uint8_t* codes;
    const uint8_t* parameters;
    int64_t code_bytes, parameter_bytes;  // of one block of one tile
    const struct GridView* grid;          // where the matrix is one of these, and only its shape is given here
    const struct StackView* stack;
    const struct AdditiveView* additive;
};

constexpr int kGridOffset = 16;  // makes entries of a table bytes from 0 on
// Entries of a wide table are kWideBase * high + low with bytes up to kWideBase - 1, so that sums of a block with
// activations of 15 bits stay below 2^31.
constexpr int kWideBase = 65, kWideOffset = (kWideBase * kWideBase - 1) / 2;

// A matrix of codes of 2, 3, 4 or 8 bits; see plait/weights/tiles.py for their order and plait/weights/coded.py
// for what they stand for. Numbers of groups lie as [tile][group][16 rows].
struct GridView {
    int64_t rows, columns, group, groups;
    int bits, offset;      // offset: what a byte is too large by where there are no zeros
    bool is_table, is_wide;
    const uint8_t* codes;
    const uint8_t* scales;      // fp16, or bytes where there are row scales
    const uint8_t* zeros;       // fp16; null for none
    const uint8_t* types;       // [tile][group][4]: 2 bits a row; null for none
    const float* row_scales;    // null for none
    const uint8_t* low_scales;  // fp16, of the low bits where both bits of a code have scales of their own; null for none
    int plane;                  // of these the one that is looked at: 0 for the high bits, 1 for the low ones
    uint8_t table[16];          // entries plus kGridOffset, or the high bytes of entries plus kWideOffset
    uint8_t low_table[16];      // of a wide table
    uint32_t specials[4];       // the four bytes of the last code, each four times over
};

// What a code of a table stands for, plus the offset.
inline int entry_of(const GridView& w, int code) {
    return w.is_wide ? kWideBase * w.table[code] + w.low_table[code] : w.table[code];
}

constexpr int kMaxStackRank = 16;

// A matrix that is a sum of blocks; see plait/weights/stacked_blocks.py for their bytes.
struct StackView {
    int64_t rows, columns, rank, count;
    const uint8_t* const* blocks;
};

constexpr int64_t kEntries = 256;  // of a codebook

// A matrix of vector codes: a run of `width` columns is the sum of an entry of each book, times the scale of its row.
struct AdditiveView {
    int64_t rows, columns, width, books;
    const uint8_t* codes;     // [row][run][book]
    const uint16_t* entries;  // fp16 [book][256][column of the run]
    const uint16_t* scales;   // fp16 [row]
};

enum class Activation : int { silu = 0, gelu_tanh = 1, gelu = 2, relu = 3 };

// The nodes of a draft tree among the keys of a piece: key i is node first_node + i.
struct DraftNodes {
    const uint64_t* ancestors;  // per query, `words` words: bit j shows node j
    int64_t words, num_nodes, first_node;
    int64_t window;                // nodes `window` or more levels above a query are hidden; 0 for no limit
    const int64_t* query_depths;   // per query
    const int64_t* node_depths;
    int64_t first_slot;            // slot of depth 0; may lie before the chunk or behind it
};

// Keys of one strand that lie within one chunk. A key's slot is its position, counted from the chunk's first.
struct Piece {
    const void* keys;  // [key][head_dim], key_stride numbers apart; null for coded ones
    const void* values;
    int64_t key_stride, value_stride;
    int64_t count, slot;  // keys, and the slot of the first of them
    Number number;
    const int64_t* low;   // per query: keys outside [low, high) are hidden
    const int64_t* high;
    const int64_t* distance;  // per query: from slot 0 of the chunk up to it, where there is a bias
    int64_t step;             // by how much a key is nearer than the one a slot before; 0 where all are as far
    const DraftNodes* nodes;  // where the keys are nodes of a draft, each in the slot of its depth; null for a run
};

// Queries of one key/value head that visit one chunk.
struct Visit {
    const float* q;         // [row][padded_dim], scaled, zero behind head_dim; row = query * group + head
    int64_t rows, group;
    int64_t head_dim, value_dim, padded_dim, padded_value;  // the padded ones are multiples of 16
    float softcap;          // 0 for none
    const float* slopes;    // of the heads of the group: slope * growth[distance] is taken off a score; null for no bias
    float slope_factor;
    const float* growth;    // at distance 0; as far to either side as distances reach
    const Piece* pieces;    // in the order of their slots; those of drafts come last
    int64_t num_pieces;
};

// Attention of rows over one chunk of keys or over several: top[r], total[r], sum[r][padded_value], with
// out = sum / total and lse = top + log(total). Nothing seen: top = -inf, total = 0, sum = 0.
struct Fold {
    float* top;
    float* total;
    float* sum;
};

struct CodedNumbers;

struct Kernels {
    const char* name;

    // Tile `tile` times rows [first, last), which are whole chunks: out[row - first][16].
    // Tiles [tile, tile + count), at most two, times rows [first, last): out[tile][row - first][16].
    void (*packed_tiles)(const PackedView&, int64_t tile, int64_t count, const QuantizedRows& x, int64_t first, int64_t last, float* out);
    void (*grid_tile)(const GridView&, int64_t tile, const QuantizedRows& x, int64_t first, int64_t last, float* out);
    // The same with `rows` (1, 2 or 4) activations in fp32, ldx apart.
    void (*grid_exact)(const GridView&, int64_t tile, const float* x, int64_t ldx, int rows, float* out);
    // Tile `tile` of a stack in fp32: out[column][16].
    void (*stack_rows)(const StackView&, int64_t tile, float* out);
    // Such a tile times `rows` (up to 8) activations in fp32, ldx apart: out[row][16].
    void (*made_exact)(const float* tile, int64_t columns, const float* x, int64_t ldx, int rows, float* out);
    // Rows [first, first + count) of a matrix of vector codes in fp32: out[row][column].
    void (*additive_rows)(const AdditiveView&, int64_t first, int64_t count, float* out);
    // How many bits of `words` words of x differ from those of each of 16 rows, [word][16]: out[16].
    void (*differing_bits)(const uint64_t* rows, const uint64_t* x, int64_t words, int32_t* out);
    // Bit i is set where x[i] + shift[i] is below 0 or NaN, for up to 64 numbers; a null shift is 0.
    uint64_t (*negative_bits)(const float* x, const float* shift, int count);
    // y[r] = x . w[r] for output rows [begin, end) of a dense row-major matrix; y has row stride ldy.
    void (*dense_rows)(const float* x, int64_t ldx, int64_t rows, const void* weight, int64_t weight_stride,
                       Number number, int64_t columns, int64_t begin, int64_t end, float* y, int64_t ldy);
    // Quantise 32 * num_blocks numbers of one row into its place in a chunk of `rows`.
    void (*quantize_row)(const float* x, int64_t num_blocks, int row, int rows, int8_t* codes, RowBlock* blocks);
    // What a chunk of `rows` such rows stands for: y[row][32 * num_blocks].
    void (*dequantize_chunk)(const int8_t* codes, const RowBlock* blocks, int rows, int64_t num_blocks, float* y);
    void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t n, float* y);
    void (*add)(const float* a, const float* b, int64_t n, float* y);
    void (*scale)(const float* a, float factor, int64_t n, float* y);
    void (*multiply)(const float* a, const float* b, int64_t n, float* y);
    // y += sum over j of factors[j] * rows[j], rows `stride` apart, in the order of j.
    void (*add_combination)(const float* factors, int64_t count, const float* rows, int64_t stride, int64_t n, float* y);
    // y = activation(gate) * up; `up` may be null.
    void (*activate)(Activation, const float* gate, const float* up, int64_t n, float* y);
    void (*exp)(const float* x, int64_t n, float* y);
    // Turn the first 2 * half channels of x by the angles and multiply all by `factor`.
    void (*rotate)(const float* x, const float* cos, const float* sin, int64_t half, int64_t dim, float factor,
                   float* y);
    void (*convert)(const float* x, Number number, int64_t n, void* y);
    void (*widen)(const void* x, Number number, int64_t n, float* y);
    // Attention over one chunk into `fold`; scratch holds attend_scratch numbers.
    void (*attend_chunk)(const Visit&, float* scratch, Fold fold);
    // The same over keys [first, first + count) of a head that are coded, the one piece of the visit, in slots from 0
    // on; nodes of a draft are hidden where not shown. Scratch holds coded_scratch numbers.
    void (*attend_coded)(const Visit&, const CodedNumbers& keys, const CodedNumbers& values, int64_t head, int64_t first,
                         float* scratch, Fold fold);
    // Merge `from` into `into`, row by row.
    void (*merge_folds)(Fold into, Fold from, int64_t rows, int64_t padded_value);
    // out (value_dim numbers) and lse of row `row` of a fold.
    void (*finish_fold)(Fold fold, int64_t row, int64_t value_dim, int64_t padded_value, float* out, float* lse);
    float (*largest)(const float* x, int64_t n);
    // Sum of exp(x - top) in the order of the lanes; y (may be null) receives the terms.
    float (*exp_sum)(const float* x, float top, int64_t n, float* y);
};

// Numbers of scratch that attend_chunk needs for this many rows.
inline int64_t attend_scratch(int64_t rows, int64_t padded_dim, int64_t padded_value) {
    const int64_t widest = padded_dim > padded_value ? padded_dim : padded_value;
    return rows * kScoreStride + kKeyBlock * widest;
}

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();
const Kernels* dotprod_kernels();

// The path in use: the widest that processor and build have, or PLAIT_NATIVE_ISA.
const Kernels& kernels();

}  // namespace plait
