"""Which workers to start on so many devices: placements, simulated, ranked by goodput per device.

best, *others = plan(profile, params, devices=8, memory_gib=141, slo=Slo(deadline_s=5))
print(serve_toml(best, profile, slo, profile_path=path))    # for `fastvideo serve --config`

Every split of the row into neighbouring stages is tried with every number of workers and every
degree of the profile that fits. The best monolith (each worker runs all stages) is always reported.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeAlias

from fastvideo.parallel.degrees import parse
from fastvideo.sampling import SamplingParams
from fastvideo_inference.goodput.profile import PARTS, SAVE, SHARED, Profile
from fastvideo_inference.goodput.simulate import BURST, Costs, Pool, arrivals, simulate

REQUESTS, WARM_UP = 300, 0.1  # of a simulated run; the share of it that is dropped
KEEP = 8  # placements that are reported
_PRECISION = 0.02  # of the rate that bisection ends at


@dataclass(frozen=True)
class Slo:
    """A clip is good if it ends within `deadline_s`; `target` of all must be. Seconds.

    `delivery_s` is what a client adds: the mean wait for the next poll, and the download.
    """

    deadline_s: float
    target: float = 0.9
    delivery_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no fleet could mean."""
        if not 0 <= self.delivery_s < self.deadline_s < math.inf or not 0 < self.target <= 1:
            raise ValueError(
                f"slo: deadline {self.deadline_s:g} s must be above 0 and delivery"
                f" {self.delivery_s:g} s, which is not negative; target {self.target:g} in (0, 1]"
            )


@dataclass(frozen=True)
class Group:
    """`count` workers of some stages, each on as many devices as its degrees multiply to."""

    stages: tuple[str, ...]
    count: int
    parallel: str
    memory_gib: float | None

    @property
    def devices(self) -> int:
        """All devices of its workers."""
        return self.count * _world_size(self.parallel)


@dataclass(frozen=True)
class Placement:
    """Groups of workers and their simulated goodput: requests a second, one clip's seconds."""

    groups: tuple[Group, ...]
    rate: float
    bursty_rate: float
    clip_s: float

    @property
    def devices(self) -> int:
        """All devices."""
        return sum(group.devices for group in self.groups)

    @property
    def goodput(self) -> float:
        """Requests a second and device."""
        return self.rate / self.devices

    @property
    def is_monolith(self) -> bool:
        """Whether each worker runs all stages."""
        return len(self.groups) == 1


_Candidate: TypeAlias = tuple[Placement, list[Pool]]


def plan(
    profile: Profile,
    params: SamplingParams,
    *,
    devices: int,
    slo: Slo,
    memory_gib: float | None = None,
    decoder: str = "",
) -> list[Placement]:
    """Return the `KEEP` best placements, best first, ties to fewer devices.

    The best monolith comes last if it is not among them. Raises `ValueError` if a single clip on an
    idle fleet misses the SLO on every placement.
    """
    if devices < 1:
        raise ValueError(f"devices {devices} must be at least 1")
    if profile.device.kind == "cpu" and profile.device.threads > 1:
        raise ValueError(
            f"the profile is of one process with {profile.device.threads} threads, and a worker has"
            " one core; make one by: fastvideo profile --processes N"
        )
    _check_memory(profile, memory_gib)
    found: list[_Candidate] = []
    for groups in placements(profile, devices=devices, memory_gib=memory_gib):
        try:
            pools = [pool_of(group, profile, params, decoder=decoder) for group in groups]
        except ValueError as error:
            reason = error  # a degree that the profile lacks for one of the stages
            continue
        clip_s = sum(map(seconds_of, pools)) + slo.delivery_s
        found.append((Placement(groups, 0.0, 0.0, clip_s), pools))
    if not found:
        raise reason
    fastest = min(one.clip_s for one, _ in found)
    if fastest > slo.deadline_s:
        raise ValueError(
            f"slo {slo.deadline_s:g} s: no placement on {devices} devices makes a clip in it; the"
            f" fastest takes {fastest:.3g} s"
        )
    ranked = _rank([pair for pair in found if pair[0].clip_s <= slo.deadline_s], slo, keep=KEEP)
    if not any(one.is_monolith for one in ranked):
        ranked += _rank([pair for pair in found if pair[0].is_monolith], slo, keep=1)
    return ranked


def _rank(found: Sequence[_Candidate], slo: Slo, *, keep: int) -> list[Placement]:
    """Simulate candidates in the order of their capacity, until none can be better."""
    bounds = {id(one): capacity(pools) / slo.target / one.devices for one, pools in found}
    ranked: list[_Candidate] = []
    for one, pools in sorted(found, key=lambda pair: (-bounds[id(pair[0])], pair[0].devices)):
        bar = ranked[keep - 1][0].goodput if len(ranked) >= keep else 0.0
        if bounds[id(one)] < bar:
            break
        low = bar * one.devices
        if low and attainment(pools, slo, low) < slo.target:
            continue
        made = replace(one, rate=goodput(pools, slo, low=low))
        ranked = sorted([*ranked, (made, pools)], key=lambda pair: _order(pair[0]))[:keep]
    return [replace(one, bursty_rate=goodput(pools, slo, burst=BURST)) for one, pools in ranked]


def _order(one: Placement) -> tuple[float, int, float]:
    """Rank by goodput; those that bisection cannot tell apart, by devices."""
    level = round(math.log(one.goodput, 1 + _PRECISION)) if one.goodput else -math.inf
    return -level, one.devices, -one.goodput


