// Arrays from Python, without copies: each is checked here, once, before a kernel sees its address.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "kernels.h"

namespace plait {

namespace nb = nanobind;

using Array = nb::ndarray<nb::device::cpu>;
using ConstArray = nb::ndarray<nb::ro, nb::device::cpu>;

// A wrong array or number; Python sees a ValueError.
[[noreturn]] inline void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

template <class A>
std::string shape_of(const A& array) {
    std::string text = "(";
    for (size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
    return text + ")";
}

template <class A>
Number number_of(const A& array, const char* name) {
    const nb::dlpack::dtype type = array.dtype();
    if (type.lanes == 1 && type.code == uint8_t(nb::dlpack::dtype_code::Float) && type.bits == 32) return Number::fp32;
    if (type.lanes == 1 && type.code == uint8_t(nb::dlpack::dtype_code::Float) && type.bits == 16) return Number::fp16;
    if (type.lanes == 1 && type.code == uint8_t(nb::dlpack::dtype_code::Bfloat) && type.bits == 16) return Number::bf16;
    refuse(std::string(name) + " must be float32, bfloat16 or float16.");
}

template <class A>
void check_fp32(const A& array, const char* name) {
    if (number_of(array, name) != Number::fp32) refuse(std::string(name) + " must be float32.");
}

template <class T, class A>
void check_type(const A& array, const char* name, const char* type) {
    if (array.dtype() != nb::dtype<T>()) refuse(std::string(name) + " must be " + type + ".");
}

// The shape, and numbers next to each other along the last axis (an axis of length 1 may have any stride).
template <class A>
void check_shape(const A& array, const char* name, std::initializer_list<int64_t> wanted) {
    bool is_right = array.ndim() == wanted.size();
    std::string text;
    size_t axis = 0;
    for (int64_t size : wanted) {
        if (is_right && size >= 0 && int64_t(array.shape(axis)) != size) is_right = false;
        text += (axis++ ? ", " : "") + (size < 0 ? std::string("any") : std::to_string(size));
    }
    if (!is_right) refuse(std::string(name) + " must have shape (" + text + "). Got " + shape_of(array) + ".");
    if (array.ndim() > 0 && array.shape(array.ndim() - 1) > 1 && array.stride(array.ndim() - 1) != 1)
        refuse(std::string(name) + " must be contiguous along its last axis.");
}

template <class A>
void check_contiguous(const A& array, const char* name) {
    int64_t step = 1;
    for (size_t axis = array.ndim(); axis-- > 0;) {
        if (array.shape(axis) > 1 && array.stride(axis) != step) refuse(std::string(name) + " must be contiguous.");
        step *= int64_t(array.shape(axis));
    }
}

template <class A>
const float* floats(const A& array) {
    return static_cast<const float*>(static_cast<const void*>(array.data()));
}

inline float* floats_out(const Array& array) { return static_cast<float*>(array.data()); }

// An axis' stride that can be multiplied by an index, also where the axis has length 1 or 0.
template <class A>
int64_t stride_of(const A& array, size_t axis) {
    return array.shape(axis) > 1 ? array.stride(axis) : 0;
}

// The rows that a product reads, x (rows, columns), and those that it writes, y (rows, outputs), both in fp32.
struct ProductRows {
    const float* x;
    float* y;
    int64_t rows, ldx, ldy;

    ProductRows(const ConstArray& from, const Array& to, int64_t columns, int64_t outputs) {
        check_fp32(from, "x");
        check_fp32(to, "y");
        check_shape(from, "x", {-1, columns});
        rows = int64_t(from.shape(0));
        check_shape(to, "y", {rows, outputs});
        x = floats(from), y = floats_out(to), ldx = stride_of(from, 0), ldy = stride_of(to, 0);
    }
};

}  // namespace plait
