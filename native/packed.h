// A low-bit matrix, repacked once from GGML blocks into tiles of 16 rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "kernels.h"

namespace plait {

// Memory that starts on a cache line.
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t bytes);
    uint8_t* data() const { return data_.get(); }
    size_t size() const { return size_; }

private:
    struct Free {
        void operator()(uint8_t* p) const;
    };
    std::unique_ptr<uint8_t[], Free> data_;
    size_t size_ = 0;
};

class PackedMatrix {
public:
    // `blocks` holds `rows` rows of `row_bytes` bytes in the GGML format of that name (q4_0, q4_1, q5_0, q5_1,
    // q8_0, q2_k, q3_k, q4_k, q5_k, q6_k). Throws std::invalid_argument for an unknown format or a partial block.
    PackedMatrix(const uint8_t* blocks, int64_t rows, int64_t row_bytes, const std::string& format);

    const PackedView& view() const { return view_; }
    int64_t nbytes() const { return int64_t(codes_.size() + parameters_.size()); }
    // One row in fp32, `columns` numbers: exactly the values of the GGML block.
    void unpack_row(int64_t row, float* out) const;

private:
    Buffer codes_, parameters_;
    PackedView view_{};
};

}  // namespace plait
