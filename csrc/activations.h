// Activations and their derivatives, of vectors.
//
// The arithmetic of float is the same in every instruction set: each multiply_add is rounded once, and nothing else is
// contracted. That of double is the C library's.
#pragma once

#include <cmath>

#include "elements.h"

namespace thinned {
namespace {

// c[0] + x * (c[1] + x * (c[2] + ...)).
template <class V, int n>
inline V polynomial(V x, const float (&c)[n]) {
    V sum = V::all(c[n - 1]);
    for (int k = n - 2; k >= 0; --k) sum = multiply_add(sum, x, V::all(c[k]));
    return sum;
}

template <class V>
inline V negative(V x) {
    return subtract(V::all(0), x);
}

template <class V>
inline V magnitude(V x) {
    return larger(negative(x), x);
}

// e^x, to 1 ulp; 0 where it is below 2^-124. The constants are those of Cephes' expf.
inline Floats exponential(Floats x) {
    const Floats bounded = smaller(Floats::all(89), larger(Floats::all(-87), x));  // NaN stays
    const Floats magic = Floats::all(12582912);                                    // 1.5 * 2^23: a sum with it has no fraction
    const Floats n = subtract(multiply_add(bounded, Floats::all(1.44269504088896341f), magic), magic);
    Floats r = multiply_add(n, Floats::all(-0.693359375f), bounded);
    r = multiply_add(n, Floats::all(2.12194440e-4f), r);
    const Floats p = polynomial(r, {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f, 8.3334519073e-3f,
                                    1.3981999507e-3f, 1.9875691500e-4f});
    const Floats y = add(multiply_add(p, multiply(r, r), r), Floats::all(1));
    // 2^(n - 1), whose exponent is in range where that of 2^n is not.
    const Floats power = to_exponent(add(n, Floats::all(12582912 + 126)));
    const Floats scaled = multiply(y, power);
    return if_less(x, Floats::all(-85.5f), Floats::all(0), add(scaled, scaled));
}

template <class Function>
inline Doubles each(Doubles x, Function function) {
    double lane[Doubles::lanes];
    x.store(lane);
    for (double& value : lane) value = function(value);
    return Doubles::load(lane);
}

inline Doubles exponential(Doubles x) {
    return each(x, [](double value) { return std::exp(value); });
}

// The cumulative distribution of the normal law, and its density.
template <class V>
struct Normal {
    V below, density;
};

// The smaller of the two tails is 2^(|x| k(|x|) - 1), so that it does not come from a difference. The polynomial k is a
// fit for an absolute error of 1e-8 in the tail; beyond |x| = 14 its power is 0.
inline Floats normal_below(Floats x) {
    const Floats u = magnitude(x);
    const Floats k = polynomial(u, {-1.1511054f, -0.45920512f, -0.05250876f, 0.0070867231f, -0.00015905435f,
                                    -0.00017508974f, 3.6599606e-05f, -2.5625693e-06f});
    const Floats exponent = larger(Floats::all(-127), multiply_add(u, k, Floats::all(-1)));  // NaN stays
    const Floats magic = Floats::all(12582912), n = subtract(add(exponent, magic), magic);
    const Floats fraction = polynomial(subtract(exponent, n), {1, 6.931472028550421e-1f, 2.402264791363012e-1f,
                                                               5.550332471162809e-2f, 9.618437357674640e-3f,
                                                               1.339887440266574e-3f, 1.535336188319500e-4f});
    const Floats tail = multiply(fraction, to_exponent(add(n, Floats::all(12582912 + 127))));
    return if_less(x, Floats::all(0), tail, subtract(Floats::all(1), tail));
}

inline Normal<Floats> normal(Floats x) {
    const Floats e = exponential(multiply(multiply(x, x), Floats::all(-0.5f)));
    return {normal_below(x), multiply(e, Floats::all(0.398942280f))};
}

inline Normal<Doubles> normal(Doubles x) {
    constexpr double half_root = 0.70710678118654752440, scale = 0.39894228040143267794;
    return {each(x, [](double value) { return 0.5 * std::erfc(-value * half_root); }),
            each(x, [](double value) { return scale * std::exp(-0.5 * value * value); })};
}

// 1 / (1 + e^-x), and its derivative.
template <class V>
struct Sigmoid {
    V value, slope;
};

template <class V>
inline Sigmoid<V> sigmoid(V x) {
    const V one = V::all(1), e = exponential(negative(magnitude(x))), larger_one = divide(one, add(one, e));
    const V smaller_one = multiply(e, larger_one);
    return {if_less(x, V::all(0), smaller_one, larger_one), multiply(smaller_one, larger_one)};
}

template <class V>
inline V silu(V x) {
    return divide(x, add(V::all(1), exponential(negative(x))));
}

template <class V>
inline V silu_slope(V x) {
    const Sigmoid<V> s = sigmoid(x);
    return add(s.value, multiply(x, s.slope));
}

// Twice the argument of the hyperbolic tangent: (1 + tanh(z / 2)) / 2 is the sigmoid of z.
constexpr double tanh_scale = 1.59576912160573071176, tanh_cubic = 0.044715;

template <class V>
inline V gelu_argument(V x) {
    using Scalar = typename V::Scalar;
    const V cube = multiply(multiply(x, x), x);
    return multiply(V::all(static_cast<Scalar>(tanh_scale)), add(x, multiply(V::all(static_cast<Scalar>(tanh_cubic)), cube)));
}

template <class V>
inline V gelu_tanh(V x) {
    return divide(x, add(V::all(1), exponential(negative(gelu_argument(x)))));
}

template <class V>
inline V gelu_tanh_slope(V x) {
    using Scalar = typename V::Scalar;
    const Sigmoid<V> s = sigmoid(gelu_argument(x));
    const V three = V::all(static_cast<Scalar>(3 * tanh_cubic));
    const V inner = multiply(V::all(static_cast<Scalar>(tanh_scale)), add(V::all(1), multiply(three, multiply(x, x))));
    return add(s.value, multiply(multiply(x, s.slope), inner));
}

template <class V>
inline V gelu(V x) {
    return multiply(x, normal(x).below);
}

template <class V>
inline V gelu_slope(V x) {
    const Normal<V> law = normal(x);
    return add(law.below, multiply(x, law.density));
}

}  // namespace
}  // namespace thinned
