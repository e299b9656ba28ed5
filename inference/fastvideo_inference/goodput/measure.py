"""Measuring a profile: each stage of a few settings, some times over, alone or under load.

profile = measure(found, settings, processes=2)

With several processes a server of so many workers is loaded, each worker on a core of its own where
the device is a CPU. What workers, server and clients take from each other (memory, cache, clock,
cores) is then in the seconds, and so is the time in which a worker waits for its next clip.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import fastvideo
from fastvideo.hub import OpenModel
from fastvideo.parallel.degrees import parse
from fastvideo.spec import Spec
from fastvideo_inference import recipe
from fastvideo_inference.goodput import load
from fastvideo_inference.goodput.load import Server
from fastvideo_inference.goodput.plan import worker_toml
from fastvideo_inference.goodput.profile import (
    DECODE,
    DENOISE,
    DISPATCH,
    LOAD,
    SAVE,
    SHARED,
    Cell,
    Device,
    Profile,
    Setting,
    work_of,
)

if TYPE_CHECKING:
    from fastvideo_inference.pipeline import VideoPipeline

_Cell: TypeAlias = tuple[tuple[Any, ...], list[float]]
_STAGE = "stage."  # before the names of stages in what a server says of a clip
_READY_S = 0.1
_WARM_UPS = 1
_LOADS = 3  # how often each part is loaded
_AT_ONCE, _POLL_S = 2, 0.1  # requests for each worker: one is made, one waits; as `bench serve`
_BUSY, _LOOK_S = 0.25, 0.3  # share of the cores from which seconds are not trusted; how long


def measure(
    found: OpenModel,
    settings: Sequence[Setting],
    *,
    device: str = "auto",
    repeats: int = 5,
    processes: int = 1,
    parallel: Sequence[str] = (),
) -> Profile:
    """Return a profile of a model on this machine; see the module."""
    if processes == 1 and not parallel:
        cells, place, gib = _alone(found, settings, device=device, repeats=repeats)
    else:
        served = _Served(found, settings, device, repeats, processes)
        cells, place, gib = served.cells(["", *parallel]), served.device, served.gib
    facts = {"model": found.name, "fingerprint": recipe.fingerprint(found.folder)}
    made = _profile(cells, spec=found.spec, device=place, gib=gib, **facts)
    return made.model_copy(update={"processes": processes})


def quick(
    pipe: VideoPipeline, settings: Sequence[Setting], *, fingerprint: str, repeats: int
) -> Profile:
    """Return a profile of a loaded model: one short clip of each size, pattern and decoder."""
    spec = pipe.model.spec
    cells: list[_Cell] = []
    for setting in shortened(settings, spec):
        cells += _clips(pipe.with_decoder(setting.decoder), setting, repeats)
    facts = {"model": pipe.model_id.name_or_path, "fingerprint": fingerprint}
    return _profile(cells, spec=spec, device=_device(pipe.model.device), gib={}, **facts)


def shortened(settings: Sequence[Setting], spec: Spec) -> list[Setting]:
    """Return settings with few steps, where a model leaves their number open: all cost the same."""
    few = {} if spec.scheduler.name == "few_step" else {"num_inference_steps": 2}
    own = [replace(one, params=one.params.model_copy(update=few), quality=0.0) for one in settings]
    return list(dict.fromkeys(own))


def _profile(cells: Iterable[_Cell], *, spec: Spec, **facts: Any) -> Profile:
    seconds: dict[tuple[Any, ...], list[float]] = {}
    for key, value in cells:
        seconds.setdefault(key, []).extend(value)
    return Profile(
        date=datetime.date.today().isoformat(),
        spec=spec,
        cells=tuple(
            Cell(
                stage=s,
                work=w,
                attention=a,
                decoder=d,
                parallel=p,
                seconds=tuple(round(x, 5) for x in value),
            )
            for (s, w, a, d, p), value in seconds.items()
        ),
        **facts,
    )


def is_loaded() -> bool:
    """Tell whether other programs keep this machine's cores busy, while this one sleeps."""
    if sys.platform != "linux":
        return False
    before = _clocks()
    time.sleep(_LOOK_S)
    idle, whole = (b - a for a, b in zip(before, _clocks(), strict=True))
    return idle < (1 - _BUSY) * whole


