// Vectors in plain C++, for a compiler to make of them what the machine has.
#pragma once

#include <cmath>
#include <type_traits>

#include "../elements.h"

namespace thinned {
namespace {

// Four 64-bit lanes.
struct Words {
    static constexpr int lanes = 4;
    uint64_t lane[lanes];

    template <class F>
    static Words make(F f) {
        Words result;
        for (int i = 0; i < lanes; ++i) result.lane[i] = f(i);
        return result;
    }
    static Words load(const uint64_t* from) { return make([=](int i) { return from[i]; }); }
    static Words all(uint64_t value) { return make([=](int) { return value; }); }
    // Lanes of two vectors in turn.
    static void store_pairs(uint64_t* to, Words a, Words b) {
        for (int i = 0; i < lanes; ++i) to[2 * i] = a.lane[i], to[2 * i + 1] = b.lane[i];
    }
    // The 64-bit product of the low halves; high halves are ignored.
    friend Words multiply_low(Words a, Words b) {
        return make([&](int i) { return (a.lane[i] & 0xFFFFFFFF) * (b.lane[i] & 0xFFFFFFFF); });
    }
    friend Words high_half(Words a) { return make([&](int i) { return a.lane[i] >> 32; }); }
    friend Words add(Words a, Words b) { return make([&](int i) { return a.lane[i] + b.lane[i]; }); }
    friend Words xor2(Words a, Words b) { return make([&](int i) { return a.lane[i] ^ b.lane[i]; }); }
    friend Words and2(Words a, Words b) { return make([&](int i) { return a.lane[i] & b.lane[i]; }); }
    friend Words xor3(Words a, Words b, Words c) { return xor2(xor2(a, b), c); }
    // The low halves of two vectors side by side.
    friend Words join_low(Words low, Words high) {
        return make([&](int i) { return (low.lane[i] & 0xFFFFFFFF) | high.lane[i] << 32; });
    }
    // Where the plane is another than T's bit it decides, whatever the planes below it said.
    friend Words below_above(Words below, Words plane, Words bit) {
        return make([&](int i) {
            return (~plane.lane[i] & (below.lane[i] | bit.lane[i])) | (below.lane[i] & bit.lane[i]);
        });
    }
    // Where the plane is T's bit it leaves the question open.
    friend Words equal_above(Words equal, Words plane, Words bit) {
        return make([&](int i) { return equal.lane[i] & ~(plane.lane[i] ^ bit.lane[i]); });
    }
    friend unsigned nonzero(Words a, Words b) {
        unsigned chosen = 0;
        for (int i = 0; i < lanes; ++i) chosen |= static_cast<unsigned>((a.lane[i] | b.lane[i]) != 0) << i;
        return chosen;
    }
    static void compress(uint64_t* to, unsigned chosen, Words words) {
        compress_lanes(to, chosen, words.lane, lanes);
    }
};

// std::fma, which without an instruction for it is a call that a compiler cannot make a vector of. The product is exact
// in double, and an inexact sum is rounded to an odd number there, so that rounding it again gives the nearest float.
inline float multiply_add_once(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return std::fma(a, b, c);
#else
    const double product = static_cast<double>(a) * b, sum = product + c, part = sum - product;
    const double error = (product - (sum - part)) + (c - part);
    uint64_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    const uint64_t inexact = (error < 0) | (error > 0), even = ~bits & 1, outwards = (error > 0) == (sum > 0);
    bits += (inexact & even) * (2 * outwards - 1);
    double odd;
    std::memcpy(&odd, &bits, sizeof odd);
    return static_cast<float>(odd);
#endif
}

template <class T, int N>
struct Lanes {
    static constexpr int lanes = N;
    using Scalar = T;
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
    T lane[N];

    static Lanes all(T value) {
        Lanes result;
        for (int i = 0; i < N; ++i) result.lane[i] = value;
        return result;
    }
    template <class Element>
    static Lanes load(const Element* from) {
        Lanes result;
        for (int i = 0; i < N; ++i) result.lane[i] = widen(from[i]);
        return result;
    }
    template <class Element>
    void store(Element* to) const {
        for (int i = 0; i < N; ++i) to[i] = narrow<Element>(lane[i]);
    }
    friend Lanes multiply(Lanes a, Lanes b) {
        for (int i = 0; i < N; ++i) a.lane[i] *= b.lane[i];
        return a;
    }
    friend Lanes add(Lanes a, Lanes b) {
        for (int i = 0; i < N; ++i) a.lane[i] += b.lane[i];
        return a;
    }
    // Rounded once.
    friend Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
        for (int i = 0; i < N; ++i) a.lane[i] = multiply_add_once(a.lane[i], b.lane[i], c.lane[i]);
        return a;
    }
    friend Lanes subtract(Lanes a, Lanes b) {
        for (int i = 0; i < N; ++i) a.lane[i] -= b.lane[i];
        return a;
    }
    friend Lanes divide(Lanes a, Lanes b) {
        for (int i = 0; i < N; ++i) a.lane[i] /= b.lane[i];
        return a;
    }
    // The second where they are equal or not ordered.
    friend Lanes larger(Lanes a, Lanes b) {
        for (int i = 0; i < N; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
        return a;
    }
    friend Lanes smaller(Lanes a, Lanes b) {
        for (int i = 0; i < N; ++i) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
        return a;
    }
    friend Lanes if_less(Lanes a, Lanes b, Lanes then, Lanes otherwise) {
        for (int i = 0; i < N; ++i) a.lane[i] = a.lane[i] < b.lane[i] ? then.lane[i] : otherwise.lane[i];
        return a;
    }
    // The lowest 9 bits as the sign and the exponent: 2^n of the number whose bits end in n + 127.
    friend Lanes to_exponent(Lanes a) {
        for (int i = 0; i < N; ++i) a.lane[i] = float_of(bits_of(a.lane[i]) << 23);
        return a;
    }
    // A store that leaves the cache as it is, where an instruction set has it; `to` is aligned to 64 bytes.
    void stream(void* to) const { std::memcpy(to, lane, sizeof lane); }
    friend Lanes select(unsigned mask, Lanes kept, Lanes dropped) {
        Bits chosen[N], other[N];
        std::memcpy(chosen, kept.lane, sizeof chosen);
        std::memcpy(other, dropped.lane, sizeof other);
        for (int i = 0; i < N; ++i) {
            const Bits all = (mask & 1u << i) ? ~Bits{0} : Bits{0};  // never a branch: masks are not predictable
            chosen[i] = (chosen[i] & all) | (other[i] & ~all);
        }
        std::memcpy(kept.lane, chosen, sizeof chosen);
        return kept;
    }
    friend Lanes keep(unsigned mask, Lanes a) { return select(mask, a, all(0)); }
};

using Floats = Lanes<float, 8>;
using Doubles = Lanes<double, 8>;

inline void finish_streams() {}

void store_bools(uint64_t mask, uint8_t* to) {
    for (int i = 0; i < 64; ++i) to[i] = mask >> i & 1;
}

}  // namespace
}  // namespace thinned
