"""A profile: seconds of each stage of one model on one device, and estimates from them.

profile = read(path)
profile.stage_s("decode", params).median

A stage's seconds are affine in its work between two measured sizes: FLOP of a denoising step,
pixels of decoding and of writing the file, prompts of text encoding. Torch-free.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field

from fastvideo import files
from fastvideo.config import Strict, parse
from fastvideo.sampling import SamplingParams
from fastvideo.spec import Spec
from fastvideo_inference.engine import book

ENCODE, DENOISE, DECODE, SAVE = "encode_text", "denoise", "decode", "save"
LOAD = "load"  # of a part, as load.text
DISPATCH = "dispatch"  # what a worker waits for its next clip while others wait for it
# of the model, that a stage runs; as its module says, whose import brings torch
PARTS = {ENCODE: ("text",), DENOISE: ("dit",), DECODE: ("vae",)}
SHARED = (DENOISE, DECODE)  # stages that ranks share; the others run on each of them
HIGH = 0.9  # the quantile of a late one
_NEW, _MOST = 0.3, 4.0  # how much the newest clip counts for a factor; the most that this may be


class Cell(Strict):
    """Measured seconds of one stage of one setting: of a step for `denoise`, else of the stage.

    `work` is what the seconds are affine in (see `work_of`). What does not matter to the stage is
    "": `attention` is the denoiser's pattern, `decoder` a small decoder's name, `parallel` degrees.
    """

    stage: str
    work: float = Field(gt=0)
    attention: str = ""
    decoder: str = ""
    parallel: str = ""
    seconds: tuple[float, ...] = Field(min_length=1)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What must be equal for two cells to be sizes of one thing."""
        return self.stage, self.attention, self.decoder, self.parallel


@dataclass(frozen=True)
class Setting:
    """Complete parameters, a small decoder's name ("": the VAE's own), and a measured quality."""

    params: SamplingParams
    decoder: str = ""
    quality: float = 0.0

    def __str__(self) -> str:
        """Name what may differ between two of them."""
        p = self.params
        size = f"{p.width}x{p.height}, {p.num_frames} frames, {p.num_inference_steps} steps"
        return f"{size}, {p.attention}" + (f", decoder {self.decoder}" if self.decoder else "")


class Device(Strict):
    """Whose seconds these are."""

    name: str
    kind: str
    threads: int = Field(ge=1)
    torch: str
    fastvideo: str


@dataclass(frozen=True)
class Estimate:
    """Seconds: the median, and what nine of ten stay below."""

    median: float
    high: float

    def __add__(self, other: Estimate) -> Estimate:
        """Add medians, and what is above them as independent spreads add."""
        median = self.median + other.median
        above = math.hypot(self.high - self.median, other.high - other.median)
        return Estimate(median, median + above)

    def __mul__(self, times: float) -> Estimate:
        """Scale both, as for steps of one clip, which are slow together."""
        return Estimate(self.median * times, self.high * times)


