#include "packed.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "half.h"
#include "threads.h"

namespace plait {
namespace {

uint16_t half_at(const uint8_t* p) { return uint16_t(p[0] | p[1] << 8); }
float number_at(const uint8_t* p) { return fp16_to_float(half_at(p)); }

// A row as codes (one byte each, with the layout's constant not yet subtracted), and scale and minimum of every
// group of 32 or 16 columns. GGML subtracts the minima of its K formats; here they are added.
struct Row {
    std::vector<uint8_t> codes;
    std::vector<float> scales, minima;
};

using Decode = void (*)(const uint8_t* block, uint8_t* codes, float* scales, float* minima);

void nibbles(const uint8_t* p, int width, uint8_t* codes) {
    for (int i = 0; i < width; ++i) {
        codes[i] = p[i] & 15;
        codes[i + width] = p[i] >> 4;
    }
}

void fifth_bits(const uint8_t* p, uint8_t* codes) {
    for (int i = 0; i < 32; ++i) codes[i] |= uint8_t(((p[i / 8] >> (i % 8)) & 1) << 4);
}

void decode_q4_0(const uint8_t* p, uint8_t* codes, float* scales, float*) {
    scales[0] = number_at(p);
    nibbles(p + 2, 16, codes);
}

void decode_q4_1(const uint8_t* p, uint8_t* codes, float* scales, float* minima) {
    scales[0] = number_at(p);
    minima[0] = number_at(p + 2);
    nibbles(p + 4, 16, codes);
}

void decode_q5_0(const uint8_t* p, uint8_t* codes, float* scales, float*) {
    scales[0] = number_at(p);
    nibbles(p + 6, 16, codes);
    fifth_bits(p + 2, codes);
}

void decode_q5_1(const uint8_t* p, uint8_t* codes, float* scales, float* minima) {
    scales[0] = number_at(p);
    minima[0] = number_at(p + 2);
    nibbles(p + 8, 16, codes);
    fifth_bits(p + 4, codes);
}

void decode_q8_0(const uint8_t* p, uint8_t* codes, float* scales, float*) {
    scales[0] = number_at(p);
    for (int i = 0; i < 32; ++i) codes[i] = p[2 + i] ^ 0x80;
}

// The 8 scales and minima of 6 bits that Q4_K and Q5_K keep in 12 bytes.
void six_bit_scales(const uint8_t* p, float* scales, float* minima) {
    const float scale = number_at(p), minimum = number_at(p + 2);
    const uint8_t* first = p + 4;
    const uint8_t* second = p + 8;
    const uint8_t* last = p + 12;
    for (int i = 0; i < 4; ++i) {
        scales[i] = scale * float(first[i] & 63);
        minima[i] = -(minimum * float(second[i] & 63));
        scales[i + 4] = scale * float((last[i] & 15) | ((first[i] >> 2) & 48));
        minima[i + 4] = -(minimum * float((last[i] >> 4) | ((second[i] >> 2) & 48)));
    }
}

void decode_q4_k(const uint8_t* p, uint8_t* codes, float* scales, float* minima) {
    six_bit_scales(p, scales, minima);
    for (int j = 0; j < 4; ++j) nibbles(p + 16 + 32 * j, 32, codes + 64 * j);
}

void decode_q5_k(const uint8_t* p, uint8_t* codes, float* scales, float* minima) {
    six_bit_scales(p, scales, minima);
    for (int j = 0; j < 4; ++j) nibbles(p + 48 + 32 * j, 32, codes + 64 * j);
    for (int i = 0; i < 256; ++i) codes[i] |= uint8_t(((p[16 + i % 32] >> (i / 32)) & 1) << 4);
}

void decode_q2_k(const uint8_t* p, uint8_t* codes, float* scales, float* minima) {
    const float scale = number_at(p + 80), minimum = number_at(p + 82);
    for (int g = 0; g < 16; ++g) {
        scales[g] = scale * float(p[g] & 15);
        minima[g] = -(minimum * float(p[g] >> 4));
    }
    for (int i = 0; i < 256; ++i) codes[i] = (p[16 + i / 128 * 32 + i % 32] >> (2 * (i % 128 / 32))) & 3;
}

void decode_q3_k(const uint8_t* p, uint8_t* codes, float* scales, float*) {
    const float scale = number_at(p + 108);
    const uint8_t* packed = p + 96;
    for (int g = 0; g < 16; ++g) {
        const int low = (packed[g % 8] >> (4 * (g / 8))) & 15;
        const int high = (packed[8 + g % 4] >> (2 * (g / 4))) & 3;
        scales[g] = scale * float((low | high << 4) - 32);
    }
    for (int i = 0; i < 256; ++i) {
        const int low = (p[32 + i / 128 * 32 + i % 32] >> (2 * (i % 128 / 32))) & 3;
        codes[i] = uint8_t(low | ((p[i % 32] >> (i / 32)) & 1) << 2);
    }
}

void decode_q6_k(const uint8_t* p, uint8_t* codes, float* scales, float*) {
    const float scale = number_at(p + 208);
    for (int g = 0; g < 16; ++g) scales[g] = scale * float(int8_t(p[192 + g]));
    for (int i = 0; i < 256; ++i) {
        const int half = i / 128, within = i % 128;
        const int low = (p[64 * half + within % 64] >> (4 * (within / 64))) & 15;
        const int high = (p[128 + 32 * half + within % 32] >> (2 * (within / 32))) & 3;
        codes[i] = uint8_t(low | high << 4);
    }
}

struct Source {
    const char* name;
    int elements, bytes, groups;  // of one block; groups with a scale each
    Layout layout;
    Decode decode;
};

const Source kSources[] = {
    {"q4_0", 32, 18, 1, Layout::u4_f16, decode_q4_0},
    {"q4_1", 32, 20, 1, Layout::u4_f16_min, decode_q4_1},
    {"q5_0", 32, 22, 1, Layout::u7_f16_16, decode_q5_0},
    {"q5_1", 32, 24, 1, Layout::u7_f16_min, decode_q5_1},
    {"q8_0", 32, 34, 1, Layout::u8_f16, decode_q8_0},
    {"q2_k", 256, 84, 16, Layout::u4_f32_min_pair, decode_q2_k},
    {"q3_k", 256, 110, 16, Layout::u4_f32_pair, decode_q3_k},
    {"q4_k", 256, 144, 8, Layout::u4_f32_min, decode_q4_k},
    {"q5_k", 256, 176, 8, Layout::u7_f32_min, decode_q5_k},
    {"q6_k", 256, 210, 16, Layout::u7_f32_pair, decode_q6_k},
};

struct Traits {
    bool is_nibble, is_half, has_minima;
    int groups;  // scales for each 32 columns
    int subtract;
};

Traits traits(Layout layout) {
    switch (layout) {
        case Layout::u4_f16: return {true, true, false, 1, 8};
        case Layout::u4_f16_min: return {true, true, true, 1, 0};
        case Layout::u4_f32_min: return {true, false, true, 1, 0};
        case Layout::u4_f32_pair: return {true, false, false, 2, 4};
        case Layout::u4_f32_min_pair: return {true, false, true, 2, 0};
        case Layout::u7_f16_16: return {false, true, false, 1, 16};
        case Layout::u7_f16_min: return {false, true, true, 1, 0};
        case Layout::u7_f32_min: return {false, false, true, 1, 0};
        case Layout::u7_f32_pair: return {false, false, false, 2, 32};
        default: return {false, true, false, 1, 128};
    }
}

void put_number(uint8_t* base, int index, float value, bool is_half) {
    if (is_half) {
        // Came from fp16, so nothing is rounded.
        const uint16_t half = float_to_fp16(value);
        std::memcpy(base + 2 * index, &half, 2);
    } else {
        std::memcpy(base + 4 * index, &value, 4);
    }
}

float get_number(const uint8_t* base, int64_t index, bool is_half) {
    if (is_half) {
        uint16_t half;
        std::memcpy(&half, base + 2 * index, 2);
        return fp16_to_float(half);
    }
    float value;
    std::memcpy(&value, base + 4 * index, 4);
    return value;
}

}  // namespace

PackedMatrix::PackedMatrix(const uint8_t* blocks, int64_t rows, int64_t row_bytes, const std::string& format) {
    const Source* source = nullptr;
    for (const Source& candidate : kSources)
        if (format == candidate.name) source = &candidate;
    if (source == nullptr) throw std::invalid_argument("There is no native layout for format '" + format + "'.");
    if (rows < 0 || row_bytes < 0 || row_bytes % source->bytes != 0)
        throw std::invalid_argument("A row in " + format + " must have a multiple of " + std::to_string(source->bytes) +
                                    " bytes. Got " + std::to_string(row_bytes) + ".");
    const Traits kind = traits(source->layout);
    const int64_t columns = row_bytes / source->bytes * source->elements, num_blocks = columns / kBlock;
    const int64_t tiles = (rows + kTile - 1) / kTile;
    const int64_t number_bytes = kind.is_half ? 2 : 4;
    view_ = {rows, columns, tiles, source->layout, nullptr, nullptr, kind.is_nibble ? kTile * kBlock / 2 : kTile * kBlock,
             kTile * kind.groups * (kind.has_minima ? 2 : 1) * number_bytes, nullptr, nullptr, nullptr};
    codes_ = Buffer::lasting(size_t(tiles * num_blocks * view_.code_bytes));
    parameters_ = Buffer::lasting(size_t(tiles * num_blocks * view_.parameter_bytes));
    std::memset(codes_.data(), 0, codes_.size());
    std::memset(parameters_.data(), 0, parameters_.size());
    view_.codes = codes_.data();
    view_.parameters = parameters_.data();

    const auto pack_tile = [&](int64_t tile, Row& row) {
        for (int r = 0; r < kTile && tile * kTile + r < rows; ++r) {
            const uint8_t* from = blocks + (tile * kTile + r) * row_bytes;
            for (int64_t b = 0; b < row_bytes / source->bytes; ++b)
                source->decode(from + b * source->bytes, row.codes.data() + b * source->elements,
                               row.scales.data() + b * source->groups, row.minima.data() + b * source->groups);
            uint8_t* codes = codes_.data() + tile * num_blocks * view_.code_bytes;
            uint8_t* parameters = parameters_.data() + tile * num_blocks * view_.parameter_bytes;
            for (int64_t b = 0; b < num_blocks; ++b, codes += view_.code_bytes, parameters += view_.parameter_bytes) {
                const uint8_t* code = row.codes.data() + b * kBlock;
                for (int group = 0; group < 8; ++group, code += 4) {
                    if (!kind.is_nibble) {
                        std::memcpy(codes + 64 * group + 4 * r, code, 4);
                        continue;
                    }
                    uint8_t* out = codes + 64 * (group / 2) + 4 * r;
                    for (int c = 0; c < 4; ++c) out[c] = uint8_t(out[c] | code[c] << (4 * (group & 1)));
                }
                for (int g = 0; g < kind.groups; ++g) {
                    const int64_t index = b * kind.groups + g;
                    put_number(parameters, g * kTile + r, row.scales[index], kind.is_half);
                    if (kind.has_minima)
                        put_number(parameters, (kind.groups + g) * kTile + r, row.minima[index], kind.is_half);
                }
            }
        }
    };
    std::vector<Row> scratch(size_t(Pool::get().size()));
    for (Row& row : scratch) {
        row.codes.resize(size_t(columns));
        row.scales.resize(size_t(num_blocks * kind.groups));
        row.minima.resize(size_t(num_blocks * kind.groups));
    }
    Pool::get().run([&](Team& team) {
        team.share(tiles, 8, [&](int64_t begin, int64_t end) {
            for (int64_t tile = begin; tile < end; ++tile) pack_tile(tile, scratch[size_t(team.index)]);
        });
    });
}

void PackedMatrix::unpack_row(int64_t row, float* out) const {
    const Traits kind = traits(view_.layout);
    const int64_t num_blocks = view_.columns / kBlock, tile = row / kTile, r = row % kTile;
    const uint8_t* codes = view_.codes + tile * num_blocks * view_.code_bytes;
    const uint8_t* parameters = view_.parameters + tile * num_blocks * view_.parameter_bytes;
    for (int64_t b = 0; b < num_blocks; ++b, codes += view_.code_bytes, parameters += view_.parameter_bytes) {
        for (int column = 0; column < kBlock; ++column) {
            const int group = column / 4, c = column % 4, scale_group = kind.groups == 2 ? column / 16 : 0;
            const int code = kind.is_nibble ? (codes[64 * (group / 2) + 4 * r + c] >> (4 * (group & 1))) & 15
                                            : codes[64 * group + 4 * r + c];
            float value = float(code - kind.subtract) * get_number(parameters, scale_group * kTile + r, kind.is_half);
            if (kind.has_minima)
                value += get_number(parameters, (kind.groups + scale_group) * kTile + r, kind.is_half);
            out[b * kBlock + column] = value;
        }
    }
}

}  // namespace plait
