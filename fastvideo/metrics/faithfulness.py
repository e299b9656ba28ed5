"""Faithfulness: how often a world's parser finds in frames what the prompt asked for.

rows = faithfulness(truths, parses, legal=world.ATTRIBUTES)   # one row per attribute
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Truth = Mapping[str, str]

ALL = "all"  # every attribute of a clip right at once


@dataclass(frozen=True)
class Row:
    """One attribute: right in `right` of `n` values, by a constant guess in a share of `chance`.

    A clip has one value of it, or one for each of several things.
    """

    attribute: str
    right: int
    n: int
    chance: float

    @property
    def rate(self) -> float:
        """Share of values that were right."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate, as if values were independent."""
        return wilson(self.right, self.n)


def faithfulness(
    truths: Sequence[Truth], parses: Sequence[Truth], *, legal: Mapping[str, Sequence[str]]
) -> list[Row]:
    """Compare parses with truths, clip by clip; a row for each attribute of `legal`, then `all`.

    legal: the values that each attribute may take; always naming the commonest one is `chance`.
    A value may join those of several things by `+`, in any order: each counts for itself. A value
    that the parser could not read counts as wrong, one that is not in the truth counts in `all`
    alone. Raises `ValueError` without clips.
    """
    if not truths or len(truths) != len(parses):
        raise ValueError(f"{len(parses)} parses for {len(truths)} truths; one each, at least one")
    rows = []
    for name in legal:
        right = sum(matched(t, p, name)[0] for t, p in zip(truths, parses, strict=True))
        values = [value for truth in truths for value in truth[name].split("+")]
        rows.append(Row(name, right, len(values), _commonest(values)))
    wholes = [tuple(truth[name] for name in legal) for truth in truths]
    reads = [tuple(parse.get(name) for name in legal) for parse in parses]
    right = sum(whole == read for whole, read in zip(wholes, reads, strict=True))
    return [*rows, Row(ALL, right, len(wholes), _commonest(wholes))]


def matched(truth: Truth, parse: Truth, name: str) -> tuple[int, int]:
    """Return how many of a truth's values of one attribute a parse has, and how many they are."""
    wanted = truth[name].split("+")
    found = parse.get(name, "").split("+")
    return sum(value in found for value in wanted), len(wanted)


def _commonest(values: Iterable[Hashable]) -> float:
    """Return the share of the value that occurs most often."""
    counts = Counter(values)
    return max(counts.values()) / counts.total()


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of a rate (1927), which stays within 0..1 at any n."""
    assert 0 <= right <= n and n > 0, "counts of a rate"
    rate, share = right / n, z**2 / n
    if right == n:  # exactly, which rounding would miss
        return 1 / (1 + share), 1.0
    centre = (rate + share / 2) / (1 + share)
    half = z * math.sqrt(rate * (1 - rate) / n + share / (4 * n)) / (1 + share)
    return max(0.0, centre - half), min(1.0, centre + half)


def rates(rows: Iterable[Row]) -> dict[str, float]:
    """Return {attribute: rate}, for a log."""
    return {row.attribute: row.rate for row in rows}
