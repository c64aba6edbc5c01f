// The way through a plan: collect rows, generate the blocks they need together, apply.
#pragma once

#include "apply.h"
#include "plan.h"
#include "planes.h"

namespace thinned {
namespace {

// 64 mask bits from any bit position on.
inline uint64_t bits_at(const uint64_t* words, int64_t position) {
    const int64_t word = position >> 6;
    const int shift = static_cast<int>(position & 63);
    return shift ? words[word] >> shift | words[word + 1] << (64 - shift) : words[word];
}

// Where the masks of a row's elements are: in place, or shifted into place.
struct Aligned {
    const uint8_t* bytes;
    const uint8_t* at(int64_t i) const { return bytes + i / 8; }
};
struct Shifted {
    const uint64_t* words;
    int64_t position;
    uint64_t here = 0;
    const uint8_t* at(int64_t i) {
        here = bits_at(words, position + i);
        return reinterpret_cast<const uint8_t*>(&here);
    }
};

// In place: row i's bit j goes to row j's bit i (Warren, "Hacker's Delight", section 7-3).
inline void transpose(uint64_t (&rows)[64]) {
    uint64_t mask = 0x00000000FFFFFFFF;
    for (int step = 32; step; step >>= 1, mask ^= mask << step)
        for (int base = 0; base < 64; base += 2 * step)
            for (int i = base; i < base + step; ++i) {
                const uint64_t swapped = (rows[i] >> step ^ rows[i + step]) & mask;
                rows[i] ^= swapped << step;
                rows[i + step] ^= swapped;
            }
}

// A count in the mixed radix of nested loops, and where it stands in x, y, mask and keys.
struct LoopPosition {
    const std::vector<Dim>& loops;
    int64_t count[max_dims + 2];
    int64_t x = 0, y = 0, mask = 0, key = 0;

    LoopPosition(const std::vector<Dim>& loops, int64_t steps) : loops(loops) {
        for (int d = static_cast<int>(loops.size()) - 1; d >= 0; --d) {
            count[d] = steps % loops[d].size;
            steps /= loops[d].size;
            move(loops[d], count[d]);
        }
    }
    void next() {
        for (int d = static_cast<int>(loops.size()) - 1; d >= 0; --d) {
            move(loops[d], 1);
            if (++count[d] < loops[d].size) return;
            move(loops[d], -loops[d].size);
            count[d] = 0;
        }
    }
    void move(const Dim& loop, int64_t steps) {
        x += steps * loop.x;
        y += steps * loop.y;
        mask += steps * loop.mask;
        key += steps * loop.key;
    }
};

template <bool plain, class Element>
class Walk {
  public:
    explicit Walk(const Plan& plan)
        : plan_(plan), constants_{plan.task.scale, plan.task.shift, plan.task.fill} {}

    void units(int64_t from, int64_t to) {
        for (LoopPosition place(plan_.loops, from); from < to; ++from, place.next()) {
            if (plan_.kind == Row::tile)
                add_tile(place);
            else
                add_row(place);
        }
        flush();
    }

  private:
    static constexpr int max_rows = 1024;
    static constexpr int64_t pattern_bits = segment;

    // Elements of memory under mask bits at a position among the generated ones; a tile's rows lie under 64
    // of them each, whose positions are in `lines_` from `position` on.
    struct PendingRows {
        Span<const Element> x;
        Span<Element> y;
        int64_t n, rows;
        int64_t first_column, columns;
        int position;
    };

    const Plan& plan_;
    const Constants constants_;
    Blocks blocks_;
    PendingRows pieces_[max_rows];
    int lines_[max_rows];
    uint64_t pattern_[pattern_bits / 64 + 2];
    int piece_count_ = 0, line_count_ = 0;
    uint64_t last_key_ = 0, last_start_ = 0;
    int64_t last_bits_ = 0;
    int last_position_ = 0;

    PendingRows piece(const LoopPosition& place, int64_t n) const {
        const auto* x = static_cast<const Element*>(plan_.task.x) + place.x;
        auto* y = static_cast<Element*>(plan_.task.y) + place.y;
        return {{x, plan_.row.x}, {y, plan_.row.y}, n, 1, 0, 0, 0};
    }

    static int64_t left(int64_t size, int64_t step, int64_t count) { return std::min(step, size - step * count); }

