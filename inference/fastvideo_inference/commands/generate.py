"""`fastvideo generate`: prompts become clips, their recipe inside and their timings beside."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from fastvideo import env, files, hub
from fastvideo.cli import FAILED, OK, one_line, refusing
from fastvideo_inference import naming, sharing
from fastvideo_inference.commands._jobs import Batch, Job, Words, check_place, read
from fastvideo_inference.commands._report import Report, reporting

if TYPE_CHECKING:
    from fastvideo_inference.pipeline import VideoPipeline

Model = Annotated[
    str | None,
    Option("--model", "-m", help=f"Bundled name, folder or hub id. [{hub.DEFAULT_MODEL}]"),
]
Attention = Annotated[
    str | None, Option(help="Another pattern: dense, vsa(sparsity=0.8). [the model's]")
]
Backend = Annotated[
    str | None, Option(help="What computes the attention; doctor lists them. [auto, the fastest]")
]
DropGates = Annotated[
    bool | None,
    Option("--drop-gates/--no-drop-gates", help="Let --attention drop a VSA model's gates. [no]"),
]
Lora = Annotated[
    list[str] | None,
    Option(help="PATH[:STRENGTH] of a LoRA, or its name on the hub; repeatable."),
]
Decoder = Annotated[
    str | None,
    Option(help="A small decoder of the model, its path, or vae. [vae, the VAE's own]"),
]
Parallel = Annotated[
    str | None, Option(help="How torchrun's processes share a clip: ulysses=2,guidance=2.")
]
Output = Annotated[
    str | None,
    Option("--output", "-o", help=f"File, folder/ or template. [{naming.DEFAULT_TEMPLATE}]"),
]


def generate(
    prompt: Annotated[str | None, Argument(help="What the clip should show.")] = None,
    prompts: Annotated[
        Path | None, Option(help="A .txt (a prompt a line) or .jsonl (a request a line).")
    ] = None,
    model: Model = None,
    seed: Annotated[int | None, Option(help="-1 or none: drawn, and printed.")] = None,
    steps: Annotated[int | None, Option(help="Denoising steps.")] = None,
    size: Annotated[str | None, Option(help="WIDTHxHEIGHT in pixels, such as 224x128.")] = None,
    frames: Annotated[int | None, Option(help="Number of frames, 4k+1.")] = None,
    fps: Annotated[int | None, Option(help="Frames per second of the file.")] = None,
    guidance: Annotated[float | None, Option(help="Guidance scale; 1 is off.")] = None,
    negative: Annotated[str | None, Option(help="What the clip should not show.")] = None,
    attention: Attention = None,
    backend: Backend = None,
    drop_gates: DropGates = None,
    lora: Lora = None,
    decoder: Decoder = None,
    output: Output = None,
    config: Annotated[Path | None, Option(help="TOML file with fields of the request.")] = None,
    settings: Annotated[
        list[str] | None, Option("--set", help="key=value, over the config; repeatable.")
    ] = None,
    repeat: Annotated[
        Path | None, Option("--from", help="A clip whose recipe to repeat; flags change it.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="One event a line on stdout.")] = False,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1. [auto]")] = None,
    dtype: Annotated[str | None, Option(help="float32, bfloat16. [auto]")] = None,
    parallel: Parallel = None,
) -> int:
    """Make clips from prompts. What is not given is the model's default."""
    words = Words(
        prompt=prompt,
        prompts=prompts,
        model=model,
        config=config,
        repeat=repeat,
        output=output,
        size=size,
        settings=tuple(settings or ()),
        device=device,
        dtype=dtype,
        decoder=decoder,
        parallel=parallel,
        flags={
            "seed": seed,
            "num_inference_steps": steps,
            "num_frames": frames,
            "fps": fps,
            "guidance_scale": guidance,
            "negative_prompt": negative,
            "attention": attention,
            "backend": backend,
            "drop_gates": drop_gates,
            "lora": lora or None,
        },
    )
    start = _run_alone if env.world_size() == 1 else _run_in_many
    return start(words, as_json=as_json)


def _run_alone(words: Words, *, as_json: bool) -> int:
    with refusing():
        batch = read(words)
    return _run(batch, as_json=as_json)


def _run_in_many(words: Words, *, as_json: bool) -> int:
    """Let the first process read the request; the others do what it was told."""
    with refusing():
        check_place(words.device, words.dtype, num_processes=env.world_size())
        batch = read(words) if env.rank() == 0 else None
    from fastvideo.launched import together  # torch comes in here
    from fastvideo.model import pick_device
    from fastvideo.parallel import agree

    with together(pick_device(words.device or "auto")) as device:
        batch = agree.with_first(batch, agree.everybody(), device)
        assert batch is not None, "the first process has read it"
        return _run(dataclasses.replace(batch, device=str(device)), as_json=as_json)


def _run(batch: Batch, *, as_json: bool) -> int:
    started = time.perf_counter()
    from fastvideo_inference.pipeline import VideoPipeline  # torch comes in here

    pipe = VideoPipeline.from_pretrained(
        batch.model,
        device=batch.device,
        dtype=batch.dtype,
        decoder=batch.decoder,
        parallel=sharing.write(batch.degrees) or None,
    )
    gc.freeze()  # what is loaded stays; imageio collects garbage twice a clip
    load_s = time.perf_counter() - started
    is_silent = pipe.model.meshes.axis("sample").rank > 0
    with reporting(as_json=as_json, is_silent=is_silent) as report:
        return _make_all(pipe, batch, report, load_s=load_s)


def _make_all(pipe: VideoPipeline, batch: Batch, report: Report, *, load_s: float) -> int:
    code, total = OK, len(batch.jobs)
    replica = pipe.model.meshes.axis("data")
    for index in range(replica.rank, total, replica.size):
        job = batch.jobs[index]
        plan = job.plan
        report.start(index=index, total=total, prompt=plan.prompt, seed=plan.seed)
        try:
            timings = _make(pipe, job, report, load_s=load_s if index == replica.rank else 0.0)
        except (ValueError, OSError, RuntimeError) as error:
            report.failed(plan.prompt, one_line(error))
            if total == 1 or batch.degrees.world_size > 1:  # others wait for this one
                raise
            code = FAILED
        else:
            report.saved(str(job.path), seed=plan.seed, timings=timings)
    return code


def _make(pipe: VideoPipeline, job: Job, report: Report, *, load_s: float) -> dict[str, float]:
    from fastvideo_inference.events import Done

    last = None
    for last in pipe.events(job.plan):
        report.event(last)
    assert isinstance(last, Done), "stages end in Done"
    video = pipe.video(last.state)
    if not video.writes:
        return {}
    started = time.perf_counter()
    video.save(job.path)
    load = {"load": load_s} if load_s else {}
    timings = {**load, **video.timings, "save": time.perf_counter() - started}
    timings = {name: round(seconds, 4) for name, seconds in timings.items()}
    degrees = sharing.write(pipe.model.meshes.degrees)
    beside = {
        "recipe": video.recipe,
        **({"parallel": degrees} if degrees else {}),  # beside it: it decides nothing
        "frames_sha256": video.frames_sha256,
        "timings_s": timings,
        "output": job.path.name,
    }
    files.write_text(naming.sidecar(job.path), json.dumps(beside, indent=2) + "\n")
    return timings
