// Applying mask bits to 64 elements at a time, whatever their type.
//
// Expects `Floats`, `Doubles` and `store_bools` of an instruction set.
#pragma once

#include <algorithm>
#include <cmath>

namespace thinned {
namespace {

constexpr int chunk = 64;

// shift is added only where there is one: -0 + 0 would lose the sign of a kept zero.
struct Constants {
    double scale, shift, fill;
    bool plain() const { return shift == 0 && fill == 0 && !std::signbit(fill); }
};

// Mask bits i to i + lanes - 1, in the low bits; what is above them is not to be looked at.
template <int lanes>
struct Bits {
    static unsigned at(const uint8_t* mask, int i) {
        static_assert(lanes <= 8 && 8 % lanes == 0);
        return static_cast<unsigned>(mask[i / 8]) >> i % 8;
    }
};
template <>
struct Bits<16> {
    static unsigned at(const uint8_t* mask, int i) {
        uint16_t bits;
        std::memcpy(&bits, mask + i / 8, sizeof bits);
        return bits;
    }
};

template <class Element>
struct Vector {
    using type = Floats;
};
template <>
struct Vector<double> {
    using type = Doubles;
};

// 64 elements under 64 mask bits, or the first n of them and at most a vector's worth more.
template <bool plain, class Element>
inline void apply(const Element* x, Element* y, const uint8_t* mask, Constants constants, int n = chunk) {
    using V = typename Vector<Element>::type;
    using Scalar = typename V::Scalar;
    const V scale = V::all(static_cast<Scalar>(constants.scale));
    const V shift = V::all(static_cast<Scalar>(constants.shift));
    const V fill = V::all(static_cast<Scalar>(constants.fill));
    for (int i = 0; i < n; i += V::lanes) {
        V value = multiply(V::load(x + i), scale);
        if constexpr (plain) {
            keep(Bits<V::lanes>::at(mask, i), value).store(y + i);
        } else {
            if (constants.shift != 0) value = add(value, shift);
            select(Bits<V::lanes>::at(mask, i), value, fill).store(y + i);
        }
    }
}

// Each of 32 bits twice.
inline uint64_t twice(uint64_t bits) {
    bits = (bits | bits << 16) & 0x0000FFFF0000FFFF;
    bits = (bits | bits << 8) & 0x00FF00FF00FF00FF;
    bits = (bits | bits << 4) & 0x0F0F0F0F0F0F0F0F;
    bits = (bits | bits << 2) & 0x3333333333333333;
    bits = (bits | bits << 1) & 0x5555555555555555;
    return bits | bits << 1;
}

// A complex number counts as its two parts.
template <bool plain, class Part>
inline void apply(const Complex<Part>* x, Complex<Part>* y, const uint8_t* mask, Constants constants,
                  int n = chunk) {
    constexpr int half = chunk / 2;
    for (int i = 0; i < n; i += half) {
        uint32_t bits;
        std::memcpy(&bits, mask + i / 8, sizeof bits);
        const uint64_t doubled = twice(bits);
        apply<plain>(reinterpret_cast<const Part*>(x + i), reinterpret_cast<Part*>(y + i),
                     reinterpret_cast<const uint8_t*>(&doubled), constants, 2 * std::min(half, n - i));
    }
}

template <bool plain>
inline void apply(const Bool*, Bool* y, const uint8_t* mask, Constants, int = chunk) {
    uint64_t bits;
    std::memcpy(&bits, mask, sizeof bits);
    store_bools(bits, reinterpret_cast<uint8_t*>(y));
}

// Elements of a row and the distance to the next in memory.
template <class Element>
struct Span {
    Element* at;
    int64_t stride;

