"""How long things usually take: limits for a step that hangs, and estimates for those who wait."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastvideo.models.wan_dit_config import WanConfig
from fastvideo.sampling import SamplingParams
from fastvideo.spec import Spec

STEP_LIMIT_S, TIMES_USUAL = 30.0, 5.0
_ALIKE = 4.0  # the largest ratio of FLOP at which a clip's time is scaled to another
_FORGET = 0.3  # how fast a slow interval is forgotten


class Key(NamedTuple):
    """Whose steps are compared: those of a pool's workers, at a stage of a model."""

    pool: int
    model: str
    stage: str


def work(params: SamplingParams, spec: Spec) -> float:
    """Return about the FLOP of a layer in a step of a clip; guidance runs two forwards."""
    shape = spec.latent_shape(frames=params.num_frames, height=params.height, width=params.width)
    tokens = shape.tokens(spec.compression.patch).num_tokens
    heads, head_dim, ffn_dim = (
        spec.dit.config.get(name, getattr(WanConfig, name))
        for name in ("num_attention_heads", "attention_head_dim", "ffn_dim")
    )
    width = heads * head_dim
    each = 8 * width * width + 4 * width * ffn_dim + 4 * tokens * width
    return float(tokens * each * (1 if params.guidance_scale == 1 else 2))


class Book:
    """Seconds between two signs of progress, by pool, model and stage; seconds of whole clips."""

    def __init__(self) -> None:
        self._intervals: dict[Key, dict[float, float]] = {}
        self._clips: dict[str, dict[float, dict[str, float]]] = {}
        self._last: dict[str, dict[str, float]] = {}

    def note(self, key: Key, work: float, seconds: float) -> None:
        """Keep an interval; a longer one counts at once, a shorter one slowly."""
        known = self._intervals.setdefault(key, {})
        old = known.get(work, seconds)
        known[work] = max(seconds, old + _FORGET * (seconds - old))

    def limit_s(self, key: Key, work: float) -> float | None:
        """Return after how long a step of this size is given up; None if none was ever seen."""
        known = self._intervals.get(key)
        if not known:
            return None
        nearest = _nearest(known, work)
        return max(STEP_LIMIT_S, TIMES_USUAL * known[nearest] * work / nearest)

    def note_clip(self, model: str, work: float, stage_seconds: dict[str, float]) -> None:
        """Keep the seconds of a finished clip."""
        self._last[model] = self._clips.setdefault(model, {})[work] = dict(stage_seconds)

    def stages_s(self, model: str, work: float) -> dict[str, float] | None:
        """Return the estimated seconds of a clip by stage; None before any of about its size."""
        known = self._clips.get(model)
        nearest = _nearest(known, work) if known else 0.0
        if not known or max(nearest / work, work / nearest) > _ALIKE:
            return None
        return {stage: s * work / nearest for stage, s in known[nearest].items()}

    def clip_s(self, model: str, work: float) -> float | None:
        """Return the estimated seconds of a clip, as `stages_s`."""
        found = self.stages_s(model, work)
        return sum(found.values()) if found else None

    def progress(self, model: str, row: Sequence[str], index: int, fraction: float) -> float:
        """Return the done fraction of a clip, by the stage seconds of the clip before."""
        shares = [self._last.get(model, {}).get(stage, 0.0) for stage in row]
        if not sum(shares):
            shares = [1.0] * len(row)
        done = sum(shares[:index]) + (shares[index] * fraction if index < len(row) else 0.0)
        return done / sum(shares)


def _nearest(known: Iterable[float], work: float) -> float:
    return min(known, key=lambda other: abs(math.log(other / work)))
