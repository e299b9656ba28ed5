"""Is the planner right? Its placements as real servers under load, on the cores of this machine.

python inference/bench/goodput.py --case split --append inference/bench/results-goodput.jsonl

A case is profiled (one pinned thread a worker, all cores busy), planned, and each placement that is
named is served by `fastvideo serve` and loaded as `fastvideo bench serve` does. Printed: simulated
and live goodput, attainment at 50 % and 80 % of the simulated one, and good clips at five times it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastvideo_inference.commands.plan import name
from fastvideo_inference.goodput import plan as planning
from fastvideo_inference.goodput import profile as profiles
from fastvideo_inference.goodput.bench import Bench
from fastvideo_inference.goodput.load import Score, Server
from fastvideo_inference.goodput.measure import served
from fastvideo_inference.goodput.plan import Placement, Slo
from fastvideo_inference.goodput.simulate import Pool

from fastvideo import timing
from fastvideo.resolve import resolve
from fastvideo.sampling import GenerateRequest

MODEL = "fastwan-nano"
# frames of a clip, its decoder, GiB of weights a worker (None: no limit), deadline in clips alone
CASES: dict[str, tuple[int, str, float | None, float]] = {
    "monolith": (25, "tiny", None, 5.0),  # decoding is so cheap that its worker would idle
    "split": (13, "", 0.0145, 5.0),  # text encoder and DiT, or DiT and VAE fit together, not all
}
PROMPTS = [  # more than the engine's cache holds
    f"a {size} {colour} {shape} moving {way} {when}"
    for size in ("big", "small", "very big", "very small")
    for colour in ("red", "blue", "green", "yellow", "white")
    for shape in ("ball", "square", "star", "triangle")
    for way in ("left", "right", "up", "down")
    for when in ("by day", "at night")
]
MEASURED = 2  # placements of a case
STEP = 1.15  # from one rate to the next
POLL_S = 0.1


def main() -> None:
    """Run the cases that are asked for."""
    p = argparse.ArgumentParser()
    p.add_argument("--case", choices=CASES, action="append")
    p.add_argument("--count", type=int, default=200, help="requests of a run")
    p.add_argument("--cores", type=int, default=2)
    p.add_argument("--append", type=Path, help="JSON lines to add the results to")
    args = p.parse_args()
    for case in args.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            result = timing.record(case=case, **run(case, args, Path(folder)))
        if args.append:
            timing.append(args.append, result)


def run(case: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Profile, plan, and measure every placement that was planned."""
    frames, decoder, memory_gib, times = CASES[case]
    path = folder / "profile.json"
    command = ["profile", MODEL, "--frames", str(frames), "--processes", str(args.cores)]
    cli(*command, "--device", "cpu", "--repeats", "8", "-o", str(path))
    profile = profiles.read(path)
    params = resolve(GenerateRequest(prompt="bench", seed=0, num_frames=frames), profile.spec)
    alone_s = sum(one.median for one in profile.row_s(params, decoder=decoder).values())
    slo = Slo(deadline_s=round(times * alone_s, 2), delivery_s=POLL_S)
    how = {"devices": args.cores, "memory_gib": memory_gib, "decoder": decoder}
    ranked = planning.plan(profile, params, slo=slo, **how)
    print(f"{case}: a clip takes {alone_s:.2f} s, deadline {slo.deadline_s} s", flush=True)
    live = []
    rivals = [one for one in ranked if one.devices == args.cores]
    for index, placement in enumerate(rivals[:MEASURED]):
        own = folder / f"placement{index}"
        own.mkdir()
        text = planning.serve_toml(placement, profile, slo, profile_path=path, decoder=decoder)
        (own / "serve.toml").write_text(text, encoding="utf-8")
        with served(own / "serve.toml") as url:
            asked = {"num_frames": frames, **({"decoder": decoder} if decoder else {})}
            bench = Bench(
                Server(url),
                asked,
                PROMPTS,
                replace(slo, delivery_s=0.0),
                num_frames=frames,
                folder=own / "bench",
                count=args.count,
                poll_s=POLL_S,
            )
            pools = [
                planning.pool_of(group, profile, params, decoder=decoder)
                for group in placement.groups
            ]
            one = measured(bench, placement, pools, slo, is_best=index == 0)
        print(line(one), flush=True)
        live.append(one)
    return {
        "model": MODEL,
        "frames": frames,
        "decoder": decoder,
        "memory_gib": memory_gib,
        "slo": {"deadline_s": slo.deadline_s, "target": slo.target},
        "count": args.count,
        "alone_s": round(alone_s, 4),
        "placements": live,
    }


def measured(
    bench: Bench, placement: Placement, pools: list[Pool], slo: Slo, *, is_best: bool
) -> dict[str, Any]:
    """Return what was simulated of a placement and what its server did; all of the best one."""
    bench.begin()
    alone_s = bench.run("single").score.latency_s["p50"]
    peak, attainment = best_rate(bench, 0.9 * placement.rate), []
    facts = {
        "placement": name(placement),
        "simulated_per_s": round(placement.rate, 4),
        "live_per_s": round(peak, 4),
        "alone_s": round(alone_s, 4),
    }
    if not is_best:
        return facts
    for share in (0.5, 0.8):
        rate = share * placement.rate
        score = bench.run("server", rate=rate).score
        simulated = planning.attainment(pools, slo, rate)
        attainment.append({"share": share, "live": score.attainment, "simulated": simulated})
    at_peak = bench.run("server", rate=peak).score
    longer = replace(bench, folder=bench.folder / "5x", count=5 * bench.count)  # as many seconds
    longer.begin()
    overload = longer.run("server", rate=5 * peak).score
    return facts | {
        "attainment": attainment,
        "good_per_s": [round(good_per_s(one), 4) for one in (at_peak, overload)],
        "overload_statuses": dict(overload.statuses),
        "late_accepts": overload.late_accepts,
    }


def good_per_s(found: Score) -> float:
    """Return how many good clips a second a run gave."""
    share = found.attainment * found.attempted / max(1, found.statuses.get("completed", 0))
    return share * found.throughput_per_s


def best_rate(bench: Bench, rate: float) -> float:
    """Return the highest rate, in steps, at which the target share was good."""
    passed = failed = 0.0
    while not (passed and failed):
        if bench.run("server", rate=rate).passes(bench.slo):
            passed, rate = rate, rate * STEP
        else:
            failed, rate = rate, rate / STEP
    middle = (passed * failed) ** 0.5
    return middle if bench.run("server", rate=middle).passes(bench.slo) else passed


def cli(*words: str) -> None:
    """Run a command of ours."""
    subprocess.run([sys.executable, "-m", "fastvideo", *words], check=True)


def line(found: dict[str, Any]) -> str:
    """Return a placement's results in a line."""
    text = (
        f"  {found['placement']}: {60 * found['live_per_s']:.1f}/min live,"
        f" {60 * found['simulated_per_s']:.1f} simulated"
    )
    for one in found.get("attainment", ()):
        text += f"; at {one['share']:.0%} {one['live']:.1%} live, {one['simulated']:.1%} simulated"
    if "good_per_s" in found:
        peak, overload = found["good_per_s"]
        text += f"; good clips/min {60 * peak:.1f} at goodput, {60 * overload:.1f} at 5x"
    return text


if __name__ == "__main__":
    main()
