// A mask and what stands beside it, an activation or a sum, in one pass over memory.
#pragma once

#include <utility>

#include "activations.h"
#include "apply.h"
#include "kernel.h"
#include "planes.h"

namespace thinned {
namespace {

// A result of so many bytes does not fit into a cache with its input. Stores that go past the caches then take half
// the time: 4 million floats in 0.6 ms and not 1.2 ms on an AMD EPYC with 32 MiB.
constexpr int64_t streamed_bytes = int64_t{1} << 24;

template <Function function, bool biased, class V>
inline V value(V x, V other, V bias, V scale, unsigned mask) {
    if constexpr (function == Function::relu) return keep(mask, multiply(larger(V::all(0), x), scale));
    if constexpr (function == Function::gelu) return keep(mask, multiply(gelu(x), scale));
    if constexpr (function == Function::gelu_tanh) return keep(mask, multiply(gelu_tanh(x), scale));
    if constexpr (function == Function::silu) return keep(mask, multiply(silu(x), scale));
    if constexpr (function == Function::add) return add(other, keep(mask, multiply(biased ? add(x, bias) : x, scale)));
    other = multiply(other, scale);
    if constexpr (function == Function::relu_slope) return if_less(V::all(0), x, other, if_less(x, V::all(1), V::all(0), other));
    if constexpr (function == Function::gelu_slope) return keep(mask, multiply(other, gelu_slope(x)));
    if constexpr (function == Function::gelu_tanh_slope) return keep(mask, multiply(other, gelu_tanh_slope(x)));
    if constexpr (function == Function::silu_slope) return keep(mask, multiply(other, silu_slope(x)));
}

// For `generate`, which is compiled once for all functions and types.
struct Meanwhile {
    void* self;
    void (*call)(void* self, int planes);
    void operator()(int planes) const { call(self, planes); }
};

template <Function function, bool biased, bool streamed, class Element>
class Fuse {
    using V = typename Vector<Element>::type;

  public:
    explicit Fuse(const Fusion& task)
        : task_(task), x_(static_cast<const Element*>(task.x)), other_(static_cast<const Element*>(task.other)),
          bias_(static_cast<const Element*>(task.bias)), y_(static_cast<Element*>(task.y)),
          scale_(V::all(static_cast<typename V::Scalar>(task.scale))) {}

    void units(int64_t from, int64_t to) {
        const int64_t each = task_.parts();
        for (; from < to; ++from) {
            const int64_t row = from / each, first = from % each * Fusion::part;
            const int64_t n = std::min(Fusion::part, task_.n - first);
            const int blocks = static_cast<int>((n + block_bits - 1) / block_bits);
            if (next_count_ == batch || blocks_.count + blocks > batch) turn();
            next_[next_count_++] = {row * task_.n + first, biased ? first % task_.columns : 0, n, 2 * blocks_.count};
            left_next_ += n;
            blocks_.add(static_cast<uint64_t>(first / block_bits), blocks, task_.keys[row]);
        }
        turn();
        advance(left_);
        if constexpr (streamed) finish_streams();
    }

  private:
    static constexpr int batch = Fusion::part / block_bits;  // blocks, and pieces, taken together

    // Elements side by side, and where their mask bits begin.
    struct Piece {
        int64_t at, column, n;
        int word;
    };

    const Fusion& task_;
    const Element* const x_;
    const Element* const other_;
    const Element* const bias_;
    Element* const y_;
    const V scale_;
    Blocks blocks_;
    Piece next_[batch], ready_[batch];  // whose bits are to be generated; whose bits are there
    uint64_t bits_[2 * batch];
    int next_count_ = 0, at_ = 0;
    int64_t left_next_ = 0, left_ = 0, all_ = 0, done_ = 0;  // elements; done_ of piece at_

    // Generate the bits of what was collected, and meanwhile apply those that are there.
    void turn() {
        all_ = left_;
        if constexpr (function != Function::relu_slope)
            generate(blocks_, task_.T, Meanwhile{this, [](void* self, int planes) {
                                                     Fuse& fuse = *static_cast<Fuse*>(self);
                                                     fuse.advance(std::min(fuse.step(planes), fuse.left_));
                                                 }});
        advance(left_);
        std::copy_n(blocks_.below, 2 * blocks_.count, bits_);
        std::copy_n(next_, next_count_, ready_);
        left_ = left_next_;
        blocks_.count = next_count_ = at_ = 0;
        left_next_ = done_ = 0;
    }

    // How many elements to apply at a time, so that all are applied when the bits are there.
    int64_t step(int planes) const {
        const int64_t calls = (blocks_.count + Pair::lanes - 1) / Pair::lanes * planes;
        return (all_ / calls + chunk) / chunk * chunk;
    }

