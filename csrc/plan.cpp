#include "plan.h"

#include <algorithm>
#include <cstdlib>

namespace thinned {
namespace {

bool continues(const Dim& outer, const Dim& inner) {
    return outer.x == inner.x * inner.size && outer.y == inner.y * inner.size &&
           outer.mask == inner.mask * inner.size && outer.key == inner.key * inner.size;
}

// Dimensions in the order of y's memory, as few as possible.
std::vector<Dim> normalised(const std::vector<Dim>& dims) {
    std::vector<Dim> order;
    for (const Dim& dim : dims)
        if (dim.size != 1) order.push_back(dim);
    std::stable_sort(order.begin(), order.end(),
                     [](const Dim& a, const Dim& b) { return std::abs(a.y) > std::abs(b.y); });
    std::vector<Dim> merged;
    for (const Dim& dim : order) {
        if (!merged.empty() && continues(merged.back(), dim)) {
            Dim& last = merged.back();
            last = {last.size * dim.size, dim.x, dim.y, dim.mask, dim.key};
        } else {
            merged.push_back(dim);
        }
    }
    return merged;
}

Dim steps(const Dim& dim, int64_t step) {
    step = std::min(step, dim.size);  // a stride times more than the size may be no int64
    return {(dim.size + step - 1) / step, dim.x * step, dim.y * step, dim.mask * step, dim.key * step};
}

// Take out of `dims` those that run through consecutive mask indices, if there are any.
std::vector<Dim> take_columns(std::vector<Dim>& dims, int64_t& count) {
    std::vector<Dim> columns;
    count = 1;
    const auto continues = [&](const Dim& dim) { return dim.mask == count && dim.key == 0; };
    for (auto next = dims.begin(); (next = std::find_if(dims.begin(), dims.end(), continues)) != dims.end();) {
        columns.insert(columns.begin(), *next);
        count *= next->size;
        dims.erase(next);
    }
    return columns;
}

void group_rows(Plan& plan) {
    int last = static_cast<int>(plan.loops.size()) - 1;
    if (last == plan.row_loop) --last;
    if (plan.kind == Row::tile || plan.row.size > segment || last < 0) return;
    const Dim& dim = plan.loops[last];
    if (dim.key != 0 || (dim.mask != 0 && (plan.kind == Row::run || dim.mask != 1))) return;
    plan.group = dim;
    plan.group_loop = last;
    plan.group_step = std::min(dim.size, segment / plan.row.size);
    plan.loops[last] = steps(dim, plan.group_step);
}

}  // namespace

Plan make_plan(const Task& task) {
    Plan plan{task};
    std::vector<Dim> dims = normalised(task.dims);
    for (const Dim& dim : dims) plan.elements *= dim.size;

    if (!dims.empty()) {
        plan.row = dims.back();
        dims.pop_back();
    }
    const bool one_key = plan.row.key == 0;
    if (one_key && plan.row.mask == 1) {
        plan.kind = Row::run;
    } else if (one_key && plan.row.mask == 0) {
        plan.kind = Row::constant;
    } else if (plan.columns = take_columns(dims, plan.column_count); !plan.columns.empty()) {
        plan.kind = Row::tile;
        plan.row_step = tile_rows;
    } else {
        plan.kind = Row::constant;  // element by element
        dims.push_back(plan.row);
        plan.row = Plan{}.row;
    }

    auto first_shared = std::stable_partition(dims.begin(), dims.end(), [](const Dim& dim) {
        return dim.mask != 0 || dim.key != 0;
    });
    plan.loops.assign(dims.begin(), first_shared);
    if (plan.kind == Row::tile) {
        plan.column_loop = static_cast<int>(plan.loops.size());
        plan.loops.push_back(steps({plan.column_count, 0, 0, 1, 0}, tile_columns));
    }
    plan.row_loop = static_cast<int>(plan.loops.size());
    plan.loops.push_back(steps(plan.row, plan.row_step));
    plan.loops.insert(plan.loops.end(), first_shared, dims.end());
    group_rows(plan);
    for (const Dim& loop : plan.loops) plan.units *= loop.size;
    return plan;
}

}  // namespace thinned
