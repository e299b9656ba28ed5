"""How often is a clip made within its budget? Warm calls of a pipeline, and cold commands.

python inference/bench/budget.py --append inference/bench/results-budget.jsonl

The first call and the first command measure this machine, which is not counted. A cold one is a
whole `fastvideo generate`, by a clock outside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastvideo import VideoPipeline, timing

PROMPT = "a big red ball moving left at night"


def main() -> None:
    """Measure each model within each budget."""
    p = argparse.ArgumentParser()
    p.add_argument("--models", nargs="+", default=["fastwan-nano", "wan-nano"])
    p.add_argument("--warm", type=int, default=30, help="calls in each budget of 2, 4 and 8 s")
    p.add_argument("--cold", type=int, default=10, help="commands in each budget of 4 and 8 s")
    p.add_argument("--append", type=Path, help="JSON lines to add the results to")
    args = p.parse_args()
    for model in args.models:
        pipe = VideoPipeline.from_pretrained(model, device="cpu")
        rows = [warm(pipe, seconds, args.warm) for seconds in (2, 4, 8)]
        del pipe
        cold(model, 60, 1)
        rows += [cold(model, seconds, args.cold) for seconds in (4, 8)]
        if args.append:
            timing.append(args.append, timing.record(model=model, rows=rows))


def warm(pipe: VideoPipeline, seconds: float, count: int) -> dict[str, Any]:
    """Make clips with a pipeline that is loaded."""
    found: list[tuple[float | None, str]] = []
    for seed in range(count):
        started = time.perf_counter()
        try:
            video: Any = pipe(PROMPT, seed=seed, budget=seconds)
        except ValueError as error:
            found.append((None, str(error)))
            continue
        found.append((time.perf_counter() - started, video.budget["reason"]))
    if seconds == 2:  # the first one measured the machine
        found[0] = (video.budget["actual_s"], found[0][1]) if found[0][0] else found[0]
    return row("warm", pipe.model.spec.name, seconds, found)


def cold(model: str, seconds: float, count: int) -> dict[str, Any]:
    """Make clips with a command each."""
    found: list[tuple[float | None, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(count):
            path = Path(folder, f"{seconds}-{seed}.mp4")
            command = [sys.executable, "-m", "fastvideo", "generate", PROMPT, "--model", model]
            command += ["--seed", str(seed), "--budget", str(seconds), "-o", str(path)]
            started = time.perf_counter()
            done = subprocess.run(
                [*command, "--device", "cpu"], capture_output=True, text=True, check=False
            )
            spent_s = time.perf_counter() - started
            if done.returncode:
                found.append((None, done.stderr.strip()))
                continue
            beside = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            found.append((spent_s, beside["budget"]["reason"]))
    return row("cold", model, seconds, found)


def row(
    kind: str, model: str, seconds: float, found: Iterable[tuple[float | None, str]]
) -> dict[str, Any]:
    """Sum up, and print a line."""
    found = list(found)
    chosen = Counter(reason.split(": ")[1].split(":")[0] for s, reason in found if s is not None)
    refused = [reason for s, reason in found if s is None]
    inside = sum(s is not None and s <= seconds for s, _ in found)
    spent = sorted(s for s, _ in found if s is not None)
    middle = round(spent[len(spent) // 2], 3) if spent else None
    text = f"{model} {kind} {seconds} s: {inside} of {len(found)} inside, median {middle} s"
    print(text, *(f"{n} x {what}" for what, n in chosen.most_common()), sep="; ", flush=True)
    if refused:
        print(f"  {len(refused)} refused: {refused[0]}", flush=True)
    return {
        "kind": kind,
        "budget_s": seconds,
        "count": len(found),
        "inside": inside,
        "refused": len(refused),
        "median_s": middle,
        "range_s": [round(spent[0], 3), round(spent[-1], 3)] if spent else None,
        "chosen": dict(chosen),
    }


if __name__ == "__main__":
    main()
