// The masks of many blocks at once: Philox4x32-7 bit planes, compared with T from the most significant on.
//
// Expects `Words` of an instruction set. Words hold 32-bit values in 64-bit lanes; what is in a lane's high
// half never matters, as the multiplication reads the low halves and the last step joins those.
#pragma once

#include <algorithm>
#include <numeric>

namespace thinned {
namespace {

constexpr int capacity = 512;     // blocks generated together
constexpr int block_bits = 128;
constexpr int common_planes = 9;  // planes computed for every block, before those that only some need
constexpr int rest_planes = 3;    // planes computed at a time for those
constexpr int rounds = 7;
constexpr uint64_t mul0 = 0xD2511F53, mul1 = 0xCD9E8D57;
constexpr uint64_t weyl0 = 0x9E3779B9, weyl1 = 0xBB67AE85;
constexpr uint64_t low = 0xFFFFFFFF;

// Two vectors as one: two chains of multiplications in flight hide each other's latency.
struct Pair {
    static constexpr int lanes = 2 * Words::lanes;
    Words a, b;

    static Pair load(const uint64_t* from) { return {Words::load(from), Words::load(from + Words::lanes)}; }
    static Pair all(uint64_t value) { return {Words::all(value), Words::all(value)}; }
    static void store_pairs(uint64_t* to, Pair x, Pair y) {
        Words::store_pairs(to, x.a, y.a);
        Words::store_pairs(to + lanes, x.b, y.b);
    }
    friend Pair multiply_low(Pair x, Pair y) { return {multiply_low(x.a, y.a), multiply_low(x.b, y.b)}; }
    friend Pair high_half(Pair x) { return {high_half(x.a), high_half(x.b)}; }
    friend Pair add(Pair x, Pair y) { return {add(x.a, y.a), add(x.b, y.b)}; }
    friend Pair xor2(Pair x, Pair y) { return {xor2(x.a, y.a), xor2(x.b, y.b)}; }
    friend Pair and2(Pair x, Pair y) { return {and2(x.a, y.a), and2(x.b, y.b)}; }
    friend Pair xor3(Pair x, Pair y, Pair z) { return {xor3(x.a, y.a, z.a), xor3(x.b, y.b, z.b)}; }
    friend Pair join_low(Pair x, Pair y) { return {join_low(x.a, y.a), join_low(x.b, y.b)}; }
    friend Pair below_above(Pair x, Pair y, Pair z) {
        return {below_above(x.a, y.a, z.a), below_above(x.b, y.b, z.b)};
    }
    friend Pair equal_above(Pair x, Pair y, Pair z) {
        return {equal_above(x.a, y.a, z.a), equal_above(x.b, y.b, z.b)};
    }
    friend unsigned nonzero(Pair x, Pair y) {
        return nonzero(x.a, y.a) | nonzero(x.b, y.b) << Words::lanes;
    }
    // The lanes chosen, side by side; up to `lanes` words are written.
    static void compress(uint64_t* to, unsigned chosen, Pair x) {
        constexpr unsigned first = (1u << Words::lanes) - 1;
        Words::compress(to, chosen & first, x.a);
        Words::compress(to + count_bits(chosen & first), chosen >> Words::lanes, x.b);
    }
};

// Blocks with an undecided position left.
struct Open {
    int count;
    uint64_t index[capacity + Pair::lanes];
    uint64_t number[capacity + Pair::lanes];
    uint64_t key[capacity + Pair::lanes];
    uint64_t first[capacity + Pair::lanes];  // their undecided positions
    uint64_t second[capacity + Pair::lanes];

    // May be called while reading from as many places ahead.
    template <bool keyed>
    void add(Pair its_index, Pair its_number, Pair its_key, Pair its_first, Pair its_second) {
        const unsigned chosen = nonzero(its_first, its_second);
        Pair::compress(index + count, chosen, its_index);
        Pair::compress(number + count, chosen, its_number);
        if (keyed) Pair::compress(key + count, chosen, its_key);
        Pair::compress(first + count, chosen, its_first);
        Pair::compress(second + count, chosen, its_second);
        count += count_bits(chosen);
    }
    // Lanes after the last block are decided.
    void pad() {
        std::fill_n(first + count, Pair::lanes, 0);
        std::fill_n(second + count, Pair::lanes, 0);
    }
};

struct Blocks {
    int count = 0;
    // Whether the blocks have more than one key, or more than one high half of their number.
    bool mixed;
    uint64_t number[capacity + Pair::lanes];
    uint64_t key[capacity + Pair::lanes];
    uint64_t below[2 * (capacity + Pair::lanes)];  // the masks, 128 bits a block
    Open open;

