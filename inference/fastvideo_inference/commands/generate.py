"""`fastvideo generate`: prompts become clips, their recipe inside and their timings beside."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from fastvideo import env, files, hub, sampling
from fastvideo.errors import FAILED, OK, one_line, refusing
from fastvideo.log import warned
from fastvideo.stages import Notice
from fastvideo_inference import naming, sharing
from fastvideo_inference.commands.report import Report, reporting
from fastvideo_inference.goodput.budget import Budget, process_age_s
from fastvideo_inference.request import Batch, CliArgs, Job, check_place, claimed, read

if TYPE_CHECKING:
    from fastvideo_inference.pipeline import VideoPipeline
    from fastvideo_inference.video import Video

Model = Annotated[
    str | None,
    Option("--model", "-m", help=f"Bundled name, folder or hub id. [{hub.DEFAULT_MODEL}]"),
]
Attention = Annotated[str | None, Option(help=f"{sampling.ATTENTION.help}. [the model's]")]
Backend = Annotated[str | None, Option(help=f"{sampling.BACKEND.help}. [auto, the fastest]")]
DropGates = Annotated[
    bool | None, Option("--drop-gates/--no-drop-gates", help=f"{sampling.DROP_GATES.help}. [no]")
]
Lora = Annotated[list[str] | None, Option(help=f"{sampling.LORA.help}; repeatable.")]
Decoder = Annotated[
    str | None,
    Option(help="A small decoder of the model, its path, or vae. [vae, the VAE's own]"),
]
Parallel = Annotated[
    str | None, Option(help="How torchrun's processes share a clip: ulysses=2,guidance=2.")
]
Count = Annotated[
    int, Option(min=1, max=1000, help="Clips of each prompt, of seed, seed + 1, and so on.")
]
Set = Annotated[list[str] | None, Option("--set", help="key=value, over the config; repeatable.")]
Prompts = Annotated[
    Path | None, Option(help="A .txt (a prompt a line) or .jsonl (a request a line).")
]
Overwrite = Annotated[
    bool, Option("--overwrite", help="Replace an old clip when the new one is whole.")
]
Repeat = Annotated[
    Path | None, Option("--from", help="A clip whose recipe to repeat; flags change it.")
]
Server = Annotated[
    str | None, Option(help="URL of a `fastvideo serve` that makes the clips in place of this.")
]
ApiKey = Annotated[str | None, Option(help="The server's key, or @FILE that holds it.")]
Output = Annotated[
    str | None,
    Option("--output", "-o", help=f"File, folder/ or template. [{naming.DEFAULT_TEMPLATE}]"),
]


_FIELDS = (
    *("prompt", "seed", "steps", "size", "frames", "fps", "guidance", "negative"),
    *("attention", "backend", "drop_gates", "lora"),
)


def generate(
    ctx: Context,
    prompt: Annotated[str | None, Argument(help=sampling.PROMPT.help)] = None,
    prompts: Prompts = None,
    model: Model = None,
    seed: Annotated[str | None, Option(help=f"{sampling.SEED.help}; several: 1,5,9.")] = None,
    count: Count = 1,
    steps: Annotated[int | None, Option(help=sampling.STEPS.help)] = None,
    size: Annotated[str | None, Option(help="WIDTHxHEIGHT in pixels, such as 224x128")] = None,
    frames: Annotated[int | None, Option(help=sampling.FRAMES.help)] = None,
    fps: Annotated[str | None, Option(help=sampling.FPS.help)] = None,
    guidance: Annotated[float | None, Option(help=sampling.GUIDANCE.help)] = None,
    negative: Annotated[str | None, Option(help=sampling.NEGATIVE.help)] = None,
    attention: Attention = None,
    backend: Backend = None,
    drop_gates: DropGates = None,
    lora: Lora = None,
    decoder: Decoder = None,
    budget: Annotated[
        str | None,
        Option(
            help="Seconds from this command to the file, such as 5s; what is left"
            " open is chosen for the best clip within them."
        ),
    ] = None,
    output: Output = None,
    overwrite: Overwrite = False,
    config: Annotated[Path | None, Option(help="TOML file with fields of the request.")] = None,
    settings: Set = None,
    repeat: Repeat = None,
    as_json: Annotated[bool, Option("--json", help="One event a line on stdout.")] = False,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1. [auto]")] = None,
    dtype: Annotated[str | None, Option(help="float32, bfloat16. [auto]")] = None,
    parallel: Parallel = None,
    server: Server = None,
    api_key: ApiKey = None,
) -> int:
    """Make clips from prompts. What is not given is the model's default."""
    typed = {**locals(), "lora": lora or None, "settings": tuple(settings or ())}
    typed["fields"] = {name: typed[name] for name in _FIELDS}
    typed["notices"] = ctx.meta["given_twice"]
    args = CliArgs(**{name: typed[name] for name in CliArgs.__dataclass_fields__})
    if server is not None:
        from fastvideo_inference.commands import remote

        return remote.generate(args, server=server, api_key=api_key, as_json=as_json)
    start = _run_alone if env.world_size() == 1 else _run_in_many
    return start(args, as_json=as_json)


def _run_alone(args: CliArgs, *, as_json: bool) -> int:
    with refusing():
        batch = read(args)
    with claimed(batch) as own:
        return _run(own, as_json=as_json)


