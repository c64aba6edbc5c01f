"""The device code of the Triton backend: Philox, bit planes, and the three kernels.

A tile is ``ROWS`` rows of the tensor. A thread makes the words of whole Philox blocks, 128 decisions at a
time. Then the words change threads: the thread of 8 neighbours takes one byte. So a block is computed once
for its 128 elements, and loads and stores remain 16 bytes wide.
"""

# No `from __future__ import annotations`: Triton reads the types below.
import triton
import triton.language as tl

__all__ = ["fold", "shift", "tile"]


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr):
    """Philox4x32 on uint32 words, with any number of rounds."""
    for _ in tl.static_range(ROUNDS):
        # One instruction gives both halves of a product; umulhi and a product are two.
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0, product1.to(tl.uint32)
        c2, c3 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1, product0.to(tl.uint32)
        k0, k1 = k0 + tl.full([], 0x9E3779B9, tl.uint32), k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _plane(low, high, plane, k0, k1):
    """The four words of one bit plane of each block, whose number is in two words."""
    return _philox(low, high, plane, tl.full([], 0, tl.uint32), k0, k1, 7)


@triton.jit
def _step(low, high, plane, k0, k1, T, l0, l1, l2, l3, u0, u1, u2, u3):
    """One more plane: what is below ``T`` by now, and what equals its bits so far."""
    w0, w1, w2, w3 = _plane(low, high, plane, k0, k1)
    limit = ((T << plane).to(tl.int32, bitcast=True) >> 31).to(tl.uint32, bitcast=True)
    d0, d1, d2, d3 = u0 & (w0 ^ limit), u1 & (w1 ^ limit), u2 & (w2 ^ limit), u3 & (w3 ^ limit)
    l0, l1, l2, l3 = l0 | (d0 & limit), l1 | (d1 & limit), l2 | (d2 & limit), l3 | (d3 & limit)
    return l0, l1, l2, l3, u0 ^ d0, u1 ^ d1, u2 ^ d2, u3 ^ d3


@triton.jit
def _below(low, high, k0, k1, T, u0, u1, u2, u3, HEAD: tl.constexpr, MORE: tl.constexpr):
    """Where ``u < T``, as four words a block; only the bits set in ``u0`` to ``u3`` are asked for.

    ``HEAD`` planes are read without asking whether they are needed, further ones until all bits are decided.
    """
    l0, l1, l2, l3 = u0 ^ u0, u1 ^ u1, u2 ^ u2, u3 ^ u3
    for plane in tl.static_range(HEAD):
        at = tl.full([], plane, tl.uint32)
        l0, l1, l2, l3, u0, u1, u2, u3 = _step(low, high, at, k0, k1, T, l0, l1, l2, l3, u0, u1, u2, u3)
    if MORE:
        plane = tl.full([], HEAD, tl.uint32)
        while (plane < 32) & (tl.max(tl.reshape(u0 | u1 | u2 | u3, [u0.numel])) != 0):
            l0, l1, l2, l3, u0, u1, u2, u3 = _step(
                low, high, plane, k0, k1, T, l0, l1, l2, l3, u0, u1, u2, u3
            )
            plane += 1
    return l0, l1, l2, l3


@triton.jit
def _spread(w0, w1, w2, w3, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """The bits of four words a block, as 0 or not 0, in ``[ROWS, BLOCKS * 128]``."""
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, BLOCKS * 4])
    # A byte at a time: the 8 bits of a thread that holds 8 elements are then at places known to the compiler.
    eights = words[:, :, None] >> (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, :]
    bits = eights[:, :, :, None] & (1 << tl.arange(0, 8)).to(tl.uint32)[None, None, None, :]
    return tl.reshape(bits, [ROWS, BLOCKS * 128])


