"""`fastvideo generate --server URL`: a server makes the clips, all else is as without it."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from typing import Any

from fastvideo.errors import FAILED, OK, RefusedError, one_line, refusing
from fastvideo.log import warned
from fastvideo.stages import Notice
from fastvideo_inference.commands.generate import write_sidecar
from fastvideo_inference.commands.report import Report, reporting
from fastvideo_inference.recipe import Recipe
from fastvideo_inference.remote import Job, PreviewImage, RemotePipeline, read_key
from fastvideo_inference.request import (
    CliArgs,
    RemoteBatch,
    RemoteJob,
    check_same_decoder,
    claimed,
    read_remote,
)


def generate(args: CliArgs, *, server: str, api_key: str | None, as_json: bool) -> int:
    """Ask for all clips, and write each as it comes; Ctrl-C cancels what is not written."""
    with refusing():
        batch = read_remote(args)
        pipe = RemotePipeline(
            server, model=batch.model, decoder=batch.decoder, api_key=read_key(api_key)
        )
    with claimed(batch) as own, reporting(as_json=as_json) as report:
        return _make_all(pipe, own, report)


def _make_all(pipe: RemotePipeline, batch: RemoteBatch, report: Report) -> int:
    code, total = OK, len(batch.jobs)
    with closing(_jobs(pipe, batch)) as jobs:
        for index, (one, job) in enumerate(zip(batch.jobs, jobs, strict=True)):
            seed = one.request.seed or 0
            report.start(index=index, total=total, prompt=one.request.prompt, seed=seed)
            try:
                timings = _make(job, one, batch, report)
            except (ValueError, OSError, RuntimeError) as error:
                report.failed(one.request.prompt, one_line(error))
                if total == 1:
                    raise
                code = FAILED
            else:
                report.saved(str(one.path), seed=seed, timings=timings)
    return code


def _jobs(pipe: RemotePipeline, batch: RemoteBatch) -> Generator[Job, None, None]:
    try:
        yield from pipe.jobs([one.request for one in batch.jobs])
    except ValueError as error:  # what the server refuses is a request that was never legal
        raise RefusedError(one_line(error)) from error


def _make(job: Job, one: RemoteJob, batch: RemoteBatch, report: Report) -> dict[str, float]:
    for text in warned(job.values["notices"]):
        report.event(Notice("request", text))
    for event in job.events():
        if isinstance(event, Notice):
            warned([event.text])
        if not isinstance(event, PreviewImage):
            report.event(event)
    started = time.perf_counter()
    video = job.result(decode=False)
    if batch.repeated:
        _check_same(video.recipe, batch.repeated)
    video.save(one.path, overwrite=batch.overwrite)
    timings = {**video.timings, "download": time.perf_counter() - started}
    timings = {name: round(seconds, 4) for name, seconds in timings.items()}
    notices = (*batch.notices, *video.notices)
    write_sidecar(one.path, video, timings=timings, notices=notices, overwrite=batch.overwrite)
    return timings


def _check_same(made: dict[str, Any], repeated: Recipe) -> None:
    for name in ("attention", "drop_gates"):
        mine, its = getattr(repeated.request, name), made["request"][name]
        if mine != its:
            text = f"the server made the clip with {name} {its}, that of --from had {mine}"
            raise ValueError(text)
    check_same_decoder("the clip of --from", repeated, Recipe.model_validate(made).decoder)
    found = made["model"]["fingerprint"]
    if found != repeated.model.fingerprint:
        raise ValueError(
            f"the server's {made['model']['spec']} has other weights ({found[:12]}) than made the"
            f" clip of --from ({repeated.model.fingerprint[:12]})"
        )
