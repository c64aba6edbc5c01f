// The kernel as a Python module. Tensors come as addresses, sizes and strides, so that nothing here depends
// on a version of PyTorch. Everything that an address, a size and a stride can tell is checked here; the length
// of the memory behind an address is the caller's word.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "kernel.h"

namespace nb = nanobind;
using namespace thinned;

namespace {

using Sizes = std::vector<int64_t>;

constexpr const char* dtypes[] = {"float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool"};
constexpr int64_t item_sizes[] = {2, 2, 4, 8, 8, 16, 1};
constexpr uintptr_t alignments[] = {2, 2, 4, 8, 4, 8, 1};
constexpr int dtype_count = sizeof dtypes / sizeof *dtypes;

// From the first to the last, an array has at most 2^44 items, which at 16 bytes each are all that a process can
// address, and a mask at most 2^60 indices. The kernel's products of sizes and strides are then below 2^63.
constexpr int64_t most_items = int64_t{1} << 44;
constexpr int64_t most_indices = int64_t{1} << 60;

// The largest prime of 16 bits: in the permutation of strata, a product plus a summand then has 32 bits.
constexpr int64_t most_strata = 65521;

// ValueError in Python.
[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

std::string text(const Sizes& sizes) {
    std::string result;
    for (const int64_t size : sizes) result += (result.empty() ? "" : ", ") + std::to_string(size);
    return "(" + result + ")";
}

// One array's bytes.
struct Memory {
    const char* name;
    uintptr_t at;
    int64_t bytes;

    Memory(const char* name, uintptr_t at, int64_t items, int64_t item_size, uintptr_t alignment)
        : name(name), at(at), bytes(items * item_size) {
        if (!at)
            refuse(std::string(name) + " has no memory (address 0) for its " + std::to_string(bytes) + " bytes");
        if (at & (alignment - 1))
            refuse(std::string(name) + " begins at address " + std::to_string(at) + ", which must be a multiple of " +
                   std::to_string(alignment) + "; clone() the tensor");
        if (at > UINTPTR_MAX - bytes)
            refuse(std::string(name) + " at address " + std::to_string(at) + " ends beyond the last address");
    }
    bool overlaps(const Memory& other) const { return at < other.at + other.bytes && other.at < at + bytes; }
};

void check_apart(const Memory& written, const Memory& read) {
    if (written.overlaps(read))
        refuse(std::string(written.name) + " overlaps " + read.name + ": " + std::to_string(written.bytes) +
               " bytes from address " + std::to_string(written.at) + ", " + std::to_string(read.bytes) +
               " from address " + std::to_string(read.at));
}

void check_count(const char* name, int64_t count) {
    if (count < 0 || count > most_items)
        refuse(std::string(name) + " must be 0 .. 2**44, got " + std::to_string(count));
}

// The items from the first to the last, both counted, of an array that is not empty.
int64_t reach(const char* name, const Sizes& shape, const Sizes& strides, int64_t most) {
    int64_t last = 0, step;
    for (size_t d = 0; d < strides.size(); ++d) {
        if (shape[d] == 1) continue;
        if (strides[d] < 0 || __builtin_mul_overflow(strides[d], shape[d] - 1, &step) || step >= most - last)
            refuse(std::string(name) + " has strides " + text(strides) + " over shape " + text(shape) +
                   "; accepted: strides of 0 or more that reach no further than " + std::to_string(most) + " items");
        last += step;
    }
    return last + 1;
}

Dtype checked(int dtype, int64_t T) {
    if (dtype < 0 || dtype >= dtype_count)
        refuse("dtype must be 0 .. " + std::to_string(dtype_count - 1) + ", got " + std::to_string(dtype));
    if (T < 0 || T > int64_t{1} << 32) refuse("T must be 0 .. 2**32, got " + std::to_string(T));
    return static_cast<Dtype>(dtype);
}

template <class Work>
void run_released(const Work& task) {
    nb::gil_scoped_release release;
    run(task);
}

void flat(uintptr_t x, uintptr_t y, int dtype, int64_t n, int64_t T, double scale, double shift, double fill,
          int64_t key) {
    const Dtype type = checked(dtype, T);
    const int64_t item_size = item_sizes[dtype];
    check_count("n", n);
    if (n == 0) return;
    const Memory from{"x", x, n, item_size, alignments[dtype]}, to{"y", y, n, item_size, alignments[dtype]};
    if (x != y) check_apart(to, from);
    const uint64_t bits = static_cast<uint64_t>(key);
    run_released(Task{type, reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), &bits,
                  {{n, 1, 1, 1, 0}}, 0, static_cast<uint64_t>(T), scale, shift, fill});
}

// `keys` is 0 for the one `key`.
void strided(uintptr_t x, uintptr_t y, int dtype, const Sizes& shape, const Sizes& x_strides,
             const Sizes& y_strides, const Sizes& mask_strides, int64_t base, int64_t T, double scale,
             double shift, double fill, int64_t key, uintptr_t keys, const Sizes& key_shape,
             const Sizes& key_strides) {
    const Dtype type = checked(dtype, T);
    const int64_t item_size = item_sizes[dtype];
    const size_t dims = shape.size();
    if (dims > max_dims || x_strides.size() != dims || y_strides.size() != dims || mask_strides.size() != dims ||
        key_strides.size() != key_shape.size())
        refuse("shape " + text(shape) + " has strides " + text(x_strides) + " in x, " + text(y_strides) +
               " in y, " + text(mask_strides) + " in the mask and " + text(key_strides) +
               " in keys of shape " + text(key_shape) + "; accepted: a stride for each dimension, of which there " +
               "are at most " + std::to_string(max_dims));
    if (key_shape.size() > dims || !std::equal(key_shape.begin(), key_shape.end(), shape.begin()))
        refuse("keys of shape " + text(key_shape) + " do not fit a tensor of shape " + text(shape) +
               "; accepted: the shape of its leading dimensions");
    int64_t elements = 1;
    for (const int64_t size : shape) {
        check_count("a size", size);
        if (__builtin_mul_overflow(elements, size, &elements) || elements > most_items)
            refuse("shape " + text(shape) + " has more than 2**44 elements");
    }
    if (elements == 0) return;

    const Memory from{"x", x, reach("x", shape, x_strides, most_items), item_size, alignments[dtype]};
    const Memory to{"y", y, reach("y", shape, y_strides, most_items), item_size, alignments[dtype]};
    bool same = x == y;
    for (size_t d = 0; d < dims; ++d) {
        if (shape[d] == 1) continue;
        same = same && x_strides[d] == y_strides[d];
        if (y_strides[d] == 0) refuse("y's strides " + text(y_strides) + " write elements of " + text(shape) +
                                      " to one place");
    }
    if (!same) check_apart(to, from);
    if (base < 0 || base > INT64_MAX - reach("the mask", shape, mask_strides, most_indices))
        refuse("base must be 0 or more and the last mask index below 2**63 - 1, got base " + std::to_string(base) +
               " with strides " + text(mask_strides) + " over shape " + text(shape));
    if (keys)
        check_apart(to, {"keys", keys, reach("keys", shape, key_strides, most_items), 8, 8});
    else if (!key_strides.empty())
        refuse("keys of strides " + text(key_strides) + " have no memory (address 0)");

    std::vector<Dim> task_dims(dims);
    for (size_t d = 0; d < dims; ++d)
        task_dims[d] = {shape[d], x_strides[d], y_strides[d], mask_strides[d],
                        d < key_strides.size() ? key_strides[d] : 0};
    const uint64_t bits = static_cast<uint64_t>(key);
    run_released(Task{type, reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y),
                  keys ? reinterpret_cast<const uint64_t*>(keys) : &bits, std::move(task_dims),
                  static_cast<uint64_t>(base), static_cast<uint64_t>(T), scale, shift, fill});
}

