// One walk for each instruction set: the same text, compiled with different vectors.
#pragma once

#include "plan.h"

namespace thinned {

void walk_baseline(const Plan& plan, int64_t from, int64_t to);
void walk_avx2(const Plan& plan, int64_t from, int64_t to);
void walk_avx512(const Plan& plan, int64_t from, int64_t to);

}  // namespace thinned
