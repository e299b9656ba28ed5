"""Choosing an attention backend: each says why it cannot serve, the first in `order` of the others
is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo import registry
from fastvideo.attention.layout import Layout, plan
from fastvideo.attention.order import Need as Need
from fastvideo.attention.order import place
from fastvideo.attention.pattern import Dense, Pattern, Vsa, write
from fastvideo.log import logger
from fastvideo.shapes import TokenGrid

PACKAGE = "fastvideo.attention.backends"
EXAMPLE_GRID = TokenGrid(8, 16, 16)


class Backend(Protocol):
    """A module under `backends/`. Softmax scale 1 / sqrt(D), no mask but the layout's."""

    @property
    def __name__(self) -> str: ...

    def unsupported(self, need: Need) -> str | None:
        """Say why `need` cannot be served, and what would help; None if it can."""

    def describe(self, need: Need) -> str:
        """Name the kernel that will run, for the log."""

    attend: Callable[..., Tensor]
    """`attend(q_BLHD, k_BSHD, v_BSHD, layout)`: softmax(q k / sqrt(D)) v under the layout's
    pattern, (B, L, H, D). Backends that serve VSA also take `gate_BLHD`, the coarse branch's
    weight."""


class Attend(Protocol):
    """What a network calls. Self-attention passes its layout, cross-attention none."""

    def __call__(
        self,
        q_BLHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        *,
        layout: Layout | None = None,
        gate_BLHD: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Attention:
    """An `Attend` with one backend for self-attention and one for cross-attention."""

    self_backend: Backend
    cross_backend: Backend

    @property
    def names(self) -> dict[str, str]:
        """The names of both backends, for a recipe."""
        pair = {"self": self.self_backend, "cross": self.cross_backend}
        return {key: backend.__name__.rpartition(".")[2] for key, backend in pair.items()}

    def __call__(
        self,
        q_BLHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        *,
        layout: Layout | None = None,
        gate_BLHD: Tensor | None = None,
    ) -> Tensor:
        """Attend with the backend for self-attention if there is a layout, else with the other."""
        backend = self.cross_backend if layout is None else self.self_backend
        if gate_BLHD is None:
            return backend.attend(q_BLHD, k_BSHD, v_BSHD, layout)
        assert layout is not None and isinstance(layout.pattern, Vsa), "only VSA has gates"
        return backend.attend(q_BLHD, k_BSHD, v_BSHD, layout, gate_BLHD)


def plain(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    *,
    layout: Layout | None = None,
    gate_BLHD: Tensor | None = None,
) -> Tensor:
    """Attend densely with SDPA, the network's default when its caller chose nothing."""
    assert gate_BLHD is None and (layout is None or layout.pattern == Dense()), "dense only"
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def choose(
    name: str = "auto",
    *,
    layout: Layout | None,
    dtype: torch.dtype,
    device: torch.device | str,
    needs_grad: bool,
    num_keys: int | None = None,
    head_dim: int = 128,
) -> Backend:
    """Return the backend `name`, or the fastest that serves the call; log the decision.

    If none does, the `ValueError` quotes the reason of the named one, or of every one for "auto".
    """
    if num_keys is None and layout is not None:
        num_keys = layout.grid.num_tokens
    need = Need(layout, dtype, torch.device(device), needs_grad, num_keys, head_dim)
    names = registry.names(PACKAGE) if name == "auto" else [name]
    backends = {n: cast(Backend, registry.module(PACKAGE, n)) for n in names}
    reasons = {n: b.unsupported(need) for n, b in backends.items()}
    usable = [n for n in names if reasons[n] is None]
    if not usable:
        quoted = "; ".join(f"{n}: {reason}" for n, reason in reasons.items())
        raise ValueError(f"no attention backend for {_words(need)} (asked for {name!r}): {quoted}")
    best, *slower = sorted(usable, key=lambda n: place(n, need))
    logger.info(
        "attention for %s: %s (%s)%s%s",
        _words(need),
        best,
        backends[best].describe(need),
        f"; expected slower: {', '.join(slower)}" if slower else "",
        _others(reasons),
    )
    return backends[best]


def select(
    name: str = "auto",
    *,
    layout: Layout,
    num_text_tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
    needs_grad: bool,
    head_dim: int,
) -> Attention:
    """Choose for a network's self-attention under `layout` and its cross-attention to the text.

    Cross-attention is dense: where the pattern is not, `name` means self-attention alone.
    """
    pick = functools.partial(
        choose, dtype=dtype, device=device, needs_grad=needs_grad, head_dim=head_dim
    )
    cross = name if layout.pattern == Dense() else "auto"
    return Attention(pick(name, layout=layout), pick(cross, layout=None, num_keys=num_text_tokens))


def table(
    pattern: Pattern | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    needs_grad: bool = False,
    grid: TokenGrid = EXAMPLE_GRID,
) -> list[tuple[str, str]]:
    """List each backend with "chosen", "usable" or why it cannot serve a pattern, for `doctor`."""
    layout = plan(pattern or Dense(), grid, "cpu")  # index tensors are not looked at
    need = Need(layout, dtype, torch.device(device), needs_grad, grid.num_tokens)
    backends = {n: cast(Backend, registry.module(PACKAGE, n)) for n in registry.names(PACKAGE)}
    reasons = {n: b.unsupported(need) for n, b in backends.items()}
    usable = [n for n in backends if reasons[n] is None]
    best = min(usable, key=lambda n: place(n, need), default="")
    return [(n, reasons[n] or ("chosen" if n == best else "usable")) for n in backends]


def _words(need: Need) -> str:
    pattern = "no layout" if need.layout is None else _pattern_words(need.layout)
    dtype = str(need.dtype).removeprefix("torch.")
    keys = "any number of" if need.num_keys is None else str(need.num_keys)
    grad = "training" if need.needs_grad else "inference"
    return f"{pattern}, {keys} keys, head {need.head_dim}, {dtype}, {need.device.type}, {grad}"


def _pattern_words(layout: Layout) -> str:
    """Name the pattern, its number of tiles, and how many of them a query tile sees under VSA."""
    if layout.tiles is None:
        return write(layout.pattern)
    text = f"{write(layout.pattern)}, {layout.tiles.num} tiles"
    if not isinstance(layout.pattern, Vsa):
        return text
    return f"{text}, {layout.pattern.num_selected(layout.tiles.num)} seen by each"


def _others(reasons: dict[str, str | None]) -> str:
    return "".join(f"; not {n}: {reason}" for n, reason in reasons.items() if reason)
