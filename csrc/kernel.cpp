#include "kernel.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

namespace thinned {
namespace {

// Fewer elements than this for each thread are not worth waking it for.
constexpr int64_t grain = 16384;

struct Isa {
    const char* name;
    void (*walk)(const Plan&, int64_t, int64_t);
    void (*numbers)(const Numbers&, int64_t, int64_t);
    void (*strata)(const Strata&, int64_t, int64_t);
    void (*choose)(const Choice&, int64_t, int64_t);
    void (*fuse)(const Fusion&, int64_t, int64_t);
    bool (*supported)();
};

const Isa isas[] = {
    {"baseline", walk_baseline, numbers_baseline, strata_baseline, choose_baseline, fuse_baseline, [] { return true; }},
#ifdef THINNED_X86
    {"avx2", walk_avx2, numbers_avx2, strata_avx2, choose_avx2, fuse_avx2,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
    {"avx512", walk_avx512, numbers_avx512, strata_avx512, choose_avx512, fuse_avx512,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
     }},
#endif
};

const Isa* best() {
    const Isa* found = isas;
    for (const Isa& isa : isas)
        if (isa.supported()) found = &isa;
    return found;
}

std::atomic<const Isa*>& chosen() {
    static std::atomic<const Isa*> isa{best()};
    return isa;
}

std::atomic<bool> forked{false};

#ifndef _WIN32
// From the start: a pool that the child lacks may be one that others used before the first call here.
[[maybe_unused]] const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// All units of a task of so many elements, by as many threads as they are worth.
template <class Work>
void share(const Work& task, void (*work)(const Work&, int64_t, int64_t), int64_t units, int64_t elements) {
    const int64_t wanted = std::min<int64_t>(elements / grain, units);
    const int team = wanted > 1 ? static_cast<int>(std::min<int64_t>(wanted, threads())) : 1;
    if (team <= 1) return work(task, 0, units);
#ifdef _OPENMP
#pragma omp parallel num_threads(team)
    {
        const int64_t size = omp_get_num_threads(), number = omp_get_thread_num();
        work(task, units * number / size, units * (number + 1) / size);
    }
#endif
}

}  // namespace

std::vector<std::string> compiled_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas) names.emplace_back(isa.name);
    return names;
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas)
        if (isa.supported()) names.emplace_back(isa.name);
    return names;
}

std::string isa() { return chosen().load()->name; }

void set_isa(const std::string& name) {
    std::string accepted;
    for (const Isa& isa : isas) {
        if (!isa.supported()) continue;
        if (name == isa.name) {
            chosen() = &isa;
            return;
        }
        accepted += (accepted.empty() ? "" : ", ") + std::string(isa.name);
    }
    throw std::invalid_argument("no instruction set '" + name + "' on this machine; accepted: " + accepted);
}

uint64_t philox(uint64_t key, uint64_t counter, uint32_t last) {
    uint64_t word[4] = {counter & 0xFFFFFFFF, counter >> 32, 0, last};
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
        const uint64_t product0 = 0xD2511F53 * word[0], product1 = 0xCD9E8D57 * word[2];
        word[0] = product1 >> 32 ^ word[1] ^ key0;
        word[2] = product0 >> 32 ^ word[3] ^ key1;
        word[1] = product1 & 0xFFFFFFFF;
        word[3] = product0 & 0xFFFFFFFF;
    }
    return word[0] | word[1] << 32;
}

int threads() {
#ifdef _OPENMP
    return forked || omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

void run(const Task& task) {
    for (const Dim& dim : task.dims)
        if (dim.size == 0) return;
    const Plan plan = make_plan(task);
    share(plan, chosen().load()->walk, plan.units, plan.elements);
}

void run(const Numbers& task) {
    share(task, chosen().load()->numbers, task.rows * task.blocks(), task.rows * task.count);
}

uint32_t Strata::prime() const {
    for (uint32_t n = std::max<uint32_t>(2, static_cast<uint32_t>(strata));; ++n) {
        uint32_t divisor = 2;
        while (divisor * divisor <= n && n % divisor) ++divisor;
        if (divisor * divisor > n) return n;
    }
}

void run(const Strata& task) {
    share(task, chosen().load()->strata, task.rows * task.parts(), task.rows * task.count);
}

void run(const Fusion& task) {
    share(task, chosen().load()->fuse, task.rows * task.parts(), task.rows * task.n);
}

void run(const Choice& task) {
    share(task, chosen().load()->choose, (task.n + Choice::part - 1) / Choice::part, task.n);
}

}  // namespace thinned
