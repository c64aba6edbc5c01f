// The kernel against the reference, for every instruction set of this machine. Memory is allocated to the
// byte, so that the sanitisers see whatever is read or written beside it.
#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>

#include "../kernel.h"
#include "reference.h"

using namespace thinned;

namespace {

int passed = 0, failed = 0;

void check(bool held, const std::string& what) {
    ++(held ? passed : failed);
    if (!held) std::printf("FAILED: %s\n", what.c_str());
}

// splitmix64 (Steele, Lea and Flood, OOPSLA'14): the same numbers in every run.
struct Random {
    uint64_t state;

    uint64_t next() {
        uint64_t z = state += 0x9E3779B97F4A7C15;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
        z = (z ^ z >> 27) * 0x94D049BB133111EB;
        return z ^ z >> 31;
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
    bool one_in(int n) { return below(n) == 0; }
    template <class T, size_t n>
    T of(const T (&choices)[n]) {
        return choices[below(n)];
    }
};

const Dtype dtypes[] = {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64, Dtype::c64, Dtype::c128, Dtype::mask};
const char* const names[] = {"float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool"};
const int64_t sizes[] = {2, 2, 4, 8, 8, 16, 1};
const int64_t reals[] = {2, 2, 4, 8, 4, 8, 1};

const char* name(Dtype dtype) { return names[static_cast<int>(dtype)]; }

// Exactly as many bytes as asked for.
struct Memory {
    std::unique_ptr<unsigned char[]> bytes;
    int64_t count;