    static int blocks_for(uint64_t start, int64_t bits) {
        return static_cast<int>((start + bits - 1) / block_bits - start / block_bits + 1);
    }

    // Where the mask bits from `start` on are, or will be once generated.
    int request(uint64_t key, uint64_t start, int64_t bits) {
        if (blocks_.count && key == last_key_ && start == last_start_ && bits == last_bits_) return last_position_;
        const uint64_t block = start / block_bits;
        const int wanted = blocks_for(start, bits);
        const int first = blocks_.count - blocks_.same_last(block, key);
        const int there = blocks_.count - first;
        if (wanted > there) blocks_.add(block + there, wanted - there, key);
        last_key_ = key, last_start_ = start, last_bits_ = bits;
        return last_position_ = first * block_bits + static_cast<int>(start % block_bits);
    }

    void add_row(const LoopPosition& place) {
        PendingRows piece = this->piece(place, left(plan_.row.size, plan_.row_step, place.count[plan_.row_loop]));
        if (plan_.group_loop >= 0)
            piece.rows = left(plan_.group.size, plan_.group_step, place.count[plan_.group_loop]);
        const int64_t bits = plan_.kind == Row::run ? piece.n : plan_.group.mask ? piece.rows : 1;
        const uint64_t start = plan_.task.base + place.mask;
        if (piece_count_ == max_rows || blocks_.count + blocks_for(start, bits) > capacity) flush();
        piece.position = request(plan_.task.keys[place.key], start, bits);
        pieces_[piece_count_++] = piece;
    }

    void add_tile(const LoopPosition& place) {
        PendingRows piece = this->piece(place, left(plan_.row.size, plan_.row_step, place.count[plan_.row_loop]));
        piece.first_column = tile_columns * place.count[plan_.column_loop];
        piece.columns = left(plan_.column_count, tile_columns, place.count[plan_.column_loop]);
        const uint64_t start = plan_.task.base + place.mask;
        const int most = static_cast<int>(piece.n) * (static_cast<int>(piece.columns - 1) / block_bits + 2);
        if (piece_count_ == max_rows || line_count_ + piece.n > max_rows || blocks_.count + most > capacity)
            flush();
        piece.position = line_count_;
        for (int64_t i = 0; i < piece.n; ++i)
            lines_[line_count_++] = request(plan_.task.keys[place.key + i * plan_.row.key],
                                            start + i * plan_.row.mask, piece.columns);
        pieces_[piece_count_++] = piece;
    }

    void flush() {
        if (!piece_count_) return;
        generate(blocks_, plan_.task.T);
        for (int i = 0; i < piece_count_; ++i) {
            if (plan_.kind == Row::run)
                apply_run(pieces_[i]);
            else if (plan_.kind == Row::constant)
                apply_constant(pieces_[i]);
            else
                apply_tile(pieces_[i]);
        }
        blocks_.count = 0;
        piece_count_ = line_count_ = 0;
    }

    Span<const Element> x_of(const PendingRows& piece, int64_t row) const {
        return {piece.x.at + row * plan_.group.x, piece.x.stride};
    }
    Span<Element> y_of(const PendingRows& piece, int64_t row) const {
        return {piece.y.at + row * plan_.group.y, piece.y.stride};
    }

    bool adjoining(const PendingRows& piece) const {
        return piece.x.stride == 1 && piece.y.stride == 1 && plan_.group.x == piece.n && plan_.group.y == piece.n;
    }

    // Short rows that lie side by side under the same bits: one long row under those bits over and over.
    void apply_pattern(const PendingRows& piece) {
        const int64_t repeats = std::min(piece.rows, pattern_bits / piece.n);
        std::memset(pattern_, 0, sizeof pattern_);
        for (int64_t row = 0; row < repeats; ++row)
            for (int64_t i = 0; i < piece.n; i += 64) {
                const int64_t left = piece.n - i, to = row * piece.n + i;
                const uint64_t those = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
                const uint64_t bits = bits_at(blocks_.below, piece.position + i) & those;
                pattern_[to >> 6] |= bits << (to & 63);
                if (to & 63) pattern_[(to >> 6) + 1] |= bits >> (64 - (to & 63));
            }
        const Aligned mask{reinterpret_cast<const uint8_t*>(pattern_)};
        for (int64_t row = 0; row < piece.rows; row += repeats)
            apply_row<plain>(x_of(piece, row), y_of(piece, row), std::min(repeats, piece.rows - row) * piece.n, constants_,
                             mask);
    }

