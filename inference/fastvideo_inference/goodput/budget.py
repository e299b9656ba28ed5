"""A latency budget for one clip: the best of a model's settings that will be in time.

budget = Budget(5.0, found)
budget.prepare(pipe, settings)             # best first: `goodput.quality.candidates`
choice = budget.choose(settings, spent_s=0.4)

Seconds are those of a profile of this machine, made on first use and corrected by later clips.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastvideo
from fastvideo import timing
from fastvideo.hub import OpenModel
from fastvideo.log import logger
from fastvideo_inference import recipe
from fastvideo_inference.goodput import profile as profiles
from fastvideo_inference.goodput import quality
from fastvideo_inference.goodput.profile import SAVE, Estimate, Profile, Setting

if TYPE_CHECKING:
    from fastvideo.sampling import GenerateRequest, SamplingParams
    from fastvideo_inference.pipeline import VideoPipeline
    from fastvideo_inference.video import Video

START, FIRST = "start", "first"  # factors: seconds until a model is loaded; of a first clip
_CACHE = Path("~/.cache/fastvideo/profiles")
_REPEATS = 3  # of each setting, for the profile of a first use
_FIRST = 1.5  # before any first clip was timed


@dataclass(frozen=True)
class Choice:
    """What a budget bought: a setting, why, and the seconds from the clock's start to the end."""

    setting: Setting
    reason: str
    expected_s: float
    high_s: float

    def facts(self, budget_s: float, actual_s: float) -> dict[str, Any]:
        """Return what a sidecar says of it."""
        predicted = {
            "predicted_s": round(self.expected_s, 3),
            "nine_of_ten_s": round(self.high_s, 3),
        }
        return {
            "budget_s": budget_s,
            "reason": self.reason,
            **predicted,
            "actual_s": round(actual_s, 3),
        }


class Budget:
    """Seconds that a clip may take, and the profile of this machine by which they are spent.

    `saves`: the clip's file is within them.
    """

    def __init__(
        self, seconds: float, found: OpenModel, *, device: str = "auto", saves: bool = True
    ) -> None:
        if not 0 < seconds < float("inf"):
            raise ValueError(f"budget {seconds:g} s must be above 0")
        self.seconds, self._found, self._saves = seconds, found, saves
        self._fingerprint = recipe.fingerprint(found.folder)
        self._path = _path(self._fingerprint, device)
        self.profile: Profile | None = None
        try:
            self.profile = profiles.read(self._path) if self._path.exists() else None
        except ValueError as error:  # of another version
            logger.warning("%s: measured anew", error)

    def choose_cold(self, known: Sequence[Setting], *, spent_s: float) -> None:
        """Raise `ValueError` if nothing can be in time, before the model is loaded."""
        if self.profile and self._covers(known):
            self.choose(known, spent_s=spent_s + self.profile.factors.get(START, 0.0), first=True)

    def prepare(self, pipe: VideoPipeline, known: Sequence[Setting]) -> float:
        """Measure what the profile lacks; return the seconds of it, which no budget counts.

        What was measured while other programs kept this machine busy is measured again once they
        do not.
        """
        began, old = time.perf_counter(), self.profile
        if old and self._covers(known) and not old.is_busy:
            return 0.0
        from fastvideo_inference.goodput import measure

        is_busy = measure.is_loaded()
        if old and self._covers(known) and is_busy:
            return time.perf_counter() - began
        logger.warning("budget: measuring %s on this machine, once", self._found.name)
        if is_busy:
            logger.warning("budget: other programs keep it busy, so this is measured again later")
        if old is None or old.is_busy:
            old, new = None, known
        else:
            new = [setting for setting in known if not self._covers([setting])]
        made = measure.quick(pipe, new, fingerprint=self._fingerprint, repeats=_REPEATS)
        self.profile = made.with_cells_of(old).model_copy(update={"is_busy": is_busy})
        self._keep()
        return time.perf_counter() - began

    def choose(
        self, known: Sequence[Setting], *, spent_s: float = 0.0, first: bool = False
    ) -> Choice:
        """Return the best setting that nine times of ten is in time, of which some is spent.

        `first`: of a process, which takes longer. Raises `ValueError` with the smallest budget that
        could be met.
        """
        missed: list[tuple[float, Setting]] = []
        for setting in known:
            expected = self._clip_s(setting, first=first)
            median, high = expected.median + spent_s, expected.high + spent_s
            if high <= self.seconds:
                text = _reason(setting, missed, self.seconds, median, high)
                return Choice(setting, text, median, high)
            missed.append((high, setting))
        high, fastest = min(missed, key=lambda one: one[0])
        raise ValueError(
            f"budget {self.seconds:g} s: no setting of {self._found.spec.name} is in time on this"
            f" machine; the smallest budget that could be met is {-(-high * 10 // 1) / 10:g} s"
            f" ({fastest})"
        )

    def note(
        self, setting: Setting, took_s: Mapping[str, float], *, start_s: float | None = None
    ) -> None:
        """Correct the profile by a clip; `start_s`: it was a first one, loaded after these."""
        assert self.profile is not None, "a choice was made by it"
        counted = (*self._found.spec.stages, *([SAVE] if self._saves else []))
        took = {stage: took_s[stage] for stage in counted if stage in took_s}
        if start_s is None:
            self.profile = self.profile.corrected(setting.params, took, decoder=setting.decoder)
        else:
            usual = self._clip_s(setting, first=False).median
            self.profile = self.profile.with_factors(
                {START: start_s, FIRST: sum(took.values()) / usual}
            )
        self._keep()

    def _clip_s(self, setting: Setting, *, first: bool) -> Estimate:
        assert self.profile is not None, "prepare() comes first"
        row = self.profile.row_s(setting.params, decoder=setting.decoder, saves=self._saves)
        whole = sum(row.values(), Estimate(0.0, 0.0))
        return whole * self.profile.factors.get(FIRST, _FIRST) if first else whole

    def _covers(self, known: Sequence[Setting]) -> bool:
        try:
            return all(self._clip_s(setting, first=False).high for setting in known)
        except ValueError:
            return False

    def _keep(self) -> None:
        assert self.profile is not None, "there is one to keep"
        try:
            profiles.write(self.profile, self._path)
        except OSError as error:
            logger.warning("budget: the profile cannot be kept: %s", error)


