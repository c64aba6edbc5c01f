// Values under numbers that are given: those below T are kept.
#pragma once

#include "apply.h"
#include "kernel.h"

namespace thinned {
namespace {

// Mask bits i to i + 63 of numbers less 2^31.
struct Below {
    const int32_t* numbers;
    int64_t n;
    int32_t last;   // the largest number that is kept
    uint64_t some;  // all bits, or none where nothing is kept
    uint64_t here = 0;

    const uint8_t* at(int64_t i) {
        uint8_t kept[64];
        if (n - i >= 64) {
            for (int j = 0; j < 64; ++j) kept[j] = numbers[i + j] <= last;
        } else {
            for (int j = 0; j < 64; ++j) kept[j] = j < n - i && numbers[i + j] <= last;
        }
        here = 0;
        for (int j = 0; j < 8; ++j) {
            uint64_t bytes;
            std::memcpy(&bytes, kept + 8 * j, sizeof bytes);
            here |= (bytes * 0x0102040810204080 >> 56) << 8 * j;  // the product moves byte k's bit to bit 56 + k
        }
        here &= some;
        return reinterpret_cast<const uint8_t*>(&here);
    }
};

template <class Element>
void choose(const Choice& task, int64_t from, int64_t to) {
    const int64_t first = from * Choice::part, n = std::min(task.n, to * Choice::part) - first;
    const Constants constants{task.scale, task.shift, task.fill};
    const Span<const Element> x{static_cast<const Element*>(task.x) + first, 1};
    const Span<Element> y{static_cast<Element*>(task.y) + first, 1};
    const int32_t last = static_cast<int32_t>(static_cast<int64_t>(task.T) - 1 - (int64_t{1} << 31));
    const Below below{task.numbers + first, n, last, task.T ? ~uint64_t{0} : 0};
    if (constants.plain())
        apply_row<true>(x, y, n, constants, below);
    else
        apply_row<false>(x, y, n, constants, below);
}

// Units `from` to `to` of a task, each a part of its elements.
void choose(const Choice& task, int64_t from, int64_t to) {
    switch (task.dtype) {
        case Dtype::f16: return choose<Half>(task, from, to);
        case Dtype::bf16: return choose<BFloat>(task, from, to);
        case Dtype::f32: return choose<float>(task, from, to);
        case Dtype::f64: return choose<double>(task, from, to);
        case Dtype::c64: return choose<Complex<float>>(task, from, to);
        case Dtype::c128: return choose<Complex<double>>(task, from, to);
        case Dtype::mask: return choose<Bool>(task, from, to);
    }
}

}  // namespace
}  // namespace thinned
