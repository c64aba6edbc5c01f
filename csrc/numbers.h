// The 32-bit numbers that masks are decided by: all 32 planes of a block, turned from planes into numbers.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernel.h"
#include "planes.h"

namespace thinned {
namespace {

// Row i's bit j goes to row j's bit i, in many matrices at once, one for each column.
template <int columns>
inline void transpose_each(uint32_t (&rows)[32][columns]) {
    uint32_t mask = 0x0000FFFF;
    for (int step = 16; step; step >>= 1, mask ^= mask << step)
        for (int base = 0; base < 32; base += 2 * step)
            for (int i = base; i < base + step; ++i)
                for (int c = 0; c < columns; ++c) {
                    const uint32_t swapped = (rows[i][c] >> step ^ rows[i + step][c]) & mask;
                    rows[i][c] ^= swapped << step;
                    rows[i + step][c] ^= swapped;
                }
}

class NumberWalk {
  public:
    explicit NumberWalk(const Numbers& task) : task_(task) {}

    // Units are blocks: as many for each row as a row can touch, of which its last may have none of it.
    void units(int64_t from, int64_t to) {
        const int64_t each = task_.blocks();
        for (; from < to; ++from) add(from / each, from % each);
        flush();
    }

  private:
    // Where a block's numbers go: `n` of them, from `first` on.
    struct Slot {
        int32_t* to;
        int first, n;
    };

    const Numbers& task_;
    Blocks blocks_;
    Slot slots_[capacity];

    void add(int64_t row, int64_t block) {
        const uint64_t start = task_.starts[row];
        const int offset = static_cast<int>(start % block_bits);
        const int64_t done = std::max<int64_t>(0, block * block_bits - offset);  // of the row, before this block
        if (done >= task_.count) return;
        const int first = block ? 0 : offset;
        const int n = static_cast<int>(std::min<int64_t>(block_bits - first, task_.count - done));
        slots_[blocks_.count] = {task_.y + row * task_.count + done, first, n};
        blocks_.add(start / block_bits + block, 1, task_.keys[row]);
        if (blocks_.count == capacity) flush();
    }

    void flush() {
        if (!blocks_.count) return;
        blocks_.pad();
        if (blocks_.mixed)
            generate_with<Mixed>();
        else
            generate_with<Uniform>();
        blocks_.count = 0;
    }

    template <class Source>
    void generate_with() {
        const Source source(blocks_);
        constexpr int words = 4 * Pair::lanes;
        uint32_t rows[32][words], numbers[words][32];
        for (int at = 0; at < blocks_.count; at += Pair::lanes) {
            const typename Source::Lanes lanes(source, Pair::load(blocks_.number + at), Pair::load(blocks_.key + at));
            for (int l = 0; l < 32; ++l) {
                const Plane plane = lanes.plane(source, l);
                uint64_t bits[2 * Pair::lanes];
                Pair::store_pairs(bits, plane.first, plane.second);
                std::memcpy(rows[31 - l], bits, sizeof bits);
            }
            transpose_each(rows);
            for (int w = 0; w < words; ++w)
                for (int i = 0; i < 32; ++i) numbers[w][i] = rows[i][w] ^ 0x80000000;
            const int filled = std::min(Pair::lanes, blocks_.count - at);
            for (int i = 0; i < filled; ++i) {
                const Slot& slot = slots_[at + i];
                std::memcpy(slot.to, numbers[4 * i] + slot.first, slot.n * sizeof(uint32_t));
            }
        }
    }
};

// Units `from` to `to` of a task.
void numbers(const Numbers& task, int64_t from, int64_t to) { NumberWalk(task).units(from, to); }

}  // namespace
}  // namespace thinned
