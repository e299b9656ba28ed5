"""The table of a comparison: settings of models on the same prompts and noise, beside a base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

from fastvideo import timing
from fastvideo.metrics.diversity import diversity
from fastvideo.metrics.faithfulness import ALL, matched
from fastvideo_inference import paired, scores
from fastvideo_inference.paired import Estimate
from fastvideo_inference.scores import Distance, Legal, Record

METHOD = (
    "Faithfulness: share of clips whose attribute the world's parser reads as the prompt asked;"
    " `mean`: mean over clips of the share of their attributes; `all`: every attribute at once."
    " Differences are paired: same prompt, same noise, this setting less the base, over the prompts"
    " that both were made of. 95 % intervals of differences and of the share of diversity: ratio"
    " estimate over independent groups (Cochran), Student's t; prompts of one combination of"
    " attributes are one group, for diversity each prompt is. Those of rates: Wilson's."
)

Seconds = Mapping[str, float]


@dataclass(frozen=True)
class Sampler:
    """What was run: `sigmas` if the model has few steps, `own` if they are those it has."""

    scheduler: str
    steps: int
    guidance: float
    attention: str
    sigmas: tuple[float, ...] | None = None
    own: bool = True
    decoder: str | None = None
    """A small one in the place of the VAE's."""

    @property
    def forwards(self) -> int:
        """Evaluations of the network for one clip."""
        return self.steps * (1 if self.guidance == 1 else 2)


@dataclass(frozen=True)
class Rate:
    """A share of clips with Wilson's interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Against:
    """A setting less the base on the prompts of both: shares of 1, and diversity over diversity."""

    prompts: int
    mean: Estimate
    all: Estimate
    diversity: Estimate | None


@dataclass(frozen=True)
class Timed:
    """Seconds of one clip from prompt to frames, without a file; medians, paired ratio to base."""

    rounds: int
    total: Mapping[str, Any]
    denoise: Mapping[str, Any]
    faster: Mapping[str, Any]
    """Seconds of the base over these, of the same round."""


@dataclass(frozen=True)
class Found:
    """What is known of one setting."""

    name: str
    model: str
    sampler: Sampler
    evaluation: str
    n: int
    combinations: int
    rates: Mapping[str, Rate]
    mean: float
    diversity: float | None
    flicker: float | None
    distance: Distance | None
    overlap: float | None
    """With the ideal shapes of the prompts; of a world that can tell."""
    against: Against | None
    seconds: Timed | None


@dataclass(frozen=True)
class Contrast:
    """Every setting beside the base, and where and with what it was measured."""

    base: str
    rows: tuple[Found, ...]
    truth: Mapping[str, float | None]
    """Diversity and flicker of the true clips of the base's prompts."""
    seed: int
    world: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    method: str = METHOD

    def to_json(self) -> str:
        """Return the table as JSON; the same results give the same text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)


@dataclass(frozen=True)
class Made:
    """The results of one setting: clips of every prompt, then later repeats of the first ones."""

    name: str
    model: str
    sampler: Sampler
    evaluation: str
    repeats: Sequence[Sequence[Record]]


def found(
    made: Made, base: Made, rounds: Sequence[Mapping[str, Seconds]], *, legal: Legal
) -> Found:
    """Put one setting's numbers together, with what tells it from the base."""
    first = made.repeats[0]
    spread, fits = spreads(made.repeats), scores.fits(first, "fit")
    rows = scores.rows(first, "parse", legal)
    has_features = "features" in first[0]
    return Found(
        name=made.name,
        model=made.model,
        sampler=made.sampler,
        evaluation=made.evaluation,
        n=len(first),
        combinations=len({_combination(m) for m in first}),
        rates={row.attribute: Rate(row.rate, *row.interval) for row in rows},
        mean=fmean(row.rate for row in rows if row.attribute != ALL),
        diversity=fmean(spread) if spread else None,
        flicker=scores.mean(first, "flicker"),
        distance=scores.distance(first, first) if has_features else None,
        overlap=fits.overlap if fits else None,
        against=None if made is base else against(made, base, legal=legal),
        seconds=timed(made.name, base.name, rounds) if rounds else None,
    )


def against(made: Made, base: Made, *, legal: Legal) -> Against:
    """Compare on the prompts that both were made of; `ValueError` if those differ."""
    pairs = list(zip(made.repeats[0], base.repeats[0], strict=False))
    for one, other in pairs:
        if one["prompt"] != other["prompt"]:
            raise ValueError(f"{made.name} was asked {one['prompt']!r}, not {other['prompt']!r}")
    groups = [_combination(one) for one, _ in pairs]
    mean, whole = (
        paired.difference([mark(a) for a, _ in pairs], [mark(b) for _, b in pairs], groups)
        for mark in (partial(_share_right, legal=legal), partial(_all_right, legal=legal))
    )
    both = list(zip(spreads(made.repeats), spreads(base.repeats), strict=False))
    wide = [b for _, b in both]
    share = paired.ratio([a for a, _ in both], wide) if sum(wide) > 0 else None
    return Against(len(pairs), mean, whole, share)


