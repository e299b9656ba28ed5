"""The Triton kernels of `triton.py`: block-sparse attention, forward and backward.

A walk is what a tile attends to: the rows of all tiles on its list, cut into chunks of at most 16
rows. A step takes as many chunks as fill a block, whatever tiles they come from, so a small edge
tile costs only its own rows. Whole chunks come first: steps through these need no mask.
"""
# Triton compiles these functions: their pointers, integers and blocks have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language import constexpr

CHUNK = constexpr(16)
"""Rows of a whole chunk: the smallest side of a product on tensor cores."""


class View(NamedTuple):
    """A tensor (B, L, H, D) and its strides; that of D is 1."""

    at: Any
    clip: int
    row: int
    head: int


class Work(NamedTuple):
    """What programs do beside their tensors."""

    blocks: Any
    """(tile, first row, rows) of each program."""
    spans: Any
    """Of each tile's walk: its begin in `chunks`, the end of its whole chunks, its end."""
    chunks: Any
    clip: int
    """Strides of `spans`: 0 if all clips or heads see the same."""
    head: int
    num_rows: int
    root: float
    """What products of queries and keys are multiplied by, for powers of e and of 2."""
    scale: float


@triton.jit
def pack(
    seen,
    starts,
    sizes,
    spans,
    chunks,
    used,
    strides,
    NUM: constexpr,
    BLOCK: constexpr,
    PARTS: constexpr,
):
    """Write the walk of tile n, which sees the tiles of row n of `seen`.

    A chunk is its first row and its number of rows, in one integer.
    """
    n, h, b, j = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.arange(0, BLOCK)
    seen += b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1] + n * strides[2]
    is_seen = tl.load(seen + j * strides[3], j < NUM, other=0) != 0
    size = tl.load(sizes + j, is_seen, other=0).to(tl.int32)
    start = tl.load(starts + j, is_seen, other=0).to(tl.int32)
    whole, rest = size // CHUNK, size % CHUNK
    has_rest = (rest > 0).to(tl.int32)
    num_whole = tl.sum(whole)
    num_all = num_whole + tl.sum(has_rest)
    # Where a walk lies does not matter, so whoever comes first takes the next place.
    first = tl.atomic_add(used, num_all)
    span = spans + ((b * tl.num_programs(1) + h) * NUM + n) * 3
    tl.store(span, first)
    tl.store(span + 1, first + num_whole)
    tl.store(span + 2, first + num_all)
    place = first + tl.cumsum(whole) - whole
    for part in range(PARTS):
        tl.store(chunks + place + part, (start + part * CHUNK) * 32 + CHUNK, mask=part < whole)
    place = first + num_whole + tl.cumsum(has_rest) - has_rest
    tl.store(chunks + place, (start + whole * CHUNK) * 32 + rest, mask=rest > 0)


@triton.jit
def _span(work, tile, BLOCK_N: constexpr):
    """Return where a tile's walk begins, where its steps of whole chunks end, where it ends."""
    span = work.spans + tl.program_id(2) * work.clip + tl.program_id(1) * work.head + tile * 3
    first, whole, end = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    step: constexpr = BLOCK_N // CHUNK
    return first, first + (whole - first) // step * step, end


@triton.jit
def _rows(work, i, end, BLOCK_N: constexpr, MASKED: constexpr):
    """Return the rows of the step at chunk i, and which of them are real."""
    offset = tl.arange(0, BLOCK_N)
    place = i + offset // CHUNK
    if MASKED:
        code = tl.load(work.chunks + place, place < end, other=0)
    else:
        code = tl.load(work.chunks + place)
    return (code >> 5) + offset % CHUNK, offset % CHUNK < (code & 31)


@triton.jit
def _block(work, BLOCK_M: constexpr):
    """Return this program's tile, its rows, and which of them are real."""
    block, offset = work.blocks + tl.program_id(0) * 3, tl.arange(0, BLOCK_M)
    return tl.load(block), tl.load(block + 1) + offset, offset < tl.load(block + 2)


