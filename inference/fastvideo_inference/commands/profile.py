"""`fastvideo profile`: seconds of each stage of a model on this machine, as JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fastvideo import hub, sampling
from fastvideo.errors import OK, refusing
from fastvideo.hub import OpenModel
from fastvideo.models import decoder as decoders
from fastvideo.parallel.degrees import parse
from fastvideo.resolve import resolve
from fastvideo.spec import Spec
from fastvideo_inference.goodput import profile as profiles
from fastvideo_inference.goodput.profile import Setting

PROMPT = "a big red ball moving left at night"


def profile(
    model: Annotated[str, Argument(help="Bundled name, folder or hub id.")] = hub.DEFAULT_MODEL,
    size: Annotated[
        list[str] | None, Option(help="WIDTHxHEIGHT; repeatable. [the model's]")
    ] = None,
    frames: Annotated[
        list[int] | None, Option(help="Number of frames; repeatable. [the model's, and half]")
    ] = None,
    attention: Annotated[
        list[str] | None, Option(help="A pattern; repeatable. [the model's]")
    ] = None,
    processes: Annotated[
        int, Option(min=1, max=1024, help="Workers of a loaded server, of one core each on a CPU.")
    ] = 1,
    parallel: Annotated[
        list[str] | None, Option(help="Degrees of a group of them: ulysses=2; repeatable.")
    ] = None,
    repeats: Annotated[int, Option(min=2, max=1000, help="Clips of each setting.")] = 5,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1.")] = "auto",
    output: Annotated[
        Path | None, Option("--output", "-o", help="File. [MODEL.profile.json]")
    ] = None,
) -> int:
    """Measure each stage of a model on this machine: its own decoder and the small ones."""
    with refusing():
        _check_served(processes, parallel or [], attention)
        found = hub.open_model(model)
        settings = _settings(found, size or [], frames or [], attention or [])
        path = output or Path(f"{found.spec.name}.profile.json")
        if path.exists():
            raise FileExistsError(f"{path} exists; choose another name or remove it")
    from fastvideo_inference.goodput import measure  # torch comes in here

    if measure.is_loaded():
        print("other programs are busy on this machine: seconds will be too long", file=sys.stderr)
    made = measure.measure(
        hub.fetched(found),
        measure.shortened(settings, found.spec),
        device=device,
        repeats=repeats,
        processes=processes,
        parallel=parallel or [],
    )
    profiles.write(made, path)
    params = settings[0].params
    for stage in (*found.spec.stages, profiles.SAVE):
        estimate = made.stage_s(stage, params)
        print(f"{stage:<16}{estimate.median:9.3f} s   nine of ten below {estimate.high:.3f} s")
    print(path)
    return OK


def _check_served(processes: int, parallel: list[str], attention: list[str] | None) -> None:
    if attention and processes > 1:
        raise ValueError("attention: a server makes the clips of several processes the model's way")
    for degrees in parallel:
        size = parse(degrees).world_size
        if not 1 < size <= processes:
            raise ValueError(
                f"parallel {degrees} takes {size} processes; it must take 2 at least, and at most"
                f" {processes} (--processes)"
            )


def _settings(
    found: OpenModel, sizes: list[str], frames: list[int], patterns: list[str]
) -> list[Setting]:
    """Return the clips to measure: every size, length and pattern, then every small decoder."""
    spec = found.spec
    lengths = frames or [spec.defaults.num_frames, _half(spec)]
    asked = [
        resolve(
            sampling.read_layers(
                ("--size", {"size": size} if size else {}),
                ("--frames", {"frames": length}),
                ("--attention", {"attention": pattern} if pattern else {}),
                ("profile", {"prompt": PROMPT, "seed": 0}),
            ),
            spec,
        )
        for size in sizes or [""]
        for length in dict.fromkeys(lengths)
        for pattern in patterns or [""]
    ]
    small = decoders.names(found.folder) if found.folder else []
    first = {(one.width, one.height, one.num_frames): one for one in reversed(asked)}
    return [Setting(one) for one in asked] + [
        Setting(one, d) for d in small for one in first.values()
    ]


def _half(spec: Spec) -> int:
    step = spec.compression.temporal
    return max(1, (spec.defaults.num_frames - 1) // 2 // step * step + 1)
