#include "isa.h"
#include "simd/avx2.h"
#include "choose.h"
#include "fused.h"
#include "numbers.h"
#include "strata.h"
#include "walk.h"

namespace thinned {

void walk_avx2(const Plan& plan, int64_t from, int64_t to) { walk(plan, from, to); }
void numbers_avx2(const Numbers& task, int64_t from, int64_t to) { numbers(task, from, to); }
void strata_avx2(const Strata& task, int64_t from, int64_t to) { strata(task, from, to); }
void choose_avx2(const Choice& task, int64_t from, int64_t to) { choose(task, from, to); }
void fuse_avx2(const Fusion& task, int64_t from, int64_t to) { fuse(task, from, to); }

}  // namespace thinned