    void apply_run(const PendingRows& piece) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(blocks_.below) + piece.position / 8;
        if (piece.rows > 1 && piece.n <= pattern_bits / 4 && adjoining(piece)) return apply_pattern(piece);
        for (int64_t row = 0; row < piece.rows; ++row) {
            if (piece.position % 8 == 0)
                apply_row<plain>(x_of(piece, row), y_of(piece, row), piece.n, constants_, Aligned{bytes});
            else
                apply_row<plain>(x_of(piece, row), y_of(piece, row), piece.n, constants_,
                                 Shifted{blocks_.below, piece.position});
        }
    }

    // All ones if a row of one decision is kept, and zero if not.
    static uint64_t kept(const uint64_t* bits, int64_t bit) { return 0 - (bits[bit >> 6] >> (bit & 63) & 1); }

    // Short rows that lie side by side, a decision each: one long row under as many copies of each bit.
    void apply_copies(const PendingRows& piece) {
        const int64_t words = piece.n / 64, rest = piece.n % 64, step = plan_.group.mask;
        const uint64_t ones = (uint64_t{1} << rest) - 1;
        uint64_t* to = pattern_;
        uint64_t word = 0;
        int64_t filled = 0, bit = piece.position;
        for (int64_t row = 0; row < piece.rows; ++row, bit += step) {
            const uint64_t bits = kept(blocks_.below, bit);
            for (int64_t i = 0; i < words; ++i) {
                *to++ = word | bits << filled;
                word = bits >> 1 >> (63 - filled);
            }
            word |= (bits & ones) << filled;
            filled += rest;
            if (filled >= 64) {
                *to++ = word;
                filled -= 64;
                word = (bits & ones) >> (rest - filled);
            }
        }
        *to = word;
        const Aligned mask{reinterpret_cast<const uint8_t*>(pattern_)};
        apply_row<plain>(piece.x, piece.y, piece.rows * piece.n, constants_, mask);
    }

    void apply_constant(const PendingRows& piece) {
        const bool apart = plain ? piece.n < ApplyUnit<Element>::size : piece.n < long_row<Element> && piece.n % chunk;
        if (apart && piece.rows > 1 && adjoining(piece)) return apply_copies(piece);
        for (int64_t row = 0; row < piece.rows; ++row) {
            const uint64_t bits = kept(blocks_.below, piece.position + row * plan_.group.mask);
            apply_one<plain>(x_of(piece, row), y_of(piece, row), piece.n, constants_, bits);
        }
    }

    void apply_tile(const PendingRows& piece) {
        uint64_t rows[64];
        LoopPosition at(plan_.columns, piece.first_column);
        for (int64_t column = 0; column < piece.columns; column += 64) {
            for (int i = 0; i < 64; ++i)
                rows[i] = i < piece.n ? bits_at(blocks_.below, lines_[piece.position + i] + column) : 0;
            transpose(rows);
            const int64_t width = std::min<int64_t>(64, piece.columns - column);
            for (int64_t j = 0; j < width; ++j, at.next()) {
                const Span<const Element> x = {piece.x.at + at.x, piece.x.stride};
                const Span<Element> y = {piece.y.at + at.y, piece.y.stride};
                apply_row<plain>(x, y, piece.n, constants_, Same{rows[j]});
            }
        }
    }
};

template <class Element>
void walk(const Plan& plan, int64_t from, int64_t to) {
    if (Constants{plan.task.scale, plan.task.shift, plan.task.fill}.plain())
        Walk<true, Element>(plan).units(from, to);
    else
        Walk<false, Element>(plan).units(from, to);
}

// Units `from` to `to` of a plan.
void walk(const Plan& plan, int64_t from, int64_t to) {
    switch (plan.task.dtype) {
        case Dtype::f16: return walk<Half>(plan, from, to);
        case Dtype::bf16: return walk<BFloat>(plan, from, to);
        case Dtype::f32: return walk<float>(plan, from, to);
        case Dtype::f64: return walk<double>(plan, from, to);
        case Dtype::c64: return walk<Complex<float>>(plan, from, to);
        case Dtype::c128: return walk<Complex<double>>(plan, from, to);
        case Dtype::mask: return Walk<true, Bool>(plan).units(from, to);
    }
}

}  // namespace
}  // namespace thinned
