// The operation as its definition reads, one element after the other, in plain arithmetic: slow, and written
// without a look at the kernel.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernel.h"

namespace reference {

using Words = std::array<uint32_t, 4>;

inline Words philox(Words counter, uint64_t key, int rounds) {
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < rounds; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53} * counter[0], product1 = uint64_t{0xCD9E8D57} * counter[2];
        counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(product1),
                   static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(product0)};
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return counter;
}

// u(i): one bit from each plane, the most significant first.
inline uint32_t number(uint64_t i, uint64_t key) {
    const uint64_t block = i / 128;
    const int bit = static_cast<int>(i % 128);
    uint32_t u = 0;
    for (uint32_t plane = 0; plane < 32; ++plane)
        u = u << 1 | (philox({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), plane, 0}, key, 7)[bit / 32] >> bit % 32 & 1);
    return u;
}

// The place of a draw among the strata, by the number v.
inline uint64_t place(uint32_t v, uint64_t draw, uint64_t strata) {
    uint64_t prime = strata < 2 ? 2 : strata;
    for (uint64_t divisor = 2; divisor * divisor <= prime; ++divisor)
        if (prime % divisor == 0) ++prime, divisor = 1;
    const uint64_t a = 1 + ((v >> 16) * (prime - 1) >> 16), b = (v & 0xFFFF) * prime >> 16;
    uint64_t x = (a * draw + b) % prime;
    while (x >= strata) x = (a * x + b) % prime;
    return x;
}

// u(i) < T, plane after plane from the most significant.
inline bool keep(uint64_t i, uint64_t key, uint64_t T) {
    if (T > 0xFFFFFFFF) return true;
    const uint64_t block = i / 128;
    const int bit = static_cast<int>(i % 128);
    for (uint32_t plane = 0; plane < 32; ++plane) {
        const Words words =
            philox({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), plane, 0}, key, 7);
        const unsigned u = words[bit / 32] >> bit % 32 & 1, t = T >> (31 - plane) & 1;
        if (u != t) return u < t;
    }
    return false;
}

// A binary format by the size of its fraction and its smallest and largest exponents, in exact doubles.
struct Format {
    int fraction, smallest, largest;

    double decode(uint16_t bits) const {
        const int code = (bits & 0x7FFF) >> fraction, rest = bits & ((1 << fraction) - 1);
        double value;
        if (code == largest - smallest + 2)
            value = rest ? NAN : INFINITY;
        else if (code == 0)
            value = std::ldexp(rest, smallest - fraction);
        else
            value = std::ldexp((1 << fraction) + rest, code - 1 + smallest - fraction);
        return bits & 0x8000 ? -value : value;
    }
    // To nearest, ties to even.
    uint16_t encode(double value) const {
        const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
        const uint16_t infinity = static_cast<uint16_t>((largest - smallest + 2) << fraction);
        if (std::isnan(value)) return infinity | 1 << (fraction - 1);
        value = std::fabs(value);
        if (std::isinf(value)) return sign | infinity;
        const int exponent = value == 0 ? smallest : std::max(std::ilogb(value), smallest);
        const double steps = std::nearbyint(std::ldexp(value, fraction - exponent));
        // A carry out of the fraction goes into the exponent, as it should.
        const double code = std::ldexp(exponent - smallest, fraction) + steps;
        return code >= infinity ? sign | infinity : static_cast<uint16_t>(sign | static_cast<uint16_t>(code));
    }
};

constexpr Format half{10, -14, 15}, bfloat{7, -126, 127};

// One real number of a type: its size in memory, and x * scale + shift there.
template <class T>
T affine(T x, double scale, double shift) {
    T value = x * static_cast<T>(scale);
    return shift != 0 ? value + static_cast<T>(shift) : value;
}

inline uint16_t affine(const Format& format, uint16_t x, double scale, double shift) {
    return format.encode(affine(static_cast<float>(format.decode(x)), scale, shift));
}

