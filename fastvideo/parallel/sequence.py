"""Sequence parallelism, applied from outside: one clip's tokens are spread over processes.

    denoiser = spread(dit, meshes)           # `dit` itself where the axis "sequence" has size 1
    v_BCTHW = denoiser(x_BCTHW, t_BT, cond, attend=attend, layout=layout)

Every process of the axis gives the same latents, times and text, and gets the same, whole velocity.
The network knows nothing of it: what is spread is the data between its three functions.

    embed     everywhere, of all tokens; each process then keeps its own, in the layout's order
    blocks    on its own tokens: a shard carries its own rotary turns and frame numbers, so nothing
              but self-attention differs from a shorter clip
    head      on its own tokens, as if they were one row of a picture; the patches are gathered

Tokens are split, not latent frames, so any number of them divides: parts differ by one at most, and
nothing is padded that an attention could see. A network takes part if its tokens are a dataclass
with the fields of `Tokens` below, and its `blocks` and `head` treat each token by itself but for
calls of `attend`; each family's contract test says whether it does.

**Self-attention** needs all tokens. Two ways, and their product: `ulysses` x `ring`.

- Ulysses (2309.14509): one all-to-all turns q, k, v (and VSA's gate, in the same exchange) from
  some tokens of all heads into all tokens of some heads, and the result is turned back. Between the
  two, the caller's own `attend` runs on whole sequences, so VSA, STA and every backend work
  unchanged; STA's windows are those of the heads at hand. Heads are split whole: 12 over 8 is
  2 2 2 2 1 1 1 1, exact but in attention as slow as 12 over 6. Over more processes than heads,
  some have none.
- Ring (2310.01889, `ring.py`): keys and values travel. For any number of heads, but dense
  attention only, by plain PyTorch in place of `attend`; a `ValueError` refuses other patterns
  (`rules.check` does before any weight is loaded).

With both, the tokens of neighbours on "ulysses" are one block of "ring". Cross-attention to the
text, whose layout is None, stays local: every process holds the whole text.

**Gradients.** All processes must compute the same loss of the whole output (same targets, same
random numbers), and each runs its own backward pass. Then:

- The gradient of a *parameter* is a part on each process, and their sum over the axis "sequence" is
  the gradient of a single process. This holds for every parameter, also of embeddings and head: a
  process back-propagates through its own tokens alone. `collectives.sum_gradients(params, axis)`
  sums them after all backward passes of an update; a strategy that averages over all processes
  multiplies by the axis's size instead. The same rule serves whatever made the text.
- The gradient of the *latents* is whole on each process, so that one call's result may be the next
  one's input, and a generator's output a critic's input, without a thought.

Backward passes communicate in the order of the forward one, reversed. Activation checkpointing
repeats the collectives of what it computes again, on all processes alike.

`spread` calls `embed`, `blocks`, `head` and `prepare` of the network, never its `forward`: hooks or
compilation that should take part must be on these (FSDP2: `register_fsdp_forward_method`). A
compiled layer is interrupted at its self-attention, which runs as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastvideo.attention import Attend, Dense, Layout, Sta, plain
from fastvideo.attention.layout import Lists
from fastvideo.parallel import ring, rules
from fastvideo.parallel.axis import Axis
from fastvideo.parallel.collectives import exchange, gather, own, replicated, shares
from fastvideo.shapes import TokenGrid

if TYPE_CHECKING:
    from fastvideo.parallel.mesh import Meshes


class Tokens(Protocol):
    """The fields that are spread, of a dataclass that may have others; L is their only length."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def x_BLC(self) -> Tensor:
        """The tokens, in the layout's order."""

    @property
    def turn_LF2(self) -> Tensor:
        """Their rotary turns."""

    @property
    def frame_L(self) -> Tensor:
        """Their frames."""

    @property
    def layout(self) -> Layout:
        """The layout of the whole sequence; of `head`'s tokens, where to put the patches."""