void numbers(uintptr_t y, uintptr_t keys, uintptr_t starts, int64_t rows, int64_t count) {
    check_count("rows", rows);
    check_count("count", count);
    if (rows == 0 || count == 0) return;
    if (rows > most_items / count)
        refuse(std::to_string(rows) + " rows of " + std::to_string(count) + " numbers are more than 2**44");
    const Memory to{"y", y, rows * count, 4, 4};
    check_apart(to, {"keys", keys, rows, 8, 8});
    check_apart(to, {"starts", starts, rows, 8, 8});
    run_released(Numbers{reinterpret_cast<int32_t*>(y), reinterpret_cast<const uint64_t*>(keys),
                         reinterpret_cast<const uint64_t*>(starts), rows, count});
}

// `u` and `v` have `source_rows` rows.
void strata(uintptr_t y, uintptr_t u, uintptr_t v, uintptr_t draws, uintptr_t sources, int64_t rows, int64_t count,
            int64_t source_rows, int64_t strata) {
    check_count("rows", rows);
    check_count("count", count);
    check_count("source_rows", source_rows);
    if (strata < 1 || strata > most_strata)
        refuse("strata must be 1 .. " + std::to_string(most_strata) + ", got " + std::to_string(strata));
    if (rows == 0 || count == 0) return;
    if (std::max(rows, source_rows) > most_items / count)
        refuse(std::to_string(std::max(rows, source_rows)) + " rows of " + std::to_string(count) +
               " numbers are more than 2**44");
    const Memory to{"y", y, rows * count, 4, 4};
    check_apart(to, {"u", u, source_rows * count, 4, 4});
    check_apart(to, {"v", v, source_rows * count, 4, 4});
    check_apart(to, {"draws", draws, rows, 8, 8});
    check_apart(to, {"sources", sources, rows, 8, 8});
    const int64_t* from = reinterpret_cast<const int64_t*>(sources);
    for (int64_t row = 0; row < rows; ++row)
        if (from[row] < 0 || from[row] >= source_rows)
            refuse("sources must be 0 .. " + std::to_string(source_rows - 1) + ", got " + std::to_string(from[row]));
    run_released(Strata{reinterpret_cast<int32_t*>(y), reinterpret_cast<const int32_t*>(u),
                        reinterpret_cast<const int32_t*>(v), reinterpret_cast<const int64_t*>(draws), from, rows,
                        count, strata});
}