def make_in_time(
    pipe: VideoPipeline,
    asked: Sequence[tuple[GenerateRequest, SamplingParams, tuple[str, ...]]],
    seconds: float,
    make: Callable[[VideoPipeline, SamplingParams, tuple[str, ...]], Video],
    *,
    is_whole: bool,
) -> list[Video]:
    """Make each clip of a call within a budget: `is_whole`, with frames, and noise of its seed."""
    if not is_whole:
        raise ValueError("a budget is for clips of frames, whose noise is drawn from the seed")
    model, own = pipe.model, pipe.decoder_id
    assert model.folder is not None, "a loaded model comes from a folder"
    found = OpenModel(pipe.model_id.name_or_path, model.spec, model.folder)
    decoder = own.name_or_path if own else None
    requests = (request.model_copy(update={"seed": one.seed}) for request, one, _ in asked)
    each = [quality.candidates(request, found, decoder=decoder) for request in requests]
    if model.meshes.degrees.world_size > 1:
        raise ValueError("a budget chooses for a clip of one process")
    budget = Budget(seconds, found, device=str(model.device), saves=False)
    budget.profile, made = budget.profile or pipe.profile, []
    for known, (_, _, notices) in zip(each, asked, strict=True):
        budget.prepare(pipe, known)
        began, choice = time.perf_counter(), budget.choose(known)
        setting = choice.setting
        video = make(pipe.with_decoder(setting.decoder), setting.params, (*notices, choice.reason))
        budget.note(setting, video.timings)
        pipe.profile = budget.profile
        facts = choice.facts(seconds, time.perf_counter() - began)
        made.append(replace(video, budget=facts))
    return made


def process_age_s() -> float:
    """Return the seconds since this process was started; those of its CPU where no /proc tells."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        born_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since the machine's own start
        return time.clock_gettime(time.CLOCK_BOOTTIME) - born_s
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()


def _path(fingerprint: str, device: str) -> Path:
    """Return where the profile of a model is kept: one for each machine, device and version."""
    facts = timing.place()
    key = json.dumps([fingerprint, device, fastvideo.__version__, facts])
    return _CACHE.expanduser() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _reason(
    setting: Setting,
    missed: Sequence[tuple[float, Setting]],
    budget_s: float,
    median: float,
    high: float,
) -> str:
    text = f"budget {budget_s:g} s: {setting}: {median:.2f} s expected, nine of ten in {high:.2f} s"
    if missed:
        late, better = missed[-1]
        text += f"; {better} would take {late:.2f} s"
    return text
