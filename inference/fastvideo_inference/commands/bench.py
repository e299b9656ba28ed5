"""`fastvideo bench serve`: the goodput of a server of OpenAI's Videos API, by open-loop load."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from fastvideo import files
from fastvideo.config import assignments
from fastvideo.errors import FAILED, OK, refusing
from fastvideo_inference.goodput import bench as benches
from fastvideo_inference.goodput import plot
from fastvideo_inference.goodput.bench import Bench, Run
from fastvideo_inference.goodput.load import Server
from fastvideo_inference.goodput.plan import Slo
from fastvideo_inference.remote import read_key

bench = typer.Typer(
    help="Measure the goodput of a server.",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
)
PROMPTS = (
    "a big red ball moving left at night",
    "a small blue star moving right",
    "a green square moving up by day",
)


@bench.callback()
def _bench() -> None:
    """Measure the goodput of a server."""


@bench.command()
def serve(
    url: Annotated[str, Argument(help="A server of OpenAI's Videos API.")],
    slo: Annotated[float, Option(help="Seconds from POST to the last byte of a good clip.")],
    frames: Annotated[int, Option(min=1, help="Frames that a good file holds.")],
    rate: Annotated[
        list[float] | None, Option(help="Requests a minute; repeatable. [bisected]")
    ] = None,
    target: Annotated[float, Option(help="The share of requests that must be good.")] = 0.9,
    count: Annotated[int, Option(min=10, help="Requests a run.")] = 200,
    burst: Annotated[float, Option(help="1: Poisson; more: bursts (squared CV of gaps).")] = 1.0,
    offline: Annotated[bool, Option("--offline", help="At last, send all at once.")] = False,
    settings: Annotated[
        list[str] | None, Option("--set", help="A field of the request, key=value; repeatable.")
    ] = None,
    poll: Annotated[float, Option(help="Seconds between two reads of a status.")] = 0.1,
    seed: Annotated[int, Option(help="Of the times.")] = 0,
    api_key: Annotated[str | None, Option(help="The server's key, or @FILE that holds it.")] = None,
    output: Annotated[
        Path, Option("--output", "-o", help="Folder; the same command resumes from it.")
    ] = Path("bench"),
) -> int:
    """Send requests whether or not others have ended; print the share that was in time and whole.

    Rejected, failed and undecodable requests count as missed. The first tenth of a run is dropped.
    """
    with refusing():
        own = Bench(
            Server(url, read_key(api_key) or ""),
            {"num_frames": frames, **assignments(settings or ())},
            PROMPTS,
            Slo(deadline_s=slo, target=target),
            num_frames=frames,
            folder=output,
            count=count,
            poll_s=poll,
            burst=burst,
            seed=seed,
        )
        own.begin()
        rates = [one / 60 for one in rate or ()]
        if any(not 0 < one < math.inf for one in rates):
            raise ValueError(f"rate {min(rates) * 60:g} a minute must be above 0")
    runs: list[Run] = []
    for run in own.runs(rates, offline=offline):
        runs.append(run)
        print(line(run), flush=True)
        _write(runs, own, is_complete=False)
    is_complete = len(runs) > 1 and all(run.is_complete for run in runs)
    found = _write(runs, own, is_complete=is_complete)
    print(
        f"goodput: {60 * found:.3g} requests/min at {target:.0%} within {slo:g} s (polled every"
        f" {poll:g} s)"
    )
    if not is_complete:
        print(f"incomplete: {next((s.error for s in runs[-1].samples if s.error), '')}")
    return OK if is_complete else FAILED


def line(run: Run) -> str:
    """Return the figures of a run in two lines: the client's, and the server's own seconds."""
    found = run.score
    ends = ", ".join(f"{count} {status}" for status, count in sorted(found.statuses.items()))
    at_3x = f", {found.attainment_3x:.1%} at 3x alone" if found.attainment_3x is not None else ""
    server = ", ".join(f"{n.removeprefix('stage.')} {_s(q)}" for n, q in found.server_s.items())
    return (
        f"{run.mode:>8} {60 * run.rate:7.2f}/min: {found.attainment:6.1%} good{at_3x};"
        f" p50/p90/p95/p99 {_s(found.latency_s)} s, {60 * found.throughput_per_s:.3g} clips/min;"
        f" {ends}; late accepts {found.late_accepts}, wrong rejects {found.wrong_rejects}, invalid"
        f" {found.invalid}, sent late {found.late_sends}\n{'server':>8} {server}"
    )


def _s(quantiles: Mapping[str, float]) -> str:
    return "/".join(f"{value:.2f}" for value in quantiles.values()) or "-"


def _write(runs: list[Run], own: Bench, *, is_complete: bool) -> float:
    """Write `table.json` and the plot of the runs so far; return their goodput."""
    found = benches.goodput(runs, own.slo)
    facts = {
        "goodput_per_s": found,
        "is_complete": is_complete,
        "slo": asdict(own.slo),
        "poll_s": own.poll_s,
        "runs": [
            {"mode": r.mode, "rate": r.rate, "is_complete": r.is_complete, **asdict(r.score)}
            for r in runs
        ],
    }
    text = json.dumps(facts, indent=1) + "\n"
    files.write_text(own.folder / "table.json", text, overwrite=True)
    files.write_text(own.folder / "attainment.svg", _plot(runs, own), overwrite=True)
    return found


def _plot(runs: list[Run], own: Bench) -> str:
    served = sorted((run for run in runs if run.mode == "server"), key=lambda one: one.rate)
    by_rate: dict[str, Any] = {"live": [(60 * r.rate, r.score.attainment) for r in served]}
    by_scale = {
        f"{60 * run.rate:.3g} a minute": benches.at_scales(run, own.slo, num_frames=own.num_frames)
        for run in served
    }
    return plot.svg({"requests a minute": by_rate, "SLO scale": by_scale}, target=own.slo.target)