    explicit Memory(int64_t n) : bytes(new unsigned char[n]), count(n) {}
    Memory(const Memory& other) : Memory(other.count) { std::copy_n(other.bytes.get(), count, bytes.get()); }
    void* at(int64_t offset) const { return bytes.get() + offset; }
};

// Real numbers of all kinds: any bits, among them NaN and subnormals, and common numbers.
Memory numbers(Dtype dtype, int64_t elements, Random& random) {
    const int64_t size = reals[static_cast<int>(dtype)];
    Memory memory(elements * sizes[static_cast<int>(dtype)]);
    for (int64_t i = 0; i < memory.count / size; ++i) {
        const uint64_t bits = random.next();
        std::memcpy(memory.at(i * size), &bits, size);
        const double common = static_cast<double>(random.below(2001) - 1000) / 64;
        if (random.one_in(2)) continue;
        if (size == 4) reference::put(memory.at(0), i, static_cast<float>(common));
        if (size == 8) reference::put(memory.at(0), i, common);
    }
    return memory;
}

template <class Bits>
bool nan(Bits bits, int fraction) {
    const Bits infinity = static_cast<Bits>(~Bits{0}) >> (fraction + 1) << fraction;
    return static_cast<Bits>(bits << 1) > static_cast<Bits>(infinity << 1);
}

template <class Bits>
bool same(const Memory& a, const Memory& b, int fraction) {
    for (int64_t i = 0; i < a.count / static_cast<int64_t>(sizeof(Bits)); ++i) {
        const auto one = reference::at<Bits>(a.at(0), i), other = reference::at<Bits>(b.at(0), i);
        if (one != other && !(fraction && nan(one, fraction) && nan(other, fraction))) return false;
    }
    return true;
}

// All bytes, a NaN counting as any other.
bool same(Dtype dtype, const Memory& a, const Memory& b) {
    switch (dtype) {
        case Dtype::f16: return same<uint16_t>(a, b, 10);
        case Dtype::bf16: return same<uint16_t>(a, b, 7);
        case Dtype::f32:
        case Dtype::c64: return same<uint32_t>(a, b, 23);
        case Dtype::f64:
        case Dtype::c128: return same<uint64_t>(a, b, 52);
        case Dtype::mask: return same<uint8_t>(a, b, 0);
    }
    return false;
}

// How far a strided array reaches, in elements.
int64_t extent(const std::vector<Dim>& dims, int64_t Dim::*stride) {
    int64_t last = 0;
    for (const Dim& dim : dims) {
        if (dim.size == 0) return 0;
        last += (dim.size - 1) * dim.*stride;
    }
    return last + 1;
}

std::string describe(const Task& task) {
    std::ostringstream text;
    text << name(task.dtype) << " under " << isa() << ", T " << task.T << ", base " << task.base << ", scale "
         << task.scale << ", shift " << task.shift << ", fill " << task.fill;
    for (const Dim& d : task.dims)
        text << " {" << d.size << ", x " << d.x << ", y " << d.y << ", mask " << d.mask << ", key " << d.key << "}";
    return text.str();
}

// A task on memory of its own, by the reference and under every instruction set.
void compare(Task task, bool in_place, Random& random) {
    const int64_t size = sizes[static_cast<int>(task.dtype)];
    if (in_place)
        for (Dim& dim : task.dims) dim.x = dim.y;
    const int64_t key_count = extent(task.dims, &Dim::key);
    std::unique_ptr<uint64_t[]> keys(new uint64_t[key_count]);
    // Rows often share a key, and keys often share a half.
    for (int64_t i = 0; i < key_count; ++i)
        keys[i] = i && random.one_in(3) ? keys[i - 1] : random.next() >> random.of({0, 0, 32, 63});
    task.keys = keys.get();
    const Memory x = numbers(task.dtype, extent(task.dims, &Dim::x), random);
    const Memory before = in_place ? x : numbers(task.dtype, extent(task.dims, &Dim::y), random);

    const auto result = [&](const std::function<void(const Task&)>& run) {
        Memory y = before;
        const Memory source = x;
        task.x = in_place ? y.at(0) : source.at(0);
        task.y = y.at(0);
        run(task);
        if (!in_place && !same<uint8_t>(source, x, 0)) check(false, "input written: " + describe(task));
        return y;
    };
    const Memory expected = result([](const Task& t) { reference::run(t); });
    for (const std::string& isa : supported_isas()) {
        set_isa(isa);
        check(same(task.dtype, result([](const Task& t) { run(t); }), expected) && size, describe(task));
    }
}

Task task(Dtype dtype, std::vector<Dim> dims, uint64_t T, uint64_t base = 0) {
    const double scale = T ? 4294967296.0 / static_cast<double>(T) : 0;
    return {dtype, nullptr, nullptr, nullptr, std::move(dims), base, T, scale, 0, 0};
}

constexpr uint64_t tenth = 3865470566, one = uint64_t{1} << 32;

void known_answers(const char* path) {
    std::ifstream file(path);
    std::string line;
    int answers = 0;
    while (std::getline(file, line)) {
        if (line.empty() || line[0] == '#') continue;
        std::istringstream words(line);
        int rounds;
        uint32_t word[10];
        words >> std::dec >> rounds >> std::hex;
        for (uint32_t& w : word) words >> w;
        const reference::Words result =
            reference::philox({word[0], word[1], word[2], word[3]}, uint64_t{word[5]} << 32 | word[4], rounds);
        check(words && std::equal(result.begin(), result.end(), word + 6), "known answer: " + line);
        ++answers;
    }
    check(answers == 6, std::string("six known answers in ") + path);
}

// At T = 2^31 plane 0 alone decides: the mask of block 0 under key 0 is the complement of its known words.
void known_answer_of_the_kernel() {
    const uint32_t words[] = {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48};
    const uint64_t key = 0;
    for (const std::string& isa : supported_isas()) {
        set_isa(isa);
        uint8_t mask[128];
        Task first = task(Dtype::mask, {{128, 1, 1, 1, 0}}, one / 2);
        first.y = mask, first.x = mask, first.keys = &key;
        run(first);
        bool held = true;
        for (int i = 0; i < 128; ++i) held &= mask[i] == !(words[i / 32] >> i % 32 & 1);
        check(held, "known answer of block 0 under " + isa);
    }
}

void formats() {
    for (int bits = 0; bits < 65536; ++bits)
        for (const reference::Format& format : {reference::half, reference::bfloat}) {
            const double value = format.decode(static_cast<uint16_t>(bits));
            if (!std::isnan(value) && format.encode(value) != bits) check(false, "format of " + std::to_string(bits));
        }
    check(reference::half.decode(0x3555) == 0.333251953125 && reference::half.encode(65519.99) == 0x7BFF &&
              reference::half.encode(65520) == 0x7C00 && reference::half.encode(0x1p-25) == 0 &&
              reference::bfloat.decode(0x3EAB) == 0.333984375,
          "formats of 16 bits");
}

void shapes(Random& random) {
    for (const Dtype dtype : dtypes) {
        for (const int64_t n : {1, 2, 63, 64, 65, 127, 128, 129, 1000, 5000})
            compare(task(dtype, {{n, 1, 1, 1, 0}}, tenth, 77), false, random);
        for (const uint64_t T : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 24, one / 4, one / 2, one - 1, one})
            compare(task(dtype, {{300, 1, 1, 1, 0}}, T), false, random);
        compare(task(dtype, {}, one / 2), false, random);
        compare(task(dtype, {{200, 3, 1, 1, 0}}, tenth), false, random);             // every third
        compare(task(dtype, {{200, 1, 2, 1, 0}}, tenth), false, random);             // to every other
        compare(task(dtype, {{200, 0, 1, 1, 0}}, tenth), false, random);             // expanded
        compare(task(dtype, {{500, 1, 1, 0, 0}}, one / 2), false, random);           // one decision
        compare(task(dtype, {{70, 1, 1, 90, 0}, {90, 70, 70, 1, 0}}, tenth), false, random);      // transposed
        compare(task(dtype, {{90, 70, 1, 70, 0}, {70, 1, 90, 1, 0}}, tenth), false, random);      // transposing
        compare(task(dtype, {{3, 520, 520, 130, 0}, {4, 130, 130, 0, 0}, {130, 1, 1, 1, 0}}, tenth), false,
                random);  // shared in the middle
        compare(task(dtype, {{40, 77, 77, 0, 1}, {77, 1, 1, 1, 0}}, tenth), false, random);   // a key a row
        compare(task(dtype, {{40, 77, 77, 0, 0}, {77, 1, 1, 1, 0}}, tenth), false, random);   // one mask for all
        compare(task(dtype, {{77, 40, 40, 1, 0}, {40, 1, 1, 0, 1}}, tenth), false, random);   // keys along the row
        compare(task(dtype, {{1200, 3, 3, 3, 0}, {3, 1, 1, 1, 0}}, tenth, 5), true, random);  // short rows
        compare(task(dtype, {{1200, 2, 2, 0, 1}, {2, 1, 1, 1, 0}}, tenth), false, random);    // many keys
        compare(task(dtype, {{40, 33, 33, 129, 0}, {33, 1, 1, 1, 0}}, tenth), false, random);  // part of a whole
    }
    compare(task(Dtype::bf16, {{70000, 1, 1, 1, 0}}, tenth), true, random);  // more blocks than are made at once
    compare(task(Dtype::f32, {{70, 600, 600, 1, 0}, {600, 1, 1, 70, 0}}, tenth), false, random);
    compare(task(Dtype::f32, {{600, 1, 1, 70, 0}, {600, 600, 600, 1, 0}}, tenth), false, random);  // wide tiles
}

// Side by side, and apart from each other.
void rows_of_one_decision(Random& random) {
    for (const Dtype dtype : dtypes)
        for (const int64_t n : {1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 49, 63, 64, 65, 100, 121, 128, 196})
            for (const int64_t step : {n, n + 1})
                for (const bool affine : {false, true}) {
                    if (affine && dtype == Dtype::mask) continue;
                    Task rows = task(dtype, {{3000 / n, step, step, 1, 0}, {n, 1, 1, 0, 0}}, one / 2, 5);
                    if (affine) rows.shift = 0.5, rows.fill = -2;
                    compare(rows, dtype != Dtype::mask && n % 2, random);
                }
    for (const int64_t n : {9, 49, 64, 5000})  // more than is taken together
        compare(task(Dtype::f32, {{40000 / n, n, n, 1, 0}, {n, 1, 1, 0, 0}}, tenth, 5), true, random);
}

void far_positions(Random& random) {
    for (const uint64_t base : {(uint64_t{1} << 32) - 90, (uint64_t{1} << 39) - 90, (uint64_t{1} << 46) - 90,
                                (uint64_t{1} << 63) - 90, ~uint64_t{0} - 50000}) {
        compare(task(Dtype::f32, {{3000, 1, 1, 1, 0}}, tenth, base), false, random);
        compare(task(Dtype::f32, {{100, 30, 30, 0, 1}, {30, 1, 1, 1, 0}}, tenth, base), false, random);
        compare(task(Dtype::f32, {{70, 1, 1, 90, 0}, {90, 70, 70, 1, 0}}, tenth, base), false, random);
    }
    compare(task(Dtype::f32, {{60, 1, 1, int64_t{1} << 33, 0}}, one / 2), false, random);
    compare(task(Dtype::f32, {{60, 30, 30, int64_t{1} << 40, 0}, {30, 1, 1, 1, 0}}, tenth), false, random);
}

void values(Random& random) {
    for (const Dtype dtype : dtypes)
        for (const double shift : {0.0, 0.25})
            for (const double fill : {0.0, -1.5})
                for (const double scale : {1.0, 1.1111111, 3e4, 1e-5})
                    for (const bool in_place : {false, true}) {
                        Task one_task = task(dtype, {{5, 133, 133, 133, 0}, {133, 1, 1, 1, 0}}, tenth);
                        one_task.scale = scale, one_task.shift = shift, one_task.fill = fill;
                        compare(one_task, in_place, random);
                    }
    for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {  // every number there is
        const uint64_t key = 7;
        for (const double scale : {1.0, 1.1111111, 0.3, 0x1p-12}) {
            Memory x(2 * 65536), y(2 * 65536), expected(2 * 65536);
            for (int i = 0; i < 65536; ++i) reference::put(x.at(0), i, static_cast<uint16_t>(i));
            Task all = task(dtype, {{65536, 1, 1, 0, 0}}, one);
            all.x = x.at(0), all.keys = &key, all.scale = scale;
            all.y = expected.at(0), reference::run(all);
            for (const std::string& isa : supported_isas()) {
                set_isa(isa);
                all.y = y.at(0), run(all);
                check(same(dtype, y, expected), std::string("all numbers of ") + describe(all));
            }
        }
    }
}

// Any strides of anything. y must not overlap itself, so its dimensions are laid out in a random order.
void random_tasks(Random& random, int count) {
    for (int i = 0; i < count; ++i) {
        std::vector<Dim> dims(random.below(5));
        int64_t elements = 1;
        for (Dim& dim : dims) {
            dim.size = random.one_in(40) ? 0 : random.of({1, 2, 3, 5, 8, 17, 63, 64, 65, 130, 257});
            dim.size = std::min(dim.size, std::max<int64_t>(1, 3000 / elements));
            elements *= std::max<int64_t>(dim.size, 1);
        }
        for (int64_t Dim::*stride : {&Dim::x, &Dim::y, &Dim::mask, &Dim::key}) {
            std::vector<size_t> order(dims.size());
            for (size_t d = 0; d < order.size(); ++d) order[d] = d;
            if (random.one_in(2))
                for (size_t d = 1; d < order.size(); ++d) std::swap(order[d], order[random.below(d + 1)]);
            int64_t step = random.one_in(4) ? random.below(4) + 1 : 1;
            const bool is_mask = stride == &Dim::mask, is_key = stride == &Dim::key;
            for (size_t d = dims.size(); d-- > 0;) {
                Dim& dim = dims[order[d]];
                const bool held = stride != &Dim::y && (is_key ? !random.one_in(4) : random.one_in(5));
                dim.*stride = held ? 0 : step;
                if (!held) step *= std::max<int64_t>(dim.size, 1) + (random.one_in(4) ? random.below(4) : 0);
                if (is_mask && random.one_in(6)) dim.*stride = random.below(500);
            }
        }
        const uint64_t T = random.one_in(2) ? random.next() >> 32 : tenth;
        Task any = task(random.of(dtypes), dims, T, random.next() >> random.of({1, 20, 25, 60}));
        if (random.one_in(3)) any.shift = 0.5, any.fill = -2;
        compare(any, any.dtype != Dtype::mask && random.one_in(3), random);
    }
}

// Rows of numbers, which lie anywhere in their blocks.
void compare_numbers(int64_t rows, int64_t count, uint64_t base, int64_t step, Random& random) {
    const std::unique_ptr<uint64_t[]> keys(new uint64_t[rows]), starts(new uint64_t[rows]);
    for (int64_t row = 0; row < rows; ++row) {
        keys[row] = row && random.one_in(3) ? keys[row - 1] : random.next() >> random.of({0, 0, 32, 63});
        starts[row] = base + row * step;
    }
    const std::unique_ptr<int32_t[]> y(new int32_t[rows * count]);
    for (const std::string& isa : supported_isas()) {
        set_isa(isa);
        run(Numbers{y.get(), keys.get(), starts.get(), rows, count});
        bool held = true;
        for (int64_t i = 0; i < rows * count; ++i)
            held &= y[i] == static_cast<int64_t>(reference::number(starts[i / count] + i % count, keys[i / count])) - (int64_t{1} << 31);
        std::ostringstream text;
        text << rows << " rows of " << count << " numbers from " << base << " in steps of " << step << " under " << isa;
        check(held, text.str());
    }
}

void numbers_of_positions(Random& random) {
    for (const int64_t count : {1, 2, 127, 128, 129, 255, 256, 257, 5000})
        for (const uint64_t base : {uint64_t{0}, uint64_t{1}, uint64_t{127}, (uint64_t{1} << 39) - 90, ~uint64_t{0} / 2 - 300000})
            compare_numbers(1, count, base, 0, random);
    compare_numbers(700, 1, 5, 77, random);
    compare_numbers(150, 33, 0, 129, random);
    compare_numbers(40, 200, 3, 0, random);
    compare_numbers(0, 5, 0, 0, random);
    compare_numbers(1, 70000, 90, 0, random);  // more blocks than are made at once, by several threads
}

// Draws of one element and of several threads' worth of them.
void compare_strata(int64_t rows, int64_t count, int64_t strata, Random& random) {
    const int64_t source_rows = rows / 3 + 1;
    const std::unique_ptr<int32_t[]> u(new int32_t[source_rows * count]), v(new int32_t[source_rows * count]);
    for (int64_t i = 0; i < source_rows * count; ++i) {
        u[i] = static_cast<int32_t>(random.next());
        v[i] = random.one_in(10) ? random.of({INT32_MIN, INT32_MAX, -1, 0, 65535}) : static_cast<int32_t>(random.next());
    }
    const std::unique_ptr<int64_t[]> draws(new int64_t[rows]), sources(new int64_t[rows]);
    for (int64_t row = 0; row < rows; ++row) {
        draws[row] = random.of({int64_t{0}, strata - 1, random.below(strata)}) + random.of({-1, 0, 0, 0, 1}) * strata;
        sources[row] = random.below(source_rows);
    }
    const std::unique_ptr<int32_t[]> y(new int32_t[rows * count]);
    for (const std::string& isa : supported_isas()) {
        set_isa(isa);
        std::fill_n(y.get(), rows * count, 0);
        run(Strata{y.get(), u.get(), v.get(), draws.get(), sources.get(), rows, count, strata});
        bool held = true;
        for (int64_t i = 0; i < rows * count; ++i) {
            const int64_t from = sources[i / count] * count + i % count;
            const uint64_t draw = static_cast<uint64_t>((draws[i / count] + strata) % strata);
            const uint64_t place = reference::place(static_cast<uint32_t>(v[from]) ^ 0x80000000, draw, strata);
            const uint32_t number = static_cast<uint32_t>(u[from]) + static_cast<uint32_t>(place * ((uint64_t{1} << 32) / strata));
            held &= static_cast<uint32_t>(y[i]) == number;
        }
        std::ostringstream text;
        text << rows << " rows of " << count << " numbers in " << strata << " strata under " << isa;
        check(held, text.str());
    }
}

void stratified_draws(Random& random) {
    for (const int64_t strata : {1, 2, 3, 4, 20, 24, 64, 100, 1000, 31398, 65520, 65521}) {
        for (const int64_t count : {1, 31, 32, 33, 129, 4095, 4097}) compare_strata(4, count, strata, random);
        compare_strata(300, 7, strata, random);
    }
    compare_strata(0, 5, 20, random);
    compare_strata(1, 70000, 20, random);  // parts of one row, by several threads
}

// Values under given numbers, at sizes around a vector's and a thread's part.
void choices(Random& random) {
    for (const Dtype dtype : dtypes)
        for (const int64_t n : {1, 7, 8, 63, 64, 65, 200, 16384, 16391, 40000})
            for (const uint64_t T : {uint64_t{0}, uint64_t{1}, one / 2, one - 1, one}) {
                Task all = task(dtype, {{n, 1, 1, 0, 0}}, tenth);
                if (dtype != Dtype::mask && random.one_in(2)) all.shift = 0.5, all.fill = -2;
                const Memory x = numbers(dtype, n, random);
                const std::unique_ptr<int32_t[]> given(new int32_t[n]);
                for (int64_t i = 0; i < n; ++i)
                    given[i] = random.one_in(4) ? random.of({INT32_MIN, INT32_MIN + 1, -1, 0, INT32_MAX}) : static_cast<int32_t>(random.next());
                Memory expected(x.count), y(x.count);
                all.x = x.at(0), all.y = expected.at(0);
                for (int64_t i = 0; i < n; ++i)
                    reference::element(all, i, i, static_cast<uint64_t>(int64_t{given[i]} + (int64_t{1} << 31)) < T);
                for (const std::string& isa : supported_isas()) {
                    set_isa(isa);
                    const bool in_place = dtype != Dtype::mask && random.one_in(3);
                    std::memcpy(y.at(0), x.at(0), x.count);
                    run(Choice{dtype, in_place ? y.at(0) : x.at(0), y.at(0), given.get(), n, T, all.scale, all.shift, all.fill});
                    check(same(dtype, y, expected), std::to_string(n) + " chosen of " + name(dtype) + " under " + isa);
                }
            }
}

const Function functions[] = {Function::relu,       Function::gelu,       Function::gelu_tanh,
                              Function::silu,       Function::add,        Function::relu_slope,
                              Function::gelu_slope, Function::gelu_tanh_slope, Function::silu_slope};

double real(Dtype dtype, const void* memory, int64_t i) {
    switch (dtype) {
        case Dtype::f16: return reference::half.decode(reference::at<uint16_t>(memory, i));
        case Dtype::bf16: return reference::bfloat.decode(reference::at<uint16_t>(memory, i));
        case Dtype::f32: return reference::at<float>(memory, i);
        default: return reference::at<double>(memory, i);
    }
}

// Whether y[i] is the reference's value, rounded to y's type: to the bit where that is defined, which is where its
// error has no size.
bool near(const Fusion& task, int64_t i, bool kept) {
    const double x = real(task.dtype, task.x, i), y = real(task.dtype, task.y, i);
    const double other = task.other ? real(task.dtype, task.other, i) : 0;
    const double bias = task.bias ? real(task.dtype, task.bias, i % task.columns) : 0;
    const bool wide = task.dtype == Dtype::f64;
    const reference::Value value = wide ? reference::fused<double>(task, kept, x, other, bias)
                                        : reference::fused<float>(task, kept, x, other, bias);
    double rounded = value.value;
    if (task.dtype == Dtype::f32) rounded = static_cast<float>(rounded);
    if (task.dtype == Dtype::f16) rounded = reference::half.decode(reference::half.encode(rounded));
    if (task.dtype == Dtype::bf16) rounded = reference::bfloat.decode(reference::bfloat.encode(rounded));
    if (std::isnan(rounded)) return std::isnan(y);
    if (rounded == y) return std::signbit(rounded) == std::signbit(y) || value.size != 0;
    const double epsilons[] = {0x1p-10, 0x1p-7, 0x1p-23, 0x1p-52};
    // Far out an overflow in float is none in double.
    return value.size != 0 &&
           (std::fabs(x) > 100 || std::isinf(value.size) ||
            std::fabs(y - rounded) <= 4 * epsilons[static_cast<int>(task.dtype)] * std::fabs(value.size) + 1e-37);
}

void fusions(Random& random) {
    for (int number = 0; number < 300; ++number) {
        const Dtype dtype = dtypes[random.below(4)];
        const Function function = random.of(functions);
        const int64_t rows = random.of({1, 1, 2, 5, 150}), columns = random.of({1, 3, 64, 77, 400});
        const int64_t n = number % 50 ? columns * random.of({1, 1, 2}) : 16384 + columns * 10 - 16384 % columns;
        const bool biased = function == Function::add && random.one_in(2);
        const uint64_t T = random.of({uint64_t{0}, uint64_t{1}, tenth, one / 2, one - 1, one});
        const Memory x = numbers(dtype, rows * n, random), other = numbers(dtype, rows * n, random), bias = numbers(dtype, columns, random);
        const std::unique_ptr<uint64_t[]> keys(new uint64_t[rows]);
        for (int64_t row = 0; row < rows; ++row) keys[row] = random.next() >> random.of({0, 32, 63});
        Memory first(x.count), y(x.count);
        for (const std::string& isa : supported_isas()) {
            set_isa(isa);
            const bool reads_other = function >= Function::add;
            Fusion task{function, dtype, x.at(0), reads_other ? other.at(0) : nullptr, biased ? bias.at(0) : nullptr, y.at(0),
                        keys.get(), rows, n, columns, T, 1.25};
            run(task);
            const std::string what = "fusion " + std::to_string(static_cast<int>(function)) + " of " + name(dtype) + " under " + isa +
                                     ", " + std::to_string(rows) + " x " + std::to_string(n);
            if (isa == supported_isas().front()) {
                std::memcpy(first.at(0), y.at(0), y.count);
                int64_t wrong = -1;
                for (int64_t i = 0; i < rows * n && wrong < 0; ++i)
                    if (!near(task, i, reference::keep(i % n, keys[i / n], T))) wrong = i;
                check(wrong < 0, what + " at " + std::to_string(wrong) + ", x " + std::to_string(wrong < 0 ? 0 : real(dtype, x.at(0), wrong)));
            }
            check(same(dtype, y, first), what + " is that of the first instruction set");
        }
    }
}

void folds(Random& random) {
    for (int i = 0; i < 1000; ++i) {
        const uint64_t key = random.next() >> random.of({0, 32, 63}), data = random.next() >> random.of({0, 32, 63});
        const reference::Words words = reference::philox(
            {static_cast<uint32_t>(data), static_cast<uint32_t>(data >> 32), 0, 1}, key, 10);
        check(fold(key, data) == (words[0] | static_cast<uint64_t>(words[1]) << 32), "fold " + std::to_string(i));
        const reference::Words others = reference::philox(
            {static_cast<uint32_t>(data), static_cast<uint32_t>(data >> 32), 0, 0}, key, 10);
        check(philox(key, data, 0) == (others[0] | static_cast<uint64_t>(others[1]) << 32), "philox " + std::to_string(i));
    }
}

void nothing_is_nothing() {
    for (const auto& dims : {std::vector<Dim>{{0, 1, 1, 1, 0}}, {{3, 0, 0, 0, 0}, {0, 1, 1, 1, 0}}}) {
        run(task(Dtype::f32, dims, one / 2));  // would read and write at address zero
        check(true, "no elements");
    }
}

void threads_agree(Random& random) {
    const int before = omp_get_max_threads();
    const std::vector<Dim> layouts[] = {{{200003, 1, 1, 1, 0}},
                                        {{4001, 50, 50, 50, 0}, {50, 1, 1, 1, 0}},
                                        {{300, 1, 1, 300, 0}, {300, 300, 300, 1, 0}},
                                        {{90000, 1, 1, 0, 0}},
                                        {{300, 300, 300, 0, 1}, {300, 1, 1, 1, 0}}};
    for (const Dtype dtype : {Dtype::bf16, Dtype::f32, Dtype::mask})
        for (const auto& dims : layouts) {
            Task large = task(dtype, dims, tenth);
            const Memory x = numbers(dtype, extent(dims, &Dim::x), random);
            std::vector<uint64_t> keys(extent(dims, &Dim::key), 7);
            large.x = x.at(0), large.keys = keys.data();
            Memory first(x.count), other(x.count);
            for (const std::string& isa : supported_isas()) {
                set_isa(isa);
                for (const int team : {1, 2, 3, 4}) {
                    omp_set_num_threads(team);
                    check(threads() == team, "OpenMP's number of threads is the kernel's");
                    large.y = (team == 1 ? first : other).at(0);
                    run(large);
                    if (team > 1) check(same(dtype, first, other), std::to_string(team) + " threads, " + describe(large));
                }
            }
        }
    omp_set_num_threads(before);
}

void calls_at_once() {
    const uint64_t key = 7;
    const int64_t n = 100000;
    std::vector<float> x(n, 1.5f), expected(n);
    Task shared_task = task(Dtype::f32, {{n, 1, 1, 1, 0}}, tenth);
    shared_task.x = x.data(), shared_task.keys = &key;
    Task first = shared_task;
    first.y = expected.data(), run(first);
    std::vector<std::vector<float>> results(4, std::vector<float>(n));
    std::vector<std::thread> callers;
    for (auto& result : results)
        callers.emplace_back([&shared_task, &result] {
            for (int i = 0; i < 5; ++i) {
                Task own = shared_task;
                own.y = result.data(), run(own);
            }
        });
    for (auto& caller : callers) caller.join();
    for (const auto& result : results) check(result == expected, "calls at once");
}

// A child has none of its parent's threads: it must not wait for them.
void fork_works() {
    const uint64_t key = 7;
    const int64_t n = 100000;
    std::vector<float> x(n, 1.5f), expected(n), y(n);
    omp_set_num_threads(2);
    Task large = task(Dtype::f32, {{n, 1, 1, 1, 0}}, tenth);
    large.x = x.data(), large.keys = &key;
    large.y = expected.data(), run(large);
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        large.y = y.data(), run(large);
        _exit(y == expected && threads() == 1 ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child computes alone");
}

void instruction_sets() {
    const std::string before = isa();
    check(before == supported_isas().back(), "the last supported instruction set is in use");
    check(compiled_isas().front() == "baseline" && supported_isas().front() == "baseline", "baseline comes first");
    for (const std::string& name : supported_isas()) {
        set_isa(name);
        check(isa() == name, "set_isa " + name);
    }
    std::string message;
    try {
        set_isa("sse9");
    } catch (const std::invalid_argument& error) {
        message = error.what();
    }
    check(message.find("'sse9'") != std::string::npos && message.find("accepted: baseline") != std::string::npos,
          "an unknown instruction set is refused with those accepted");
    check(isa() == supported_isas().back(), "a refused instruction set changes nothing");
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) return std::fprintf(stderr, "usage: test_kernel philox4x32.kat\n"), 2;
    Random random{2014};
    instruction_sets();
    known_answers(arguments[1]);
    known_answer_of_the_kernel();
    formats();
    shapes(random);
    rows_of_one_decision(random);
    far_positions(random);
    values(random);
    random_tasks(random, 600);
    numbers_of_positions(random);
    stratified_draws(random);
    choices(random);
    fusions(random);
    folds(random);
    nothing_is_nothing();
    threads_agree(random);
    calls_at_once();
    fork_works();
    std::string ran;
    for (const std::string& isa : supported_isas()) ran += " " + isa;
    for (const std::string& isa : compiled_isas())
        if (ran.find(isa) == std::string::npos) std::printf("skipped: %s, which this processor lacks\n", isa.c_str());
    std::printf("instruction sets:%s\n%d passed, %d failed\n", ran.c_str(), passed, failed);
    return failed != 0;
}
