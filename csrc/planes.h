// The masks of many blocks at once: Philox4x32-7 bit planes, compared with T from the most significant on.
//
// Expects `Words` of an instruction set. Words hold 32-bit values in 64-bit lanes; what is in a lane's high
// half never matters, as the multiplication reads the low halves and the last step joins those.
#pragma once

#include <algorithm>

namespace thinned {
namespace {

constexpr int capacity = 512;       // blocks generated together
constexpr int block_bits = 128;
constexpr int together = 2;         // vectors in flight, to hide the multiplication's latency
constexpr int common_planes = 8;    // planes computed for every block, before those that only some need
constexpr uint64_t mul0 = 0xD2511F53, mul1 = 0xCD9E8D57;
constexpr uint64_t weyl0 = 0x9E3779B9, weyl1 = 0xBB67AE85;
constexpr uint64_t low = 0xFFFFFFFF;

struct Blocks {
    int count = 0;
    // Whether the blocks have more than one key, or more than one high half of their number.
    bool mixed = false;
    uint64_t number[capacity];
    uint64_t key[capacity];
    uint64_t below[2 * capacity + 2];  // the masks, 128 bits a block; a reader may look one word ahead
    uint64_t undecided[2 * capacity];

    void clear() {
        count = 0;
        mixed = false;
    }
    bool same_last(uint64_t block, uint64_t its_key) const {
        return count && number[count - 1] == block && key[count - 1] == its_key;
    }
    void add(uint64_t block, uint64_t its_key) {
        mixed |= count && (its_key != key[0] || (block ^ number[0]) >> 32);
        number[count] = block;
        key[count++] = its_key;
    }
};

// 128 bits of one plane for each lane's block.
struct Plane {
    Words first, second;
};

// The rounds' keys and the middle rounds, which all the ways below end with.
template <int from>
Plane finish(Words c0, Words c1, Words c2, Words c3, Words k0, Words k1) {
    for (int round = from; round < 7; ++round) {
        const Words p0 = multiply_low(c0, Words::all(mul0)), p1 = multiply_low(c2, Words::all(mul1));
        const Words r0 = add(k0, Words::all(round * weyl0)), r1 = add(k1, Words::all(round * weyl1));
        c0 = xor3(high_half(p1), c1, r0);
        c2 = xor3(high_half(p0), c3, r1);
        c1 = p1;
        c3 = p0;
    }
    return {join_low(c0, c1), join_low(c2, c3)};
}

// Any blocks under any keys.
struct Mixed {
    Words number, key;

    Mixed(const Blocks& blocks, const int* index) {
        uint64_t numbers[Words::lanes], keys[Words::lanes];
        for (int i = 0; i < Words::lanes; ++i) {
            numbers[i] = blocks.number[index[i]];
            keys[i] = blocks.key[index[i]];
        }
        number = Words::load(numbers);
        key = Words::load(keys);
    }
    Plane plane(int l) const {
        return finish<0>(number, high_half(number), Words::all(l), Words::all(0), key, high_half(key));
    }
};

// Blocks under one key whose numbers share their high half. Then only counter word 0 differs between lanes
// and only word 2 between planes, so the first two rounds split into a part for the lanes, computed once,
// and scalars for the plane.
struct Uniform {
    Words product, high, word3;
    uint64_t number_high, k0, k1;

    Uniform(const Blocks& blocks, const int* index)
        : number_high(blocks.number[0] >> 32), k0(blocks.key[0] & low), k1(blocks.key[0] >> 32) {
        uint64_t numbers[Words::lanes];
        for (int i = 0; i < Words::lanes; ++i) numbers[i] = blocks.number[index[i]];
        word3 = multiply_low(Words::load(numbers), Words::all(mul0));
        product = multiply_low(xor2(high_half(word3), Words::all(k1)), Words::all(mul1));
        high = high_half(product);
    }
    Plane plane(int l) const {
        const uint64_t p1 = mul1 * static_cast<uint64_t>(l);
        const uint64_t p0 = mul0 * ((p1 >> 32 ^ number_high ^ k0) & low);
        const uint64_t c0 = (p1 ^ (k0 + weyl0)) & low, c2 = (p0 >> 32 ^ (k1 + weyl1)) & low;
        return finish<2>(xor2(high, Words::all(c0)), product, xor2(word3, Words::all(c2)), Words::all(p0),
                         Words::all(k0), Words::all(k1));
    }
};

struct Comparison {
    Words below, undecided;

