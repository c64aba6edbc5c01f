// The kernel as a Python module. Tensors come as addresses, sizes and strides, so that nothing here depends
// on a version of PyTorch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "kernel.h"

namespace nb = nanobind;
using namespace thinned;

namespace {

using Sizes = std::vector<int64_t>;

std::vector<Dim> dims(const Sizes& shape, const Sizes& x, const Sizes& y, const Sizes& mask, const Sizes& key) {
    const size_t n = shape.size();
    if (n > max_dims || x.size() != n || y.size() != n || mask.size() != n || key.size() > n)
        throw std::invalid_argument("shape and strides must have the same length, at most 64");
    std::vector<Dim> result(n);
    for (size_t d = 0; d < n; ++d)
        result[d] = {shape[d], x[d], y[d], mask[d], d < key.size() ? key[d] : 0};
    return result;
}

template <class Work>
void run_released(const Work& task) {
    nb::gil_scoped_release release;
    run(task);
}

void flat(uintptr_t x, uintptr_t y, int dtype, int64_t n, uint64_t T, double scale, double shift, double fill,
          int64_t key) {
    const uint64_t bits = static_cast<uint64_t>(key);
    run_released(Task{static_cast<Dtype>(dtype), reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), &bits,
                  {{n, 1, 1, 1, 0}}, 0, T, scale, shift, fill});
}

void strided(uintptr_t x, uintptr_t y, int dtype, const Sizes& shape, const Sizes& x_strides,
             const Sizes& y_strides, const Sizes& mask_strides, int64_t base, uint64_t T, double scale,
             double shift, double fill, int64_t key, uintptr_t keys, const Sizes& key_strides) {
    const uint64_t bits = static_cast<uint64_t>(key);
    run_released(Task{static_cast<Dtype>(dtype), reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y),
                  keys ? reinterpret_cast<const uint64_t*>(keys) : &bits,
                  dims(shape, x_strides, y_strides, mask_strides, key_strides), static_cast<uint64_t>(base), T,
                  scale, shift, fill});
}

void numbers(uintptr_t y, uintptr_t keys, uintptr_t starts, int64_t rows, int64_t count) {
    run_released(Numbers{reinterpret_cast<int32_t*>(y), reinterpret_cast<const uint64_t*>(keys),
                         reinterpret_cast<const uint64_t*>(starts), rows, count});
}

void fold_one(uintptr_t y, uintptr_t key, int64_t data) {
    *reinterpret_cast<uint64_t*>(y) = fold(*reinterpret_cast<const uint64_t*>(key), static_cast<uint64_t>(data));
}

// A step is 0 for one key, or one datum, for all.
void fold_many(uintptr_t y, uintptr_t keys, int64_t key_step, uintptr_t data, int64_t data_step, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        reinterpret_cast<uint64_t*>(y)[i] = fold(reinterpret_cast<const uint64_t*>(keys)[i * key_step],
                                                 reinterpret_cast<const uint64_t*>(data)[i * data_step]);
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("flat", &flat);
    module.def("strided", &strided);
    module.def("numbers", &numbers);
    module.def("fold", &fold_one);
    module.def("fold_many", &fold_many);
    module.def("isa", &isa);
    module.def("set_isa", &set_isa);
    module.def("compiled_isas", &compiled_isas);
    module.def("supported_isas", &supported_isas);
    module.def("threads", &threads);
    module.attr("dtypes") = nb::make_tuple("float16", "bfloat16", "float32", "float64", "complex64",
                                           "complex128", "bool");
    module.attr("compiler") = THINNED_COMPILER;
    module.attr("flags") = THINNED_FLAGS;
}
