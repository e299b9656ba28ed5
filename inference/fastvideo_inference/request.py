"""What `generate` is asked to do, checked before torch is loaded: prompts, settings, output names.

batch = read(CliArgs(fields={"prompt": "a red ball", "seed": 1}, model="wan-nano"))
for job in batch.jobs: ...   # complete parameters and a path each
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastvideo import env, files, hub, sampling
from fastvideo.config import Keys, Source, assignments, read_toml, repeated, toml_line, where
from fastvideo.errors import refusing
from fastvideo.hub import OpenModel
from fastvideo.log import given_twice, warned
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.registry import did_you_mean
from fastvideo.resolve import notices, resolve
from fastvideo.sampling import GenerateRequest, Layer, SamplingParams
from fastvideo_inference import naming, prompts, sharing
from fastvideo_inference.goodput import quality
from fastvideo_inference.goodput.profile import Setting
from fastvideo_inference.recipe import DecoderId, Recipe, decoder_id, fingerprint, read_recipe

DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")
_BUDGET = re.compile(r"\s*(\d{1,6}(?:\.\d{1,6})?|\.\d{1,6})\s*s?\s*")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_FLAGS = {"prompt": "the prompt", "height": "--size", "width": "--size"}
_SERVER_DECIDES = ("attention", "backend", "drop_gates", "device", "dtype", "parallel", "budget")
_BESIDE = ("model", "decoder")  # keys of a config that are no sampling fields

Resolved = tuple[SamplingParams, tuple[str, ...], tuple[Setting, ...]]
"""Complete parameters, the notices about them, and what a budget may choose in their place."""


@dataclass(frozen=True)
class CliArgs:
    """What was typed after `generate`; None for what was not. `fields` are sampling fields.

    `notices` are lines about the words themselves, which every clip's sidecar repeats.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    prompts: Path | None = None
    model: str | None = None
    decoder: str | None = None
    config: Path | None = None
    settings: tuple[str, ...] = ()
    repeat: Path | None = None
    output: str | None = None
    overwrite: bool = False
    device: str | None = None
    dtype: str | None = None
    parallel: str | None = None
    count: int = 1
    budget: str | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One clip to make, and where to put it."""

    params: SamplingParams
    notices: tuple[str, ...]
    path: Path
    settings: tuple[Setting, ...] = ()  # with a budget, those that it may choose, best first


@dataclass(frozen=True)
class Batch:
    """All that a run of `generate` does, checked."""

    model: OpenModel
    decoder: DecoderId | None
    device: str
    dtype: str
    degrees: ParallelConfig
    jobs: tuple[Job, ...]
    numbered: bool
    overwrite: bool
    budget_s: float | None = None


@dataclass(frozen=True)
class RemoteJob:
    """One clip to have a server make, and where to put it; what is open the server decides."""

    request: GenerateRequest
    path: Path


@dataclass(frozen=True)
class RemoteBatch:
    """All that a run of `generate --server` asks; `repeated` is the recipe of `--from`."""

    model: str | None
    decoder: str | None
    repeated: Recipe | None
    jobs: tuple[RemoteJob, ...]
    numbered: bool
    overwrite: bool
    notices: tuple[str, ...] = ()


AnyBatch = TypeVar("AnyBatch", Batch, RemoteBatch)


def flag_of(name: str) -> str:
    """Return the flag that sets a sampling field, of its full or its short name."""
    setting = sampling.settings().get(name)
    alias = setting.alias if setting and setting.alias else name
    return _FLAGS.get(name, f"--{alias.replace('_', '-')}")


def flag(keys: Keys) -> str:
    """Name the flag that gave a field, as the origin of a wrong value."""
    return "the command line" if keys[0] == "prompt" else flag_of(str(keys[0]))


def read(args: CliArgs) -> Batch:
    """Check everything asked for; raise a one-line `ValueError` or `OSError` if it is wrong."""
    check_place(args.device, args.dtype, num_processes=env.world_size())
    budget_s = _budget_s(args.budget)
    repeated = _repeated(args.repeat)
    layers, beside = _layers(args, repeated)
    rows = _rows(args)
    args = replace(args, notices=(*args.notices, *_given_twice(args)))
    check = partial(_checked, args, repeated, layers, rows, beside["decoder"])
    name = hub.DEFAULT_MODEL if beside["model"] is None else beside["model"]
    model = _open(name, args, repeated)
    batch = check(model)
    if not model.has_weights:  # the small files allow the request: the rest is worth fetching
        whole = hub.fetched(model)
        batch = replace(batch, model=whole) if whole.spec == model.spec else check(whole)
    batch = replace(batch, budget_s=budget_s)
    if repeated:
        _check_repeatable(args.repeat, repeated, batch.model)
        check_same_decoder(str(args.repeat), repeated, batch.decoder)
    return batch


def read_remote(args: CliArgs) -> RemoteBatch:
    """Check what can be checked without the model, which a server has."""
    for name in _SERVER_DECIDES:
        if {**args.fields, **vars(args)}[name] is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for the server to decide")
    repeated = _repeated(args.repeat)
    layers, beside = _layers(args, repeated)
    http = sampling.settings(sampling.HTTP)
    requests = []
    rows, seeds = _rows(args), _one_seed_each(layers)
    notices = (*args.notices, *_given_twice(args))
    idle = {name: None for name in GenerateRequest.model_fields if name not in http}
    for row in rows:
        for own in seeds:
            request, origin = _merged(row, own)
            _check_remote(origin, repeated=args.repeat)
            requests += sampling.clips(request.model_copy(update=idle), args.count)
    template = _template(args, num_clips=len(requests), count=args.count * len(seeds))
    return RemoteBatch(
        model=beside["model"],
        decoder=beside["decoder"],
        repeated=repeated,
        jobs=tuple(
            RemoteJob(one, naming.fill(template, prompt=one.prompt, seed=one.seed or 0, index=i))
            for i, one in enumerate(requests)
        ),
        numbered=template.endswith(naming.DEFAULT_NAME),
        overwrite=args.overwrite,
        notices=notices,
    )


def _check_remote(origin: Mapping[str, str], *, repeated: Path | None) -> None:
    """Raise `ValueError` for what a server decides, unless a clip of `--from` had it."""
    for name in ("attention", "backend", "drop_gates"):
        place = origin.get(name)
        if place is not None and place != str(repeated):
            raise ValueError(f"{name} (from {place}) is for the server to decide")


def _repeated(path: Path | None) -> Recipe | None:
    repeated = read_recipe(path) if path else None
    if repeated and repeated.latents != "seed":
        text = "was made from noise that its caller brought; it cannot be repeated"
        raise ValueError(f"{path} {text}")
    return repeated


def _checked(
    args: CliArgs,
    repeated: Recipe | None,
    layers: list[Layer],
    rows: Sequence[Layer],
    decoder_name: str | None,
    model: OpenModel,
) -> Batch:
    decoder = decoder_id(decoder_name, model.spec, model.folder)
    seeds = _one_seed_each(layers)
    resolved = [
        (one, (*args.notices, *lines), settings)
        for row in rows
        for own in seeds
        for one, lines, settings in _resolved(args, row, own, decoder_name, model)
    ]
    params = [one for one, _, _ in resolved]
    warned(line for _, lines, _ in resolved for line in lines if line not in args.notices)
    template = _template(args, num_clips=len(params), count=args.count * len(seeds))
    return Batch(
        model=model,
        decoder=decoder,
        device=args.device or (repeated.device if repeated else "auto"),
        dtype=args.dtype or (repeated.dtype if repeated else "auto"),
        degrees=_degrees(args.parallel, params, model, has_small_decoder=decoder is not None),
        jobs=_jobs(resolved, template),
        numbered=template.endswith(naming.DEFAULT_NAME),
        overwrite=args.overwrite,
    )


def _template(args: CliArgs, *, num_clips: int, count: int) -> str:
    asked = naming.DEFAULT_TEMPLATE if args.output is None else args.output
    return naming.check_template(asked, num_clips=num_clips, count=count)


@contextmanager
def claimed(batch: AnyBatch) -> Iterator[AnyBatch]:
    """Hold the names of all clips of a batch; `RefusedError` if a name is not to be had.

    A name gets a number if it is the default one, or that of an earlier clip of the batch.
    """
    own: dict[Path, Any] = {}
    with ExitStack() as held:
        with refusing():
            files.allow_many_claims()
            for job in batch.jobs:
                numbered = batch.numbered or job.path in own
                path = naming.claim(job.path, held, numbered=numbered, overwrite=batch.overwrite)
                own[path] = replace(job, path=path)
        yield replace(batch, jobs=tuple(own.values()))


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
    layers: list[tuple[Source, dict[str, Any]]] = []
    if repeated:
        given = {"model": repeated.model.name_or_path, **repeated.request.model_dump()}
        if repeated.decoder:
            given["decoder"] = repeated.decoder.name_or_path
        layers.append((str(args.repeat), given))
    if args.config:
        given = read_toml(args.config)
        lines = {key: toml_line(args.config, [key]) for key in given}
        layers.append((lambda keys: lines[str(keys[0])], given))
    if args.settings:
        layers.append((lambda keys: f"--set {keys[0]}", assignments(args.settings)))
    seeds = _seeds(args.fields.get("seed"))
    flags = {**args.fields, "seed": seeds, "model": args.model, "decoder": args.decoder}
    layers.append((flag, {k: v for k, v in flags.items() if v is not None}))
    beside: dict[str, Any] = {"model": None, "decoder": None}
    for source, values in layers:
        for key in beside.keys() & values:
            beside[key] = values[key]
            if not isinstance(values[key], str):
                origin = where(source, [key])
                raise ValueError(f"{key} {values[key]!r} in {origin} must be a name or a path")
    return [(s, {k: v for k, v in vs.items() if k not in beside}) for s, vs in layers], beside


def _given_twice(args: CliArgs) -> tuple[str, ...]:
    """Return a line, which is logged, for each key that several `--set` or a row give again."""
    rows = warned(given_twice(prompts.keys(args.prompts) if args.prompts else ()))
    return (*repeated(args.settings), *rows)  # `assignments` logs the first ones


def _seeds(given: Any) -> Any:
    """Return the whole number of `--seed`, or a tuple of several; what is no number stays text."""
    if not isinstance(given, str):
        return given
    found = tuple(map(sampling.typed_whole, given.split(",")))
    return found if len(found) > 1 else found[0]


def _one_seed_each(layers: list[Layer]) -> list[list[Layer]]:
    """Return the layers for each of the seeds of a flag such as `--seed 1,5,9`."""
    *configs, (source, typed) = layers
    seeds = typed.get("seed")
    several = seeds if isinstance(seeds, tuple) else (seeds,) if "seed" in typed else ()
    return [[*configs, (source, {**typed, "seed": one})] for one in several] or [layers]


def _open(name: str, args: CliArgs, repeated: Recipe | None) -> OpenModel:
    try:
        return hub.open_model(name)
    except ValueError as error:
        if repeated and args.model is None and name == repeated.model.name_or_path:
            hint = f"named by the recipe in {args.repeat}; --model says where it is now"
            raise ValueError(f"{error} ({hint})") from None
        raise


def _rows(args: CliArgs) -> Sequence[Layer]:
    """Return the rows of a prompt file, or one without fields of its own."""
    if args.prompts is None:
        return [("", {})]
    if args.fields.get("prompt") is not None:
        raise ValueError("give a prompt or --prompts FILE, not both")
    return prompts.read_prompts(args.prompts)


def _merged(row: Layer, layers: list[Layer]) -> tuple[GenerateRequest, dict[str, str]]:
    """Return a request, and where each field of it comes from."""
    # A row of a prompt file is more particular than a config, less than a flag typed now.
    *configs, typed = layers
    place, fields = row
    for key in fields.keys() & set(_BESIDE):
        raise ValueError(f"{key} in {where(place, [key])} must be one for all rows; use --{key}")
    ordered = [*configs, row, typed]
    if not any({"prompt", "text"} & layer.keys() for _, layer in ordered):
        if fields:
            raise ValueError(f"prompt is missing in {where(place)}")
        raise ValueError('there is no prompt; try: fastvideo generate "a big red ball moving left"')
    return sampling.read_with_origins(*ordered, beside=_BESIDE)


def _budget_s(text: str | None) -> float | None:
    """Return the seconds of a budget such as 5 or 5s."""
    if text is None:
        return None
    found = _BUDGET.fullmatch(text)
    if found is None or not float(found[1]):
        raise ValueError(f"--budget {text!r} must be seconds above 0, such as 5s")
    if env.world_size() > 1:
        raise ValueError("--budget chooses for a clip of one process; leave torchrun out")
    return float(found[1])


def _resolved(
    args: CliArgs, row: Layer, layers: list[Layer], decoder: str | None, model: OpenModel
) -> list[Resolved]:
    """Return the clips of a row."""
    request, origin = _merged(row, layers)
    params = resolve(request, model.spec, origin=origin)
    lines = notices(request, params, model.spec)
    try:
        clips = sampling.clips(params, args.count)
    except ValueError as error:
        raise ValueError(f"{error} (from {origin.get('seed', '--count')})") from None
    if args.budget is None:
        return [(one, lines, ()) for one in clips]
    asked = (request.model_copy(update={"seed": one.seed}) for one in clips)
    each = (quality.candidates(one, model, decoder=decoder) for one in asked)
    return [(one, lines, settings) for one, settings in zip(clips, each, strict=True)]


def _degrees(
    text: str | None, params: list[SamplingParams], model: OpenModel, *, has_small_decoder: bool
) -> ParallelConfig:
    def check(degrees: ParallelConfig) -> None:
        if degrees.data > len(params):
            raise ValueError(
                f"--parallel: data={degrees.data} exceeds the number of prompts ({len(params)});"
                f" nearest: data={len(params)}"
            )
        for one in params:
            sharing.check(degrees, one, model.spec, has_small_decoder=has_small_decoder)

    def is_legal(degrees: ParallelConfig) -> bool:
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
    found = fingerprint(model.folder)
    if found != recipe.model.fingerprint:
        raise ValueError(
            f"{path} was made by other weights than {model.name}: its recipe says"
            f" {recipe.model.spec} {recipe.model.fingerprint[:12]}, {model.folder} is {found[:12]}"
        )


def check_same_decoder(clip: str, recipe: Recipe, used: DecoderId | None) -> None:
    """Raise `ValueError` if the decoder of a clip's recipe now has other weights."""
    old = recipe.decoder
    if old and used and used.name_or_path == old.name_or_path and used != old:
        raise ValueError(
            f"{clip} was made by another decoder {old.name_or_path} than the one that is there now:"
            f" its recipe says {old.fingerprint[:12]}, it is {used.fingerprint[:12]}"
        )


def _jobs(resolved: list[Resolved], template: str) -> tuple[Job, ...]:
    return tuple(
        Job(one, lines, naming.fill(template, prompt=one.prompt, seed=one.seed, index=i), settings)
        for i, (one, lines, settings) in enumerate(resolved)
    )
