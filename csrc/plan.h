// A task arranged as nested loops around rows of memory that one mask rule covers.
#pragma once

#include "kernel.h"

namespace thinned {

// How a row, the innermost dimension of memory, meets the mask. walk.h has a function for each kind:
//
//   mask of a contiguous float tensor          kind      applied by
//   (64, 1000), own decision per element       run       apply_run
//   (40, 50, 3), shared along the middle       run       apply_run, or apply_pattern: short rows, same bits
//   (64, 1000), shared along the last          constant  apply_constant
//   (3000, 64, 7), shared along the last       constant  apply_constant, or apply_copies: short rows
//   channels_last or transposed                tile      apply_tile
//   (2000,) with mask stride 129               constant  apply_constant, element by element
enum class Row {
    run,       // consecutive elements have consecutive mask indices
    constant,  // all elements of a row have one mask index
    tile,      // consecutive mask indices run along other dimensions, the columns
};

// Step sizes. `segment`: elements of a run; `tile_rows` x `tile_columns`: of a tile.
constexpr int64_t segment = 16384;
constexpr int64_t tile_rows = 64;
constexpr int64_t tile_columns = 512;

struct Plan {
    Task task;
    Row kind = Row::run;
    Dim row = {1, 1, 1, 0, 0};
    // Dimensions that together run through consecutive mask indices, the fastest last.
    std::vector<Dim> columns = {};
    int64_t column_count = 1;
    // Loops from the outermost on. The row's own segments (`row_loop`) and the tile's columns
    // (`column_loop`) are loops among them; loops that share a mask are innermost, where its bits are still in cache.
    std::vector<Dim> loops = {};
    int row_loop = -1, column_loop = -1;
    int64_t row_step = segment;
    // The innermost dimension of short rows that share their mask bits or have one bit each: a step of its
    // loop (`group_loop`) covers `group_step` rows at once.
    Dim group = {1, 1, 1, 0, 0};
    int group_loop = -1;
    int64_t group_step = 1;
    int64_t units = 1;  // steps of all loops
    int64_t elements = 1;
};

Plan make_plan(const Task& task);

}  // namespace thinned