def _share_right(record: Record, legal: Legal) -> float:
    """Return the share of a clip's attributes that are as its prompt asked."""
    marks = [matched(record["truth"], record["parse"], name) for name in legal]
    return fmean(right / count for right, count in marks)


def _all_right(record: Record, legal: Legal) -> float:
    """Return 1 if every attribute is as asked, else 0."""
    return float(all(record["parse"].get(name) == record["truth"][name] for name in legal))


def spreads(repeats: Sequence[Sequence[Record]], key: str = "features") -> list[float]:
    """Return, for each prompt with several repeats, how far apart these are in features."""
    if len(repeats) < 2:
        return []
    return [diversity([[repeat[i][key] for repeat in repeats]]) for i in range(len(repeats[-1]))]


def timed(name: str, base: str, rounds: Sequence[Mapping[str, Seconds]]) -> Timed:
    """Sum the stages of every round up."""
    whole = [{row: sum(stages.values()) for row, stages in one.items()} for one in rounds]
    return Timed(
        rounds=len(rounds),
        total=timing.middle([one[name] for one in whole], 3),
        denoise=timing.middle([one[name]["denoise"] for one in rounds], 3),
        faster=timing.ratio(whole, base, over=name),
    )


def _combination(record: Record) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(record["truth"].items()))


def markdown(table: Contrast) -> str:
    """Write the table for a model card: faithfulness, then the rest, then how to read it."""
    names = list(table.rows[0].rates)
    head = ["setting", "steps", "guidance", "n", *names, "mean", "mean - base", "all - base"]
    first = [
        [r.name, _steps(r.sampler), f"{r.sampler.guidance:g}", str(r.n)]
        + [f"{100 * r.rates[name].value:.1f}" for name in names]
        + [f"{100 * r.mean:.1f}"]
        + (["base", "base"] if r.against is None else _differences(r.against, r.n))
        for r in table.rows
    ]
    titles = ["setting", "diversity", "of base's", "flicker", "feature distance"]
    second = [[r.name, *_rest(r)] for r in table.rows]
    truth = ["true clips", _number(table.truth["diversity"]), "", _number(table.truth["flicker"])]
    clock = ["s a clip", "range", "denoise s", "faster than base", "range"]
    return "\n\n".join(
        [
            _grid(head, first),
            _grid([*titles, *clock], [*second, [*truth, "", "", "", "", "", ""]]),
            *_notes(table),
        ]
    )


def _steps(sampler: Sampler) -> str:
    if sampler.sigmas is None:
        return f"{sampler.steps} {sampler.scheduler}"
    sigmas = ", ".join(f"{sigma:.4g}" for sigma in sampler.sigmas)
    return f"{sampler.steps}: {sigmas}{'' if sampler.own else ' *'}"


def _differences(found: Against, n: int) -> list[str]:
    fewer = f" n={found.prompts}" if found.prompts < n else ""
    return [_interval(e, 100, "+.1f") + fewer for e in (found.mean, found.all)]


def _interval(e: Estimate, scale: float, form: str) -> str:
    if e.low is None or e.high is None:
        return f"{scale * e.value:{form}}"
    return f"{scale * e.value:{form}} ({scale * e.low:{form}} to {scale * e.high:{form}})"


def _rest(row: Found) -> list[str]:
    share = row.against.diversity if row.against else None
    far = row.distance
    cells = [
        _number(row.diversity),
        "base" if row.against is None else _interval(share, 100, ".0f") + " %" if share else "",
        _number(row.flicker),
        f"{far.value:.2f} (n={far.n}, floor {far.floor:.2f})" if far else "",
    ]
    if row.seconds is None:
        return [*cells, "", "", "", "", ""]
    s = row.seconds
    spans = [" - ".join(f"{x:.2f}" for x in m["range"]) for m in (s.total, s.faster)]
    clip, denoise, faster = s.total["s"], s.denoise["s"], s.faster["ratio"]
    return [*cells, f"{clip:.2f}", spans[0], f"{denoise:.2f}", f"{faster:.2f}", spans[1]]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _notes(table: Contrast) -> list[str]:
    notes = [f"Base: {table.base}. Rates and differences in percent; seed {table.seed}."]
    if any(not row.sampler.own for row in table.rows):
        notes.append("`*`: sigmas given by hand, not those that the model was distilled for.")
    rounds = {row.seconds.rounds for row in table.rows if row.seconds}
    how = f"prompt to frames, a clip at a time, {max(rounds, default=0)} rounds in turn"
    clock = f"Seconds: {how}, after a warm-up." if rounds else "Seconds were not measured."
    facts = {k: v for k, v in {**table.machine, **table.versions}.items() if v is not None}
    where = ", ".join(f"{key} {value}" for key, value in facts.items())
    return [" ".join([*notes, table.method, clock]), f"Machine: {where}."]


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
