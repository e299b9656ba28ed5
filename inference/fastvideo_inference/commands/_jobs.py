"""From words on the command line to checked jobs; nothing here needs torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo import env, hub, media
from fastvideo.config import assignments, read_toml
from fastvideo.parallel.degrees import Degrees
from fastvideo.registry import did_you_mean
from fastvideo.shapes import parse_size
from fastvideo.spec import Spec
from fastvideo_inference import naming, prompts, sharing
from fastvideo_inference.recipe import DecoderId, Recipe, decoder_id, fingerprint, read_recipe
from fastvideo_inference.request import Plan, read_layers

# The flag that sets a field of the request, for error texts.
FLAG_OF = {
    "num_frames": "--frames",
    "height": "--size",
    "width": "--size",
    "fps": "--fps",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "negative_prompt": "--negative",
    "seed": "--seed",
    "attention": "--attention",
    "backend": "--backend",
    "drop_gates": "--drop-gates",
    "lora": "--lora",
    "prompt": "the prompt",
}


DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Words:
    """What was typed after `generate`; None for what was not."""

    prompt: str | None
    prompts: Path | None
    model: str | None
    config: Path | None
    repeat: Path | None
    output: str | None
    size: str | None
    settings: tuple[str, ...]
    device: str | None
    dtype: str | None
    decoder: str | None
    flags: Mapping[str, Any]
    parallel: str | None = None


@dataclass(frozen=True)
class Job:
    """One clip to make, and where to put it."""

    plan: Plan
    path: Path


@dataclass(frozen=True)
class Batch:
    """All that a run of `generate` does, checked."""

    model: str
    device: str
    dtype: str
    decoder: str | None
    jobs: tuple[Job, ...]
    degrees: Degrees


def read(words: Words) -> Batch:
    """Check everything asked for; raise a one-line `ValueError` or `OSError` if it is wrong."""
    check_place(words.device, words.dtype, num_processes=env.world_size())
    repeated = read_recipe(words.repeat) if words.repeat else None
    layers, name, decoder = _layers(words, repeated)
    if not isinstance(name, str):
        raise ValueError(f"model {name!r} must be a name or a folder")
    if not isinstance(decoder, str | None):
        raise ValueError(f"decoder {decoder!r} must be a name or a path")
    spec, folder = _open(name, words, repeated)
    used = decoder_id(decoder, spec, folder)
    if repeated:
        _check_repeatable(words.repeat, repeated, name, folder)
        _check_same_decoder(words.repeat, repeated, used)
    plans = [_plan(row, layers, words, spec) for row in _rows(words, repeated)]
    return Batch(
        model=name,
        device=words.device or (repeated.device if repeated else "auto"),
        degrees=_degrees(words.parallel, plans, spec, has_small_decoder=used is not None),
        dtype=words.dtype or (repeated.dtype if repeated else "auto"),
        decoder=used.name_or_path if used else None,
        jobs=_place(plans, words.output),
    )


def _degrees(
    text: str | None, plans: list[Plan], spec: Spec, *, has_small_decoder: bool
) -> Degrees:
    def check(degrees: Degrees) -> None:
        if degrees.data > len(plans):
            raise ValueError(
                f"parallel data={degrees.data} deals out prompts, of which there are {len(plans)};"
                f" nearest: data={len(plans)}"
            )
        for plan in plans:
            sharing.check(degrees, plan, spec, has_small_decoder=has_small_decoder)

    def is_legal(degrees: Degrees) -> bool:
        try:
            check(degrees)
        except ValueError:
            return False
        return True

    degrees = sharing.read(
        text, world_size=env.world_size(), origin="--parallel", is_legal=is_legal
    )
    check(degrees)
    return degrees


def _open(name: str, words: Words, repeated: Recipe | None) -> tuple[Spec, Path]:
    try:
        return hub.open_spec(name, weights=repeated is not None)
    except ValueError as error:
        if repeated and words.model is None and name == repeated.model.name_or_path:
            hint = f"named by the recipe in {words.repeat}; --model says where it is now"
            raise ValueError(f"{error} ({hint})") from None
        raise


def _layers(
    words: Words, repeated: Recipe | None
) -> tuple[list[tuple[str, dict[str, Any]]], Any, Any]:
    """Return the request layers, lowest first, and the model and decoder that they name."""
    layers = []
    if repeated:
        given = {"model": repeated.model.name_or_path, **repeated.request.model_dump()}
        if repeated.decoder:
            given["decoder"] = repeated.decoder.name_or_path
        layers.append((str(words.repeat), given))
    if words.config:
        layers.append((str(words.config), read_toml(words.config)))
    if words.settings:
        layers.append(("--set", assignments(words.settings)))
    flags = {k: v for k, v in words.flags.items() if v is not None}
    if words.model is not None:
        flags["model"] = words.model
    if words.size is not None:
        flags["width"], flags["height"] = parse_size(words.size)
    if words.decoder is not None:
        flags["decoder"] = words.decoder
    layers.append(("the command line", flags))
    model, decoder = hub.DEFAULT_MODEL, None
    for _, values in layers:
        model, decoder = values.pop("model", model), values.pop("decoder", decoder)
    return layers, model, decoder


def _rows(words: Words, repeated: Recipe | None) -> list[tuple[str, dict[str, Any]]]:
    if words.prompt is not None and words.prompts is not None:
        raise ValueError("give a prompt or --prompts FILE, not both")
    if words.prompts is not None:
        return prompts.read_prompts(words.prompts)
    return [("the command line", {} if words.prompt is None else {"prompt": words.prompt})]


def _plan(
    row: tuple[str, dict[str, Any]],
    layers: list[tuple[str, dict[str, Any]]],
    words: Words,
    spec: Spec,
) -> Plan:
    # A row of a prompt file is more particular than a config, less than a flag typed now.
    flags = [(FLAG_OF[key], {key: value}) for key, value in layers[-1][1].items()]
    ordered = [*layers[:-1], row, *flags]
    if not any("prompt" in values for _, values in ordered):
        raise ValueError('there is no prompt; try: fastvideo generate "a big red ball moving left"')
    origin = {key: source for source, values in ordered for key in values}
    return read_layers(*ordered).resolve(spec, origin=origin)


def check_place(device: str | None, dtype: str | None, *, num_processes: int = 1) -> None:
    """Refuse a device or dtype that torch could not mean; None is what was not typed."""
    if device is not None and ":" in device and num_processes > 1:
        raise ValueError(
            f"--device {device} is one device for {num_processes} processes, each of which takes"
            f" its own; say {device.partition(':')[0]}"
        )
    if device is not None and not DEVICE.fullmatch(device):
        raise ValueError(f"--device {device!r} is unknown; use auto, cpu, mps, cuda, cuda:N or xpu")
    if dtype is not None and dtype not in DTYPES:
        hint = did_you_mean(dtype, DTYPES)
        raise ValueError(f"--dtype {dtype!r} is unknown{hint} (known: {', '.join(DTYPES)})")


def _check_repeatable(path: Path | None, recipe: Recipe, name: str, folder: Path) -> None:
    if recipe.latents != "seed":
        raise ValueError(
            f"{path} was made from noise that its caller brought; it cannot be repeated"
        )
    found = fingerprint(folder)
    if found != recipe.model.fingerprint:
        raise ValueError(
            f"{path} was made by other weights than {name}: its recipe says {recipe.model.spec}"
            f" {recipe.model.fingerprint[:12]}, {folder} is {found[:12]}"
        )


def _check_same_decoder(path: Path | None, recipe: Recipe, used: DecoderId | None) -> None:
    old = recipe.decoder
    if old and used and used.name_or_path == old.name_or_path and used != old:
        raise ValueError(
            f"{path} was made by another decoder {old.name_or_path} than the one that is there now:"
            f" its recipe says {old.fingerprint[:12]}, it is {used.fingerprint[:12]}"
        )


def _place(plans: list[Plan], output: str | None) -> tuple[Job, ...]:
    template = naming.check_template(output or naming.DEFAULT_TEMPLATE, num_clips=len(plans))
    jobs: list[Job] = []
    for index, plan in enumerate(plans):
        path = naming.fill(template, prompt=plan.prompt, seed=plan.seed, index=index)
        taken = {job.path for job in jobs}
        if output is None or path in taken:
            path = naming.unused(path, taken=taken)
        media.check_output(path)
        if naming.sidecar(path).exists():
            raise FileExistsError(f"{naming.sidecar(path)} exists already and is not overwritten")
        jobs.append(Job(plan, path))
    return tuple(jobs)