    // n more elements, and the rest of the last chunk or piece: its mask bits begin at a byte.
    inline void advance(int64_t n) {
        while (n > 0) {
            const Piece& piece = ready_[at_];
            const int64_t from = done_, some = std::min((n + chunk - 1) / chunk * chunk, piece.n - from), rest = some % chunk;
            const auto* mask = reinterpret_cast<const uint8_t*>(bits_ + piece.word) + from / 8;
            whole(piece.at + from, piece.column + from, mask, some - rest);
            const int64_t end = from + some - rest;
            if (rest) part(piece.at + end, piece.column + end, mask + (some - rest) / 8, static_cast<int>(rest));
            done_ = from + some;
            if (done_ == piece.n) ++at_, done_ = 0;
            n -= some;
            left_ -= some;
        }
    }

    // 64 elements of the bias from a column on.
    const Element* bias(int64_t column, Element* buffer) const {
        column %= task_.columns;
        if (column + chunk <= task_.columns) return bias_ + column;
        for (int i = 0; i < chunk; ++i) {
            buffer[i] = bias_[column];
            if (++column == task_.columns) column = 0;
        }
        return buffer;
    }

    // n elements, whole chunks. All that the loop reads is local: a vector's store may change any member.
    inline void whole(int64_t at, int64_t column, const uint8_t* mask, int64_t n) const {
        const Element *x = x_ + at, *other = function >= Function::add ? other_ + at : nullptr;
        Element* y = y_ + at;
        const V scale = scale_;
        if constexpr (biased) {
            Element buffer[chunk];
            for (int64_t i = 0; i < n; i += chunk)
                apply<streamed>(x + i, other + i, bias(column + i, buffer), y + i, mask + i / 8, chunk, scale);
        } else {
            apply<streamed>(x, other, nullptr, y, mask, n, scale);
        }
    }

    void part(int64_t at, int64_t column, const uint8_t* mask, int n) const {
        Element x[chunk] = {}, other[chunk] = {}, buffer[chunk], y[chunk];
        std::memcpy(x, x_ + at, n * sizeof(Element));
        if constexpr (function >= Function::add) std::memcpy(other, other_ + at, n * sizeof(Element));
        apply<false>(x, other, biased ? bias(column, buffer) : nullptr, y, mask, n, scale_);
        std::memcpy(y_ + at, y, n * sizeof(Element));
    }

    template <bool stream>
    static inline void apply(const Element* x, const Element* other, const Element* bias, Element* y,
                             const uint8_t* mask, int64_t n, V scale) {
        for (int64_t i = 0; i < n; i += V::lanes) {
            const V its_x = V::load(x + i);
            V its_other = its_x, its_bias = its_x;
            if constexpr (function >= Function::add) its_other = V::load(other + i);
            if constexpr (biased) its_bias = V::load(bias + i);
            const unsigned bits = Bits<V::lanes>::at(mask + i / 8, static_cast<int>(i % 8));
            const V result = value<function, biased>(its_x, its_other, its_bias, scale, bits);
            if constexpr (stream)
                result.stream(y + i);
            else
                result.store(y + i);
        }
    }
};

template <Function function, bool biased, class Element>
void fuse_as(const Fusion& task, int64_t from, int64_t to) {
    if constexpr (sizeof(Element) >= 4) {
        const int64_t row_bytes = task.n * static_cast<int64_t>(sizeof(Element));
        const bool aligned = reinterpret_cast<uintptr_t>(task.y) % 64 == 0 && (task.rows == 1 || row_bytes % 64 == 0);
        if (aligned && task.rows * row_bytes >= streamed_bytes)
            return Fuse<function, biased, true, Element>(task).units(from, to);
    }
    Fuse<function, biased, false, Element>(task).units(from, to);
}

template <class Element>
void fuse(const Fusion& task, int64_t from, int64_t to) {
    switch (task.function) {
        case Function::relu: return fuse_as<Function::relu, false, Element>(task, from, to);
        case Function::gelu: return fuse_as<Function::gelu, false, Element>(task, from, to);
        case Function::gelu_tanh: return fuse_as<Function::gelu_tanh, false, Element>(task, from, to);
        case Function::silu: return fuse_as<Function::silu, false, Element>(task, from, to);
        case Function::add:
            return task.bias ? fuse_as<Function::add, true, Element>(task, from, to)
                             : fuse_as<Function::add, false, Element>(task, from, to);
        case Function::relu_slope: return fuse_as<Function::relu_slope, false, Element>(task, from, to);
        case Function::gelu_slope: return fuse_as<Function::gelu_slope, false, Element>(task, from, to);
        case Function::gelu_tanh_slope: return fuse_as<Function::gelu_tanh_slope, false, Element>(task, from, to);
        case Function::silu_slope: return fuse_as<Function::silu_slope, false, Element>(task, from, to);
    }
}

// Units `from` to `to` of a task, each a part of a row.
void fuse(const Fusion& task, int64_t from, int64_t to) {
    switch (task.dtype) {
        case Dtype::f16: return fuse<Half>(task, from, to);
        case Dtype::bf16: return fuse<BFloat>(task, from, to);
        case Dtype::f32: return fuse<float>(task, from, to);
        default: return fuse<double>(task, from, to);
    }
}

}  // namespace
}  // namespace thinned
