"""A latency budget for one clip: the best of a model's settings that is expected to be done in time.

choice = choose(request, options(folder), profile, seconds=5.0)
choice.params, choice.decoder, choice.reason

The order of settings is measured on the model and stored beside it, in `quality.toml`; the seconds
are those of a profile of this machine, corrected by what later clips took.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from fastvideo.config import Strict, parse, read_toml, toml_line
from fastvideo.resolve import resolve
from fastvideo.sampling import GenerateRequest, SamplingParams, spelled
from fastvideo.spec import Spec
from fastvideo_inference.goodput import profile as profiles
from fastvideo_inference.goodput.profile import DENOISE, SAVE, Device, Estimate, Profile

FILE = "quality.toml"
_CACHE = Path("~/.cache/fastvideo/profiles")
_NEW = 0.3  # how much the newest clip counts
_MOST = 4.0  # times that a factor may be, or part of one


class Option(Strict):
    """One setting and its measured quality; fields that are not given are the model's defaults."""

    quality: float = Field(ge=0, allow_inf_nan=False)
    size: str | None = None
    frames: int | None = None
    steps: int | None = None
    attention: str | None = None
    decoder: str = ""


class Quality(Strict):
    """`quality.toml`: settings, and how their quality was measured."""

    measured: str
    option: tuple[Option, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Choice:
    """What a budget bought: complete parameters, a small decoder's name or "", and the seconds."""

    params: SamplingParams
    decoder: str
    expected: Estimate
    quality: float
    reason: str


def options(folder: Path | None, *, name: str) -> tuple[Option, ...]:
    """Return a model's settings, best first; `ValueError` if it has no `quality.toml`."""
    path = folder / FILE if folder else None
    if path is None or not path.is_file():
        raise ValueError(
            f"budget: {name} has no {FILE}, which orders its settings by measured quality"
        )
    found = parse(Quality, read_toml(path), source=lambda keys: toml_line(path, keys))
    return tuple(sorted(found.option, key=lambda one: -one.quality))


def choose(
    request: GenerateRequest,
    known: Sequence[Option],
    profile: Profile,
    *,
    seconds: float,
    decoder: str | None = None,
    spent_s: float = 0.0,
) -> Choice:
    """Return the best setting that nine times of ten is done in `seconds`, of which some are spent.

    What the request (or `decoder`) says itself stays. Raises `ValueError` with the smallest budget
    that could be met if none fits.
    """
    found = list(candidates(request, profile.spec, known, decoder=decoder))
    made = []
    for option, params, own in found:
        expected = clip_s(profile, params, decoder=own)
        made.append((expected.high + spent_s, option, params, own, expected))
        if expected.high + spent_s <= seconds:
            return Choice(params, own, expected, option.quality, _reason(made, seconds, spent_s))
    smallest = min(high for high, *_ in made)
    raise ValueError(
        f"budget {seconds:g} s: no setting of {profile.spec.name} is done in it on this machine; the"
        f" smallest that could be met is {_rounded_up(smallest):g} s"
    )


def candidates(
    request: GenerateRequest, spec: Spec, known: Sequence[Option], *, decoder: str | None
) -> list[tuple[Option, SamplingParams, str]]:
    """Return the settings that differ in what the request leaves open, best first."""
    given = request.model_dump(exclude_none=True)
    found: dict[tuple[Any, ...], tuple[Option, SamplingParams, str]] = {}
    for option in known:
        own = option.model_dump(exclude_none=True, exclude={"quality", "decoder"})
        fields = spelled(own, source=FILE)
        params = resolve(GenerateRequest(**{**fields, **given, "seed": request.seed or 0}), spec)
        name = option.decoder if decoder is None else decoder
        found.setdefault((params, name), (option, params, name))
    return list(found.values())


def clip_s(profile: Profile, params: SamplingParams, *, decoder: str) -> Estimate:
    """Return the seconds of a whole clip, its file included."""
    total = Estimate(0.0, 0.0)
    for stage in (*profile.spec.stages, SAVE):
        total += profile.stage_s(stage, params, decoder=decoder)
    return total


def corrected(
    profile: Profile,
    params: SamplingParams,
    took_s: Mapping[str, float],
    *,
    decoder: str,
) -> Profile:
    """Return a profile whose factors know what a clip took, by stage."""
    factors = dict(profile.factors)
    for stage, took in took_s.items():
        if stage not in (*profile.spec.stages, SAVE) or not took:
            continue
        expected = profile.stage_s(stage, params, decoder=decoder).median
        old = factors.get(stage, 1.0)
        ratio = took / (expected / old)
        mixed = (1 - _NEW) * old + _NEW * ratio
        factors[stage] = round(min(_MOST, max(1 / _MOST, mixed)), 4)
    return profile.model_copy(update={"factors": factors})


def path_of(fingerprint: str, device: Device) -> Path:
    """Return where the profile of a model on a device is kept, one for each version of ours."""
    key = hashlib.sha256(f"{fingerprint} {device.model_dump_json()}".encode()).hexdigest()
    return _CACHE.expanduser() / f"{key[:24]}.json"


def _reason(made: Sequence[tuple[Any, ...]], seconds: float, spent_s: float) -> str:
    *better, (_, option, params, own, expected) = made
    text = (
        f"budget {seconds:g} s: {_words(params, own)}, quality {option.quality:g}:"
        f" {expected.median + spent_s:.2f} s expected, {expected.high + spent_s:.2f} s nine times"
        " of ten"
    )
    if better:
        high, missed, *rest = better[-1]
        text += f"; {_words(rest[0], rest[1])}, quality {missed.quality:g}, takes {high:.2f} s"
    return text


def _words(params: SamplingParams, decoder: str) -> str:
    return (
        f"{params.width}x{params.height}x{params.num_frames}, {params.num_inference_steps} steps,"
        f" {params.attention}" + (f", decoder {decoder}" if decoder else "")
    )


def _rounded_up(seconds: float) -> float:
    return -(-seconds * 10 // 1) / 10
