"""Block-sparse attention for NVIDIA GPUs, forward and backward, in Triton.

Tiles are read where they lie, in any strides. What is executed are rows of tiles, rounded up to 16
on the side that is walked and to 16, 32 or 64 on the other: `issued` counts it. PyTorch for CUDA
brings Triton on Linux; without a GPU, TRITON_INTERPRET=1 runs the kernels in NumPy.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import threading
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastvideo.attention import sparse
from fastvideo.attention.choice import Need
from fastvideo.attention.first_calls import FirstCalls
from fastvideo.attention.layout import Lists, Tiles

_CHUNK = 16
_BLOCK = 64
"""Rows of a program, as far as its tile has them: the least that Hopper's products take."""
_LOG2_E = 1.4426950408889634
_HALF = (torch.bfloat16, torch.float16)
_MAX_HEAD = 128
_MIN_CAPABILITY = (8, 0)
# Rows in a step, warps, stages: the first run on a GPU tries them all. As rows are looked up before
# they are loaded, 3 stages load one step ahead and 5 two. None spills registers on sm_90.
_CONFIGS = {
    "forward": ((64, 4, 3), (64, 4, 5), (32, 4, 5)),
    "backward_q": ((64, 4, 3), (32, 4, 5)),
    "backward_kv": ((64, 8, 3), (32, 4, 3), (32, 4, 5)),
}
_FIXED_HALF = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
_FIXED = {"BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
_LAUNCHES = threading.Lock()


def unsupported(need: Need) -> str | None:
    """Sparse patterns on an NVIDIA GPU with tensor cores for bfloat16, or in the interpreter."""
    if need.is_dense:
        return "serves sparse patterns only"
    if importlib.util.find_spec("triton") is None:
        return "not installed: pip install triton (Linux only)"
    if need.head_dim > _MAX_HEAD:
        return f"needs heads of at most {_MAX_HEAD} channels, not {need.head_dim}"
    dtype = str(need.dtype).removeprefix("torch.")
    # The interpreter has float32 only; Triton is not imported (0.3 s) where it could not serve.
    if need.device.type == "cpu" and need.dtype == torch.float32 and _is_interpreted():
        return None
    if need.device.type != "cuda":
        return f"needs an NVIDIA GPU, not {need.device.type}"
    if _is_interpreted():
        return "TRITON_INTERPRET is set, which interprets on the CPU"
    if need.dtype not in (*_HALF, torch.float32):
        return f"needs bfloat16, float16 or float32, not {dtype}"
    capability = torch.cuda.get_device_capability(need.device)
    return None if capability >= _MIN_CAPABILITY else f"needs compute capability {_MIN_CAPABILITY}"


def describe(need: Need) -> str:
    """Say where the kernels run, and what their first calls cost."""
    if need.device.type != "cuda":
        return "Triton kernels, interpreted"
    told = f"took {compile_s():.0f} s so far" if compile_s() else "takes seconds, told in the log"
    return f"Triton kernels; compiling and tuning each at its first call {told}"


def fine(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, tiles: Tiles, lists: Lists) -> Tensor:
    """Attend with one program for each block of queries and each head."""
    return _apply(_Fine, q_BLHD, k_BLHD, v_BLHD, tiles, lists)


def means(x_BLHD: Tensor, tiles: Tiles) -> Tensor:
    """Do what `sparse.mean` does without copies in float32."""
    return _apply(_Means, x_BLHD, tiles)


attend = sparse.Tiled(fine, means)


def issued(tiles: Tiles, lists: Lists) -> float:
    """Return the query-key products that the forward pass executes over those that it needs."""
    sizes_N = tiles.sizes_N.double()
    rows_N = torch.zeros_like(sizes_N)
    for size, blocks in _blocks(tiles).items():
        rows_N.index_add_(0, blocks[:, 0], rows_N.new_full((len(blocks),), size))
    seen_BHNN = sparse.seen(lists, tiles.num).double()
    chunks_BHN = seen_BHNN @ (sizes_N / _CHUNK).ceil()
    keys_BHN = (chunks_BHN * _CHUNK / _BLOCK).ceil() * _BLOCK
    return float((keys_BHN @ rows_N).sum() / ((seen_BHNN @ sizes_N) @ sizes_N).sum())


def compile_s() -> float:
    """Return the seconds that the first calls of all kernels took together, so far."""
    return sum(_first_calls().seconds.values())


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Call a function that PyTorch's compiler must not look into."""
    call: Callable[..., Tensor] = _apply_alone
    if torch.compiler.is_compiling():  # otherwise `disable` would load the compiler, for seconds
        call = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
    # Triton launches on the current device.
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        return call(function, *arguments)


def _apply_alone(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Launch from one thread at a time: Triton's tuner keeps a call's arguments in itself."""
    call: Callable[..., Tensor] = function.apply
    with _LAUNCHES:
        return call(*arguments)


class _Fine(torch.autograd.Function):
    """FlashAttention-2 (2307.08691) over lists: keeps log-sum-exps, computes weights again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, lists: Lists) -> Tensor:
        q, k, v = (_with_rows(x) for x in (q, k, v))
        batch, length, heads, _ = q.shape
        out_BLHD = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse_BHL = q.new_empty(batch, heads, length, dtype=torch.float32)
        seen_BHNN, capacity = sparse.seen(lists, tiles.num), lists.index_BHNK.numel()
        walks = _walks(seen_BHNN, tiles, capacity)
        _launch("forward", (q, k, v, out_BLHD, lse_BHL), tiles, walks)
        ctx.save_for_backward(q, k, v, out_BLHD, lse_BHL, seen_BHNN)
        ctx.tiles, ctx.capacity = tiles, capacity
        return out_BLHD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, seen = ctx.saved_tensors
        grad, delta = _with_rows(grads[0]), torch.empty_like(lse)
        dq, dk, dv = (torch.empty_like(out) for _ in range(3))
        walks = _walks(seen, ctx.tiles, ctx.capacity)
        _launch("backward_q", (q, k, v, out, grad, lse, delta, dq), ctx.tiles, walks)
        walks = _walks(seen.transpose(-1, -2), ctx.tiles, ctx.capacity)
        _launch("backward_kv", (q, k, v, grad, lse, delta, dk, dv), ctx.tiles, walks)
        return dq, dk, dv, None, None


class _Means(torch.autograd.Function):
    """The mean of each tile, and its gradient handed back to the tile's tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tiles: Tiles) -> Tensor:
        ctx.tiles, x = tiles, _with_rows(x)
        batch, _, heads, size = x.shape
        mean_BNHD = x.new_empty(batch, tiles.num, heads, size)
        grid = (tiles.num, heads, batch)
        _kernels().means[grid](_view(x), _view(mean_BNHD), tiles.starts_N, tiles.sizes_N, HEAD=size)
        return mean_BNHD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        share_BNHD = (grads[0].float() / ctx.tiles.sizes_N.view(-1, 1, 1)).to(grads[0].dtype)
        return share_BNHD.index_select(1, ctx.tiles.tile_L), None


def _with_rows(x_BLHD: Tensor) -> Tensor:
    """Return the tensor itself if its channels are neighbours; gradients may be expanded."""
    assert x_BLHD.shape[1] * x_BLHD.stride(1) < 1 << 31, "kernels count a clip's rows in 32 bits"
    return x_BLHD if x_BLHD.stride(-1) == 1 else x_BLHD.contiguous()


def _walks(seen_BHNN: Tensor, tiles: Tiles, capacity: int) -> tuple[Any, ...]:
    """List the chunks of rows that each tile's row of `seen_BHNN` names, without the host.

    `capacity` bounds the pairs of tiles, which are as many when seen from the other side.
    """
    batch, heads, num, _ = seen_BHNN.shape
    parts = -(-tiles.num_slots // _CHUNK)
    assert capacity * parts < 1 << 31, "kernels count chunks in 32 bits"
    empty = functools.partial(torch.empty, dtype=torch.int32, device=seen_BHNN.device)
    spans_BHN3, chunks = empty(batch, heads, num, 3), empty(capacity * parts)
    _kernels().pack[(num, heads, batch)](
        seen_BHNN,
        tiles.starts_N,
        tiles.sizes_N,
        spans_BHN3,
        chunks,
        empty(1).zero_(),
        seen_BHNN.stride(),
        BLOCK=1 << (num - 1).bit_length(),
        PARTS=parts,
        NUM=num,
    )
    clip, head = (0 if n == 1 else spans_BHN3.stride(i) for i, n in enumerate((batch, heads)))
    return spans_BHN3, chunks, clip, head


def _view(x_BLHD: Tensor) -> Any:
    return _kernels().View(x_BLHD, *x_BLHD.stride()[:3])


def _launch(name: str, tensors: tuple[Tensor, ...], tiles: Tiles, walks: tuple[Any, ...]) -> None:
    """Run a kernel on all blocks of all heads; tensors (B, L, H, D) bring their strides."""
    batch, length, heads, size = tensors[0].shape
    views = [_view(x) if x.ndim == 4 else x for x in tensors]
    root = 1 / math.sqrt(size)
    is_half = tensors[0].dtype in _HALF
    for rows, blocks in _blocks(tiles).items():
        # Small tiles are few: not worth the time that a search would take.
        is_tuned = is_half and rows == _BLOCK
        scale = tiles.num.bit_length() if is_tuned else 0  # a fast step for many tiles, or for few
        kernel = _tuned(name, scale) if is_tuned else vars(_kernels())[name]
        options = {} if is_tuned else _FIXED_HALF if is_half else _FIXED
        work = _kernels().Work(blocks, *walks, length, root, root * _LOG2_E)
        run = functools.partial(kernel[(len(blocks), heads, batch)], *views, work)
        key = (name, tensors[0].dtype, tensors[0].device, size, rows, scale)
        _first_calls().timed(key, lambda: run(HEAD=size, BLOCK_M=rows, **options))  # noqa: B023


@functools.lru_cache(maxsize=16)
def _blocks(tiles: Tiles) -> dict[int, Tensor]:
    """Cut tiles into blocks; return (tile, first row, rows) of each, by rows rounded up.

    Reads sizes back from the device, once for a layout.
    """
    blocks = defaultdict(list)
    pairs = zip(tiles.starts_N.tolist(), tiles.sizes_N.tolist(), strict=True)
    for tile, (start, size) in enumerate(pairs):
        for first in range(0, size, _BLOCK):
            rows = min(_BLOCK, size - first)
            blocks[max(_CHUNK, 1 << (rows - 1).bit_length())].append((tile, start + first, rows))
    device = tiles.sizes_N.device
    return {
        rows: torch.tensor(blocks[rows], dtype=torch.int32, device=device)
        for rows in sorted(blocks, reverse=True)
    }


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("fastvideo.attention.triton_kernels")


@functools.cache
def _first_calls() -> FirstCalls:
    return FirstCalls("triton")


@functools.cache
def _tuned(name: str, scale: int) -> Any:
    """Return a kernel that tries its configurations once for each head size, and each `scale`."""
    triton = _kernels().triton
    configs = [
        triton.Config({"BLOCK_N": step}, num_warps=warps, num_stages=stages)
        for step, warps, stages in _CONFIGS[name]
    ]
    return triton.autotune(configs, key=["HEAD"])(vars(_kernels())[name])


def _is_interpreted() -> bool:
    return bool(importlib.import_module("triton").knobs.runtime.interpret)