def _clocks() -> tuple[int, int]:
    """Return how long all cores were idle, and the whole time of them, in ticks."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _alone(
    found: OpenModel, settings: Sequence[Setting], *, device: str, repeats: int
) -> tuple[list[_Cell], Device, dict[str, float]]:
    """Measure in this process, with all its threads."""
    from fastvideo.formats import PARTS
    from fastvideo.model import load, pick_device
    from fastvideo_inference.pipeline import VideoPipeline

    place, cells, gib = pick_device(device), list[_Cell](), dict[str, float]()
    for part in PARTS:
        seconds = []
        for _ in range(_LOADS):
            started = time.perf_counter()
            loaded = load(found, device=place, parts=(part,))
            seconds.append(time.perf_counter() - started)
        network = getattr(loaded, part)
        gib[part] = sum(p.numel() * p.element_size() for p in network.parameters()) / 2**30
        cells.append(((f"{LOAD}.{part}", 1.0, "", "", ""), seconds))
    pipe = VideoPipeline.load(found, device=str(place))
    gc.freeze()  # as workers and `generate` do: imageio collects garbage twice a clip
    for setting in settings:
        cells += _clips(pipe.with_decoder(setting.decoder), setting, repeats)
    return cells, _device(place), gib


def _clips(pipe: VideoPipeline, setting: Setting, repeats: int) -> list[_Cell]:
    """Make a clip some times, and return the seconds of each stage and of the file."""
    from fastvideo import stages

    params, spec = setting.params, pipe.model.spec
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(_WARM_UPS + repeats):
            state = stages.make(pipe.model, [params])
            started = time.perf_counter()
            pipe.video(state).save(Path(folder, f"{index}.mp4"))
            timings = {**state.timings, SAVE: time.perf_counter() - started}
            for stage, value in timings.items() if index >= _WARM_UPS else ():
                seconds.setdefault(stage, []).append(value)
    return _cells(seconds, setting, spec)


def _cells(
    seconds: Mapping[str, list[float]], setting: Setting, spec: Spec, *, parallel: str = ""
) -> list[_Cell]:
    """Return what clips of a setting took, by stage; of denoising each step."""
    params = setting.params
    each = {DENOISE: params.num_inference_steps}
    return [
        (
            (
                stage,
                work_of(stage, params, spec),
                params.attention if stage == DENOISE else "",
                setting.decoder if stage == DECODE else "",
                parallel,
            ),
            [one / each.get(stage, 1) for one in values],
        )
        for stage, values in seconds.items()
    ]


def _device(place: Any) -> Device:
    import torch

    from fastvideo import timing

    facts = timing.machine()
    return Device(
        name=facts["gpu"] if place.type == "cuda" else facts["cpu"],
        kind=place.type,
        threads=torch.get_num_threads(),
        torch=timing.place()["torch"],
        fastvideo=fastvideo.__version__,
    )


class _Served:
    """What a server's workers take, by what it says of each clip; `gib` are the parts' sizes."""

    def __init__(
        self,
        found: OpenModel,
        settings: Sequence[Setting],
        device: str,
        repeats: int,
        processes: int,
    ) -> None:
        from fastvideo.formats import PARTS
        from fastvideo.model import build_part, load, pick_device

        self._model, self._settings = found, settings
        self._repeats, self._processes = repeats, processes
        self._numbers = itertools.count()
        place = pick_device(device)
        self._kind = place.type
        own = _device(place)
        self.device = own.model_copy(update={"threads": 1}) if self._kind == "cpu" else own
        size = load(found, device=place, parts=()).dtype.itemsize / 2**30
        self.gib = {
            part: size * sum(p.numel() for p in build_part(found.spec, part).parameters())
            for part in PARTS
        }

    def cells(self, parallel: Sequence[str]) -> list[_Cell]:
        """Return the cells of workers alone and of groups of these degrees."""
        found: list[_Cell] = []
        for degrees in parallel:
            with self._serving(degrees, None) as (url, workers):
                for setting in self._settings:
                    seconds, waits_s = self._load(url, setting, workers)
                    if degrees:
                        seconds = {stage: seconds[stage] for stage in SHARED}
                    else:
                        found.append(((DISPATCH, 1.0, "", "", ""), [waits_s]))
                    found += _cells(seconds, setting, self._model.spec, parallel=degrees)
        with self._serving("", max(self.gib.values())) as (url, workers):
            seconds, _ = self._load(url, self._settings[0], workers)
        loads = {stage: values for stage, values in seconds.items() if stage.startswith(LOAD)}
        return found + [((stage, 1.0, "", "", ""), values) for stage, values in loads.items()]

    @contextmanager
    def _serving(self, degrees: str, memory_gib: float | None) -> Iterator[tuple[str, int]]:
        """Serve on all processes; give the server's URL and how many workers it has."""
        size = parse(degrees).world_size
        workers, numbers = self._processes // size, itertools.count()
        if not workers:
            raise ValueError(f"parallel {degrees} needs {size} processes, not {self._processes}")
        small = {one.decoder for one in self._settings} - {""}
        lines = ["[decoder]", *(f"{name} = {json.dumps(name)}" for name in small)]
        for _ in range(workers):
            own = [f"{self._kind}:{next(numbers)}" for _ in range(size)]
            lines += worker_toml(
                self._model.spec.stages, self._model.name, own, degrees, memory_gib
            )
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder, "serve.toml")
            config.write_text("\n".join(lines) + "\n", encoding="utf-8")
            with served(config) as url:
                yield url, workers

    def _load(
        self, url: str, setting: Setting, workers: int
    ) -> tuple[dict[str, list[float]], float]:
        """Return the seconds of each stage of clips, and how long a worker waits before a clip."""
        fields = {
            name: str(getattr(setting.params, name))
            for name in ("num_frames", "width", "height", "num_inference_steps", "guidance_scale")
        } | ({"decoder": setting.decoder} if setting.decoder else {})
        never = threading.Event()

        def one(number: int) -> tuple[float, Mapping[str, float]]:
            values = {**fields, "prompt": f"{setting.params.prompt}, {number}", "seed": "1"}
            made = load.follow(Server(url), values, None, poll_s=_POLL_S, stop=never)
            if made["status"] != "completed":
                raise RuntimeError(f"profile: a clip is {made['status']}: {made['error']}")
            return time.perf_counter(), made["server"]

        count = workers * (_AT_ONCE * _WARM_UPS + self._repeats)
        with ThreadPoolExecutor(_AT_ONCE * workers) as threads:
            done = sorted(threads.map(one, itertools.islice(self._numbers, count)), key=_first)
        kept = done[_AT_ONCE * _WARM_UPS * workers :]
        names = [name for name in kept[0][1] if name.startswith(_STAGE)]
        seconds = {name.removeprefix(_STAGE): [s[name] for _, s in kept] for name in names}
        clip_s = workers * (kept[-1][0] - kept[0][0]) / (len(kept) - 1)
        work_s = sum(statistics.median(values) for values in seconds.values())
        return seconds, max(0.0, clip_s - work_s)


def _first(pair: tuple[float, Any]) -> float:
    return pair[0]


@contextmanager
def served(config: Path) -> Iterator[str]:
    """Start a server in the config's folder, wait until it is ready, and end it; give its URL.

    Its log is `serve.log` there. Raises `RuntimeError` if it ends before it is ready.
    """
    command = [sys.executable, "-m", "fastvideo", "serve", "--config", str(config), "--port", "0"]
    log = config.parent / "serve.log"
    with (
        log.open("w") as lines,
        subprocess.Popen(
            command, cwd=config.parent, stdout=subprocess.PIPE, stderr=lines, text=True
        ) as server,
    ):
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            while not (url and _is_ready(url)):
                if server.poll() is not None:
                    *_, last = ["the server ended", *log.read_text().splitlines()]
                    raise RuntimeError(last)
                time.sleep(_READY_S)
            yield url
        finally:
            for _ in range(2):  # the second one waits for no clip
                server.send_signal(signal.SIGTERM)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
