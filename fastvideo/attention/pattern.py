"""Attention patterns: which token sees which, as values without a size."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from operator import lt
from typing import Any

from fastvideo.registry import did_you_mean
from fastvideo.shapes import TokenGrid

Tile = tuple[int, int, int]


@dataclass(frozen=True)
class Dense:
    """Every token sees every token."""


@dataclass(frozen=True)
class Vsa:
    """Video sparse attention (2505.13389): a query tile sees the key tiles that suit it best.

    How many is said by `sparsity`, the share of tiles that it does not see, or by `top_k`. Beside
    them it sees the means of all tiles, weighted by a gate. `tile` is frames, rows, columns in
    tokens.
    """

    sparsity: float | None = None
    top_k: int | None = None
    tile: Tile = (4, 4, 4)

    def __post_init__(self) -> None:
        """Refuse what selects nothing."""
        _check_tile(self.tile)
        if (self.sparsity is None) == (self.top_k is None):
            raise ValueError("vsa needs either sparsity, such as 0.8, or top_k, such as 16")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(
                f"vsa sparsity {self.sparsity} must be at least 0 and below 1;"
                f" {_nearest_sparsity(self.sparsity)}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"vsa top_k {self.top_k} must be at least 1; nearest: 1")

    def num_selected(self, num_tiles: int) -> int:
        """Return how many of `num_tiles` key tiles each query tile sees."""
        if self.top_k is not None:
            return min(self.top_k, num_tiles)
        assert self.sparsity is not None, "checked when made"
        # In this order and in doubles, as FastVideo computes it: (1 - 0.95) * 1200 makes 61.
        return max(1, min(math.ceil((1 - self.sparsity) * num_tiles), num_tiles))


@dataclass(frozen=True)
class Sta:
    """Sliding tile attention (2502.04507): a query tile sees the tiles of a window around it.

    `windows` holds one size for all heads or one for each, in tiles; at a border the window moves
    inside. An even size acts like the next odd one.
    """

    windows: tuple[Tile, ...]
    tile: Tile = (6, 8, 8)

    def __post_init__(self) -> None:
        """Refuse windows and tiles that hold nothing."""
        _check_tile(self.tile)
        if not self.windows:
            raise ValueError(
                "sta needs windows: one (frames, rows, columns) in tiles, or one a head"
            )
        for window in self.windows:
            if min(window) < 1:
                nearest = tuple(max(1, size) for size in window)
                raise ValueError(
                    f"sta window {window} must be at least one tile on every axis;"
                    f" nearest: {nearest}"
                )


Pattern = Dense | Vsa | Sta

_PATTERNS: dict[str, type[Pattern]] = {"dense": Dense, "vsa": Vsa, "sta": Sta}


def parse(name: str, args: Mapping[str, Any] | None = None) -> Pattern:
    """Make a pattern from a spec's name and arguments; `ValueError` names what is wrong."""
    if name not in _PATTERNS:
        hint = did_you_mean(name, _PATTERNS)
        raise ValueError(
            f"attention pattern {name!r} is unknown{hint} (known: {', '.join(_PATTERNS)})"
        )
    kind = _PATTERNS[name]
    legal = kind.__dataclass_fields__
    for key in args or {}:
        if key not in legal:
            known = ", ".join(legal) or "none"
            hint = did_you_mean(key, legal)
            raise ValueError(
                f"attention pattern {name!r} has no argument {key!r}{hint} (known: {known})"
            )
    values = {key: _read(name, key, value) for key, value in (args or {}).items()}
    if name == "sta" and "windows" not in values:
        values["windows"] = ()
    return kind(**values)


def unparse(pattern: Pattern) -> tuple[str, dict[str, Any]]:
    """Return the name and arguments that `parse` makes this pattern of, as JSON has them."""
    name = next(n for n, kind in _PATTERNS.items() if isinstance(pattern, kind))
    fields = dataclasses.asdict(pattern)
    return name, {key: value for key, value in fields.items() if value is not None}


def read(text: str) -> Pattern:
    """Read `vsa(sparsity=0.8, tile=[4, 4, 4])`, as a person writes it; `ValueError` if wrong."""
    name, bracket, rest = text.strip().partition("(")
    # What could end the table that TOML is given is refused: the rest would be another document.
    if bracket and (not rest.endswith(")") or set(rest) & set("{}#\r\n")):
        raise ValueError(f"attention pattern {text!r} must look like vsa(sparsity=0.8)")
    try:
        args = tomllib.loads("it = {" + rest[:-1] + "}")["it"] if bracket else {}
    except tomllib.TOMLDecodeError:
        raise ValueError(f"attention pattern {text!r} must look like vsa(sparsity=0.8)") from None
    return parse(name.strip(), args)