class Velocity(Protocol):
    """What a network is to those who call it, spread or not."""

    @property
    def config(self) -> Any:
        """The family's dims."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""

    def prepare(self, cond: Any) -> Any:
        """Compute what no step changes."""

    def __call__(
        self,
        x_BCTHW: Tensor,
        t_BT: Tensor,
        cond: Any,
        cache: None = None,
        *,
        attend: Attend = ...,
        layout: Layout | None = None,
        frame_T: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity, in the shape and dtype of `x_BCTHW`."""


class Network(Velocity, Protocol):
    """What `spread` needs of a network: its three functions."""

    @property
    def blocks(self) -> Callable[[Any, Attend], Any]:
        """Run the layers on tokens, with an attention."""

    def embed(
        self,
        x_BCTHW: Tensor,
        t_BT: Tensor,
        cond: Any,
        *,
        layout: Layout | None = None,
        frame_T: Tensor | None = None,
    ) -> Any:
        """Make the tokens of the whole clip."""

    def head(self, tokens: Any) -> Tensor:
        """Make each token a patch, and put these where the grid of the tokens' layout says."""


def spread(dit: Network, meshes: Meshes) -> Velocity:
    """Return `dit` spread over the axis "sequence", or itself where nobody shares it."""
    return dit if meshes.axis("sequence").size == 1 else Spread(dit, meshes)


@dataclass(frozen=True)
class Spread:
    """A network whose calls are made by all processes of an axis together."""

    dit: Network
    meshes: Meshes

    @property
    def config(self) -> Any:
        """Dims of the network."""
        return self.dit.config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return self.dit.dtype

    def prepare(self, cond: Any) -> Any:
        """Compute what no step changes; every process for itself."""
        return self.dit.prepare(cond)

    def __call__(
        self,
        x_BCTHW: Tensor,
        t_BT: Tensor,
        cond: Any,
        cache: None = None,
        *,
        attend: Attend = plain,
        layout: Layout | None = None,
        frame_T: Tensor | None = None,
    ) -> Tensor:
        """Return the whole velocity on every process; arguments as the network's, equal on all.

        Raises `ValueError` for a clip with fewer tokens than processes, and for a pattern that a
        ring cannot compute.
        """
        assert cache is None, "a spread network keeps no cache between calls"
        axis = self.meshes.axis("sequence")
        x = replicated(x_BCTHW, axis)
        tokens = self.dit.embed(x, t_BT, cond, layout=layout, frame_T=frame_T)  # L tokens
        whole = tokens.layout
        rules.check(self.meshes.degrees, whole.pattern)
        sizes = _sizes(whole.grid.num_tokens, axis)
        attention = _Attention(attend, self.meshes.axis("ulysses"), self.meshes.axis("ring"), sizes)
        part = self.dit.blocks(_shard(tokens, axis, sizes), attention)  # L / size tokens
        row = TokenGrid(1, 1, sizes[axis.rank])
        v_BCthw = self.dit.head(dataclasses.replace(part, layout=Layout(Dense(), row)))
        patches_BLCthw = gather(_cut(v_BCthw, row.width), axis, dim=1, sizes=sizes)  # L patches
        return _put(whole.restore(patches_BLCthw, 1), whole.grid).to(x_BCTHW.dtype)  # BCTHW


