// A task arranged as nested loops around rows of memory that one mask rule covers.
#pragma once

#include "kernel.h"

namespace thinned {

enum class Row {
    run,       // consecutive elements have consecutive mask indices
    constant,  // all elements of a row have one mask index
    tile,      // consecutive mask indices run along other dimensions, the columns
};

// Elements of a row that one step of the loops covers, in a run and in a tile, and columns of a tile.
constexpr int64_t segment = 16384;
constexpr int64_t tile_rows = 64;
constexpr int64_t tile_columns = 512;

struct Plan {
    Task task;
    Row kind;
    Dim row;
    // Dimensions that together run through consecutive mask indices, the fastest last.
    std::vector<Dim> columns;
    int64_t column_count;
    // Loops from the outermost on. The row's own segments (`row_loop`) and the tile's columns
    // (`column_loop`) are loops among them; loops that share a mask are inside, where it is still at hand.
    std::vector<Dim> loops;
    int row_loop, column_loop;
    int64_t row_step;
    // The innermost dimension around short rows, if its rows share their mask bits or have one each: a step of
    // its loop (`group_loop`) covers `group_step` rows at once.
    Dim group;
    int group_loop;
    int64_t group_step;
    int64_t units;     // steps of the loops in all
    int64_t elements;
};

Plan make_plan(const Task& task);

}  // namespace thinned
