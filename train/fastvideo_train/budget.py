"""Whether a run fits its devices, and what would make it fit: asked before a weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastvideo import capacity, env, hub, registry
from fastvideo.config import assignments, merge, parse
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo_train import memory, origins
from fastvideo_train.memory import GIB, Estimate
from fastvideo_train.recipe import ClipsSpec, Recipe, RoleSpec, dump

MOST_PARTS, MOST_ULYSSES = 64, 8


def limit(recipe: Recipe) -> int | None:
    """Return the bytes that a device has: the least of `run.memory_gib` and what is free of it.

    On a CPU `run.memory_gib`, else a process's share of the machine. None if nothing is known.
    """
    known = [int(recipe.run.memory_gib * GIB)] if recipe.run.memory_gib else []
    if recipe.run.device.startswith("cuda") and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(torch.device(recipe.run.device))
        known.append(free)
    host = capacity.host_memory()
    if recipe.run.device == "cpu" and host is not None and not known:
        known.append(host // env.world_size())
    return min(known, default=None)


def check(recipe: Recipe, degrees: ParallelConfig, *, dims: memory.Dims = origins.dims) -> None:
    """Raise `ValueError` for a run that needs more memory, or positions, than there are."""
    check_positions(recipe, dims)
    check_pixels(recipe)
    bytes_of_device = limit(recipe)
    if bytes_of_device is not None:
        refuse(memory.of(recipe, degrees, dims=dims), bytes_of_device, recipe, degrees, dims)


def check_positions(recipe: Recipe, dims: memory.Dims = origins.dims) -> None:
    """Raise `ValueError` for more tokens on an axis than a denoiser's rotary table has."""
    clip, origin = memory.clip_of(recipe)
    for name, spec in recipe.roles.items():
        if clip is None or spec.kind != "dit":
            continue
        family = registry.load("fastvideo.models.dit", spec.family, "Config")
        config = family.parse(dims(spec, name))
        longest = clip.tokens(config.patch_size).longest
        if longest > config.rope_max_seq_len:
            raise ValueError(
                f"clips of {origin} make {longest} positions on an axis; the denoiser of"
                f" roles.{name} has {config.rope_max_seq_len}"
            )


def check_pixels(recipe: Recipe) -> None:
    """Raise `ValueError` for clips of a world that alone need more memory than there is.

    Counted are a whole clip as it is rendered, and a batch in float32 beside what is made of it.
    """
    data, memory_bytes = recipe.data, limit(recipe)
    if not isinstance(data, ClipsSpec) or memory_bytes is None:
        return
    height, width = data.crop or (data.height, data.width)
    frames = max(data.num_frames, data.render_frames) if data.window else data.num_frames
    rendered = 3 * data.height * data.width * frames
    needed = max(rendered, 2 * 4 * 3 * recipe.run.batch * data.num_frames * height * width)
    if needed > memory_bytes:
        raise ValueError(
            f"[data] of {recipe.run.name}: {recipe.run.batch} clips of {width}x{height}"
            f"x{data.num_frames} need at least {needed / GIB:.1f} GiB, of"
            f" {memory_bytes / GIB:.1f}; use a smaller size, crop or run.batch"
        )


def refuse(
    estimate: Estimate,
    bytes_of_device: int,
    recipe: Recipe,
    degrees: ParallelConfig,
    dims: memory.Dims = origins.dims,
) -> None:
    """Raise `ValueError`, naming the largest parts and the nearest remedy, if it does not fit."""
    if estimate.total <= bytes_of_device:
        return
    parts = ", ".join(f"{p.role} {p.what} {p.bytes / GIB:.1f}".strip() for p in estimate.largest(3))
    raise ValueError(
        f"{recipe.run.name} needs about {estimate.total / GIB:.1f} GiB of each device, which has"
        f" {bytes_of_device / GIB:.1f}; largest: {parts};"
        f" {_nearest(bytes_of_device, recipe, degrees, dims)}"
    )


def dims_here(spec: RoleSpec, name: str) -> dict[str, Any]:
    """Return a role's dims without asking the hub, or wanting the run that it will start from.

    Raises `ValueError` for a denoiser if the recipe does not state them and nothing here does.
    """
    if not spec.from_ or spec.from_ in hub.bundled() or Path(spec.from_).exists():
        return origins.dims(spec, name)
    if not spec.config and spec.kind == "dit":
        raise ValueError(
            f"roles.{name}.from {spec.from_} is not here, so its dims are not known; state them in"
            f" roles.{name}.config"
        )
    return spec.config


def _nearest(
    bytes_of_device: int, recipe: Recipe, degrees: ParallelConfig, dims: memory.Dims
) -> str:
    """Name the first of the remedies, from cheap to dear, that fits; or how far they all reach."""
    least, least_words = 0, ""
    for words in _remedies(recipe, degrees):
        changed, cut = _changed(recipe, degrees, words)  # may add a batch to the words
        total = memory.of(changed, cut, dims=dims).total
        if total <= bytes_of_device:
            devices = f" on {cut.world_size} devices" if cut != degrees else ""
            return f"nearest that fits: {', '.join(words)}{devices} ({total / GIB:.1f} GiB)"
        if not least_words or total < least:
            least, least_words = total, ", ".join(words)
    if not least_words:
        return "nothing here would shrink it"
    return f"even {least_words} needs {least / GIB:.1f} GiB"


def _remedies(recipe: Recipe, degrees: ParallelConfig) -> Iterator[list[str]]:
    """Yield changes of a recipe: each alone, then those that cost no device under the others."""
    run, free = recipe.run, list[str]()
    clips = run.batch // degrees.of("batch")
    if clips > 1:
        free += [f"run.batch={degrees.of('batch')}", f"run.accumulate={run.accumulate * clips}"]
        yield list(free)
    denoises = any(role.kind == "dit" and role.trainable for role in recipe.roles.values())
    if denoises and not run.recompute:
        yield ["run.recompute=true"]
        free.append("run.recompute=true")
        yield list(free)
    strategy = [] if run.strategy == "fsdp2" else ["run.strategy=fsdp2"]
    for axis, most in (("shard", MOST_PARTS), ("ulysses", MOST_ULYSSES)):
        if axis == "ulysses" and not denoises:
            continue
        size = 2 * degrees.of(axis)
        while size <= most:
            yield [*free, *strategy, f"parallel.{axis}={size}"]
            size *= 2


def _changed(
    recipe: Recipe, degrees: ParallelConfig, words: list[str]
) -> tuple[Recipe, ParallelConfig]:
    """Return a changed recipe and its degrees.

    A batch that its processes cannot share is changed too, and `words` are told.
    """
    base = {**dump(recipe), "parallel": degrees.model_dump()}
    tree = merge(base, assignments(words))
    degrees, run = ParallelConfig(**tree["parallel"]), tree["run"]
    parts, clips = degrees.of("batch"), run["batch"] * run["accumulate"]
    batch = max(1, run["batch"] // parts) * parts
    if batch != run["batch"]:
        more = [f"run.batch={batch}", f"run.accumulate={max(1, clips // batch)}"]
        words += more
        tree = merge(tree, assignments(more))
    return parse(Recipe, tree, source="what would fit"), degrees
