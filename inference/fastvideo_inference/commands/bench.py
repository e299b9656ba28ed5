"""`fastvideo bench serve`: the goodput of a server of OpenAI's Videos API, by open-loop load."""

from __future__ import annotations

import json
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
    frames: Annotated[int, Option(help="Frames that a good file holds.")],
    rate: Annotated[
        list[float] | None, Option(help="Requests a minute; repeatable. [the goodput is searched]")
    ] = None,
    target: Annotated[float, Option(help="The share of requests that must be good.")] = 0.9,
    count: Annotated[int, Option(min=10, help="Requests a run.")] = 200,
    burst: Annotated[float, Option(help="1: Poisson; more: bursts (squared CV of gaps).")] = 1.0,
    offline: Annotated[bool, Option("--offline", help="Send all at once too.")] = False,
    settings: Annotated[
        list[str] | None, Option("--set", help="A field of the request, key=value; repeatable.")
    ] = None,
    poll: Annotated[float, Option(help="Seconds between two reads of a status.")] = 0.1,
    seed: Annotated[int, Option(help="Of the times.")] = 0,
    api_key: Annotated[str | None, Option(help="The server's key, or @FILE that holds it.")] = None,
    output: Annotated[
        Path, Option("--output", "-o", help="Folder; the same command goes on from it.")
    ] = Path("bench"),
) -> int:
    """Send requests whether or not others have ended, and tell which share was in time and whole.

    Rejected, failed and undecodable requests count as missed. The first tenth of a run is dropped.
    """
    with refusing():
        own = Bench(
            Server(url, _key(api_key)),
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
    runs: list[Run] = []
    for run in own.given(rate) if rate else own.find():
        runs.append(run)
        print(line(run), flush=True)
    if offline and all(run.is_complete for run in runs):
        runs.append(own.run("offline"))
        print(line(runs[-1]), flush=True)
    found = benches.goodput(runs, own.slo)
    is_whole = all(run.is_complete for run in runs)
    facts = {
        "goodput_per_s": found,
        "is_complete": is_whole,
        "runs": [{"mode": r.mode, "rate": r.rate, **asdict(r.score)} for r in runs],
    }
    files.write_text(output / "table.json", json.dumps(facts, indent=1) + "\n", overwrite=True)
    files.write_text(output / "attainment.svg", _plot(runs, own), overwrite=True)
    print(f"goodput: {60 * found:.3g} requests a minute at {target:.0%} within {slo:g} s")
    if not is_whole:
        print("incomplete: the server is gone; these are the requests until then")
    return OK if is_whole else FAILED


def line(run: Run) -> str:
    """Return what a run gave, as a line."""
    found, latency = run.score, run.score.latency_s
    ends = ", ".join(f"{count} {status}" for status, count in sorted(found.statuses.items()))
    return (
        f"{run.mode:>8} {60 * run.rate:7.2f}/min: {found.attainment:6.1%} good"
        + (f", {found.attainment_3x:.1%} at 3x alone" if found.attainment_3x is not None else "")
        + f"; p50 {latency.get('p50', 0):.2f} p95 {latency.get('p95', 0):.2f}"
        f" p99 {latency.get('p99', 0):.2f} s; {ends}; late accepts {found.late_accepts},"
        f" wrong rejects {found.wrong_rejects}, invalid {found.invalid}"
    )


def _key(given: str | None) -> str:
    if given is None or not given.startswith("@"):
        return given or ""
    return Path(given[1:]).read_text(encoding="utf-8").strip()


def _plot(runs: list[Run], own: Bench) -> str:
    served = sorted((run for run in runs if run.mode == "server"), key=lambda one: one.rate)
    by_rate: dict[str, Any] = {"live": [(60 * r.rate, r.score.attainment) for r in served]}
    by_scale = {
        f"{60 * run.rate:.3g} a minute": benches.at_scales(run, own.slo, num_frames=own.num_frames)
        for run in served
    }
    return plot.svg({"requests a minute": by_rate, "SLO scale": by_scale}, target=own.slo.target)
