"""Runs of load against a server, kept as they end, and the goodput that they show.

bench = Bench(server, request, slo, folder=Path("bench"), count=200)
for run in bench.find(): ...    # bisection of the rate; a run that is there is not made again

After MLPerf: `single` sends one request at a time, `offline` all at once, `server` at random
(Poisson) times.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastvideo import files
from fastvideo_inference.goodput import load
from fastvideo_inference.goodput.load import Sample, Score, Server, score
from fastvideo_inference.goodput.plan import Slo
from fastvideo_inference.goodput.simulate import arrivals

Mode = Literal["single", "offline", "server"]
_PRECISION = 0.05  # of the rate that bisection ends at
_MOST_RUNS = 12
_SINGLE = 10  # requests of a run that sends one at a time
SCALES = (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
_GONE = "ConnectionRefusedError"  # a server that died


@dataclass(frozen=True)
class Run:
    """One run: its mode, rate (requests a second), samples and score; `is_complete`: the server
    lived to its end.
    """

    mode: Mode
    rate: float
    samples: tuple[Sample, ...]
    score: Score
    is_complete: bool


@dataclass(frozen=True)
class Bench:
    """Load of one kind on one server. `request` is the fields of a clip, `prompts` go in turn.

    `folder` keeps a JSON a run; the same bench goes on from what is there, another is refused.
    """

    server: Server
    request: Mapping[str, Any]
    prompts: Sequence[str]
    slo: Slo
    num_frames: int
    folder: Path
    count: int = 200
    poll_s: float = 0.1
    burst: float = 1.0
    seed: int = 0
    _alone: list[float] = field(default_factory=list)

    def begin(self) -> None:
        """Make the folder, or raise `ValueError` if it holds the runs of another bench."""
        own = {
            **{k: v for k, v in asdict(self).items() if k not in ("folder", "_alone", "server")},
            "url": self.server.url,
        }
        text, path = json.dumps(own, indent=1, default=str) + "\n", self.folder / "bench.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            files.write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{path} is of another bench; take another folder")

    def run(self, mode: Mode, *, rate: float = 0.0) -> Run:
        """Return a run that was made before, or make it."""
        name = f"{mode}-{rate:.4g}.json" if rate else f"{mode}.json"
        path = self.folder / name
        if path.exists():
            samples = [Sample(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
        else:
            samples = self._send(mode, rate)
            if is_complete(samples):
                files.write_text(path, json.dumps([asdict(one) for one in samples]) + "\n")
        alone_s = statistics.median(self._alone) if self._alone else None
        found = score(samples, self.slo, num_frames=self.num_frames, alone_s=alone_s)
        if mode == "single":
            self._alone[:] = [one.latency_s for one in samples if one.status == "completed"]
        return Run(mode, rate, tuple(samples), found, is_complete(samples))

    def given(self, rates_min: Sequence[float]) -> Iterator[Run]:
        """Yield a run of single requests, then one at each of the rates (requests a minute)."""
        yield self.run("single")
        for rate in rates_min:
            yield self.run("server", rate=rate / 60)

    def find(self) -> Iterator[Run]:
        """Yield a run of single requests, then runs of a bisected rate, until goodput is known."""
        single = self.run("single")
        yield single
        if not single.is_complete or not self._alone:
            return
        rate, low, high = 1.0 / statistics.median(self._alone), 0.0, math.inf
        for _ in range(_MOST_RUNS):
            run = self.run("server", rate=rate)
            yield run
            if not run.is_complete:
                return
            low, high = (rate, high) if passes(run, self.slo) else (low, rate)
            if high - low <= _PRECISION * high < math.inf:
                return
            rate = 2 * rate if high == math.inf else (low + high) / 2

    def _send(self, mode: Mode, rate: float) -> list[Sample]:
        """Send the requests of a run; end early if the server is gone."""
        fields = [{**self.request, "prompt": prompt} for prompt in self.prompts]
        if mode == "server":
            times = arrivals(rate, self.count, seed=self.seed, burst=self.burst)
            groups = [times]
        else:
            groups = [[0.0] * self.count] if mode == "offline" else [[0.0]] * _SINGLE
        samples: list[Sample] = []
        for index, times in enumerate(groups):
            own = fields[index % len(fields) :] + fields[: index % len(fields)]
            for sample in load.send(self.server, own, times, poll_s=self.poll_s):
                samples.append(sample)
                if _GONE in sample.error:
                    return samples
        return samples


def passes(run: Run, slo: Slo) -> bool:
    """Tell whether the target share of a run's requests was good."""
    return run.score.attainment >= slo.target


def is_complete(samples: Sequence[Sample]) -> bool:
    """Tell whether the server lived to the end of a run."""
    return bool(samples) and not any(_GONE in one.error for one in samples)


def goodput(runs: Sequence[Run], slo: Slo) -> float:
    """Return the highest rate that passed, requests a second; 0 if none did."""
    served = (run for run in runs if run.mode == "server" and run.is_complete)
    return max((run.rate for run in served if passes(run, slo)), default=0.0)


def at_scales(run: Run, slo: Slo, *, num_frames: int) -> list[tuple[float, float]]:
    """Return (SLO scale, attainment) of a run: all of its deadlines times one factor."""
    return [
        (
            scale,
            score(
                run.samples, replace(slo, deadline_s=scale * slo.deadline_s), num_frames=num_frames
            ).attainment,
        )
        for scale in SCALES
    ]
