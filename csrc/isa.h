// The work for each instruction set: the same text, compiled with different vectors.
#pragma once

#include "plan.h"

namespace thinned {

void walk_baseline(const Plan& plan, int64_t from, int64_t to);
void walk_avx2(const Plan& plan, int64_t from, int64_t to);
void walk_avx512(const Plan& plan, int64_t from, int64_t to);
void numbers_baseline(const Numbers& task, int64_t from, int64_t to);
void strata_baseline(const Strata& task, int64_t from, int64_t to);
void choose_baseline(const Choice& task, int64_t from, int64_t to);
void fuse_baseline(const Fusion& task, int64_t from, int64_t to);
void numbers_avx2(const Numbers& task, int64_t from, int64_t to);
void strata_avx2(const Strata& task, int64_t from, int64_t to);
void choose_avx2(const Choice& task, int64_t from, int64_t to);
void fuse_avx2(const Fusion& task, int64_t from, int64_t to);
void numbers_avx512(const Numbers& task, int64_t from, int64_t to);
void strata_avx512(const Strata& task, int64_t from, int64_t to);
void choose_avx512(const Choice& task, int64_t from, int64_t to);
void fuse_avx512(const Fusion& task, int64_t from, int64_t to);

}  // namespace thinned