    // A plane further up decides over those below it, so planes may be added from the least significant on.
    void add_above(Words plane, bool bit) {
        below = bit ? or_not(below, plane) : and_not(below, plane);
        undecided = bit ? and_(undecided, plane) : and_not(undecided, plane);
    }
};

template <class Source>
void common(Blocks& blocks, uint64_t T, int planes) {
    constexpr int step = together * Words::lanes;
    for (int first = 0; first < blocks.count; first += step) {
        int index[step];
        for (int i = 0; i < step; ++i) index[i] = std::min(first + i, blocks.count - 1);
        const Source sources[together] = {Source(blocks, index), Source(blocks, index + Words::lanes)};
        Comparison compared[together][2];
        for (auto& pair : compared)
            for (Comparison& half : pair) half = {Words::all(0), Words::all(~0ull)};
        for (int l = planes - 1; l >= 0; --l) {
            const bool bit = T >> (31 - l) & 1;
            for (int i = 0; i < together; ++i) {
                const Plane plane = sources[i].plane(l);
                compared[i][0].add_above(plane.first, bit);
                compared[i][1].add_above(plane.second, bit);
            }
        }
        for (int i = 0; i < together; ++i) {
            const int at = 2 * (first + i * Words::lanes);
            if (at >= 2 * blocks.count) break;
            Words::store_pairs(blocks.below + at, compared[i][0].below, compared[i][1].below);
            Words::store_pairs(blocks.undecided + at, compared[i][0].undecided, compared[i][1].undecided);
        }
    }
}

// Further planes for the blocks that have an undecided position left.
template <class Source>
void rest(Blocks& blocks, uint64_t T, int from, int planes) {
    int open[capacity + Words::lanes];
    int count = 0;
    for (int b = 0; b < blocks.count; ++b) {
        open[count] = b;
        count += (blocks.undecided[2 * b] | blocks.undecided[2 * b + 1]) != 0;
    }
    for (int l = from; l < planes && count; ++l) {
        const uint64_t bit = T >> (31 - l) & 1 ? ~0ull : 0;
        for (int i = count; i < count + Words::lanes; ++i) open[i] = open[count - 1];
        int still = 0;
        for (int first = 0; first < count; first += Words::lanes) {
            const Plane plane = Source(blocks, open + first).plane(l);
            uint64_t words[2][Words::lanes];
            plane.first.store(words[0]);
            plane.second.store(words[1]);
            const int filled = std::min(Words::lanes, count - first);
            for (int i = 0; i < filled; ++i) {
                const int b = open[first + i];
                uint64_t left = 0;
                for (int half = 0; half < 2; ++half) {
                    uint64_t& undecided = blocks.undecided[2 * b + half];
                    blocks.below[2 * b + half] |= undecided & ~words[half][i] & bit;
                    undecided &= ~(words[half][i] ^ bit);
                    left |= undecided;
                }
                open[still] = b;
                still += left != 0;
            }
        }
        count = still;
    }
}

template <class Source>
void generate(Blocks& blocks, uint64_t T) {
    int planes = 32;
    while (!(T >> (32 - planes) & 1)) --planes;  // below T's last set bit nothing can be decided any more
    const int first = std::min(planes, common_planes);
    common<Source>(blocks, T, first);
    if (planes > first) rest<Source>(blocks, T, first, planes);
}

// Fill `below` for the blocks added.
void generate(Blocks& blocks, uint64_t T) {
    if (T == 0 || T > low)
        std::fill_n(blocks.below, 2 * blocks.count, T ? ~0ull : 0);
    else if (blocks.mixed)
        generate<Mixed>(blocks, T);
    else
        generate<Uniform>(blocks, T);
}

}  // namespace
}  // namespace thinned