@triton.jit
def _real(bits, DOUBLE: tl.constexpr):
    """A floating-point argument from its bits: as such, Triton would round it to float32."""
    if DOUBLE:
        return tl.full([], bits, tl.int64).to(tl.float64, bitcast=True)
    else:
        return tl.full([], bits, tl.int64).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _widened(x, DOUBLE: tl.constexpr):
    """``x`` in opmath; an int16 stands for the bits of a bfloat16."""
    if DOUBLE:
        return x
    elif x.dtype == tl.int16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """``value`` rounded to a dtype, of which int16 stands for bfloat16."""
    if dtype == tl.int16:
        bits = value.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        return (tl.where(value == value, even, bits) >> 16).to(tl.int16)
    else:
        return value.to(dtype)


@triton.jit
def _multiple(value, LOG2: tl.constexpr):
    """``value``, a multiple of ``2**LOG2``, in a form in which the compiler sees that it is one."""
    if LOG2 == 0:
        return value
    else:
        return (value >> LOG2) << LOG2


@triton.jit
def _offset(i0, i1, i2, i3, s0, s1, s2, s3, DIMS: tl.constexpr, UNIT: tl.constexpr):
    if UNIT:
        at = i0
    else:
        at = i0 * s0
    if DIMS > 1:
        at += i1 * s1
    if DIMS > 2:
        at += i2 * s2
    if DIMS > 3:
        at += i3 * s3
    return at