def placements(
    profile: Profile, *, devices: int, memory_gib: float | None
) -> Iterator[tuple[Group, ...]]:
    """Yield every way to give at most `devices` to groups of neighbouring stages."""
    degrees = sorted({cell.parallel for cell in profile.cells} | {""})
    for split in _splits(profile.spec.stages):
        options = (
            [
                Group(stages, count, parallel, memory_gib)
                for parallel in (degrees if {*stages} & {*SHARED} else [""])
                for count in range(1, devices // _world_size(parallel) + 1)
            ]
            for stages in split
        )
        yield from (
            one for one in itertools.product(*options) if sum(g.devices for g in one) <= devices
        )


def pool_of(group: Group, profile: Profile, params: SamplingParams, *, decoder: str = "") -> Pool:
    """Return a group for the simulator; `ValueError` if the profile lacks one of its stages."""
    seconds = profile.row_s(params, decoder=decoder)
    for stage in {*group.stages} & {*SHARED} if group.parallel else ():
        one = profile.stage_s(stage, params, decoder=decoder, parallel=group.parallel)
        seconds[stage] = one + profile.stage_s(SAVE, params) * (stage == profile.spec.stages[-1])
    parts = {stage: PARTS.get(stage, ()) for stage in seconds}
    load_s = {part: profile.load_s([part]) for own in parts.values() for part in own}
    costs = Costs(seconds, parts, load_s, profile.gib, profile.dispatch_s)
    return Pool(group.stages, group.count, costs, group.memory_gib)


def seconds_of(pool: Pool) -> float:
    """Return the median seconds of a pool's stages for one clip, with parts it must load."""
    return sum(pool.expected.values())


def attainment(
    pools: Sequence[Pool], slo: Slo, rate: float, *, burst: float = 1.0, seed: int = 0
) -> float:
    """Return the share of requests that end in time at a rate, the first tenth dropped.

    As on the server, a request that is predicted to be late is refused; it counts as missed.
    """
    times, late = arrivals(rate, REQUESTS, seed=seed, burst=burst), slo.deadline_s - slo.delivery_s
    outcomes = simulate(pools, times, refuse_after_s=late, seed=seed)[int(REQUESTS * WARM_UP) :]
    return sum(one.latency_s <= late for one in outcomes) / len(outcomes)


def goodput(pools: Sequence[Pool], slo: Slo, *, burst: float = 1.0, low: float = 0.0) -> float:
    """Return the highest rate, by bisection from `low`, at which the target share is in time.

    0 if a thousandth of the capacity is too much.
    """
    high = most = capacity(pools) / slo.target
    while high - low > _PRECISION * high and high > most / 1000:
        middle = (low + high) / 2
        if attainment(pools, slo, middle, burst=burst) >= slo.target:
            low = middle
        else:
            high = middle
    return low


def capacity(pools: Sequence[Pool]) -> float:
    """Return the rate that keeps the slowest pool busy."""
    return min(pool.count / seconds_of(pool) for pool in pools)


def serve_toml(
    best: Placement, profile: Profile, slo: Slo, *, profile_path: Path | None, decoder: str = ""
) -> str:
    """Return the config with which `fastvideo serve` starts a placement, one worker an entry."""
    numbers = itertools.count()
    lines = [
        f"# {60 * best.rate:.3g} requests a minute, {slo.target:.0%} within {slo.deadline_s:g} s at"
        f" the client ({profile.source}, {profile.device.name})",
        *([f"profile = [{json.dumps(str(profile_path))}]"] if profile_path else []),
        # each worker is a pool here; policy `deadline` keeps one place for the most urgent job
        f"in_flight = {1 + max(2, *(group.count for group in best.groups))}",
        *(["", "[decoder]", f"{decoder} = {json.dumps(decoder)}"] if decoder else []),
        "",
        "[[class]]",
        'name = "default"',
        f"deadline_s = {slo.deadline_s - slo.delivery_s:g}",
    ]
    for group in best.groups:
        for _ in range(group.count):
            own = [
                f"{profile.device.kind}:{next(numbers)}" for _ in range(_world_size(group.parallel))
            ]
            lines += worker_toml(group.stages, profile.model, own, group.parallel, group.memory_gib)
    return "\n".join(lines) + "\n"


def worker_toml(
    stages: Sequence[str],
    model: str,
    devices: Sequence[str],
    parallel: str,
    memory_gib: float | None,
) -> list[str]:
    """Return the lines of a worker in a config of `fastvideo serve`."""
    lines = ["", "[[worker]]", f"stages = {json.dumps(stages)}"]
    lines += [f"model = {json.dumps(model)}", f"devices = {json.dumps(devices)}"]
    lines += [f'parallel = "{parallel}"'] if parallel else []
    return lines + ([f"memory = {memory_gib:g}"] if memory_gib else [])


def _check_memory(profile: Profile, memory_gib: float | None) -> None:
    needed, part = max(((gib, part) for part, gib in profile.gib.items()), default=(0.0, ""))
    if memory_gib is not None and not memory_gib >= max(needed, 1e-3):
        raise ValueError(
            f"memory {memory_gib:g} GiB a worker is too little for the largest part of"
            f" {profile.model}: {part} takes {needed:.3g} GiB"
        )


def _splits(row: Sequence[str]) -> Iterator[tuple[tuple[str, ...], ...]]:
    """Yield the ways to cut the row into neighbouring groups.

    A stage without weights goes with the stage after it.
    """
    ends = [i for i, stage in enumerate(row[:-1], start=1) if stage in PARTS]
    for count in range(len(ends) + 1):
        for cuts in itertools.combinations(ends, count):
            bounds = itertools.pairwise((0, *cuts, len(row)))
            yield tuple(tuple(row[start:end]) for start, end in bounds)


@cache
def _world_size(parallel: str) -> int:
    return parse(parallel).world_size