def _run_in_many(args: CliArgs, *, as_json: bool) -> int:
    """Let the first process read the request; the others get what it read."""
    with refusing():
        check_place(args.device, args.dtype, num_processes=env.world_size())
        batch = read(args) if env.rank() == 0 else None
    from fastvideo.launched import init_distributed  # torch comes in here
    from fastvideo.model import pick_device
    from fastvideo.parallel import agree

    with ExitStack() as held:
        device = held.enter_context(init_distributed(pick_device(args.device or "auto")))
        mine = held.enter_context(claimed(batch)) if batch else None
        batch = agree.broadcast_object(mine, agree.world_group(), device)
        assert batch is not None, "the first process has read it"
        return _run(dataclasses.replace(batch, device=str(device)), as_json=as_json)


def _run(batch: Batch, *, as_json: bool) -> int:
    started = time.perf_counter()
    budget = _budget(batch)
    from fastvideo_inference.pipeline import VideoPipeline  # torch comes in here

    pipe = VideoPipeline.load(
        batch.model,
        device=batch.device,
        dtype=batch.dtype,
        decoder=None if budget else batch.decoder,
        degrees=batch.degrees,
    )
    gc.freeze()  # what is loaded stays; imageio collects garbage twice a clip
    load_s = time.perf_counter() - started
    is_silent = pipe.model.meshes.axis("sample").rank > 0
    with reporting(as_json=as_json, is_silent=is_silent) as report:
        return _make_all(pipe, batch, report, load_s=load_s, budget=budget)


def _budget(batch: Batch) -> Budget | None:
    """Return the budget of a clip, unless no setting of the first one can be in time."""
    if batch.budget_s is None:
        return None
    with refusing():
        budget = Budget(batch.budget_s, batch.model, device=batch.device)
        budget.choose_cold(batch.jobs[0].settings, spent_s=process_age_s())
    return budget


def _make_all(
    pipe: VideoPipeline, batch: Batch, report: Report, *, load_s: float, budget: Budget | None
) -> int:
    code, total = OK, len(batch.jobs)
    replica = pipe.model.meshes.axis("data")
    for index in range(replica.rank, total, replica.size):
        job = batch.jobs[index]
        params = job.params
        report.start(index=index, total=total, prompt=params.prompt, seed=params.seed)
        try:
            own_load_s = load_s if index == replica.rank else 0.0
            make = partial(_make, report=report, load_s=own_load_s, overwrite=batch.overwrite)
            if budget is None:
                timings = make(pipe, job)
            else:
                timings = _make_in_time(pipe, job, report, budget, make, is_first=index == 0)
        except (ValueError, OSError, RuntimeError) as error:
            report.failed(params.prompt, one_line(error))
            if total == 1 or batch.degrees.world_size > 1:  # others wait for this one
                raise
            code = FAILED
        else:
            report.saved(str(job.path), seed=params.seed, timings=timings)
    return code


def _make_in_time(
    pipe: VideoPipeline,
    job: Job,
    report: Report,
    budget: Budget,
    make: Callable[..., dict[str, float]],
    *,
    is_first: bool,
) -> dict[str, float]:
    """Make a clip of the best setting that is in time; a first one counts from the command on."""
    started_s = 0.0 if is_first else process_age_s()
    loaded_s = process_age_s()
    measured_s = budget.prepare(pipe, job.settings)
    started_s += measured_s
    is_cold = is_first and not measured_s  # measuring warms a model up
    with refusing():
        spent_s = process_age_s() - started_s
        choice = budget.choose(job.settings, spent_s=spent_s, first=is_cold)
    report.event(Notice("budget", *warned([choice.reason])))
    own = dataclasses.replace(
        job, params=choice.setting.params, notices=(*job.notices, choice.reason)
    )

    def facts() -> dict[str, Any]:
        return choice.facts(budget.seconds, process_age_s() - started_s)

    timings = make(pipe.with_decoder(choice.setting.decoder), own, beside=facts)
    budget.note(choice.setting, timings, start_s=loaded_s if is_cold else None)
    return timings


def _make(
    pipe: VideoPipeline,
    job: Job,
    *,
    report: Report,
    load_s: float,
    overwrite: bool,
    beside: Callable[[], dict[str, Any]] | None = None,
) -> dict[str, float]:
    """Make a clip and its file; `beside` is called when that is whole, for the sidecar."""
    from fastvideo.stages import Done

    last = None
    for last in pipe.events(job.params, notices=job.notices):
        report.event(last)
    assert isinstance(last, Done), "stages end in Done"
    video = pipe.video(last.state)
    if not video.writes:
        return {}
    started = time.perf_counter()
    video.save(job.path, overwrite=overwrite)
    load = {"load": load_s} if load_s else {}
    timings = {**load, **video.timings, "save": time.perf_counter() - started}
    timings = {name: round(seconds, 4) for name, seconds in timings.items()}
    degrees = sharing.write(pipe.model.meshes.degrees)
    write_sidecar(
        job.path,
        video,
        timings=timings,
        notices=last.state.notices,
        parallel=degrees,
        budget=beside() if beside else {},
        overwrite=overwrite,
    )
    return timings


def write_sidecar(
    path: Path,
    video: Video,
    *,
    timings: dict[str, float],
    notices: Sequence[str],
    parallel: str = "",
    budget: Mapping[str, Any] = MappingProxyType({}),
    overwrite: bool,
) -> None:
    """Write the JSON beside a clip."""
    beside = {
        "recipe": video.recipe,
        **({"parallel": parallel} if parallel else {}),  # beside it: it decides nothing
        "frames_sha256": video.frames_sha256,
        "timings_s": timings,
        **({"budget": dict(budget)} if budget else {}),
        **({"notices": list(notices)} if notices else {}),
        "output": path.name,
    }
    text = json.dumps(beside, indent=2) + "\n"
    files.write_text(naming.sidecar(path), text, overwrite=overwrite)
