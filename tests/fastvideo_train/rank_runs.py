"""What a rank does in the tests of strategies: the same tiny run as a single process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from fastvideo_train import recipe as recipes
from fastvideo_train.loop import Job, StepDone, train
from fastvideo_train.recipe import Recipe
from fastvideo_train.world import World
from tiny_recipes import tiny

from fastvideo.config import parse
from fastvideo.parallel import mesh

STEPS = 3
SETS = ("run.dtype=float32", f"run.steps={STEPS}", "run.batch=6", "run.log_every=1")


def small(method: str, *sets: str, muon: bool = False) -> Recipe:
    """A tiny float32 run of three steps, whose batch divides by 1, 2 and 3."""
    turn = ["method.args.student_every=2"] if method == "dmd" else []
    here = ["data.workers=0"] if method == "vae" else []
    tree = recipes.dump(tiny(method, *SETS, *turn, *here, *sets))
    if not muon:  # its updates are made in bfloat16, which magnifies another order of sums
        for table in (tree["optim"], *(role["optim"] for role in tree["roles"].values())):
            table.pop("muon", None)
    return parse(Recipe, tree, source="test")


def opened(recipe: Recipe, folder: str | Path, size: int = 1) -> Job:
    """The run's job as one of `size` processes that joined."""
    if recipe.run.strategy == "accelerate":
        _forget_the_last_launch()
    meshes = mesh.build(recipe.degrees(size), torch.device("cpu"))
    return Job.open(recipe, Path(folder), world=World(meshes))


def losses(
    rank: int, size: int, recipe: Recipe, folder: str, until: int | None = None
) -> list[dict[str, float]]:
    """The losses of each step, by role."""
    return _trained(opened(recipe, folder, size), until)[0]


def weights(
    rank: int, size: int, recipe: Recipe, folder: str, until: int | None = None
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """The losses of each step; then every learning role's weights and averages, whole."""
    return _trained(opened(recipe, folder, size), until)


def _trained(job: Job, until: int | None) -> tuple[list[dict[str, float]], dict[str, Any]]:
    def is_over() -> bool:
        return until is not None and job.step >= until

    done = [e for e in train(job, stop=is_over) if isinstance(e, StepDone)]
    seen = [{k: v for k, v in e.metrics.items() if k.endswith("loss")} for e in done]
    names = [n for n, role in job.roles.items() if role.trainable]
    whole = {
        f"{n}/{averaged}": job.strategy.gather(n, averaged=averaged)
        for n in names
        for averaged in (False, True)
    }
    plain = {k: {n: w.detach().numpy() for n, w in ws.items()} for k, ws in whole.items()}
    return seen, plain


def _forget_the_last_launch() -> None:
    """Accelerate keeps what it found at its first start; the pool's ranks start again and again."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29501")
