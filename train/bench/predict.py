"""Step time and memory of a recipe on many devices, predicted: arithmetic, not a measurement.

    python train/bench/predict.py configs/train/wan-1.3b/sparse.toml --devices 1 8 64

Prints a row of Markdown for each number of devices; `flops.py` counts a forward pass. A step under
`run.recompute` costs one four times over (the pass, again, and twice that backward). DMD's critic
learns in each step and the student in each `student_every`-th, against one pass of the critic and
two of the teacher; every rollout is one pass.

A device does `--rate` TFLOP/s of this (346: 35 % of an H200's 990). What is sent, where nothing
overlaps: weights of each pass, 2 bytes, gradients, 4, over `--link` GB/s within 8 devices; between
groups of 8 the mean of the parts of gradients, over `--net`; Ulysses' exchanges.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from fastvideo_train import budget, flops, memory
from fastvideo_train import recipe as recipes
from fastvideo_train.memory import GIB
from fastvideo_train.recipe import Recipe

from fastvideo.models.dit.wan import Config
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.shapes import LatentShape

GROUP = 8
"""Devices of a machine."""


@dataclass(frozen=True)
class Machine:
    """TFLOP/s of a device; GB/s that it sends within its machine and to others."""

    rate: float
    link: float
    net: float


def seconds(
    recipe: Recipe, degrees: ParallelConfig, clip: LatentShape, machine: Machine
) -> dict[str, Any]:
    """Return the seconds of a step: of arithmetic, and of what is sent."""
    run, work = recipe.run, flops.passes(recipe)
    total = sum(n * flops.of_role(recipe, role, clip).total for role, n in work.items())
    arithmetic = run.batch * run.accumulate * total / degrees.world_size / (machine.rate * 1e12)
    sent = run.accumulate * sum(
        _sent(recipe, degrees, role, clip, n, machine) for role, n in work.items()
    )
    return {"flops": total, "arithmetic": arithmetic, "sent": sent}


def _sent(
    recipe: Recipe,
    degrees: ParallelConfig,
    role: str,
    clip: LatentShape,
    n: float,
    machine: Machine,
) -> float:
    """Return the seconds that a micro-batch sends for a role, its `n` passes."""
    spec, cut = recipe.roles[role], degrees.of("weights")
    c = Config.parse(spec.config)
    params = c.num_layers * ((8 + c.gate_compress) * c.dim**2 + 2 * c.dim * c.ffn_dim)
    once = params * (cut - 1) / cut
    gathers = min(n, 3.0)  # weights are not gathered apart for the two products of backward
    rounds = 0.0 if not spec.trainable else (1.0 if role == "critic" else min(1.0, n / 4))
    inside = once * (2 * gathers + 4 * rounds) / (machine.link * 1e9)
    data = degrees.data
    outside = rounds * 2 * 4 * params / cut * (data - 1) / data / (machine.net * 1e9)
    tokens = clip.tokens(c.patch_size).num_tokens / degrees.of("sequence")
    clips = recipe.run.batch / degrees.of("batch")
    moved = 2 * 5 * clips * tokens * c.dim * c.num_layers * (1 - 1 / degrees.ulysses)
    return inside + outside + n * moved / (machine.link * 1e9)


def row(path: str, devices: int, machine: Machine) -> str:
    """Return a row of the table for a number of devices, with the recipe's global batch."""
    recipe = recipes.load(path)
    total = recipe.run.batch * recipe.run.accumulate
    shape = recipe.parallel.model_dump()
    if devices < recipe.parallel.world_size:
        shape = {**dict.fromkeys(shape, 1), "shard": devices}
    data = devices // math.prod([*shape.values()]) * shape["data"]
    words = [f"parallel.{axis}={size}" for axis, size in {**shape, "data": data}.items()]
    degrees = ParallelConfig(**{**shape, "data": data})
    batch = degrees.of("batch")
    words += [f"run.batch={batch}", f"run.accumulate={max(1, total // batch)}"]
    recipe = recipes.load(path, sets=words)
    estimate = memory.of(recipe, degrees, dims=budget.dims_here)
    assert estimate.clip is not None, "the recipes state it"
    took = seconds(recipe, degrees, estimate.clip, machine)
    run, gib = recipe.run, estimate.total / GIB
    fits = f"{gib:.0f}" if gib <= (run.memory_gib or math.inf) else f"{gib:.0f}, refused"
    step = "" if "refused" in fits else f"{took['arithmetic']:.1f} + {took['sent']:.1f}"
    return (
        f"| {run.name} | {devices} | {batch} x {run.accumulate} | {took['flops'] / 1e12:.0f} |"
        f" {fits} | {step} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rate", type=float, default=346.0)
    parser.add_argument("--link", type=float, default=337.0, help="75 %% of NVLink's 450 GB/s")
    parser.add_argument("--net", type=float, default=37.5, help="75 %% of 400 Gb/s a device")
    args = parser.parse_args()
    machine = Machine(args.rate, args.link, args.net)
    print("| recipe | devices | clips x accumulated | TFLOP a clip | GiB a device | s a step |")
    print("|---|---:|---:|---:|---:|---:|")
    for path in args.recipes:
        for devices in args.devices:
            print(row(path, devices, machine))


if __name__ == "__main__":
    main()
