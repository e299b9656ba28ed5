"""What `generate` is asked to do, checked before torch is loaded: prompts, settings, output names.

batch = read(CliArgs(fields={"prompt": "a red ball", "seed": 1}, model="wan-nano"))
for job in batch.jobs: ...   # complete parameters and a path each
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvideo import env, hub, media, sampling
from fastvideo.config import assignments, read_toml
from fastvideo.hub import OpenModel
from fastvideo.parallel.degrees import Degrees
from fastvideo.registry import did_you_mean
from fastvideo.resolve import notices, resolve
from fastvideo.sampling import SamplingParams, read_layers
from fastvideo_inference import naming, prompts, sharing
from fastvideo_inference.recipe import DecoderId, Recipe, decoder_id, fingerprint, read_recipe

DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_FLAGS = {"prompt": "the prompt", "height": "--size", "width": "--size"}
_BESIDE = ("model", "decoder")  # keys of a config that are no sampling fields

Layer = tuple[str, dict[str, Any]]
"""Where settings come from, for error texts, and the settings."""
Resolved = tuple[SamplingParams, tuple[str, ...]]
"""Complete parameters, and the notices about them."""


@dataclass(frozen=True)
class CliArgs:
    """What was typed after `generate`; None for what was not. `fields` are sampling fields."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    prompts: Path | None = None
    model: str | None = None
    decoder: str | None = None
    config: Path | None = None
    settings: tuple[str, ...] = ()
    repeat: Path | None = None
    output: str | None = None
    device: str | None = None
    dtype: str | None = None
    parallel: str | None = None


@dataclass(frozen=True)
class Job:
    """One clip to make, and where to put it."""

    params: SamplingParams
    notices: tuple[str, ...]
    path: Path


@dataclass(frozen=True)
class Batch:
    """All that a run of `generate` does, checked."""

    model: OpenModel
    decoder: DecoderId | None
    device: str
    dtype: str
    degrees: Degrees
    jobs: tuple[Job, ...]


def flag_of(name: str) -> str:
    """Return the flag that sets a sampling field."""
    alias = sampling.settings()[name].alias or name
    return _FLAGS.get(name, f"--{alias.replace('_', '-')}")


def read(args: CliArgs) -> Batch:
    """Check everything asked for; raise a one-line `ValueError` or `OSError` if it is wrong."""
    check_place(args.device, args.dtype, num_processes=env.world_size())
    repeated = read_recipe(args.repeat) if args.repeat else None
    layers, beside = _layers(args, repeated)
    model = _open(beside["model"], args, repeated)
    decoder = decoder_id(beside["decoder"], model.spec, model.folder)
    if repeated:
        _check_repeatable(args.repeat, repeated, model)
        _check_same_decoder(args.repeat, repeated, decoder)
    resolved = [_resolved(row, layers, model) for row in _rows(args)]
    params = [one for one, _ in resolved]
    return Batch(
        model=model,
        decoder=decoder,
        device=args.device or (repeated.device if repeated else "auto"),
        dtype=args.dtype or (repeated.dtype if repeated else "auto"),
        degrees=_degrees(args.parallel, params, model, has_small_decoder=decoder is not None),
        jobs=_jobs(resolved, args.output),
    )


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


def _layers(args: CliArgs, repeated: Recipe | None) -> tuple[list[Layer], dict[str, Any]]:
    """Return the layers of sampling fields, lowest first, and what else they name."""
    layers: list[Layer] = []
    if repeated:
        given = {"model": repeated.model.name_or_path, **repeated.request.model_dump()}
        if repeated.decoder:
            given["decoder"] = repeated.decoder.name_or_path
        layers.append((str(args.repeat), given))
    if args.config:
        layers.append((str(args.config), read_toml(args.config)))
    if args.settings:
        layers.append(("--set", assignments(args.settings)))
    flags = {**args.fields, "model": args.model, "decoder": args.decoder}
    layers.append(("the command line", {k: v for k, v in flags.items() if v is not None}))
    beside: dict[str, Any] = {"model": hub.DEFAULT_MODEL, "decoder": None}
    for source, values in layers:
        for key in _BESIDE:
            beside[key] = value = values.pop(key, beside[key])
            if not isinstance(value, str | None):
                raise ValueError(f"{key} {value!r} in {source} must be a name or a path")
    return layers, beside


