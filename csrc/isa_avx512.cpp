#include "isa.h"
#include "simd/avx512.h"
#include "choose.h"
#include "fused.h"
#include "numbers.h"
#include "strata.h"
#include "walk.h"

namespace thinned {

void walk_avx512(const Plan& plan, int64_t from, int64_t to) { walk(plan, from, to); }
void numbers_avx512(const Numbers& task, int64_t from, int64_t to) { numbers(task, from, to); }
void strata_avx512(const Strata& task, int64_t from, int64_t to) { strata(task, from, to); }
void choose_avx512(const Choice& task, int64_t from, int64_t to) { choose(task, from, to); }
void fuse_avx512(const Fusion& task, int64_t from, int64_t to) { fuse(task, from, to); }

}  // namespace thinned
