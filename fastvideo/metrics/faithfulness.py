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
    """One attribute: right in `right` of `n` clips, by a constant guess in a share of `chance`."""

    attribute: str
    right: int
    n: int
    chance: float

    @property
    def rate(self) -> float:
        """Share of clips in which the attribute was right."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate."""
        return wilson(self.right, self.n)


def faithfulness(
    truths: Sequence[Truth], parses: Sequence[Truth], *, legal: Mapping[str, Sequence[str]]
) -> list[Row]:
    """Compare parses with truths, clip by clip; a row for each attribute of `legal`, then `all`.

    legal: the values that each attribute may take; always naming the commonest one is `chance`.
    A value that the parser could not read counts as wrong. Raises `ValueError` without clips.
    """
    if not truths or len(truths) != len(parses):
        raise ValueError(f"{len(parses)} parses for {len(truths)} truths; one each, at least one")
    marks = [
        {name: parse.get(name) == truth[name] for name in legal}
        for truth, parse in zip(truths, parses, strict=True)
    ]
    rows = [
        Row(
            name,
            sum(mark[name] for mark in marks),
            len(marks),
            _commonest(truth[name] for truth in truths),
        )
        for name in legal
    ]
    whole = _commonest(tuple(truth[name] for name in legal) for truth in truths)
    return [*rows, Row(ALL, sum(all(mark.values()) for mark in marks), len(marks), whole)]


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
