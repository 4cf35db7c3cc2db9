// Elementary functions over 16 lanes, built from operations that every path rounds alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace plait {
namespace {

template <class S>
struct Math {
    using F = typename S::F;

    // e^x to 1 ulp (2 near the subnormal numbers): e^x = 2^n e^r with |r| <= ln(2) / 2, and the polynomial of
    // Cephes' expf for e^r. The constant comes first in max and min so that NaN passes.
    static F exp(F x) {
        x = S::max(S::set1(-110.0f), x);
        x = S::min(S::set1(89.0f), x);
        const F n = S::round(S::mul(x, S::set1(1.44269504088896341f)));
        F r = S::fma(n, S::set1(-0.693359375f), x);
        r = S::fma(n, S::set1(2.12194440e-4f), r);
        F p = S::set1(1.9875691500e-4f);
        p = S::fma(p, r, S::set1(1.3981999507e-3f));
        p = S::fma(p, r, S::set1(8.3334519073e-3f));
        p = S::fma(p, r, S::set1(4.1665795894e-2f));
        p = S::fma(p, r, S::set1(1.6666665459e-1f));
        p = S::fma(p, r, S::set1(5.0000001201e-1f));
        const F y = S::add(S::fma(p, S::mul(r, r), r), S::set1(1.0f));
        // 2^n in two factors, as n reaches beyond the exponents of fp32 on both sides.
        const F first = S::round(S::mul(n, S::set1(0.5f)));
        return S::mul(S::mul(y, S::power_of_two(first)), S::power_of_two(S::sub(n, first)));
    }

    static F sigmoid(F x) {
        return S::div(S::set1(1.0f), S::add(S::set1(1.0f), exp(S::sub(S::zero(), x))));
    }

    // 1 - 2 / (e^2x + 1): absolute error below 2e-7.
    static F tanh(F x) {
        const F e = S::add(exp(S::add(x, x)), S::set1(1.0f));
        return S::sub(S::set1(1.0f), S::div(S::set1(2.0f), e));
    }

    static F activate(Activation activation, F x) {
        switch (activation) {
            case Activation::silu:
                return S::mul(x, sigmoid(x));
            case Activation::gelu_tanh: {
                // x / 2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
                const F cubic = S::fma(S::mul(S::mul(x, x), x), S::set1(0.044715f), x);
                return S::mul(x, sigmoid(S::mul(cubic, S::set1(1.5957691216057308f))));
            }
            case Activation::gelu: {
                float lanes[kLanes];
                S::store(lanes, x);
                for (float& lane : lanes) lane *= 0.5f * (1.0f + std::erf(lane * 0.70710678118654752f));
                return S::load(lanes);
            }
            case Activation::relu:
                return S::max(S::zero(), x);
        }
        return x;
    }

    static void store_some(float* p, F x, int64_t n) {
        float lanes[kLanes];
        S::store(lanes, x);
        std::memcpy(p, lanes, size_t(n) * sizeof(float));
    }

    // y[i] = function(index of the lanes' first number, how many of them count).
    template <class Function>
    static void map(int64_t n, float* y, Function function) {
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) S::store(y + i, function(i, int64_t(kLanes)));
        if (i < n) store_some(y + i, function(i, n - i), n - i);
    }
    static F at(const float* x, int64_t i, int64_t n) {
        return n == kLanes ? S::load(x + i) : S::load_some(x + i, n);
    }
};

// Numbers of any of the three kinds as 16 lanes.
template <class S, Number N>
struct Reader {
    static typename S::F load(const void* base, int64_t index) {
        if constexpr (N == Number::fp32) return S::load(static_cast<const float*>(base) + index);
        else return S::load(static_cast<const uint16_t*>(base) + index, N == Number::bf16);
    }
    static typename S::F load_some(const void* base, int64_t index, int64_t n) {
        if constexpr (N == Number::fp32) return S::load_some(static_cast<const float*>(base) + index, n);
        else return S::load_some(static_cast<const uint16_t*>(base) + index, n, N == Number::bf16);
    }
};

}  // namespace
}  // namespace plait