void choose(uintptr_t x, uintptr_t y, int dtype, int64_t n, uintptr_t numbers, int64_t T, double scale, double shift,
            double fill) {
    const Dtype type = checked(dtype, T);
    check_count("n", n);
    if (n == 0) return;
    const Memory from{"x", x, n, item_sizes[dtype], alignments[dtype]};
    const Memory to{"y", y, n, item_sizes[dtype], alignments[dtype]};
    if (x != y) check_apart(to, from);
    check_apart(to, {"numbers", numbers, n, 4, 4});
    run_released(Choice{type, reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y),
                        reinterpret_cast<const int32_t*>(numbers), n, static_cast<uint64_t>(T), scale, shift, fill});
}

constexpr const char* functions[] = {"relu",       "gelu",       "gelu_tanh",       "silu",      "add",
                                     "relu_slope", "gelu_slope", "gelu_tanh_slope", "silu_slope"};
constexpr int function_count = sizeof functions / sizeof *functions;

// `other` is read by functions from `add` on, and `bias` by `add` unless it is 0. `keys` is 0 for the one `key` of the
// one row.
void fused(int function, uintptr_t x, uintptr_t other, uintptr_t bias, uintptr_t y, int dtype, int64_t rows, int64_t n,
           int64_t columns, int64_t T, double scale, int64_t key, uintptr_t keys) {
    const Dtype type = checked(dtype, T);
    if (type > Dtype::f64) refuse("dtype must be real, got " + std::string(dtypes[dtype]));
    if (function < 0 || function >= function_count)
        refuse("function must be 0 .. " + std::to_string(function_count - 1) + ", got " + std::to_string(function));
    check_count("rows", rows);
    check_count("n", n);
    if (rows == 0 || n == 0) return;
    if (rows > most_items / n)
        refuse(std::to_string(rows) + " rows of " + std::to_string(n) + " elements are more than 2**44");
    if (!keys && rows != 1) refuse("one key is for one row, got " + std::to_string(rows));
    const Function called = static_cast<Function>(function);
    const int64_t item_size = item_sizes[dtype];
    const Memory to{"y", y, rows * n, item_size, alignments[dtype]};
    check_apart(to, {"x", x, rows * n, item_size, alignments[dtype]});
    if (called >= Function::add) check_apart(to, {"other", other, rows * n, item_size, alignments[dtype]});
    if (called == Function::add && bias) {
        if (columns < 1 || n % columns)
            refuse("n must be a multiple of columns, got " + std::to_string(n) + " and " + std::to_string(columns));
        check_apart(to, {"bias", bias, columns, item_size, alignments[dtype]});
    }
    if (keys) check_apart(to, {"keys", keys, rows, 8, 8});
    const uint64_t bits = static_cast<uint64_t>(key);
    run_released(Fusion{called, type, reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(other),
                        reinterpret_cast<const void*>(bias), reinterpret_cast<void*>(y),
                        keys ? reinterpret_cast<const uint64_t*>(keys) : &bits, rows, n, columns,
                        static_cast<uint64_t>(T), scale});
}

// A step is 0 for one key, or one datum, for all.
void fold_many(uintptr_t y, uintptr_t keys, int64_t key_step, uintptr_t data, int64_t data_step, int64_t n) {
    check_count("n", n);
    for (const int64_t step : {key_step, data_step})
        if (step < 0 || step > 1) refuse("a step must be 0 or 1, got " + std::to_string(step));
    if (n == 0) return;
    const Memory to{"y", y, n, 8, 8};
    check_apart(to, {"keys", keys, key_step ? n : 1, 8, 8});
    check_apart(to, {"data", data, data_step ? n : 1, 8, 8});
    for (int64_t i = 0; i < n; ++i)
        reinterpret_cast<uint64_t*>(y)[i] = fold(reinterpret_cast<const uint64_t*>(keys)[i * key_step],
                                                 reinterpret_cast<const uint64_t*>(data)[i * data_step]);
}

void fold_one(uintptr_t y, uintptr_t key, int64_t data) {
    fold_many(y, key, 0, reinterpret_cast<uintptr_t>(&data), 0, 1);
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("flat", &flat);
    module.def("strided", &strided);
    module.def("numbers", &numbers);
    module.def("strata", &strata);
    module.def("choose", &choose);
    module.def("fused", &fused);
    module.def("fold", &fold_one);
    module.def("fold_many", &fold_many);
    module.def("philox", [](uint64_t key, uint64_t counter) { return philox(key, counter, 0); });
    module.def("isa", &isa);
    module.def("set_isa", &set_isa);
    module.def("compiled_isas", &compiled_isas);
    module.def("supported_isas", &supported_isas);
    module.def("threads", &threads);
    nb::list names;
    for (const char* name : dtypes) names.append(name);
    module.attr("dtypes") = nb::tuple(names);
    nb::list function_names;
    for (const char* name : functions) function_names.append(name);
    module.attr("functions") = nb::tuple(function_names);
    module.attr("compiler") = THINNED_COMPILER;
    module.attr("flags") = THINNED_FLAGS;
}
