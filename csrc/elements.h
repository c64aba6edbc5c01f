// Element types and their conversion to and from the type that is computed in.
//
// Everything is in an unnamed namespace: this text is compiled once for each instruction set, and the linker
// must never pick one set's copy for another.
#pragma once

#include <cstdint>
#include <cstring>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "mask words are read as bytes");

namespace thinned {
namespace {

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};
struct Bool {
    uint8_t value;
};
template <class T>
struct Complex {
    T real, imaginary;
};

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }

// The chosen lanes side by side; all lanes are written, so that nothing branches.
inline void compress_lanes(uint64_t* to, unsigned chosen, const uint64_t* lane, int lanes) {
    int count = 0;
    for (int i = 0; i < lanes; ++i) {
        to[count] = lane[i];
        count += chosen >> i & 1;
    }
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(Half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFF) << 13;
    if (magnitude >= 0x0F800000) return float_of(sign | 0x70000000 | magnitude);  // infinity, NaN
    // A product by 2^112 moves the exponent to float's bias and makes subnormals normal, exactly.
    return float_of(sign | bits_of(float_of(magnitude) * float_of(0x77800000)));
}

template <class Element, class Scalar>
inline Element narrow(Scalar x);

template <>
inline float narrow(float x) {
    return x;
}
template <>
inline double narrow(double x) {
    return x;
}
template <>
inline BFloat narrow(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);  // to nearest, ties to even
    return {static_cast<uint16_t>((x != x ? bits | 0x00400000 : rounded) >> 16)};
}
template <>
inline Half narrow(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000;
    const uint32_t magnitude = bits_of(x) & 0x7FFFFFFF;
    uint32_t half;
    if (magnitude > 0x7F800000) {
        half = 0x7E00;
    } else if (magnitude >= 0x477FF000) {
        half = 0x7C00;
    } else if (magnitude < 0x38800000) {
        // Adding 0.5 leaves a subnormal's bits, rounded to nearest even, at the bottom of the sum.
        half = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000;
    } else {
        half = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    }
    return {static_cast<uint16_t>(sign | half)};
}

}  // namespace
}  // namespace thinned