class Profile(Strict):
    """Seconds of one model on one device.

    `processes` worked at once while it was measured. `source` is "predicted" for what was computed
    from a device's data sheet and never measured. `gib` is the size of each part. `factors` are
    what later clips took, over what was estimated, by stage. `is_busy`: other programs kept the
    machine busy.
    """

    version: Literal[1] = 1
    source: Literal["measured", "predicted"] = "measured"
    model: str
    fingerprint: str
    spec: Spec
    device: Device
    processes: int = Field(default=1, ge=1)
    is_busy: bool = False
    date: str = ""
    gib: dict[str, float] = Field(default_factory=dict)
    cells: tuple[Cell, ...] = Field(min_length=1)
    factors: dict[str, float] = Field(default_factory=dict)

    def check(self, *, fingerprint: str, **here: object) -> None:
        """Raise `ValueError` if it is of another model, or of another device or version.

        `here` is what this machine has, by fields of `Device`.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the profile is of {self.model} {self.fingerprint[:12]}, the model is"
                f" {fingerprint[:12]}; make one by: fastvideo profile"
            )
        for name, value in here.items():
            own = getattr(self.device, name)
            if own != value:
                raise ValueError(
                    f"the profile was made with {name} {own}, here it is {value};"
                    " make one by: fastvideo profile"
                )

    def stage_s(
        self,
        stage: str,
        params: SamplingParams,
        *,
        decoder: str = "",
        parallel: str = "",
    ) -> Estimate:
        """Return a stage's seconds for one clip; `ValueError` if nothing alike was measured."""
        attention = params.attention if stage == DENOISE else ""
        key = (stage, attention, decoder if stage == DECODE else "", parallel)
        line = self._lines.get(key)
        if line is None:
            known = sorted({" ".join(filter(None, one)) for one in self._lines})
            asked = " ".join(filter(None, key))
            raise ValueError(f"the profile has no {asked} (it has: {', '.join(known)})")
        times = params.num_inference_steps if stage == DENOISE else 1
        median = line.at(work_of(stage, params, self.spec)) * self.factors.get(stage, 1.0)
        return Estimate(median, median * line.spread) * times

    def row_s(
        self,
        params: SamplingParams,
        *,
        decoder: str = "",
        parallel: str = "",
        saves: bool = True,
    ) -> dict[str, Estimate]:
        """Return the seconds of each stage of a clip; those of its file are the last's."""
        row = self.spec.stages
        shared = {stage: parallel if stage in SHARED else "" for stage in row}
        found = {
            stage: self.stage_s(stage, params, decoder=decoder, parallel=shared[stage])
            for stage in row
        }
        if saves:
            found[row[-1]] += self.stage_s(SAVE, params)
        return found

    def corrected(
        self, params: SamplingParams, took_s: Mapping[str, float], *, decoder: str = ""
    ) -> Profile:
        """Return a profile whose factors know what a clip took, by stage."""
        found = {}
        for stage in (*self.spec.stages, SAVE):
            if took_s.get(stage):
                alone_s = self.stage_s(stage, params, decoder=decoder).median
                ratio = took_s[stage] * self.factors.get(stage, 1.0) / alone_s
                found[stage] = min(_MOST, max(1 / _MOST, ratio))
        return self.with_factors(found, first=1.0)

    def with_factors(self, new: Mapping[str, float], *, first: float | None = None) -> Profile:
        """Return a profile that new factors count in; `first` is what they are held against."""
        factors = dict(self.factors)
        for name, value in new.items():
            old = factors.get(name, value if first is None else first)
            factors[name] = round((1 - _NEW) * old + _NEW * value, 4)
        return self.model_copy(update={"factors": factors})

    @property
    def dispatch_s(self) -> float:
        """Median seconds from a worker's end of a clip to its next; 0 where it was not measured."""
        line = self._lines.get((DISPATCH, "", "", ""))
        return line.at(1.0) if line else 0.0

    def with_cells_of(self, older: Profile | None) -> Profile:
        """Return a profile that knows what an older one knew, too."""
        if older is None:
            return self
        own = {(*cell.key, cell.work) for cell in self.cells}
        kept = (cell for cell in older.cells if (*cell.key, cell.work) not in own)
        both = {"cells": (*self.cells, *kept), "factors": older.factors}
        return Profile(**{**dict(self), **both})  # no copy, which would keep the lines of old cells

    def load_s(self, parts: Iterable[str]) -> float:
        """Return the median seconds of loading parts of the model; those not measured take none."""
        lines = (self._lines.get((f"{LOAD}.{part}", "", "", "")) for part in parts)
        return sum(line.at(1.0) for line in lines if line)

    def reload_s(self, stages: Sequence[str], memory_gib: float | None) -> dict[str, float]:
        """Return the seconds of loading each stage's parts for a clip: none if memory holds all."""
        parts = {stage: PARTS.get(stage, ()) for stage in stages}
        whole = sum(self.gib.get(part, 0.0) for part in set(itertools.chain(*parts.values())))
        fits = memory_gib is None or whole <= memory_gib
        return {s: 0.0 if fits else self.load_s(own) for s, own in parts.items()}

    @cached_property
    def _lines(self) -> dict[tuple[str, ...], _Line]:
        found: dict[tuple[str, ...], list[Cell]] = {}
        for cell in sorted(self.cells, key=lambda one: one.work):
            found.setdefault(cell.key, []).append(cell)
        return {key: _Line.through(cells) for key, cells in found.items()}


def work_of(stage: str, params: SamplingParams, spec: Spec) -> float:
    """Return what a stage's seconds grow with: FLOP of a step, pixels, or forwards of a prompt."""
    if stage == DENOISE:
        return book.work(params, spec)
    if stage == ENCODE:
        return 1.0 if params.guidance_scale == 1 else 2.0
    return float(params.width * params.height * params.num_frames)


def read(path: str | Path) -> Profile:
    """Read a profile; `ValueError` names the file and what is wrong."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"profile {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"profile {path} is not JSON: {error}") from None
    return parse(Profile, found, source=str(path))


def write(profile: Profile, path: Path) -> None:
    """Write a profile whole or not at all, over an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic(path, overwrite=True) as new:
        new.write_text(profile.model_dump_json(indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Line:
    """Medians of one thing at its sizes, and how many times its median nine of ten stay below."""

    points: tuple[tuple[float, float], ...]  # (work, seconds)
    spread: float

    @classmethod
    def through(cls, cells: Sequence[Cell]) -> _Line:
        medians = [statistics.median(cell.seconds) for cell in cells]
        pairs = zip(cells, medians, strict=True)
        ratios = sorted(s / m if m else 1.0 for cell, m in pairs for s in cell.seconds)
        high = ratios[min(len(ratios) - 1, math.ceil(HIGH * len(ratios)) - 1)]
        works = (cell.work for cell in cells)
        return cls(tuple(zip(works, medians, strict=True)), max(1.0, high))

    def at(self, work: float) -> float:
        """Return the seconds at a size, on the line through the two sizes around it.

        Beyond the largest or smallest that line goes on, never below a proportional share; one size
        alone is scaled.
        """
        (last_work, last_s) = self.points[-1]
        if len(self.points) == 1:
            return last_s * work / last_work
        sizes = [size for size, _ in self.points]
        above = min(max(1, bisect.bisect_left(sizes, work)), len(sizes) - 1)
        (low, low_s), (high, high_s) = self.points[above - 1 : above + 1]
        line = low_s + (high_s - low_s) / (high - low) * (work - low)
        return max(line, low_s * min(1.0, work / low))