    Span next(int64_t n) const { return {at + n * stride, stride}; }
};

// How many elements `apply` can stop after: whole vectors, and whole bytes of mask.
template <class Element>
struct ApplyUnit {
    static constexpr int size = std::max(8, Vector<Element>::type::lanes);
};
template <class Part>
struct ApplyUnit<Complex<Part>> {
    static constexpr int size = 8;
};
template <>
struct ApplyUnit<Bool> {
    static constexpr int size = chunk;
};

// At most 64 elements: what is not whole vectors in one place goes through a buffer.
template <bool plain, class Element>
void apply_some(Span<const Element> x, Span<Element> y, int n, const uint8_t* mask, Constants constants) {
    int done = 0;
    if (x.stride == 1 && y.stride == 1) {
        done = n - n % ApplyUnit<Element>::size;
        if (done) apply<plain>(x.at, y.at, mask, constants, done);
        if (done == n) return;
    }
    uint64_t bits;
    std::memcpy(&bits, mask, sizeof bits);
    bits >>= done;
    Element buffer[chunk] = {};
    const int rest = n - done;
    if (done || (x.stride == 1 && y.stride == 1)) {
        std::memcpy(buffer, x.at + done, rest * sizeof(Element));
        apply<plain>(buffer, buffer, reinterpret_cast<const uint8_t*>(&bits), constants, rest);
        std::memcpy(y.at + done, buffer, rest * sizeof(Element));
    } else {
        for (int i = 0; i < n; ++i) buffer[i] = x.at[i * x.stride];
        apply<plain>(buffer, buffer, reinterpret_cast<const uint8_t*>(&bits), constants, n);
        for (int i = 0; i < n; ++i) y.at[i * y.stride] = buffer[i];
    }
}

// The same 64 mask bits everywhere.
struct Same {
    uint64_t bits;
    const uint8_t* at(int64_t) const { return reinterpret_cast<const uint8_t*>(&bits); }
};

// n elements; `mask.at(i)` is where the mask bits of elements i to i + 63 are.
template <bool plain, class Element, class Mask>
void apply_row(Span<const Element> x, Span<Element> y, int64_t n, Constants constants, Mask mask) {
    int64_t i = 0;
    if (x.stride == 1 && y.stride == 1)
        for (; i + chunk <= n; i += chunk) apply<plain>(x.at + i, y.at + i, mask.at(i), constants);
    for (; i < n; i += chunk) {
        const int some = static_cast<int>(std::min<int64_t>(chunk, n - i));
        apply_some<plain>(x.next(i), y.next(i), some, mask.at(i), constants);
    }
}

// From how many elements on a row that is dropped is not worth reading.
template <class Element>
constexpr int64_t long_row = 2048 / sizeof(Element);

// A row of at least a vector under mask bits that are all the same, without a branch on them, which short rows
// would mispredict. The last vector may overlap the one before: it is loaded first, as x may be y.
template <class Element>
inline void scale_or_zero(const Element* x, Element* y, int64_t n, Constants constants, uint64_t bits) {
    using V = typename Vector<Element>::type;
    const V scale = V::all(static_cast<typename V::Scalar>(constants.scale));
    const unsigned mask = static_cast<unsigned>(bits);
    const int64_t end = n - V::lanes;
    const V last = keep(mask, multiply(V::load(x + end), scale));
    for (int64_t i = 0; i < end; i += V::lanes) keep(mask, multiply(V::load(x + i), scale)).store(y + i);
    last.store(y + end);
}

template <class Part>
inline void scale_or_zero(const Complex<Part>* x, Complex<Part>* y, int64_t n, Constants constants, uint64_t bits) {
    scale_or_zero(reinterpret_cast<const Part*>(x), reinterpret_cast<Part*>(y), 2 * n, constants, bits);
}

inline void scale_or_zero(const Bool*, Bool* y, int64_t n, Constants, uint64_t bits) { std::memset(y, bits & 1, n); }

// n elements under mask bits that are all the same. +0 is zero bits in every type.
template <bool plain, class Element>
inline void apply_one(Span<const Element> x, Span<Element> y, int64_t n, Constants constants, uint64_t bits) {
    const bool together = x.stride == 1 && y.stride == 1;
    if (plain && together && n >= long_row<Element> && !bits)
        std::memset(static_cast<void*>(y.at), 0, n * sizeof(Element));
    else if (plain && together && n >= ApplyUnit<Element>::size)
        scale_or_zero(x.at, y.at, n, constants, bits);
    else
        apply_row<plain>(x, y, n, constants, Same{bits});
}

}  // namespace
}  // namespace thinned
