"""Runs of load against a server, kept as they end, and the goodput that they show.

bench = Bench(server, request, prompts, slo, num_frames=81, folder=Path("bench"))
for run in bench.runs(): ...    # bisection of the rate; a run that is there is not made again

After MLPerf: `single` sends one request at a time (p90 latency), `offline` all at once (clips a
second), `server` at random (Poisson) times (goodput).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastvideo import files
from fastvideo_inference.goodput import load
from fastvideo_inference.goodput.load import Sample, Score, Server, is_complete, score
from fastvideo_inference.goodput.plan import WARM_UP, Slo
from fastvideo_inference.goodput.simulate import arrivals

Mode = Literal["single", "offline", "server"]
SCALES = (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
_PRECISION = 0.05  # of the rate that bisection ends at
_MOST_RUNS = 12
_SINGLE = 10  # requests of a run that sends one at a time


@dataclass(frozen=True)
class Run:
    """One run: its mode, rate (requests a second), samples and score.

    `is_complete`: the server lived to its end.
    """

    mode: Mode
    rate: float
    samples: tuple[Sample, ...]
    score: Score
    is_complete: bool

    def passes(self, slo: Slo) -> bool:
        """Tell whether the target share of requests was good."""
        return self.is_complete and self.score.attainment >= slo.target


@dataclass(frozen=True)
class Bench:
    """Load of one kind on one server. `request` is the fields of a clip, `prompts` go in turn.

    `folder` keeps a JSON a run; the same bench resumes from it, another one is refused.
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

    def begin(self) -> None:
        """Make the folder; `ValueError` if it holds another bench or a number makes no sense."""
        arrivals(1.0, self.count, seed=self.seed, burst=self.burst)  # refuses nonsense
        if not 0 < self.poll_s < math.inf:
            raise ValueError(f"poll {self.poll_s:g} s must be above 0")
        own = {k: v for k, v in asdict(self).items() if k not in ("folder", "server")}
        text = json.dumps(own | {"url": self.server.url}, indent=1, default=str) + "\n"
        path = self.folder / "bench.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            files.write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{path} is of another bench; choose another folder")

    def runs(self, rates: Sequence[float] = (), *, offline: bool = False) -> Iterator[Run]:
        """Yield a run of single requests, then one at each rate, or at bisected rates if none."""
        single = self.run("single")
        yield single
        alone_s = single.score.latency_s.get("p50")
        if not single.is_complete or alone_s is None:
            return
        given = (self.run("server", rate=rate, alone_s=alone_s) for rate in rates)
        for run in given if rates else self._bisected(alone_s):
            yield run
            if not run.is_complete:
                return
        if offline:
            yield self.run("offline", alone_s=alone_s)

    def run(self, mode: Mode, *, rate: float = 0.0, alone_s: float | None = None) -> Run:
        """Return a run that was made before, or make it; `alone_s` as in `score`."""
        path = self.folder / (f"{mode}-{rate:.4g}.json" if rate else f"{mode}.json")
        if path.exists():
            samples = [Sample(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
        else:
            samples = self._send(mode, rate)
            if is_complete(samples):
                files.write_text(path, json.dumps([asdict(one) for one in samples]) + "\n")
        found = score(
            samples,
            self.slo,
            num_frames=self.num_frames,
            alone_s=alone_s,
            warm_up=0.0 if mode == "offline" else WARM_UP,
        )
        return Run(mode, rate, tuple(samples), found, is_complete(samples))

    def _bisected(self, alone_s: float) -> Iterator[Run]:
        rate, low, high = 1.0 / alone_s, 0.0, math.inf
        for _ in range(_MOST_RUNS):
            run = self.run("server", rate=rate, alone_s=alone_s)
            yield run
            low, high = (rate, high) if run.passes(self.slo) else (low, rate)
            if high - low <= _PRECISION * high < math.inf:
                return
            rate = 2 * rate if high == math.inf else (low + high) / 2

    def _send(self, mode: Mode, rate: float) -> list[Sample]:
        fields = [{**self.request, "prompt": prompt} for prompt in self.prompts]
        if mode != "single":
            is_offline = mode == "offline"
            times = [0.0] * self.count if is_offline else self._times(rate)
            return load.send(self.server, fields, times, poll_s=self.poll_s)
        samples, now_s = [], 0.0
        for index in range(_SINGLE):
            own = fields[index % len(fields)]
            (one,) = load.send(self.server, [own], [0.0], poll_s=self.poll_s)
            samples.append(replace(one, due_s=now_s, sent_s=now_s))
            now_s += one.latency_s
            if not is_complete(samples):
                break
        return samples

    def _times(self, rate: float) -> list[float]:
        return arrivals(rate, self.count, seed=self.seed, burst=self.burst)


def goodput(runs: Sequence[Run], slo: Slo) -> float:
    """Return the highest rate that passed, requests a second; 0 if none did."""
    return max((run.rate for run in runs if run.mode == "server" and run.passes(slo)), default=0.0)


def at_scales(run: Run, slo: Slo, *, num_frames: int) -> list[tuple[float, float]]:
    """Return (SLO scale, attainment) of a run: its deadline times a factor."""
    scaled = [(scale, replace(slo, deadline_s=scale * slo.deadline_s)) for scale in SCALES]
    return [(s, score(run.samples, one, num_frames=num_frames).attainment) for s, one in scaled]
