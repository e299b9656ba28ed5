"""Floating-point operations of a step, two for each multiply-add, from shapes alone.

    once = of_role(recipe, "student", clip)      # a forward pass of one clip
    learning(once, recompute=True)               # with its backward pass

L tokens of C channels, feed-forward F, N layers, S text tokens of W channels, patches of P numbers
that come in and go out, Q frequencies of the time, A pairs of a query and a key:

    layer    2 L (6 C^2 + 2 C F) + 4 S C^2 + 4 (A + L S) C
    VSA      and 2 n^2 C for the scores of n tiles; with gates 2 L C^2, and 2 n^2 C once more
    outside  2 L C (P + P) + 2 S (W C + C^2) + 2 (Q C + 7 C^2)

A is L^2 if dense. Under VSA a kernel that fills tiles up multiplies the slots of all tiles by those
of the selected ones; `attention.sparse.pairs` asks a backend what it does. A backward pass counts
twice its forward pass, as every product has two: attention kernels that make scores again do more.
Norms, rotations, softmax, optimizer and average are not counted: they are bound by memory, not by
arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastvideo import attention
from fastvideo.attention import sparse
from fastvideo.models.dit.wan import Config
from fastvideo.shapes import LatentShape, TokenGrid
from fastvideo_train.recipe import Recipe


@dataclass(frozen=True)
class Forward:
    """Operations of a forward pass of one clip: in the layers, and in embedders and head."""

    layers: float
    outside: float

    @property
    def total(self) -> float:
        """Operations of the whole pass."""
        return self.layers + self.outside


def forward(
    config: Config,
    clip: LatentShape,
    pattern: attention.Pattern,
    *,
    num_text_tokens: int,
    pairs: float | None = None,
) -> Forward:
    """Count a forward pass of one clip with one time for all its frames.

    pairs: of a query and a key that a head multiplies, if not those of `padded_pairs`.
    """
    c, grid, text = config, clip.tokens(config.patch_size), num_text_tokens
    tokens = grid.num_tokens
    if pairs is None:
        pairs = padded_pairs(pattern, grid)
    layer = 4 * (pairs + tokens * text) * c.dim + 4 * text * c.dim**2
    layer += 2 * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)
    if isinstance(pattern, attention.Vsa):
        scores = 2 * num_tiles(pattern, grid) ** 2 * c.dim
        layer += scores + (scores + 2 * tokens * c.dim**2) * c.gate_compress
    patch = math.prod(c.patch_size) * (c.in_channels + c.out_channels)
    outside = 2 * tokens * c.dim * patch + 2 * text * (c.text_dim + c.dim) * c.dim
    outside += 2 * (c.freq_dim + 7 * c.dim) * c.dim
    return Forward(c.num_layers * layer, outside)


def learning(once: Forward, *, recompute: bool) -> float:
    """Count a forward and its backward pass; with `recompute` the layers run once more."""
    return 3 * once.total + once.layers * recompute


def padded_pairs(pattern: attention.Pattern, grid: TokenGrid) -> float:
    """Return the pairs of a query and a key of a head; VSA's tiles are filled up to whole ones."""
    if isinstance(pattern, attention.Vsa):
        tiles = num_tiles(pattern, grid)
        slots = tiles * math.prod(pattern.tile)
        return slots**2 * pattern.num_selected(tiles) / tiles
    return sparse.pairs(attention.plan(pattern, grid))[1]


def of_role(recipe: Recipe, role: str, clip: LatentShape) -> Forward:
    """Count a forward pass of a recipe's denoiser on one clip, at its final sparsity."""
    spec = recipe.roles[role]
    pattern = attention.parse(spec.attention.pattern, spec.attention.args)
    text = recipe.method.args["max_text_tokens"]
    return forward(Config.parse(spec.config), clip, pattern, num_text_tokens=text)


def passes(recipe: Recipe) -> dict[str, float]:
    """Return how many forward passes' work of each denoiser a clip takes in a step."""
    rounds = 4 if recipe.run.recompute else 3
    if recipe.method.name != "dmd":
        return {"student": rounds}
    share = 1 / recipe.method.args["student_every"]
    return {
        "student": 1 + rounds * share,
        "critic": rounds + share,
        "teacher": 2 * share,
    }


def num_tiles(pattern: attention.Vsa, grid: TokenGrid) -> int:
    """Return how many tiles cover a grid."""
    axes = (grid.frames, grid.height, grid.width)
    return math.prod(-(-n // t) for n, t in zip(axes, pattern.tile, strict=True))