def write(pattern: Pattern) -> str:
    """Return the text that `read` makes this pattern of."""
    name, args = unparse(pattern)
    words = ", ".join(f"{key}={json.dumps(value)}" for key, value in args.items())
    return f"{name}({words})" if words else name


def check_fits(pattern: Pattern, grid: TokenGrid, *, num_heads: int | None = None) -> None:
    """Raise `ValueError` for windows that are larger than a grid, or not one for each head."""
    if not isinstance(pattern, Sta):
        return
    axes = (grid.frames, grid.height, grid.width)
    tiles = tuple(-(-n // size) for n, size in zip(axes, pattern.tile, strict=True))
    for window in pattern.windows:
        if any(size > n for size, n in zip(window, tiles, strict=True)):
            nearest = tuple(min(pair) for pair in zip(window, tiles, strict=True))
            raise ValueError(
                f"sta window {window} is larger than the grid of {tiles} tiles (frames, rows,"
                f" columns); nearest: {nearest}"
            )
    count = len(pattern.windows)
    if num_heads is not None and count not in (1, num_heads):
        raise ValueError(f"sta has {count} windows; give one for all or {num_heads}, one a head")


def one_tile(pattern: Pattern, grid: TokenGrid) -> str | None:
    """Return a line for a user if one VSA tile holds the whole grid: sparsity has no effect."""
    axes = (grid.frames, grid.height, grid.width)
    if not isinstance(pattern, Vsa) or any(map(lt, pattern.tile, axes)):
        return None
    tile, size = ("x".join(map(str, sides)) for sides in (pattern.tile, axes))
    return (
        f"attention vsa: a tile of {tile} holds all {size} tokens (frames, rows, columns), so"
        " sparsity has no effect; use a smaller tile"
    )


def check_gates(pattern: Pattern, *, has_gates: bool, drop_gates: bool = False, name: str) -> None:
    """Raise `ValueError` if the VSA gates of model `name` would go unused, unless `drop_gates`.

    So it does for a `drop_gates` that drops nothing.
    """
    is_used = has_gates and isinstance(pattern, Vsa)
    if has_gates and not is_used and not drop_gates:
        raise ValueError(
            f"attention {write(pattern)} would drop the VSA gates that {name} was trained with;"
            " nearest: vsa(sparsity=0); to drop them say so: --drop-gates, or drop_gates true"
        )
    if drop_gates and (is_used or not has_gates):
        kept = f"attention {write(pattern)} keeps those of" if has_gates else "there are none in"
        raise ValueError(
            f"drop_gates true has no VSA gates to drop, {kept} {name}; leave it out, or say"
            " --no-drop-gates (drop_gates false)"
        )


def _read(name: str, key: str, value: Any) -> Any:
    """Turn JSON's lists into tuples and refuse values of another kind."""
    if key == "windows":
        rows = value if isinstance(value, list | tuple) else [value]
        single = len(rows) == 3 and all(isinstance(x, int) for x in rows)
        return tuple(_read(name, "window", row) for row in ([rows] if single else rows))
    if key in ("tile", "window"):
        numbers = tuple(value) if isinstance(value, list | tuple) else ()
        if len(numbers) != 3 or not all(type(x) is int for x in numbers):
            raise ValueError(
                f"{name} {key} {value!r} must be three whole numbers, such as [4, 4, 4]"
            )
        return numbers
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and (not is_number or (key == "top_k" and not isinstance(value, int))):
        raise ValueError(f"{name} {key} {value!r} must be a {'whole ' * (key == 'top_k')}number")
    return value


def _nearest_sparsity(sparsity: float) -> str:
    """Say what to ask for instead of an illegal sparsity; NaN is near nothing."""
    if math.isnan(sparsity):
        return "such as 0.8"
    return "nearest: 0" if sparsity < 0 else "nearest: 0.99, or top_k=1 for a single tile"


def _check_tile(tile: Tile) -> None:
    if min(tile) < 1:
        nearest = tuple(max(1, size) for size in tile)
        raise ValueError(f"tile {tile} must hold a token on every axis; nearest: {nearest}")
