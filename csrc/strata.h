// Numbers of stratified draws: each element's own permutation of the strata, added to its number.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernel.h"

namespace thinned {
namespace {

constexpr int walkers = 32;  // elements whose permutations are computed together

// One draw of several elements. A permutation is an affine one of 0 .. prime - 1, applied until it returns below
// `strata`. At most prime - strata places lie above, so as many further steps suffice.
class Offsets {
  public:
    explicit Offsets(const Strata& task)
        : strata_(static_cast<int32_t>(task.strata)), prime_(static_cast<int32_t>(task.prime())),
          twice_inverse_(2.0f / static_cast<float>(prime_)),
          width_(static_cast<uint32_t>((uint64_t{1} << 32) / static_cast<uint64_t>(strata_))) {}

    // y = u + place(draw) * width; u, v and y are numbers less 2^31.
    void add(int32_t* y, const int32_t* u, const int32_t* v, int64_t draw) const {
        const uint32_t s = static_cast<uint32_t>((draw % strata_ + strata_) % strata_);
        uint32_t a[walkers], b[walkers];
        int32_t x[walkers], above = 0;
        for (int i = 0; i < walkers; ++i) {
            const uint32_t number = static_cast<uint32_t>(v[i]) ^ 0x80000000;
            a[i] = 1 + ((number >> 16) * static_cast<uint32_t>(prime_ - 1) >> 16);
            b[i] = (number & 0xFFFF) * static_cast<uint32_t>(prime_) >> 16;
            x[i] = remainder(a[i] * s + b[i]);
            above |= x[i] >= strata_;
        }
        for (int32_t left = prime_ - strata_; above && left; --left) {
            above = 0;
            for (int i = 0; i < walkers; ++i) {
                const int32_t next = remainder(a[i] * static_cast<uint32_t>(x[i]) + b[i]);
                x[i] = x[i] >= strata_ ? next : x[i];
                above |= x[i] >= strata_;
            }
        }
        for (int i = 0; i < walkers; ++i)
            y[i] = static_cast<int32_t>(static_cast<uint32_t>(u[i]) + static_cast<uint32_t>(x[i]) * width_);
    }

  private:
    int32_t strata_, prime_;
    float twice_inverse_;
    uint32_t width_;

    // n % prime. The quotient has 16 bits, so that in float32 it is at most 1 off: the vectors of AVX2 multiply
    // 32 bits by 32 bits in twice the time.
    int32_t remainder(uint32_t n) const {
        const int32_t quotient = static_cast<int32_t>(static_cast<float>(static_cast<int32_t>(n >> 1)) * twice_inverse_);
        int32_t rest = static_cast<int32_t>(n - static_cast<uint32_t>(quotient) * static_cast<uint32_t>(prime_));
        rest += rest >> 31 & prime_;
        return rest >= prime_ ? rest - prime_ : rest;
    }
};

// Units `from` to `to` of a task, each of which is a part of a row.
void strata(const Strata& task, int64_t from, int64_t to) {
    const Offsets offsets(task);
    const int64_t each = task.parts();
    for (; from < to; ++from) {
        const int64_t row = from / each, first = from % each * Strata::part;
        const int64_t last = std::min(task.count, first + Strata::part), source = task.sources[row] * task.count;
        int64_t at = first;
        for (; at + walkers <= last; at += walkers)
            offsets.add(task.y + row * task.count + at, task.u + source + at, task.v + source + at, task.draws[row]);
        if (at == last) continue;
        int32_t y[walkers], u[walkers] = {}, v[walkers] = {};
        const size_t bytes = static_cast<size_t>(last - at) * sizeof(int32_t);
        std::memcpy(u, task.u + source + at, bytes);
        std::memcpy(v, task.v + source + at, bytes);
        offsets.add(y, u, v, task.draws[row]);
        std::memcpy(task.y + row * task.count + at, y, bytes);
    }
}

}  // namespace
}  // namespace thinned