    bool same_last(uint64_t block, uint64_t its_key) const {
        return count && number[count - 1] == block && key[count - 1] == its_key;
    }
    // Consecutive blocks from `first` on.
    void add(uint64_t first, int some, uint64_t its_key) {
        if (count == 0) mixed = false;
        const uint64_t start = count ? number[0] : first, its_first_key = count ? key[0] : its_key;
        mixed |= its_key != its_first_key || (first ^ start) >> 32 || ((first + some - 1) ^ start) >> 32;
        for (int i = 0; i < some; ++i) number[count + i] = first + i;
        std::fill_n(key + count, some, its_key);
        count += some;
    }
    // Vectors are loaded whole.
    void pad() {
        std::fill_n(number + count, Pair::lanes, number[0]);
        std::fill_n(key + count, Pair::lanes, key[0]);
    }
};

// 128 bits of one plane for each lane's block.
struct Plane {
    Pair first, second;
};

inline void philox_round(Pair& c0, Pair& c1, Pair& c2, Pair& c3, Pair key0, Pair key1) {
    const Pair p0 = multiply_low(c0, Pair::all(mul0)), p1 = multiply_low(c2, Pair::all(mul1));
    c0 = xor3(high_half(p1), c1, key0);
    c2 = xor3(high_half(p0), c3, key1);
    c1 = p1;
    c3 = p0;
}

// Any blocks under any keys.
struct Mixed {
    static constexpr bool keyed = true;
    explicit Mixed(const Blocks&) {}

    struct Lanes {
        Pair number, key;

        Lanes(const Mixed&, Pair number, Pair key) : number(number), key(key) {}

        Plane plane(const Mixed&, int l) const {
            Pair c0 = number, c1 = high_half(number), c2 = Pair::all(static_cast<uint64_t>(l)), c3 = Pair::all(0);
            Pair key0 = key, key1 = high_half(key);
            for (int round = 0; round < rounds; ++round) {
                philox_round(c0, c1, c2, c3, key0, key1);
                key0 = add(key0, Pair::all(weyl0));
                key1 = add(key1, Pair::all(weyl1));
            }
            return {join_low(c0, c1), join_low(c2, c3)};
        }
    };
};

// Blocks under one key whose numbers share their high half. Then only counter word 0 differs between lanes
// and only word 2 between planes, so the first two rounds split into a part for the lanes, computed once,
// and scalars for the plane.
struct Uniform {
    static constexpr bool keyed = false;
    uint64_t number_high, key0[rounds], key1[rounds];

    explicit Uniform(const Blocks& blocks) : number_high(blocks.number[0] >> 32) {
        for (int round = 0; round < rounds; ++round) {
            key0[round] = (blocks.key[0] + round * weyl0) & low;
            key1[round] = ((blocks.key[0] >> 32) + round * weyl1) & low;
        }
    }

    struct Lanes {
        Pair product, high, word3;

        Lanes(const Uniform& shared, Pair number, Pair) : product(), high(), word3(multiply_low(number, Pair::all(mul0))) {
            product = multiply_low(xor2(high_half(word3), Pair::all(shared.key1[0])), Pair::all(mul1));
            high = high_half(product);
        }

