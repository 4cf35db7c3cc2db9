// A low-bit matrix, repacked once from GGML blocks into tiles of 16 rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "buffer.h"
#include "kernels.h"

namespace plait {

class PackedMatrix {
public:
    // `blocks` holds `rows` rows of `row_bytes` bytes in the GGML format of that name (q4_0, q4_1, q5_0, q5_1,
    // q8_0, q2_k, q3_k, q4_k, q5_k, q6_k). Throws std::invalid_argument for an unknown format or a partial block.
    PackedMatrix(const uint8_t* blocks, int64_t rows, int64_t row_bytes, const std::string& format);

    virtual ~PackedMatrix() = default;
    PackedMatrix(const PackedMatrix&) = delete;
    PackedMatrix& operator=(const PackedMatrix&) = delete;

    const PackedView& view() const { return view_; }
    virtual int64_t nbytes() const { return int64_t(codes_.size() + parameters_.size()); }
    // One row in fp32, `columns` numbers: exactly the values of the GGML block.
    virtual void unpack_row(int64_t row, float* out) const;

protected:
    PackedMatrix() = default;
    PackedView view_{};

private:
    Buffer codes_, parameters_;
};

}  // namespace plait
