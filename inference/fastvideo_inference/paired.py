"""How far two settings differ on the same prompts, and how surely: closed forms, nothing drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; no interval where nothing varies, which tells no spread."""

    value: float
    low: float | None
    high: float | None


def ratio(tops: Sequence[float], bottoms: Sequence[float]) -> Estimate:
    """Return sum(tops) / sum(bottoms) over independent groups, with an interval.

    R +- t sqrt(n / (n - 1) sum((top - R bottom)^2)) / sum(bottoms), t of n - 1 degrees of freedom
    (the ratio estimate of a sample of clusters; Cochran, Sampling Techniques, 3rd ed., ch. 2, 6).
    With bottoms of 1 it is the mean and Student's interval. Raises `ValueError` without groups.
    """
    n, whole = len(tops), sum(bottoms)
    if n != len(bottoms) or whole <= 0:
        raise ValueError(f"a ratio needs pairs with a positive sum, not {n} over {len(bottoms)}")
    value = sum(tops) / whole
    squares = sum((top - value * bottom) ** 2 for top, bottom in zip(tops, bottoms, strict=True))
    if n == 1 or squares < 1e-24 * whole**2:
        return Estimate(value, None, None)
    half = t_quantile((1 + LEVEL) / 2, n - 1) * math.sqrt(n / (n - 1) * squares) / whole
    return Estimate(value, value - half, value + half)


def difference(ours: Sequence[float], base: Sequence[float], groups: Sequence[object]) -> Estimate:
    """Return the mean of ours - base, prompt by prompt, with an interval.

    Prompts of one group (the same combination of attributes) count as one observation of several
    prompts, since they are not independent.
    """
    sums: dict[object, list[float]] = {}
    for one, other, group in zip(ours, base, groups, strict=True):
        total = sums.setdefault(group, [0.0, 0.0])
        total[0] += one - other
        total[1] += 1
    return ratio([top for top, _ in sums.values()], [count for _, count in sums.values()])


def t_quantile(p: float, dof: int) -> float:
    """Return the value below which Student's t of `dof` degrees of freedom stays with p > 0.5."""
    assert 0.5 < p < 1 and dof >= 1, "an upper quantile"
    low, high = 0.0, 1.0
    while _t_below(high, dof) < p:
        high *= 2
    for _ in range(60):  # halves the bracket down to rounding
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, dof) < p else (low, middle)
    return (low + high) / 2


def _t_below(t: float, dof: int) -> float:
    """Return P(T < t) for t >= 0, by a finite series (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan2(t, math.sqrt(dof))
    cos2 = math.cos(angle) ** 2
    is_odd = dof % 2
    term = math.cos(angle) if is_odd else 1.0
    series = term if dof > 1 else 0.0
    for k in range(2 + is_odd, dof - 1, 2):
        term *= cos2 * (k - 1) / k
        series += term
    inner = math.sin(angle) * series
    between = 2 / math.pi * (angle + inner) if is_odd else inner
    return 0.5 + between / 2
