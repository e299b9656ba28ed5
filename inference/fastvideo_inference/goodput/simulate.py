"""Jobs on workers, as the engine deals them out, in simulated time (simpy); no tensors.

ends = simulate(workers, [Work(at_s, costs) for at_s in arrivals(rate=0.5, count=300, seed=0)])

The same rules as the engine's: workers of late stages are served first, first come is first served,
few states wait between two stages, a worker runs its stages of a clip without another between them,
and loads what its memory could not keep. A change there that is not made here shows in the page's
comparison with a live server.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastvideo_inference.engine.forecast import Demand, Lane, ends
from fastvideo_inference.goodput.profile import HIGH, Estimate

_Z_HIGH = 1.2815515655446004  # standard deviations of the normal distribution's quantile HIGH
assert HIGH == 0.9, "as _Z_HIGH"
BURST = 4.0  # squared coefficient of variation of bursty gaps


@dataclass(frozen=True)
class Costs:
    """What one clip costs a worker: seconds by stage, and of loading its parts.

    `parts` of a stage are loaded, `load_s` each, if the worker does not hold them; `gib` is their
    size, against its memory. `dispatch_s` pass before a worker begins.
    """

    seconds: Mapping[str, Estimate]
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    load_s: Mapping[str, float] = field(default_factory=dict)
    gib: Mapping[str, float] = field(default_factory=dict)
    dispatch_s: float = 0.0

    @property
    def row(self) -> tuple[str, ...]:
        """The stages in their order."""
        return tuple(self.seconds)


@dataclass(frozen=True)
class Pool:
    """`count` equal workers. `costs` are those of a clip on them, `memory_gib` None: no limit."""

    stages: tuple[str, ...]
    count: int
    costs: Costs
    memory_gib: float | None = None

    @cached_property
    def expected(self) -> dict[str, float]:
        """Median seconds of its stages, with the parts that it must load for each clip.

        Those of its dispatch are its first stage's.
        """
        costs, limit = self.costs, math.inf if self.memory_gib is None else self.memory_gib
        parts = {part for stage in self.stages for part in costs.parts.get(stage, ())}
        fits = sum(costs.gib.get(part, 0.0) for part in parts) <= limit
        return {
            stage: costs.seconds[stage].median
            + (0.0 if fits else sum(costs.load_s.get(p, 0.0) for p in costs.parts.get(stage, ())))
            + costs.dispatch_s * (stage == self.stages[0])
            for stage in self.stages
        }


@dataclass(frozen=True)
class Outcome:
    """When a request arrived, and its end: None if it was refused. Seconds."""

    at_s: float
    end_s: float | None

    @property
    def latency_s(self) -> float:
        """Seconds from arrival to the end; endless for one that was refused."""
        return math.inf if self.end_s is None else self.end_s - self.at_s


def arrivals(rate: float, count: int, *, seed: int, burst: float = 1.0) -> list[float]:
    """Return the times of `count` requests at `rate` a second.

    `burst` is the squared coefficient of variation of the gaps: 1 is Poisson, more is bursty
    (gamma-distributed gaps).
    """
    if not (0 < rate < math.inf and count >= 1 and 0 < burst < math.inf):
        text = f"rate {rate:g}, count {count} and burst {burst:g} must be above zero, and finite"
        raise ValueError(text)
    draw, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += draw.gammavariate(1 / burst, burst / rate)
        times.append(now)
    return times


def simulate(
    pools: Sequence[Pool],
    times: Iterable[float],
    *,
    in_flight: int = 2,
    refuse_after_s: float | None = None,
    seed: int = 0,
) -> list[Outcome]:
    """Return what becomes of requests that arrive at `times`, in their order.

    One is refused if it is predicted to end later than `refuse_after_s` after its arrival.
    """
    simpy = _simpy()
    env = simpy.Environment()
    floor = _Floor(env, pools, in_flight=in_flight, draw=random.Random(seed))
    outcomes: list[Outcome | None] = []

    def end(index: int, at_s: float) -> Callable[[], None]:
        def note() -> None:
            outcomes[index] = Outcome(at_s, env.now)

        return note

    def arrive() -> Iterator[Any]:
        for index, at_s in enumerate(times):
            yield env.timeout(max(0.0, at_s - env.now))
            outcomes.append(Outcome(at_s, None))
            if refuse_after_s is None or floor.predict_s() <= refuse_after_s:
                floor.add(end(index, at_s))

    env.process(arrive())
    env.run()
    return [one for one in outcomes if one]


@dataclass(eq=False)
class _Clip:
    end: Callable[[], None]
    index: int = 0
    is_handed: bool = False


@dataclass(eq=False)
class _Worker:
    pool: Pool
    clip: _Clip | None = None
    follows: str | None = None
    until_s: float = 0.0
    held: OrderedDict[str, None] = field(default_factory=OrderedDict)


class _Floor:
    """The workers, and the clips that wait for them."""

    def __init__(
        self, env: Any, pools: Sequence[Pool], *, in_flight: int, draw: random.Random
    ) -> None:
        self._env, self._in_flight, self._draw = env, in_flight, draw
        self._row = pools[0].costs.row
        self._workers = [_Worker(pool) for pool in pools for _ in range(pool.count)]
        self._waiting: list[_Clip] = []

    def add(self, end: Callable[[], None]) -> None:
        self._waiting.append(_Clip(end))
        self._pump()

    def predict_s(self) -> float:
        """Return in how many seconds a clip that comes now is done, nine times of ten.

        That is the engine's own forecast, which decides whom it admits.
        """
        pools = {id(w.pool): w.pool for w in self._workers}
        seconds = {key: pool.expected for key, pool in pools.items()}
        lanes, demands = [], []
        for worker in self._workers:
            free_s = max(0.0, worker.until_s - self._env.now)
            lanes.append(Lane(id(worker.pool), worker.pool.stages, free_s))
            if worker.clip and worker.follows:
                later = self._row[self._row.index(worker.follows) :]
                demands.append(Demand(later, seconds, free_s))
        demands += [Demand(self._row[clip.index :], seconds) for clip in self._waiting]
        own = sum(
            (pool.costs.seconds[s] for pool in pools.values() for s in pool.stages),
            Estimate(0.0, 0.0),
        )
        return ends([*demands, Demand(self._row, seconds)], lanes)[-1] + own.high - own.median

    def _pump(self) -> None:
        for worker in reversed(self._workers):
            if worker.clip is None:
                fit = (c for c in self._waiting if self._row[c.index] in worker.pool.stages)
                first = next((clip for clip in fit if self._has_room(clip, worker)), None)
                if first:
                    self._dispatch(first, worker)

    def _has_room(self, clip: _Clip, worker: _Worker) -> bool:
        follows = self._follows(clip, worker)
        if follows is None:
            return True
        wait = sum(c.is_handed and self._row[c.index] == follows for c in self._waiting)
        come = sum(w.follows == follows for w in self._workers)
        return wait + come < max(self._in_flight, worker.pool.count)

    def _follows(self, clip: _Clip, worker: _Worker) -> str | None:
        """Return the first stage from the clip's on that the worker does not have."""
        return next((s for s in self._row[clip.index :] if s not in worker.pool.stages), None)

    def _dispatch(self, clip: _Clip, worker: _Worker) -> None:
        self._waiting.remove(clip)
        worker.clip, worker.follows = clip, self._follows(clip, worker)
        end = len(self._row) if worker.follows is None else self._row.index(worker.follows)
        seconds = sum(self._seconds(worker, stage) for stage in self._row[clip.index : end])
        seconds += worker.pool.costs.dispatch_s
        worker.until_s = self._env.now + seconds
        self._env.process(self._run(clip, worker, seconds=seconds, end=end))

    def _run(self, clip: _Clip, worker: _Worker, *, seconds: float, end: int) -> Iterator[Any]:
        yield self._env.timeout(seconds)
        worker.clip = worker.follows = None
        if end == len(self._row):
            clip.end()
        else:
            clip.index, clip.is_handed = end, True
            self._waiting.append(clip)
            # those that began come first, as in the engine
            self._waiting.sort(key=lambda one: not one.is_handed)
        self._pump()

    def _seconds(self, worker: _Worker, stage: str) -> float:
        costs = worker.pool.costs
        estimate = costs.seconds[stage]
        above = max(0.0, math.log(estimate.high / estimate.median)) if estimate.median else 0.0
        drawn = estimate.median * math.exp(above / _Z_HIGH * self._draw.gauss(0.0, 1.0))
        return drawn + sum(self._load(worker, part) for part in costs.parts.get(stage, ()))

    def _load(self, worker: _Worker, part: str) -> float:
        """Return the seconds of loading a part; those used longest ago are freed for it."""
        costs, limit = worker.pool.costs, worker.pool.memory_gib
        is_held = part in worker.held
        worker.held[part] = None
        worker.held.move_to_end(part)
        while limit is not None and len(worker.held) > 1:
            if sum(costs.gib.get(one, 0.0) for one in worker.held) <= limit:
                break
            worker.held.popitem(last=False)
        return 0.0 if is_held else costs.load_s.get(part, 0.0)


def _simpy() -> Any:
    try:
        import simpy
    except ImportError:
        raise ValueError("simulating needs simpy: pip install 'fastvideo[serve]'") from None
    return simpy
