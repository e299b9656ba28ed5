"""Measuring a profile: each stage of a few settings, some times over, in one process or several.

profile = measure(found, settings, processes=2)

Several processes work at the same settings at the same time, each with a core of its own: what they
take from each other (memory, cache, clock) is then in the seconds, as it is on a busy server.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import multiprocessing as mp
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastvideo
from fastvideo import hub
from fastvideo.hub import OpenModel
from fastvideo.spec import Spec
from fastvideo_inference import recipe
from fastvideo_inference.goodput.profile import (
    DECODE,
    DENOISE,
    LOAD,
    SAVE,
    Cell,
    Device,
    Profile,
    Setting,
    work_of,
)

if TYPE_CHECKING:
    from fastvideo_inference.pipeline import VideoPipeline

_WARM_UPS = 1
_LOADS = 3  # how often each part is loaded
_BUSY, _LOOK_S = 0.25, 0.3  # share of the cores from which seconds are not trusted; how long


def measure(
    found: OpenModel,
    settings: Sequence[Setting],
    *,
    device: str = "auto",
    repeats: int = 5,
    processes: int = 1,
) -> Profile:
    """Return a profile of a model on this machine; see the module."""
    if processes == 1:
        rows = [_measure(found.name, settings, device, repeats, None, None)]
    else:
        rows = _in_many(found.name, settings, device, repeats, processes)
    cells = itertools.chain.from_iterable(cells for cells, _, _ in rows)
    facts = {"model": found.name, "fingerprint": recipe.fingerprint(found.folder)}
    return _profile(cells, spec=found.spec, device=rows[0][1], gib=rows[0][2], **facts).model_copy(
        update={"processes": processes}
    )


def quick(
    pipe: VideoPipeline, settings: Sequence[Setting], *, fingerprint: str, repeats: int
) -> Profile:
    """Return a profile of a loaded model: one short clip of each size, pattern and decoder."""
    spec = pipe.model.spec
    cells: list[tuple[tuple[Any, ...], list[float]]] = []
    for setting in shortened(settings, spec):
        cells += _clips(pipe.with_decoder(setting.decoder), setting, repeats, None)
    facts = {"model": pipe.model_id.name_or_path, "fingerprint": fingerprint}
    return _profile(cells, spec=spec, device=_device(pipe.model.device), gib={}, **facts)


def shortened(settings: Sequence[Setting], spec: Spec) -> list[Setting]:
    """Return settings with few steps, where a model leaves their number open: all cost the same."""
    few = {} if spec.scheduler.name == "few_step" else {"num_inference_steps": 2}
    own = [replace(one, params=one.params.model_copy(update=few), quality=0.0) for one in settings]
    return list(dict.fromkeys(own))


def _profile(
    cells: Iterable[tuple[tuple[Any, ...], list[float]]], *, spec: Spec, **facts: Any
) -> Profile:
    seconds: dict[tuple[Any, ...], list[float]] = {}
    for key, value in cells:
        seconds.setdefault(key, []).extend(value)
    return Profile(
        date=datetime.date.today().isoformat(),
        spec=spec,
        cells=tuple(
            Cell(stage=s, work=w, attention=a, decoder=d, seconds=tuple(round(x, 5) for x in value))
            for (s, w, a, d), value in seconds.items()
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


_Rows = tuple[list[tuple[tuple[Any, ...], list[float]]], Device, dict[str, float]]


def _in_many(
    name: str, settings: Sequence[Setting], device: str, repeats: int, processes: int
) -> list[_Rows]:
    """Measure in several new processes at once, one a core where the device is a CPU."""
    context = mp.get_context("spawn")
    together = context.Barrier(processes)
    with context.Pool(
        processes, initializer=_take, initargs=(together, context.Value("i", 0))
    ) as pool:
        jobs = [
            pool.apply_async(_measure_pinned, (name, settings, device, repeats))
            for _ in range(processes)
        ]
        return [job.get() for job in jobs]


_own: dict[str, Any] = {}


def _take(together: Any, counter: Any) -> None:
    with counter.get_lock():
        _own["index"], _own["together"] = counter.value, together
        counter.value += 1


def _measure_pinned(name: str, settings: Sequence[Setting], device: str, repeats: int) -> _Rows:
    return _measure(name, settings, device, repeats, _own["index"], _own["together"])


def _measure(
    name: str,
    settings: Sequence[Setting],
    device: str,
    repeats: int,
    core: int | None,
    together: Any,
) -> _Rows:
    import torch

    from fastvideo.formats import PARTS
    from fastvideo.model import load, pick_device
    from fastvideo_inference.pipeline import VideoPipeline

    place = pick_device(device)
    if core is not None and place.type == "cpu":
        if sys.platform == "linux":
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[core % len(cores)]})
        torch.set_num_threads(1)
    model = hub.open_model(name, weights=True)
    found: list[tuple[tuple[Any, ...], list[float]]] = []
    gib = {}
    for part in PARTS:
        seconds = []
        for _ in range(_LOADS):
            started = time.perf_counter()
            loaded = load(model, device=place, parts=(part,))
            seconds.append(time.perf_counter() - started)
        network = getattr(loaded, part)
        gib[part] = sum(p.numel() * p.element_size() for p in network.parameters()) / 2**30
        found.append(((f"{LOAD}.{part}", 1.0, "", ""), seconds))
    pipe = VideoPipeline.load(model, device=str(place))
    gc.freeze()  # as workers and `generate` do: imageio collects garbage twice a clip
    for setting in settings:
        found += _clips(pipe.with_decoder(setting.decoder), setting, repeats, together)
    return found, _device(place), gib


def _clips(
    pipe: VideoPipeline, setting: Setting, repeats: int, together: Any
) -> list[tuple[tuple[Any, ...], list[float]]]:
    """Make a clip some times, and return the seconds of each stage and of the file."""
    from fastvideo import stages

    params, spec = setting.params, pipe.model.spec
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(_WARM_UPS + repeats):
            if together is not None:
                together.wait()
            state = stages.make(pipe.model, [params])
            started = time.perf_counter()
            pipe.video(state).save(Path(folder, f"{index}.mp4"))
            timings = {**state.timings, SAVE: time.perf_counter() - started}
            timings[DENOISE] /= params.num_inference_steps
            for stage, value in timings.items():
                if index >= _WARM_UPS:
                    seconds.setdefault(stage, []).append(value)
    return [
        (
            (
                stage,
                work_of(stage, params, spec),
                params.attention if stage == DENOISE else "",
                setting.decoder if stage == DECODE else "",
            ),
            value,
        )
        for stage, value in seconds.items()
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