def _open(name: str, args: CliArgs, repeated: Recipe | None) -> OpenModel:
    try:
        return hub.open_model(name, weights=repeated is not None)
    except ValueError as error:
        if repeated and args.model is None and name == repeated.model.name_or_path:
            hint = f"named by the recipe in {args.repeat}; --model says where it is now"
            raise ValueError(f"{error} ({hint})") from None
        raise


def _rows(args: CliArgs) -> list[Layer]:
    """Return the rows of a prompt file, or one without fields of its own."""
    if args.prompts is None:
        return [("the command line", {})]
    if args.fields.get("prompt") is not None:
        raise ValueError("give a prompt or --prompts FILE, not both")
    return prompts.read_prompts(args.prompts)


def _resolved(row: Layer, layers: list[Layer], model: OpenModel) -> Resolved:
    # A row of a prompt file is more particular than a config, less than a flag typed now.
    *configs, (source, typed) = layers
    flags = sampling.spelled(typed, source=source)
    prompt = {key: flags.pop(key) for key in ["prompt"] if key in flags}
    words = [(source, prompt), *((flag_of(key), {key: value}) for key, value in flags.items())]
    ordered = [*configs, row, *words]
    origin = {
        key: source for source, values in ordered for key in sampling.spelled(values, source=source)
    }
    if "prompt" not in origin:
        raise ValueError('there is no prompt; try: fastvideo generate "a big red ball moving left"')
    request = read_layers(*ordered)
    params = resolve(request, model.spec, origin=origin)
    return params, notices(request, params, model.spec)


def _degrees(
    text: str | None, params: list[SamplingParams], model: OpenModel, *, has_small_decoder: bool
) -> Degrees:
    def check(degrees: Degrees) -> None:
        if degrees.data > len(params):
            raise ValueError(
                f"--parallel: data={degrees.data} exceeds the number of prompts ({len(params)});"
                f" nearest: data={len(params)}"
            )
        for one in params:
            sharing.check(degrees, one, model.spec, has_small_decoder=has_small_decoder)

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


def _check_repeatable(path: Path | None, recipe: Recipe, model: OpenModel) -> None:
    if recipe.latents != "seed":
        raise ValueError(
            f"{path} was made from noise that its caller brought; it cannot be repeated"
        )
    found = fingerprint(model.folder)
    if found != recipe.model.fingerprint:
        raise ValueError(
            f"{path} was made by other weights than {model.name}: its recipe says"
            f" {recipe.model.spec} {recipe.model.fingerprint[:12]}, {model.folder} is {found[:12]}"
        )


def _check_same_decoder(path: Path | None, recipe: Recipe, used: DecoderId | None) -> None:
    old = recipe.decoder
    if old and used and used.name_or_path == old.name_or_path and used != old:
        raise ValueError(
            f"{path} was made by another decoder {old.name_or_path} than the one that is there now:"
            f" its recipe says {old.fingerprint[:12]}, it is {used.fingerprint[:12]}"
        )


def _jobs(resolved: list[Resolved], output: str | None) -> tuple[Job, ...]:
    template = naming.check_template(output or naming.DEFAULT_TEMPLATE, num_clips=len(resolved))
    jobs: list[Job] = []
    for index, (one, told) in enumerate(resolved):
        path = naming.fill(template, prompt=one.prompt, seed=one.seed, index=index)
        taken = {job.path for job in jobs}
        if output is None or path in taken:
            path = naming.unused(path, taken=taken)
        media.check_output(path)
        if naming.sidecar(path).exists():
            raise FileExistsError(f"{naming.sidecar(path)} exists already and is not overwritten")
        jobs.append(Job(one, told, path))
    return tuple(jobs)