@triton.jit
def _split(i, size, LONG: tl.constexpr):
    """``i % size`` and ``i // size``; dividing 64 bits is a call that spills registers of large tiles."""
    if not LONG:
        i, size = i.to(tl.uint32), tl.full([], size, tl.int64).to(tl.uint32)  # a size of 1 is a constexpr
    return (i % size).to(tl.int64), (i // size).to(tl.int64)


_SIZES = ["cols", "col_tiles", "rows", "n0", "n1", "n2"]
_STRIDES = ["x_col", "x0", "x1", "x2", "x3", "out_col", "out0", "out1", "out2", "out3"]
_STRIDES += ["m0", "m1", "m2", "m3", "key0", "key1", "key2", "key3"]
_NUMBERS = ["key_low", "key_high", "base", "T", "scale", "shift", "fill"]


@triton.jit(do_not_specialize=_NUMBERS + _SIZES + _STRIDES)
def tile(
    x_ptr, out_ptr, key_ptr,
    key_low: tl.int64, key_high: tl.int64, base: tl.int64, T: tl.int64,
    scale: tl.int64, shift: tl.int64, fill: tl.int64,
    cols: tl.int64, col_tiles: tl.int64, x_col: tl.int64, out_col: tl.int64,
    rows: tl.int64, n0: tl.int64, n1: tl.int64, n2: tl.int64,
    x0: tl.int64, x1: tl.int64, x2: tl.int64, x3: tl.int64,
    out0: tl.int64, out1: tl.int64, out2: tl.int64, out3: tl.int64,
    m0: tl.int64, m1: tl.int64, m2: tl.int64, m3: tl.int64,
    key0: tl.int64, key1: tl.int64, key2: tl.int64, key3: tl.int64,
    DIMS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
    HEAD: tl.constexpr, MORE: tl.constexpr, ALL: tl.constexpr, NUMBERS: tl.constexpr, PLAIN: tl.constexpr,
    DOUBLE: tl.constexpr, LEAD: tl.constexpr, LOG_VECTOR: tl.constexpr, X_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr, ROW_UNIT: tl.constexpr, LOG_ROWS: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """One tile of ``ROWS`` rows.

    ``BLOCKS`` blocks of a row decide its elements one by one; with ``BLOCKS`` 0 one decision is made for each
    row, and shared by ``COLS`` of its elements. An element has ``PARTS`` numbers: 2 where it is complex.
    """
    pid = tl.program_id(0).to(tl.int64)
    if DIMS == 0:
        col_tile = pid
        r = tl.zeros([ROWS, 1], tl.int64)
        first, x_at, out_at, key_at = base + r, r, r, r
    else:
        col_tile, row_tile = _split(pid, col_tiles, False)
        r = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
        in_rows = r < rows
        i0, i1, i2, i3 = r, r, r, r
        if DIMS > 1:
            i0, i1 = _split(r, _multiple(n0, LOG_ROWS), LONG)
        if DIMS > 2:
            i1, i2 = _split(i1, n1, LONG)
        if DIMS > 3:
            i2, i3 = _split(i2, n2, LONG)
        first = base + _offset(i0, i1, i2, i3, m0, m1, m2, m3, DIMS, False)
        x_at = _offset(i0, i1, i2, i3, x0, x1, x2, x3, DIMS, ROW_UNIT)
        out_at = _offset(i0, i1, i2, i3, out0, out1, out2, out3, DIMS, ROW_UNIT)
        key_at = _offset(i0, i1, i2, i3, key0, key1, key2, key3, DIMS, False)

    # Which elements of the rows are in this tile.
    q = tl.arange(0, COLS * PARTS)[None, :]
    start = col_tile * COLS
    high = cols - start
    if LEAD:  # the tile begins at a whole block, ahead of the row's first element
        lead = first & 127
        high += lead
        low = tl.where(col_tile == 0, lead, 0)
        start = start - lead
    high = _multiple(tl.minimum(high, COLS).to(tl.int32) * PARTS, LOG_VECTOR)
    if LEAD:
        inside = (q >= _multiple(low.to(tl.int32) * PARTS, LOG_VECTOR)) & (q < high)
    else:
        inside = q < high
    if DIMS > 0:
        inside = inside & in_rows
    if X_UNIT:
        x_at = _multiple(x_at + start * PARTS, LOG_VECTOR) + q
    else:
        x_at = _multiple(x_at + start * x_col, LOG_VECTOR) + (q // PARTS) * x_col + q % PARTS
    if OUT_UNIT:
        out_at = _multiple(out_at + start * PARTS, LOG_VECTOR) + q
    else:
        out_at = _multiple(out_at + start * out_col, LOG_VECTOR) + (q // PARTS) * out_col + q % PARTS
    if x_ptr is not None:
        x = tl.load(x_ptr + x_at, mask=inside)  # first, so that it arrives while the mask is made

    if key_ptr is None:
        k0 = tl.full([], key_low, tl.int64).to(tl.uint32)
        k1 = tl.full([], key_high, tl.int64).to(tl.uint32)
    else:
        if DIMS > 0:
            key = tl.load(key_ptr + key_at, mask=in_rows, other=0)
        else:
            key = tl.load(key_ptr + key_at)
        k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    threshold = tl.full([], T, tl.int64).to(tl.uint32)

    if BLOCKS > 0:
        block = (first >> 7) + col_tile * BLOCKS + tl.arange(0, BLOCKS)[None, :]
        ones = tl.full([ROWS, BLOCKS], 0xFFFFFFFF, tl.uint32)
        u0, u1, u2, u3 = ones, ones, ones, ones
    else:
        block = first >> 7
        bit, one = (first & 127).to(tl.int32), tl.full([ROWS, 1], 1, tl.uint32)
        one = one << (bit & 31).to(tl.uint32)
        u0, u1 = tl.where(bit < 32, one, 0), tl.where((bit >= 32) & (bit < 64), one, 0)
        u2, u3 = tl.where((bit >= 64) & (bit < 96), one, 0), tl.where(bit >= 96, one, 0)

    low_word, high_word = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    if NUMBERS:
        number = tl.zeros([ROWS, COLS], tl.int32)
        for plane in range(32):
            w0, w1, w2, w3 = _plane(low_word, high_word, tl.full([], plane, tl.uint32), k0, k1)
            if BLOCKS > 0:
                number = (number << 1) | (_spread(w0, w1, w2, w3, ROWS, BLOCKS) != 0).to(tl.int32)
            else:
                number = (number << 1) | (((w0 & u0) | (w1 & u1) | (w2 & u2) | (w3 & u3)) != 0).to(tl.int32)
        tl.store(out_ptr + out_at, number ^ -0x80000000, mask=inside)
    else:
        if ALL:
            l0, l1, l2, l3 = u0, u1, u2, u3
        else:
            l0, l1, l2, l3 = _below(low_word, high_word, k0, k1, threshold, u0, u1, u2, u3, HEAD, MORE)
        if BLOCKS > 0:
            keep = _spread(l0, l1, l2, l3, ROWS, BLOCKS) != 0
        else:
            keep = (l0 | l1 | l2 | l3) != 0
        keep = tl.broadcast_to(keep, [ROWS, COLS])
        if PARTS == 2:
            keep = tl.reshape(tl.broadcast_to(keep[:, :, None], [ROWS, COLS, 2]), [ROWS, COLS * 2])
        if x_ptr is None:
            tl.store(out_ptr + out_at, keep.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            value = _widened(x, DOUBLE)
            if PLAIN:  # shift and fill are 0; a select before the product saves bfloat16 1.4 instructions
                value = tl.where(keep, value, 0.0) * _real(scale, DOUBLE)
            else:
                value = value * _real(scale, DOUBLE)
                value = tl.where(keep, value + _real(shift, DOUBLE), _real(fill, DOUBLE))
            tl.store(out_ptr + out_at, _rounded(value, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key", "key_step", "data", "data_step", "count"])
def fold(
    out_ptr, key_ptr, key: tl.int64, key_step: tl.int64, data_ptr, data: tl.int64, data_step: tl.int64,
    count: tl.int64, SIZE: tl.constexpr,
):  # fmt: skip
    """The children of ``SIZE`` keys."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    keys, ids = tl.full([SIZE], key, tl.int64), tl.full([SIZE], data, tl.int64)
    if key_ptr is not None:
        keys = tl.load(key_ptr + at * key_step, mask=inside)
    if data_ptr is not None:
        ids = tl.load(data_ptr + at * data_step, mask=inside)
    zero = tl.zeros([SIZE], tl.uint32)
    low, high, _, _ = _philox(
        ids.to(tl.uint32), (ids >> 32).to(tl.uint32), zero, zero + 1,
        keys.to(tl.uint32), (keys >> 32).to(tl.uint32), 10,
    )  # fmt: skip
    tl.store(out_ptr + at, low.to(tl.int64) | (high.to(tl.int64) << 32), mask=inside)


@triton.jit(do_not_specialize=["columns", "period", "count", "strata", "prime"])
def shift(
    out_ptr, u_ptr, v_ptr, draw_ptr, columns: tl.int64, period: tl.int64, count: tl.int64, strata: tl.int64,
    prime: tl.int64, SIZE: tl.constexpr,
):  # fmt: skip
    """``SIZE`` numbers of stratified draws from those of their set, which repeat after ``period`` numbers.

    The permutation is that of :func:`thinned.backends.strata.places`.
    """
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    u = tl.load(u_ptr + at % period, mask=inside)
    v = (tl.load(v_ptr + at % period, mask=inside) ^ -0x80000000).to(tl.uint32, bitcast=True)
    draw = tl.load(draw_ptr + at // columns, mask=inside, other=0) % strata
    S, P = tl.full([], strata, tl.int64).to(tl.uint32), tl.full([], prime, tl.int64).to(tl.uint32)
    a, b = 1 + ((v >> 16) * (P - 1) >> 16), (v & 0xFFFF) * P >> 16
    x = (a * tl.where(draw < 0, draw + strata, draw).to(tl.uint32) + b) % P
    left = tl.full([], prime, tl.int64) - strata
    while left > 0:  # not range(): Triton 3.6 interprets that by an int() that recent NumPy refuses
        x = tl.where(x >= S, (a * x + b) % P, x)
        left -= 1
    width = ((1 << 32) // tl.full([], strata, tl.int64)).to(tl.uint32)
    tl.store(out_ptr + at, u + (x * width).to(tl.int32, bitcast=True), mask=inside)
