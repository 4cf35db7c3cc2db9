// What is done to each row alone: norms, sums, activations, rotation, conversion.
#pragma once

#include "kernel_math.h"

namespace plait {
namespace {

template <class S>
struct RowOps {
    using F = typename S::F;
    using M = Math<S>;

    static void rms_norm(const float* x, const float* weight, float epsilon, int64_t n, float* y) {
        F squares = S::zero();
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            const F v = S::load(x + i);
            squares = S::fma(v, v, squares);
        }
        if (i < n) {
            const F v = S::load_some(x + i, n - i);
            squares = S::fma(v, v, squares);
        }
        const F inverse = S::set1(1.0f / std::sqrt(S::sum(squares) / float(n) + epsilon));
        M::map(n, y, [&](int64_t at, int64_t count) {
            return S::mul(S::mul(M::at(x, at, count), inverse), M::at(weight, at, count));
        });
    }

    static void add(const float* a, const float* b, int64_t n, float* y) {
        M::map(n, y, [&](int64_t at, int64_t count) { return S::add(M::at(a, at, count), M::at(b, at, count)); });
    }

    static void scale(const float* a, float factor, int64_t n, float* y) {
        M::map(n, y, [&](int64_t at, int64_t count) { return S::mul(M::at(a, at, count), S::set1(factor)); });
    }

    static void multiply(const float* a, const float* b, int64_t n, float* y) {
        M::map(n, y, [&](int64_t at, int64_t count) { return S::mul(M::at(a, at, count), M::at(b, at, count)); });
    }

    static void add_combination(const float* factors, int64_t count, const float* rows, int64_t stride, int64_t n,
                                float* y) {
        M::map(n, y, [&](int64_t at, int64_t lanes) {
            F sum = M::at(y, at, lanes);
            for (int64_t j = 0; j < count; ++j)
                sum = S::fma(S::set1(factors[j]), M::at(rows + j * stride, at, lanes), sum);
            return sum;
        });
    }

    static void activate(Activation activation, const float* gate, const float* up, int64_t n, float* y) {
        M::map(n, y, [&](int64_t at, int64_t count) {
            const F active = M::activate(activation, M::at(gate, at, count));
            return up == nullptr ? active : S::mul(active, M::at(up, at, count));
        });
    }

    static void exp(const float* x, int64_t n, float* y) {
        M::map(n, y, [&](int64_t at, int64_t count) { return M::exp(M::at(x, at, count)); });
    }

    static void rotate(const float* x, const float* cos, const float* sin, int64_t half, int64_t dim, float factor,
                       float* y) {
        const F f = S::set1(factor);
        M::map(half, y, [&](int64_t at, int64_t count) {
            const F first = M::at(x, at, count), second = M::at(x + half, at, count);
            return S::mul(f, S::sub(S::mul(first, M::at(cos, at, count)), S::mul(second, M::at(sin, at, count))));
        });
        M::map(half, y + half, [&](int64_t at, int64_t count) {
            const F first = M::at(x, at, count), second = M::at(x + half, at, count);
            return S::mul(f, S::add(S::mul(second, M::at(cos, at, count)), S::mul(first, M::at(sin, at, count))));
        });
        for (int64_t i = 2 * half; i < dim; ++i) y[i] = x[i] * factor;
    }

    static void convert(const float* x, Number number, int64_t n, void* y) {
        if (number == Number::fp32) {
            std::memcpy(y, x, size_t(n) * sizeof(float));
            return;
        }
        uint16_t* out = static_cast<uint16_t*>(y);
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) S::store(out + i, S::load(x + i), number == Number::bf16);
        if (i < n) {
            uint16_t lanes[kLanes];
            S::store(lanes, S::load_some(x + i, n - i), number == Number::bf16);
            std::memcpy(out + i, lanes, size_t(n - i) * sizeof(uint16_t));
        }
    }

    template <Number N>
    static void widen_from(const void* x, int64_t n, float* y) {
        M::map(n, y, [&](int64_t at, int64_t count) {
            return count == kLanes ? Reader<S, N>::load(x, at) : Reader<S, N>::load_some(x, at, count);
        });
    }
    static void widen(const void* x, Number number, int64_t n, float* y) {
        switch (number) {
            case Number::fp32: return widen_from<Number::fp32>(x, n, y);
            case Number::bf16: return widen_from<Number::bf16>(x, n, y);
            case Number::fp16: return widen_from<Number::fp16>(x, n, y);
        }
    }

    // -inf for no numbers; NaN when one of them is NaN.
    static float largest(const float* x, int64_t n) {
        const float nothing = -__builtin_inff();
        F top = S::set1(nothing), poison = S::zero();
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            const F v = S::load(x + i);
            top = S::max(v, top);
            poison = S::fma(S::sub(v, v), S::zero(), poison);
        }
        float result = S::largest(top);
        for (; i < n; ++i) result = x[i] > result || x[i] != x[i] ? x[i] : result;
        if (S::sum(poison) != 0.0f) {
            for (int64_t j = 0; j < n; ++j)
                if (x[j] != x[j]) return x[j];
        }
        return result;
    }

    static float exp_sum(const float* x, float top, int64_t n, float* y) {
        F total = S::zero();
        const F shift = S::set1(top);
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            const F term = M::exp(S::sub(S::load(x + i), shift));
            if (y != nullptr) S::store(y + i, term);
            total = S::add(total, term);
        }
        if (i < n) {
            float lanes[kLanes];
            for (int l = 0; l < kLanes; ++l) lanes[l] = i + l < n ? x[i + l] : -__builtin_inff();
            const F term = M::exp(S::sub(S::load(lanes), shift));
            if (y != nullptr) M::store_some(y + i, term, n - i);
            total = S::add(total, term);
        }
        return S::sum(total);
    }
};

}  // namespace
}  // namespace plait
