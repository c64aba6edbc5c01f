// The operations on plain memory: no PyTorch, no Python.
//
//   masked_affine:  y[i] = keep(m(i)) ? x[i] * scale + shift : fill
//   keep_mask:      y[i] = keep(m(i))                          (Dtype::mask; x is not read)
//   numbers:        y[i] = u(m(i)) - 2^31
//   strata:         y[i] = u'(m(i), draw) - 2^31           (from the numbers under two keys)
//   choice:         y[i] = u[i] < T ? x[i] * scale + shift : fill     (under numbers that are given)
//   fusion:         y[i] = keep(i) ? f(x[i]) * scale : 0, its derivative, and sums with a masked term
//
// keep(m) holds when u(m), the 32-bit number of mask index m under the key, is below T.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace thinned {

enum class Dtype { f16, bf16, f32, f64, c64, c128, mask };

constexpr int max_dims = 64;

// One dimension: its size and, for a step along it, the distance in x and y (in elements), in mask
// indices, and in the array of keys.
struct Dim {
    int64_t size, x, y, mask, key;
};

struct Task {
    Dtype dtype;
    const void* x;
    void* y;
    const uint64_t* keys;
    std::vector<Dim> dims;
    uint64_t base;  // the mask index of the first element
    uint64_t T;     // 0 .. 2^32
    double scale, shift, fill;
};

// Rows of `count` numbers, each from a mask index of its own on and under a key of its own.
struct Numbers {
    int32_t* y;  // rows * count, row after row
    const uint64_t* keys;
    const uint64_t* starts;
    int64_t rows, count;

    // How many blocks of 128 indices a row can touch.
    int64_t blocks() const { return (count + 126) / 128 + 1; }
};

// The numbers of stratified draws: rows of `count`, each of one draw, from numbers less 2^31. `u` are those under
// the key of a set of draws, `v` those that decide its permutations; row i reads row sources[i] of both.
struct Strata {
    static constexpr int64_t part = 4096;  // elements of a row that one thread takes at a time

    int32_t* y;  // rows * count, row after row
    const int32_t* u;
    const int32_t* v;
    const int64_t* draws;  // each counts modulo the strata
    const int64_t* sources;
    int64_t rows, count;
    int64_t strata;  // 1 .. 65521

    int64_t parts() const { return (count + part - 1) / part; }
    // The smallest prime that is at least 2 and at least the number of strata.
    uint32_t prime() const;
};

// Consecutive elements under numbers less 2^31, in one piece of memory each.
struct Choice {
    static constexpr int64_t part = 16384;  // elements that one thread takes at a time

    Dtype dtype;
    const void* x;
    void* y;
    const int32_t* numbers;
    int64_t n;
    uint64_t T;  // 0 .. 2^32
    double scale, shift, fill;
};

enum class Function { relu, gelu, gelu_tanh, silu, add, relu_slope, gelu_slope, gelu_tanh_slope, silu_slope };

// Rows of n consecutive elements, each under a key and with mask indices 0 .. n - 1:
//
//   relu ... silu              y[i] = keep(i) ? f(x[i]) * scale : 0
//   gelu_slope ... silu_slope  y[i] = keep(i) ? other[i] * scale * f'(x[i]) : 0
//   relu_slope                 y[i] = x[i] <= 0 ? 0 : other[i] * scale           (x is relu's y, which knows the mask)
//   add                        y[i] = other[i] + (keep(i) ? (x[i] + bias[i % columns]) * scale : 0)
struct Fusion {
    static constexpr int64_t part = 16384;  // elements of a row that one thread takes at a time

    Function function;
    Dtype dtype;  // a real one
    const void* x;
    const void* other;
    const void* bias;  // none: null
    void* y;
    const uint64_t* keys;
    int64_t rows, n;
    int64_t columns;  // n is a multiple
    uint64_t T;       // 0 .. 2^32
    double scale;

    int64_t parts() const { return (n + part - 1) / part; }
};

// x and y are the same memory or do not overlap, and no product of a size and a stride exceeds 2^61; nothing of it
// is checked here. Results depend on neither threads nor instruction set.
void run(const Task& task);
void run(const Numbers& task);
void run(const Strata& task);
void run(const Choice& task);
void run(const Fusion& task);  // y overlaps nothing

// Words 0 and 1 of philox10((lo32(counter), hi32(counter), 0, last), key).
uint64_t philox(uint64_t key, uint64_t counter, uint32_t last);

// The child of a key.
inline uint64_t fold(uint64_t key, uint64_t data) { return philox(key, data, 1); }

// Instruction sets, from the most general one on: those compiled in, and those this processor has.
std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();

// The one in use: the last supported, unless set. Throws std::invalid_argument for one not supported.
std::string isa();
void set_isa(const std::string& name);

// How many threads a large enough task is shared by: OpenMP's setting, 1 in a forked child, where the
// parent's pool of threads is gone.
int threads();

}  // namespace thinned
