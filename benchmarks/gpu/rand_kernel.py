"""Dropout by ``tl.rand``, the random numbers that Triton brings."""

# No `from __future__ import annotations`: Triton reads the types below.
import triton
import triton.language as tl

__all__ = ["dropout"]


@triton.jit
def dropout(x_ptr, out_ptr, seeds_ptr, count, p, COLS: tl.constexpr):
    """One row of ``COLS`` elements, with a seed for each row and one Philox call for each element."""
    row = tl.program_id(0)
    col = tl.arange(0, COLS)
    at = row.to(tl.int64) * COLS + col
    x = tl.load(x_ptr + at, mask=at < count).to(tl.float32)
    keep = tl.rand(tl.load(seeds_ptr + row).to(tl.uint32), col, n_rounds=7) > p
    tl.store(out_ptr + at, tl.where(keep, x / (1.0 - p), 0.0).to(out_ptr.dtype.element_ty), mask=at < count)
