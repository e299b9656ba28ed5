"""Which workers to start on so many devices: placements, simulated, ranked by goodput per device.

best, *others = plan(profile, params, devices=8, memory_gib=141, slo=Slo(deadline_s=5))
print(toml(best))    # for `fastvideo serve --config`

Every split of the row into neighbouring stages is tried with every number of workers and every
degree of the profile that fits. The best monolith (each worker runs all stages) is always reported.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastvideo import registry
from fastvideo.parallel.degrees import parse
from fastvideo.sampling import SamplingParams
from fastvideo_inference.goodput.profile import SAVE, SHARED, Profile
from fastvideo_inference.goodput.simulate import BURST, Costs, Pool, arrivals, simulate

REQUESTS, WARM_UP = 300, 0.1  # of a simulated run; the share of it that is dropped
KEEP = 8  # placements that are told of
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
        return self.count * parse(self.parallel).world_size


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


@dataclass(frozen=True)
class _Candidate:
    groups: tuple[Group, ...]
    pools: tuple[Pool, ...]
    clip_s: float

    @property
    def devices(self) -> int:
        return sum(group.devices for group in self.groups)


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
    _check_memory(profile, memory_gib)
    found = []
    for groups in placements(profile, devices=devices, memory_gib=memory_gib):
        try:
            pools = tuple(pool_of(group, profile, params, decoder=decoder) for group in groups)
        except ValueError as error:
            reason = error  # a degree that the profile lacks for one of the stages
            continue
        found.append(_Candidate(groups, pools, sum(map(seconds_of, pools)) + slo.delivery_s))
    if not found:
        raise reason
    fastest = min(one.clip_s for one in found)
    if fastest > slo.deadline_s:
        raise ValueError(
            f"slo {slo.deadline_s:g} s: no placement on {devices} devices makes a clip in it; the"
            f" fastest takes {fastest:.3g} s"
        )
    ranked = _rank([one for one in found if one.clip_s <= slo.deadline_s], slo, keep=KEEP)
    if not any(one.is_monolith for one in ranked):
        ranked += _rank([one for one in found if len(one.groups) == 1], slo, keep=1)
    return ranked


def _rank(found: Sequence[_Candidate], slo: Slo, *, keep: int) -> list[Placement]:
    """Simulate candidates in the order of their capacity, until none can be better."""
    ranked: list[tuple[Placement, _Candidate]] = []
    for one in sorted(found, key=lambda one: (-_most(one, slo), one.devices)):
        bar = ranked[keep - 1][0].goodput if len(ranked) >= keep else 0.0
        if _most(one, slo) < bar:
            break
        low = bar * one.devices
        if low and attainment(one.pools, slo, low) < slo.target:
            continue
        made = Placement(one.groups, goodput(one.pools, slo, low=low), 0.0, one.clip_s)
        ranked = sorted([*ranked, (made, one)], key=lambda pair: _order(pair[0]))[:keep]
    return [replace(made, bursty_rate=goodput(one.pools, slo, burst=BURST)) for made, one in ranked]


def _most(one: _Candidate, slo: Slo) -> float:
    """Return the bound of goodput per device: workers always busy, and the rest refused."""
    return capacity(one.pools) / slo.target / one.devices


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
        for shapes in itertools.product(*(_shapes(stages, degrees) for stages in split)):
            sizes = [parse(parallel).world_size for parallel in shapes]
            for counts in _counts(sizes, devices):
                yield tuple(
                    Group(stages, count, parallel, memory_gib)
                    for stages, count, parallel in zip(split, counts, shapes, strict=True)
                )


def pool_of(group: Group, profile: Profile, params: SamplingParams, *, decoder: str = "") -> Pool:
    """Return a group for the simulator; `ValueError` if the profile lacks one of its stages."""
    seconds = profile.row_s(params, decoder=decoder)
    for stage in {*group.stages} & {*SHARED} if group.parallel else ():
        one = profile.stage_s(stage, params, decoder=decoder, parallel=group.parallel)
        seconds[stage] = one + profile.stage_s(SAVE, params) * (stage == profile.spec.stages[-1])
    parts = {stage: _parts(stage) for stage in seconds}
    load_s = {part: profile.load_s([part]) for own in parts.values() for part in own}
    costs = Costs(seconds, parts=parts, load_s=load_s, gib=profile.gib)
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
        f"in_flight = {max(2, *(group.count for group in best.groups), 0)}",
        *(["", "[decoder]", f"{decoder} = {json.dumps(decoder)}"] if decoder else []),
        "",
        "[[class]]",
        'name = "default"',
        f"deadline_s = {slo.deadline_s - slo.delivery_s:g}",
    ]
    for group in best.groups:
        for _ in range(group.count):
            size = parse(group.parallel).world_size
            own = [f"{profile.device.kind}:{next(numbers)}" for _ in range(size)]
            lines += ["", "[[worker]]", f"stages = {json.dumps(group.stages)}"]
            lines += [f"model = {json.dumps(profile.model)}", f"devices = {json.dumps(own)}"]
            lines += [f'parallel = "{group.parallel}"'] if group.parallel else []
            lines += [f"memory = {group.memory_gib:g}"] if group.memory_gib else []
    return "\n".join(lines) + "\n"


def _check_memory(profile: Profile, memory_gib: float | None) -> None:
    needed, part = max(((gib, part) for part, gib in profile.gib.items()), default=(0.0, ""))
    if memory_gib is not None and not memory_gib >= max(needed, 1e-3):
        raise ValueError(
            f"memory {memory_gib:g} GiB a worker is too little for the largest part of"
            f" {profile.model}: {part} takes {needed:.3g} GiB"
        )


def _splits(row: Sequence[str]) -> Iterator[tuple[tuple[str, ...], ...]]:
    """Yield the ways to cut the row into neighbouring groups.

    None ends in a stage without weights, which goes with the stage after it.
    """
    for cuts in itertools.product((False, True), repeat=len(row) - 1):
        groups, start = [], 0
        for index, is_cut in enumerate(cuts, start=1):
            if is_cut:
                groups.append(tuple(row[start:index]))
                start = index
        groups.append(tuple(row[start:]))
        if all(_parts(group[-1]) for group in groups):
            yield tuple(groups)


def _parts(stage: str) -> tuple[str, ...]:
    parts: tuple[str, ...] = registry.module("fastvideo.stages", stage).PARTS
    return parts


def _shapes(stages: Sequence[str], degrees: Sequence[str]) -> Sequence[str]:
    return degrees if set(stages) & set(SHARED) else ("",)


def _counts(sizes: Sequence[int], devices: int) -> Iterator[tuple[int, ...]]:
    """Yield numbers of workers of such sizes that need at most so many devices."""
    if not sizes:
        yield ()
        return
    for count in range(1, devices // sizes[0] + 1):
        for rest in _counts(sizes[1:], devices - count * sizes[0]):
            yield count, *rest