@triton.jit
def _places(view, row, HEAD: constexpr):
    """Return pointers to rows of this program's head, and which channels are not padding."""
    d = tl.arange(0, max(16, triton.next_power_of_2(HEAD)))
    # A batch may exceed 32 bits.
    skip = tl.program_id(2).to(tl.int64) * view.clip + tl.program_id(1).to(tl.int64) * view.head
    return view.at + skip + row[:, None] * view.row + d[None, :], (d < HEAD)[None, :]


@triton.jit
def _load(view, row, real, HEAD: constexpr, MASKED: constexpr):
    """Load rows of this program's head; what is not real is 0."""
    places, is_channel = _places(view, row, HEAD)
    if MASKED:
        x = tl.load(places, real[:, None] & is_channel, other=0.0)
    elif places.shape[1] == HEAD:
        x = tl.load(places)
    else:
        x = tl.load(places, is_channel, other=0.0)
    return x


@triton.jit
def _store(view, row, real, x, HEAD: constexpr):
    places, is_channel = _places(view, row, HEAD)
    tl.store(places, x.to(view.at.dtype.element_ty), real[:, None] & is_channel)


@triton.jit
def _sums(x, num_rows):
    """Return this program's head of a tensor (B, H, L)."""
    return x + (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * num_rows


@triton.jit
def _dot(a, b):
    """Multiply; float32 exactly, not in TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _attend(
    acc, top, total, q, k, v, work, i, end, HEAD: constexpr, BLOCK_N: constexpr, MASKED: constexpr
):
    row, real = _rows(work, i, end, BLOCK_N, MASKED)
    s = _dot(q, tl.trans(_load(k, row, real, HEAD, MASKED)))
    if MASKED:
        s = tl.where(real[None, :], s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1) * work.scale)
    p = tl.exp2(s * work.scale - new[:, None])
    shrink = tl.exp2(top - new)
    y = _load(v, row, real, HEAD, MASKED)
    acc = acc * shrink[:, None] + _dot(p.to(y.dtype), y)
    return acc, new, total * shrink + tl.sum(p, 1)


@triton.jit
def forward(q, k, v, out, lse, work, HEAD: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr):
    """Attend with a block of queries (FlashAttention-2, 2307.08691)."""
    tile, row, real = _block(work, BLOCK_M)
    first, middle, end = _span(work, tile, BLOCK_N)
    x = _load(q, row, real, HEAD, True)
    acc = tl.zeros(x.shape, tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for i in range(first, middle, BLOCK_N // CHUNK):
        acc, top, total = _attend(acc, top, total, x, k, v, work, i, end, HEAD, BLOCK_N, False)
    for i in range(middle, end, BLOCK_N // CHUNK):
        acc, top, total = _attend(acc, top, total, x, k, v, work, i, end, HEAD, BLOCK_N, True)
    _store(out, row, real, acc / total[:, None], HEAD)
    tl.store(_sums(lse, work.num_rows) + row, top + tl.log2(total), real)


@triton.jit
def _grad_q(
    acc,
    q,
    g,
    lse,
    delta,
    k,
    v,
    work,
    i,
    end,
    HEAD: constexpr,
    BLOCK_N: constexpr,
    MASKED: constexpr,
):
    row, real = _rows(work, i, end, BLOCK_N, MASKED)
    x, y = _load(k, row, real, HEAD, MASKED), _load(v, row, real, HEAD, MASKED)
    s = _dot(q, tl.trans(x)) * work.scale
    if MASKED:
        s = tl.where(real[None, :], s, float("-inf"))
    ds = tl.exp2(s - lse[:, None]) * (_dot(g, tl.trans(y)) - delta[:, None])
    return acc + _dot(ds.to(x.dtype), x)


@triton.jit
def backward_q(
    q,
    k,
    v,
    out,
    grad,
    lse,
    delta,
    dq,
    work,
    HEAD: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
):
    """Find the gradient of a block of queries, and `delta`, the sum of out * grad of each row."""
    tile, row, real = _block(work, BLOCK_M)
    first, middle, end = _span(work, tile, BLOCK_N)
    x, g = _load(q, row, real, HEAD, True), _load(grad, row, real, HEAD, True)
    sums = tl.sum(_load(out, row, real, HEAD, True).to(tl.float32) * g.to(tl.float32), 1)
    tl.store(_sums(delta, work.num_rows) + row, sums, real)
    logs = tl.load(_sums(lse, work.num_rows) + row, real, other=0.0)
    acc = tl.zeros(x.shape, tl.float32)
    for i in range(first, middle, BLOCK_N // CHUNK):
        acc = _grad_q(acc, x, g, logs, sums, k, v, work, i, end, HEAD, BLOCK_N, False)
    for i in range(middle, end, BLOCK_N // CHUNK):
        acc = _grad_q(acc, x, g, logs, sums, k, v, work, i, end, HEAD, BLOCK_N, True)
    _store(dq, row, real, acc * work.root, HEAD)


@triton.jit
def _grad_kv(
    dk,
    dv,
    k,
    v,
    q,
    grad,
    lse,
    delta,
    work,
    i,
    end,
    HEAD: constexpr,
    BLOCK_N: constexpr,
    MASKED: constexpr,
):
    row, real = _rows(work, i, end, BLOCK_N, MASKED)
    x, g = _load(q, row, real, HEAD, MASKED), _load(grad, row, real, HEAD, MASKED)
    if MASKED:  # a query that is not real has the weight 2^-inf
        logs = tl.load(lse + row, real, other=float("inf"))
        sums = tl.load(delta + row, real, other=0.0)
    else:
        logs, sums = tl.load(lse + row), tl.load(delta + row)
    p = tl.exp2(_dot(k, tl.trans(x)) * work.scale - logs[None, :])
    ds = p * (_dot(v, tl.trans(g)) - sums[None, :])
    return dk + _dot(ds.to(x.dtype), x), dv + _dot(p.to(g.dtype), g)


@triton.jit
def backward_kv(
    q, k, v, grad, lse, delta, dk, dv, work, HEAD: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr
):
    """Find the gradients of a block of keys and values; its walk is over queries that see it."""
    tile, row, real = _block(work, BLOCK_M)
    first, middle, end = _span(work, tile, BLOCK_N)
    x, y = _load(k, row, real, HEAD, True), _load(v, row, real, HEAD, True)
    logs, sums = _sums(lse, work.num_rows), _sums(delta, work.num_rows)
    dx, dy = tl.zeros(x.shape, tl.float32), tl.zeros(x.shape, tl.float32)
    for i in range(first, middle, BLOCK_N // CHUNK):
        dx, dy = _grad_kv(dx, dy, x, y, q, grad, logs, sums, work, i, end, HEAD, BLOCK_N, False)
    for i in range(middle, end, BLOCK_N // CHUNK):
        dx, dy = _grad_kv(dx, dy, x, y, q, grad, logs, sums, work, i, end, HEAD, BLOCK_N, True)
    _store(dk, row, real, dx * work.root, HEAD)
    _store(dv, row, real, dy, HEAD)


@triton.jit
def means(x, out, starts, sizes, HEAD: constexpr):
    """Average the rows of tile n in float32, always in the same order, unlike `index_add`."""
    n, offset = tl.program_id(0), tl.arange(0, CHUNK)
    start, size = tl.load(starts + n).to(tl.int32), tl.load(sizes + n).to(tl.int32)
    acc = tl.zeros([CHUNK, max(16, triton.next_power_of_2(HEAD))], tl.float32)
    for first in range(0, size, CHUNK):
        real = first + offset < size
        acc += _load(x, start + first + offset, real, HEAD, True).to(tl.float32)
    mean = tl.sum(acc, 0)[None, :] / size
    _store(out, n + tl.arange(0, 1), tl.full([1], True, tl.int1), mean, HEAD)
