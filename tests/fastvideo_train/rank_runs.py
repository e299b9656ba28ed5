"""What a rank does in the tests of strategies: the same tiny run as a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from alive import Alive
from fastvideo_train import recipe as recipes
from fastvideo_train import roles as role_builder
from fastvideo_train import strategies
from fastvideo_train.loop import Job, StepDone, make_method, train
from fastvideo_train.recipe import Recipe
from fastvideo_train.world import World
from tiny_recipes import tiny

from fastvideo import rng
from fastvideo.config import parse
from fastvideo.parallel import mesh
from tests.drawn import drawn

Numbers = list[dict[str, float]]
STEPS = 3
SETS = ("run.dtype=float32", f"run.steps={STEPS}", "run.batch=6", "run.log_every=1")


def small(method: str, *sets: str, muon: bool = False) -> Recipe:
    """A tiny float32 run of three steps, whose batch divides by 1, 2 and 3; of AdamW alone."""
    turn = ["method.args.student_every=2"] if method == "dmd" else []
    here = ["data.workers=0"] if method == "vae" else []
    tree = recipes.dump(tiny(method, *SETS, *turn, *here, *sets))
    if not muon:
        for table in (tree["optim"], *(role["optim"] for role in tree["roles"].values())):
            table.pop("muon", None)
    return parse(Recipe, tree, source="test")


def opened(recipe: Recipe, folder: str | Path, size: int = 1, *, is_drawn: bool = True) -> Job:
    """The run's job as one of `size` processes that joined.

    New denoisers and text encoders are born with zeros, behind which mistakes would hide; here they
    are drawn instead, if asked.
    """
    if recipe.run.strategy == "accelerate":
        _forget_the_last_launch()
    meshes = mesh.build(recipe.degrees(size), torch.device("cpu"))
    with _all_drawn() if is_drawn else nullcontext():
        return Job.open(recipe, Path(folder), world=World(meshes))


@contextmanager
def _all_drawn() -> Iterator[None]:
    made = role_builder._new

    def new(make: Any, name: str, recipe: Recipe) -> Any:
        net = made(make, name, recipe)
        is_born_zero = recipe.roles[name].kind in ("dit", "text")
        return drawn(net, seed=rng.derive(0, name)) if is_born_zero else net

    with mock.patch.object(role_builder, "_new", new):
        yield


def losses(rank: int, size: int, recipe: Recipe, folder: str, until: int | None = None) -> Numbers:
    """The losses and norms of gradients of each step, by role."""
    return trained(opened(recipe, folder, size), until)[0]


def losses_of_each(
    rank: int, size: int, recipes: dict[str, Recipe], folder: str
) -> dict[str, Numbers]:
    """`losses` of several runs, one after the other."""
    return {n: losses(rank, size, r, f"{folder}/{n}") for n, r in recipes.items()}


def weights(
    rank: int,
    size: int,
    recipe: Recipe,
    folder: str,
    until: int | None = None,
    is_drawn: bool = True,
) -> tuple[Numbers, dict[str, Any]]:
    """`losses`; then every learning role's weights and averages, whole."""
    return trained(opened(recipe, folder, size, is_drawn=is_drawn), until)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two answers of `weights` are equal bit for bit."""
    assert a.keys() == b.keys() and all(a[role].keys() == b[role].keys() for role in a)
    return all(np.array_equal(a[role][n], b[role][n]) for role in a for n in a[role])


class Own(Alive):
    """Without what is mapped from files, of which the system keeps in memory what it likes."""

    def _note(self, storage: torch.UntypedStorage) -> None:
        try:
            address = storage.data_ptr()
        except RuntimeError:  # a cut tensor's; its rows are a tensor of their own
            return
        if storage._cdata not in self._known and not _is_mapped(address):
            super()._note(storage)


def _is_mapped(address: int) -> bool:
    with Path("/proc/self/maps").open() as lines:
        spans = [x.split()[0].split("-") for x in lines if x.endswith((".safetensors\n", ".pt\n"))]
    return any(int(first, 16) <= address < int(last, 16) for first, last in spans)


def held(rank: int, size: int, recipe: Recipe, name: str) -> dict[str, Any]:
    """What a process held while it made one role; its rows; its largest tensor as stored, in
    float32; all of it; in bytes. Then the weights, whole.
    """
    meshes = mesh.build(recipe.degrees(size), torch.device("cpu"))
    strategy = strategies.find(recipe)(recipe, meshes)
    run = recipe.run.model_copy(update={"device": strategy.first_device})
    recipe = recipe.model_copy(update={"run": run})
    with Own() as alive:
        roles = role_builder.build(recipe, make_method(recipe).wants, only=[name])
        strategy.prepare(roles)
    params = dict(roles[name].net.named_parameters())
    is_cut = {n: hasattr(p, "full_tensor") for n, p in params.items()}
    whole = {n: p.full_tensor() if is_cut[n] else p for n, p in params.items()}
    return {
        "peak": alive.peak,
        "end": alive.now,
        "rows": sum((p.to_local() if is_cut[n] else p).nbytes for n, p in params.items()),
        "largest": 4 * max(w.numel() for w in whole.values()),
        "whole": sum(w.nbytes for w in whole.values()),
        "weights": {n: w.detach().float().numpy() for n, w in whole.items()},
    }


def trained(job: Job, until: int | None = None) -> tuple[Numbers, dict[str, Any]]:
    """`weights` of a job."""

    def is_over() -> bool:
        return until is not None and job.step >= until

    done = [e for e in train(job, stop=is_over) if isinstance(e, StepDone)]
    kept = ("loss", "grad_norm")
    seen = [{k: v for k, v in e.metrics.items() if k.endswith(kept)} for e in done]
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
