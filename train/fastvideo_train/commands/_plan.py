"""`fastvideo train --dry-run`: what a recipe would run, in how much memory; nothing is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo import env, hub
from fastvideo.errors import refusing
from fastvideo_train.recipe import LatentsSpec, Recipe

if TYPE_CHECKING:
    from fastvideo.parallel.degrees import ParallelConfig
    from fastvideo_train.memory import Estimate

GIB = 1 << 30


def plan(recipe: Recipe, folder: Path) -> None:
    """Print roles, degrees and memory of a run; `RefusedError` if it is impossible or too large.

    The degrees are those of the launcher's processes, or without one those of the recipe. Folders
    and hub models that are not here yet are not looked for: the recipe's own dims and sizes count.
    """
    from fastvideo_train import budget, memory

    with refusing():
        processes = env.world_size()
        degrees = recipe.degrees(processes if processes > 1 else recipe.parallel.world_size)
        _check(recipe, folder, degrees)
        budget.check_positions(recipe, budget.dims_here)
        budget.check_pixels(recipe)
        estimate = memory.of(recipe, degrees, dims=budget.dims_here)
        device = budget.limit(recipe)
    if env.rank():
        return
    _print_run(recipe, folder, degrees, estimate)
    _print_memory(estimate, recipe, device)
    if device is not None:
        with refusing():
            budget.refuse(estimate, device, recipe, degrees, budget.dims_here)


def _check(recipe: Recipe, folder: Path, degrees: ParallelConfig) -> None:
    from fastvideo_train import batches, export, loop
    from fastvideo_train.validate import validator

    loop.check(recipe, degrees)
    export.check(_with_local_vae(recipe))
    if recipe.run.validate_every:
        validator(recipe, folder)
    if _has_data(recipe):
        batches.check(recipe)


def _with_local_vae(recipe: Recipe) -> Recipe:
    """Return a recipe whose `[export]` can be judged without asking the hub."""
    vae = str(recipe.export.get("vae", ""))
    if not hub.is_remote(vae):
        return recipe
    return recipe.model_copy(update={"export": {**recipe.export, "vae": hub.DEFAULT_MODEL}})


def _has_data(recipe: Recipe) -> bool:
    data = recipe.data
    return not isinstance(data, LatentsSpec) or Path(data.folder).exists()


def _print_run(recipe: Recipe, folder: Path, degrees: ParallelConfig, estimate: Estimate) -> None:
    from fastvideo_train.checkpoints import Checkpoints

    run, store = recipe.run, Checkpoints(folder / "checkpoints")
    latest = store.latest()
    step = store.read_info(latest)["step"] if latest else 0
    print(f"{run.name}: method {recipe.method.name}, steps {step} to {run.steps}")
    for name, role in recipe.roles.items():
        state = "trained" if role.trainable else "frozen"
        start = f"from {role.from_}" if role.from_ else "new weights"
        size = f"{estimate.num_params[name] / 1e6:.2f} M parameters"
        if role.kind == "text" and recipe.stored_text:
            size = f"states of {recipe.stored_text}"
        dtype = role.dtype or run.dtype
        print(f"  {name}: {role.kind}/{role.family}, {size}, {dtype}, {state}, {start}")
    print(f"  batch {run.batch} x {run.accumulate} of {recipe.data.name}")
    sizes: dict[str, Any] = degrees.model_dump()
    words = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    count = degrees.world_size
    print(f"  {run.strategy} on {count} process{'es' if count > 1 else ''} {words}".rstrip())
    if not _has_data(recipe):
        print(f"  {recipe.data.folder} is not here yet")  # type: ignore[union-attr]


def _print_memory(estimate: Estimate, recipe: Recipe, device: int | None) -> None:
    has = f" of {device / GIB:.1f}" if device is not None else ""
    print(f"  memory of each device, estimated: {estimate.total / GIB:.2f}{has} GiB")
    for name in [*recipe.roles, ""]:
        parts = [p for p in estimate.parts if p.role == name]
        if parts:
            words = ", ".join(f"{p.what} {p.bytes / GIB:.2f}" for p in parts)
            total = sum(p.bytes for p in parts) / GIB
            print(f"    {name or 'beside them'} {total:.2f}: {words}")
    if estimate.clip is not None:
        c = estimate.clip
        print(f"    for latents of {c.frames}x{c.height}x{c.width}")
    if estimate.host:
        print(f"    and {estimate.host / GIB:.1f} of each process's host memory while it loads")
    for note in estimate.notes:
        print(f"    {note}")
    if device is None and recipe.run.device.startswith("cuda"):
        print("    no device to compare with: --set run.memory_gib=80 plans for one")
