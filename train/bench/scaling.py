"""One recipe with the same global batch on 1 and on 2 processes: a demonstration of correctness.

Starts the steps of a run by torchrun with gloo under each strategy, in float32, and compares losses
and norms of gradients with those of one process. Seconds say nothing about scaling: the processes
share the cores of one CPU, as many threads altogether as one process has. Memory is the arithmetic
of `memory.py`.

    python train/bench/scaling.py --out train/bench/results-scaling.jsonl

The exit code is 1 if losses are further apart than `--tolerance`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo_train import recipe as recipes
from fastvideo_train.recipe import Recipe

from fastvideo import timing
from fastvideo.config import merge, parse

if TYPE_CHECKING:
    from fastvideo_train.world import World

RECIPE = "configs/train/nano/dit-image.toml"
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "accelerate": (2, {"run": {"strategy": "accelerate"}}),
    "fsdp2": (2, {"run": {"strategy": "fsdp2"}}),
    "fsdp2, ulysses=2": (2, {"run": {"strategy": "fsdp2"}, "parallel": {"ulysses": 2}}),
}
TRUTH = "demonstrates correctness, not speed: two processes share the cores of one CPU"


def main() -> None:
    """Run each line in processes of its own, compare, print the table, append a line."""
    args = parse_arguments()
    if args.child:
        work(Path(args.child))
        return
    base = recipes.load(args.recipe, sets=args.set, smoke=args.smoke)
    names = [name for name in RUNS if name == "single" or not args.only or name in args.only]
    found = {name: launched(name, base, args) for name in names}
    note_differences(found)
    kept = ("recipe", "size", "batch", "set", "smoke", "threads", "tolerance")
    settings = {k: getattr(args, k) for k in kept}
    record = timing.record(says=TRUTH, settings=settings, runs=found)
    report(record)
    timing.append(args.out, record)
    raise SystemExit(any(row["losses_apart"] > args.tolerance for row in found.values()))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("recipe", nargs="?", default=RECIPE)
    p.add_argument("--size", type=int, nargs=3, default=[6, 16, 16], help="latent T H W")
    p.add_argument("--batch", type=int, default=4, help="clips of all processes together")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--threads", type=int, default=2, help="of all processes together")
    p.add_argument("--tolerance", type=float, default=1e-5, help="of losses, relative")
    p.add_argument("--only", nargs="+", choices=[*RUNS], default=[], help="beside single")
    p.add_argument("--set", action="append", default=[], help="a key of the recipe; repeatable")
    p.add_argument("--smoke", action="store_true", help="the recipe's [smoke] table")
    p.add_argument("--out", default="", help="JSON lines file to append to")
    p.add_argument("--child", default="", help=argparse.SUPPRESS)
    return p.parse_args()


def launched(name: str, base: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """Run one line as a user would start it; return what its first process wrote."""
    processes, over = RUNS[name]
    recipe = planned(base, over, args, threads=max(1, args.threads // processes))
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        plan.write_text(json.dumps(recipes.dump(recipe)), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "--max-restarts", "0"]
        done = subprocess.run(
            [*command, __file__, "--child", str(plan)], stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise SystemExit(f"{name} ended with exit code {done.returncode}:\n{done.stderr}")
        answer: dict[str, Any] = json.loads((Path(folder) / "answer.json").read_text())
    return {"processes": processes, **answer}


def note_differences(found: Mapping[str, dict[str, Any]]) -> None:
    """Add the greatest relative difference to a single process to each line."""
    for row in found.values():
        for what in ("losses", "gradient_norms"):
            pairs = zip(row[what], found["single"][what], strict=True)
            row[f"{what}_apart"] = max(abs(a / b - 1) for a, b in pairs)


def planned(
    base: Recipe, over: dict[str, Any], args: argparse.Namespace, *, threads: int
) -> Recipe:
    """Return the recipe of a line: new float32 weights, synthetic latents, a CPU."""
    tree = recipes.dump(base)
    channels = base.roles["student"].config["in_channels"]
    frames, height, width = args.size
    data = {"name": "synthetic", "channels": channels}
    tree |= {"data": data | {"frames": frames, "height": height, "width": width}}
    tree |= {"validate": {}, "parallel": {}}
    for role in tree["roles"].values():
        role |= {"from": "", "dtype": "float32"}
    changes = {
        "run": {"steps": args.steps, "batch": args.batch, "accumulate": 1, "dtype": "float32"}
        | {"device": "cpu", "strategy": "single", "threads": threads, "validate_every": 0}
        | {"log_every": 1},
        "optim": {"schedule": "constant", "warmup": 0},  # three steps shall move the weights
    }
    return parse(Recipe, merge(merge(tree, changes), over), source=base.run.name)


# One of the processes


def work(plan: Path) -> None:
    """Train as one of torchrun's processes; the first writes losses, bytes and seconds."""
    import torch  # late: the process that only waits needs none of it
    from fastvideo_train import memory
    from fastvideo_train.world import World

    from fastvideo import env
    from fastvideo.parallel import mesh

    recipe = parse(Recipe, json.loads(plan.read_text(encoding="utf-8")), source=str(plan))
    degrees = recipe.degrees(env.world_size())
    with mesh.joined(torch.device("cpu")) as device:
        world = World(mesh.build(degrees, device))
        done, seconds = trained(recipe, plan.parent / "run", world)
    if world.is_first:
        answer = {
            "degrees": {axis: n for axis, n in degrees.model_dump().items() if n > 1},
            "threads": recipe.run.threads,
            "losses": [one["loss"] for one in done],
            "gradient_norms": [one["student/grad_norm"] for one in done],
            "estimated_mib": round(memory.of(recipe, degrees).total / 2**20, 2),
            "step_s": round(statistics.median(seconds[1:] or seconds), 4),
        }
        (plan.parent / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def trained(
    recipe: Recipe, folder: Path, world: World
) -> tuple[list[Mapping[str, float]], list[float]]:
    """Return metrics and seconds of each step; the networks are gone before processes part."""
    from fastvideo_train.loop import Job, StepDone, train

    job = Job.open(recipe, folder, world=world)
    done, seconds, began = [], [], time.perf_counter()
    for event in train(job):
        if not isinstance(event, StepDone):
            continue
        seconds.append(time.perf_counter() - began)
        done.append(event.metrics)
        began = time.perf_counter()
    job.strategy.close()
    return done, seconds


def report(record: Mapping[str, Any]) -> None:
    """Print a record as a table in Markdown."""
    s = record["settings"]
    print(f"\n{s['recipe']}: {s['batch']} clips of {s['size']} latents; {TRUTH}")
    print(
        "| strategy | processes | degrees | losses | apart | gradient norms apart"
        " | MiB a process, estimated | s a step |"
    )
    print("|---|---:|---|---|---:|---:|---:|---:|")
    for name, r in record["runs"].items():
        losses = ", ".join(f"{loss:.7f}" for loss in r["losses"])
        degrees = ", ".join(f"{axis} {n}" for axis, n in r["degrees"].items())
        words = [name.partition(",")[0], r["processes"], degrees, losses]
        words += [f"{r['losses_apart']:.1e}", f"{r['gradient_norms_apart']:.1e}"]
        words += [f"{r['estimated_mib']:.1f}", f"{r['step_s']:.3f}"]
        print("| " + " | ".join(map(str, words)) + " |")


if __name__ == "__main__":
    main()