        Plane plane(const Uniform& shared, int l) const {
            const uint64_t p1 = mul1 * static_cast<uint64_t>(l);
            const uint64_t p0 = mul0 * (p1 >> 32 ^ shared.number_high ^ shared.key0[0]);
            Pair c0 = xor2(high, Pair::all((p1 & low) ^ shared.key0[1])), c1 = product;
            Pair c2 = xor2(word3, Pair::all(p0 >> 32 ^ shared.key1[1])), c3 = Pair::all(p0);
            for (int round = 2; round < rounds; ++round)
                philox_round(c0, c1, c2, c3, Pair::all(shared.key0[round]), Pair::all(shared.key1[round]));
            return {join_low(c0, c1), join_low(c2, c3)};
        }
    };
};

// What the planes `from` to `to` say of two halves of 128 positions: whether they are below T's bits there,
// and whether they equal them, which leaves the question to further planes.
struct Compared {
    Pair below0, below1, equal0, equal1;
};

// Work between one plane and the next: none.
struct Nothing {
    void operator()(int) const {}
};

// A plane further up decides over those below it, so they are taken from the least significant on.
template <class Source, class Meanwhile = Nothing>
inline Compared compare(const Source& source, Pair number, Pair key, uint64_t T, int from, int to,
                        Meanwhile meanwhile = {}) {
    const typename Source::Lanes lanes(source, number, key);
    const Pair none = Pair::all(0), every = Pair::all(~0ull);
    Compared result{none, none, every, every};
    for (int l = to - 1; l >= from; --l) {
        const Plane plane = lanes.plane(source, l);
        const Pair bit = Pair::all(T >> (31 - l) & 1 ? ~0ull : 0);
        result.below0 = below_above(result.below0, plane.first, bit);
        result.below1 = below_above(result.below1, plane.second, bit);
        result.equal0 = equal_above(result.equal0, plane.first, bit);
        result.equal1 = equal_above(result.equal1, plane.second, bit);
        meanwhile(to - from);
    }
    return result;
}

// The planes that every block needs.
template <class Source, class Meanwhile>
void common(Blocks& blocks, const Source& source, uint64_t T, int planes, bool more, Meanwhile meanwhile) {
    uint64_t counting[Pair::lanes];
    std::iota(counting, counting + Pair::lanes, 0);
    const Pair iota = Pair::load(counting);
    blocks.open.count = 0;
    for (int at = 0; at < blocks.count; at += Pair::lanes) {
        const Pair number = Pair::load(blocks.number + at), key = Pair::load(blocks.key + at);
        const Compared c = compare(source, number, key, T, 0, planes, meanwhile);
        Pair::store_pairs(blocks.below + 2 * at, c.below0, c.below1);
        if (more) blocks.open.add<Source::keyed>(add(iota, Pair::all(at)), number, key, c.equal0, c.equal1);
    }
}

// Further planes, some at a time, for the blocks that have an undecided position left.
template <class Source>
void rest(Blocks& blocks, const Source& source, uint64_t T, int from, int planes) {
    Open& open = blocks.open;
    for (int l = from; l < planes && open.count; l += rest_planes) {
        const int count = open.count;
        open.pad();
        open.count = 0;
        for (int at = 0; at < count; at += Pair::lanes) {
            const Pair index = Pair::load(open.index + at), number = Pair::load(open.number + at);
            const Pair key = Pair::load(open.key + at);
            const Pair first = Pair::load(open.first + at), second = Pair::load(open.second + at);
            const Compared c = compare(source, number, key, T, l, std::min(l + rest_planes, planes));
            uint64_t below[2 * Pair::lanes];
            Pair::store_pairs(below, and2(first, c.below0), and2(second, c.below1));
            const int filled = std::min(Pair::lanes, count - at);
            for (int i = 0; i < filled; ++i) {
                uint64_t* block = blocks.below + 2 * open.index[at + i];
                block[0] |= below[2 * i];
                block[1] |= below[2 * i + 1];
            }
            open.add<Source::keyed>(index, number, key, and2(first, c.equal0), and2(second, c.equal1));
        }
    }
}

template <class Source, class Meanwhile>
void generate_with(Blocks& blocks, uint64_t T, Meanwhile meanwhile) {
    int planes = 32;
    while (!(T >> (32 - planes) & 1)) --planes;  // below T's last set bit nothing can be decided any more
    const int first = std::min(planes, common_planes);
    blocks.pad();
    const Source source(blocks);
    common(blocks, source, T, first, planes > first, meanwhile);
    rest(blocks, source, T, first, planes);
}

// Fill `below` for the blocks added. `meanwhile(planes)` is called once for each of the planes that every block needs
// and each Pair::lanes blocks: loads and stores in it cost little, as the multiplications wait for each other.
template <class Meanwhile = Nothing>
void generate(Blocks& blocks, uint64_t T, Meanwhile meanwhile = {}) {
    if (T == 0 || T > low)
        std::fill_n(blocks.below, 2 * blocks.count, T ? ~0ull : 0);
    else if (blocks.mixed)
        generate_with<Mixed>(blocks, T, meanwhile);
    else
        generate_with<Uniform>(blocks, T, meanwhile);
}

}  // namespace
}  // namespace thinned