@dataclass(frozen=True)
class _Attention:
    """An `Attend` for shards, by an `Attend` for whole sequences."""

    whole: Attend
    ulysses: Axis
    ring: Axis
    sizes: tuple[int, ...]
    """Tokens of each process, "ulysses" being the inner axis."""

    def __call__(
        self,
        q_BLHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        *,
        layout: Layout | None = None,
        gate_BLHD: Tensor | None = None,
    ) -> Tensor:
        """Attend from a shard's tokens to all; to the text (no layout) locally."""
        if layout is None:
            return self.whole(q_BLHD, k_BSHD, v_BSHD)
        call = self._attend
        if torch.compiler.is_compiling():  # it cannot look into an exchange
            call = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
        return call([q_BLHD, k_BSHD, v_BSHD], layout, gate_BLHD)

    def _attend(self, qkv: list[Tensor], layout: Layout, gate_BLHD: Tensor | None) -> Tensor:
        degree = self.ulysses.size
        blocks = [self.sizes[i : i + degree] for i in range(0, len(self.sizes), degree)]
        tokens, heads = blocks[self.ring.rank], shares(qkv[0].shape[2], degree)
        inputs = qkv if gate_BLHD is None else [*qkv, gate_BLHD]
        if degree > 1:
            inputs = self._to_heads(inputs, tokens, heads)
        q, k, v, *gate = inputs
        if q.shape[2] == 0:
            out = v  # no head is left for this process, which still takes part in the exchanges
        elif self.ring.size > 1:
            out = ring.attend(q, k, v, self.ring, sizes=[sum(block) for block in blocks])
        else:
            first = sum(heads[: self.ulysses.rank])
            cut = _for_heads(layout, first, first + q.shape[2])
            out = self.whole(q, k, v, layout=cut, gate_BLHD=gate[0] if gate else None)
        return exchange(out, self.ulysses, cut=1, cuts=tokens, join=2, joins=heads)

    def _to_heads(
        self, inputs: list[Tensor], tokens: tuple[int, ...], heads: tuple[int, ...]
    ) -> list[Tensor]:
        """Exchange tensors of some tokens (B, l, H, D) for some heads of each (B, L, h, D)."""
        # Heads are outermost in memory, so that this is the only copy before they are sent.
        x_HKBLD = torch.stack([x_BLHD.permute(2, 0, 1, 3) for x_BLHD in inputs], 1)
        x_KBHLD = exchange(
            x_HKBLD.permute(1, 2, 0, 3, 4), self.ulysses, cut=2, cuts=heads, join=3, joins=tokens
        )
        return [x_BHLD.transpose(1, 2) for x_BHLD in x_KBHLD.unbind(0)]


@functools.lru_cache(maxsize=16)
def _for_heads(layout: Layout, first: int, last: int) -> Layout:
    """Return the layout for heads `first` to `last` alone: only STA tells them apart."""
    if not isinstance(layout.pattern, Sta) or len(layout.pattern.windows) == 1:
        return layout
    assert layout.lists is not None and layout.lists.count_BHN is not None, "STA has its windows"
    index, count = layout.lists.index_BHNK, layout.lists.count_BHN
    windows = layout.pattern.windows[first:last]
    return dataclasses.replace(
        layout,
        pattern=dataclasses.replace(layout.pattern, windows=windows),
        lists=Lists(index[:, first:last], count[:, first:last]),
    )


def _sizes(num_tokens: int, axis: Axis) -> tuple[int, ...]:
    rules.check_tokens(num_tokens, axis.size)
    return shares(num_tokens, axis.size)


def _shard(tokens: Tokens, axis: Axis, sizes: tuple[int, ...]) -> Any:
    """Return this process's own tokens of a whole sequence."""
    return dataclasses.replace(
        tokens,
        x_BLC=own(tokens.x_BLC, axis, dim=1, sizes=sizes).contiguous(),
        turn_LF2=own(tokens.turn_LF2, axis, dim=0, sizes=sizes),
        frame_L=own(tokens.frame_L, axis, dim=0, sizes=sizes),
    )


def _cut(row_BCthw: Tensor, num: int) -> Tensor:
    """Cut a picture of one row of patches into these: (B, num, C, t, h, w)."""
    batch, channels, t, h, width = row_BCthw.shape
    return row_BCthw.reshape(batch, channels, t, h, num, width // num).permute(0, 4, 1, 2, 3, 5)


def _put(patches_BLCthw: Tensor, grid: TokenGrid) -> Tensor:
    """Put patches in grid order together as latents (B, C, T, H, W)."""
    batch, _, channels, t, h, w = patches_BLCthw.shape
    parts = patches_BLCthw.reshape(
        batch, grid.frames, grid.height, grid.width, channels, t, h, w
    ).permute(0, 4, 1, 5, 2, 6, 3, 7)  # B C T t H h W w
    return parts.reshape(batch, channels, grid.frames * t, grid.height * h, grid.width * w)
