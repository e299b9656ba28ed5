"""When jobs will be done: workers take them in the policy's order, each the first that is free.

The engine admits by it, and the simulator of `fastvideo plan` refuses by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass
class Lane:
    """A worker of a pool, and in how many seconds it is free."""

    pool: int
    stages: Sequence[str]
    free_s: float = 0.0


@dataclass(frozen=True)
class Demand:
    """Stages that a job still needs, from `from_s` on, and their seconds on each pool that fits."""

    stages: Sequence[str]
    seconds: Mapping[int, Mapping[str, float]]
    from_s: float = 0.0


def ends(demands: Sequence[Demand], lanes: Sequence[Lane]) -> list[float]:
    """Return in how many seconds each of the jobs, the most urgent first, will be done.

    A worker runs its stages of a job without another between them (list scheduling, Graham 1969).
    """
    free, found = [lane.free_s for lane in lanes], []
    for demand in demands:
        now, left = demand.from_s, list(demand.stages)
        while left:
            index = min(
                (i for i, lane in enumerate(lanes) if _can(lane, demand, left[0])),
                key=lambda i: max(free[i], now),
            )
            lane = lanes[index]
            now = max(free[index], now)
            while left and _can(lane, demand, left[0]):
                now += demand.seconds[lane.pool][left.pop(0)]
            free[index] = now
        found.append(now)
    return found


def _can(lane: Lane, demand: Demand, stage: str) -> bool:
    return stage in lane.stages and stage in demand.seconds.get(lane.pool, ())