template <class T>
T at(const void* memory, int64_t i) {
    T value;
    std::memcpy(&value, static_cast<const char*>(memory) + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
}

template <class T>
void put(void* memory, int64_t i, T value) {
    std::memcpy(static_cast<char*>(memory) + i * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
}

template <class T>
void write(const thinned::Task& task, int64_t x, int64_t y, bool kept) {
    put(task.y, y, kept ? affine(at<T>(task.x, x), task.scale, task.shift) : static_cast<T>(task.fill));
}

inline void write(const Format& format, const thinned::Task& task, int64_t x, int64_t y, bool kept) {
    put(task.y, y, kept ? affine(format, at<uint16_t>(task.x, x), task.scale, task.shift)
                        : format.encode(static_cast<float>(task.fill)));
}

inline void element(const thinned::Task& task, int64_t x, int64_t y, bool kept) {
    using thinned::Dtype;
    switch (task.dtype) {
        case Dtype::f16: return write(half, task, x, y, kept);
        case Dtype::bf16: return write(bfloat, task, x, y, kept);
        case Dtype::f32: return write<float>(task, x, y, kept);
        case Dtype::f64: return write<double>(task, x, y, kept);
        case Dtype::c64:
            for (int part = 0; part < 2; ++part) write<float>(task, 2 * x + part, 2 * y + part, kept);
            return;
        case Dtype::c128:
            for (int part = 0; part < 2; ++part) write<double>(task, 2 * x + part, 2 * y + part, kept);
            return;
        case Dtype::mask: return put<uint8_t>(task.y, y, kept);
    }
}

// An element of a fusion, as a double that has not been rounded to the type of y, and a size for its error.
struct Value {
    double value, size;
};

template <class T>
Value fused(const thinned::Fusion& task, bool kept, T x, T other, T bias) {
    using thinned::Function;
    const T scale = static_cast<T>(task.scale);
    const double z = x, tanh_argument = 0.79788456080286535588 * (z + 0.044715 * z * z * z);
    const double below = 0.5 * std::erfc(-z * 0.70710678118654752440), bell = 0.39894228040143267794 * std::exp(-z * z / 2);
    const double sigmoid = 1 / (1 + std::exp(-z)), tanh_sigmoid = 1 / (1 + std::exp(-2 * tanh_argument));
    const double given = static_cast<double>(other * scale), none = 0;
    // Never 0: where f' underflows in float, 0 * f' may have the other sign.
    const double size = std::fabs(given) + 1e-300;
    const auto masked = [&](double value, double size) { return kept ? Value{value, size} : Value{none, none}; };
    switch (task.function) {
        case Function::relu: return masked((x < 0 ? 0 : x) * scale, 0);
        case Function::gelu: return masked(z * below * task.scale, z * task.scale);
        case Function::gelu_tanh: return masked(z * tanh_sigmoid * task.scale, z * task.scale);
        case Function::silu: return masked(z * sigmoid * task.scale, z * task.scale);
        case Function::add: return {other + (kept ? (task.bias ? x + bias : x) * scale : T(0)), 0};
        case Function::relu_slope: return {x <= 0 ? 0 : given, 0};
        case Function::gelu_slope: return masked(given * (below + z * bell), size);
        case Function::gelu_tanh_slope:
            return masked(given * (tanh_sigmoid + z * tanh_sigmoid * (1 - tanh_sigmoid) * 1.59576912160573071176 *
                                                     (1 + 3 * 0.044715 * z * z)),
                          size * (1 + std::fabs(z) * (1 + z * z)));
        case Function::silu_slope: return masked(given * (sigmoid + z * sigmoid * (1 - sigmoid)), size * (1 + std::fabs(z)));
    }
    return {NAN, 0};
}

inline void run(const thinned::Task& task, size_t dim = 0, int64_t x = 0, int64_t y = 0, uint64_t mask = 0,
                int64_t key = 0) {
    if (dim == task.dims.size())
        return element(task, x, y, keep(task.base + mask, task.keys[key], task.T));
    const thinned::Dim& d = task.dims[dim];
    for (int64_t i = 0; i < d.size; ++i)
        run(task, dim + 1, x + i * d.x, y + i * d.y, mask + static_cast<uint64_t>(i * d.mask), key + i * d.key);
}

}  // namespace reference
