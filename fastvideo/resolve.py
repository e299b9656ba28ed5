"""A request and a model's spec become complete, legal sampling parameters; torch-free.

params = resolve(request, spec)   # raises before any weight is read
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from fastvideo import attention as patterns
from fastvideo import capacity, hub, sampler_note
from fastvideo.foreign import FASTWAN_SIGMAS
from fastvideo.log import logger
from fastvideo.models.wan_dit_config import WanConfig
from fastvideo.sampling import GenerateRequest, LoraUse, SamplingParams, draw_seed
from fastvideo.shapes import LatentShape, PixelShape, TokenGrid
from fastvideo.spec import TEXT_TO_VIDEO, Spec

_FAR = 2  # times as many pixels or frames, or half as many pixels


def resolve(
    request: GenerateRequest, spec: Spec, *, origin: Mapping[str, str] | None = None
) -> SamplingParams:
    """Fill in the spec's defaults, draw the seed if it is None or -1, and check what it decides.

    `origin` says where a field came from (such as "--frames"), for the `ValueError`.
    """
    _check_row(spec)
    sources = origin or {}
    given = {k: v for k, v in request.model_dump().items() if v is not None}
    values = {**spec.defaults.model_dump(exclude={"max_text_tokens"}), **given}
    if values.get("seed", -1) == -1:
        values["seed"] = draw_seed()
    if values["guidance_scale"] == 1:  # no forward looks at it
        values["negative_prompt"] = spec.defaults.negative_prompt
    try:
        values["lora"] = tuple(map(find_lora, request.lora or ()))
        values["attention"] = _pattern(request, spec)
        params = SamplingParams.model_construct(**values)  # of values that are checked
        _check(params, spec, given)
    except ValueError as error:
        first = str(error).split()[0]
        field = first.lower() if first.lower() in values else "attention"
        default = "the request" if field in given else f"the defaults of {spec.name}"
        raise ValueError(f"{error} (from {sources.get(field, default)})") from None
    return params


def notices(request: GenerateRequest, params: SamplingParams, spec: Spec) -> tuple[str, ...]:
    """Return a line for each thing that is asked for and is not done as asked."""
    own, found = spec.defaults, []
    if request.negative_prompt and params.guidance_scale == 1:
        found.append("negative_prompt is not used: guidance_scale is 1")
    is_distilled = spec.scheduler.name == "few_step"
    if is_distilled and params.guidance_scale != own.guidance_scale:
        found.append(
            f"guidance_scale {params.guidance_scale:g}: {spec.name} was distilled at"
            f" {own.guidance_scale:g}; expect other clips"
        )
    area, known = params.width * params.height, own.width * own.height
    if not known / _FAR <= area <= known * _FAR or params.num_frames > own.num_frames * _FAR:
        found.append(
            f"size {params.width}x{params.height}x{params.num_frames} is far from what {spec.name}"
            f" was trained on, {own.width}x{own.height}x{own.num_frames}; expect worse clips"
        )
    clip = PixelShape(params.num_frames, params.height, params.width)
    grid = clip.latent(spec.compression).tokens(spec.compression.patch)
    tiled = patterns.one_tile(patterns.read(params.attention), grid)
    return (*found, *([tiled] if tiled else []))


def check_clip(clip: PixelShape, spec: Spec) -> TokenGrid:
    """Return a clip's tokens.

    Raises `ValueError`, naming the nearest, for a size that the model cannot have or this machine
    cannot hold.
    """
    grid = clip.latent(spec.compression).tokens(spec.compression.patch)
    limit = spec.dit.config.get("rope_max_seq_len", WanConfig.rope_max_seq_len)
    last = LatentShape(*(limit * p for p in spec.compression.patch)).pixels(spec.compression)
    for name, asked, found, nearest in (
        ("num_frames", clip.frames, grid.frames, last.frames),
        ("height", clip.height, grid.height, last.height),
        ("width", clip.width, grid.width, last.width),
    ):
        if found > limit:
            raise ValueError(
                f"{name} {asked} makes {found} positions; this model has {limit} on an axis;"
                f" nearest: {nearest}"
            )
    capacity.check(clip, spec)
    return grid


def find_lora(use: LoraUse) -> LoraUse:
    """Return it with the hash of its file; `ValueError` if that is absent, or another one."""
    actual = hub.lora_hash(hub.find_lora(use.path))
    if use.hash not in ("", actual):
        raise ValueError(
            f"lora {use.path} has hash {actual[:12]} and the one asked for {use.hash[:12]}"
        )
    return use.model_copy(update={"hash": actual})


def check_lora_samplers(
    uses: Iterable[LoraUse], spec: Spec, *, named: Collection[str] = ()
) -> None:
    """Raise `ValueError` for a LoRA that is sampled otherwise than the model.

    named: fields that the request itself decides.
    """
    for use in uses:
        wanted = sampler_note.read(hub.find_lora(use.path)) if use.strength else None
        if wanted:
            sampler_note.check(use.path, wanted, spec, named=named)


def _check_row(spec: Spec) -> None:
    """Raise `ValueError` for a row of stages that lacks something, or does not end in frames."""
    if spec.stages == TEXT_TO_VIDEO:
        return  # known to be right, and its modules need torch
    from fastvideo import stages

    if "frames" not in stages.check(spec.stages):
        raise ValueError(f"the stages of {spec.name}, {' -> '.join(spec.stages)}, make no frames")


def _pattern(request: GenerateRequest, spec: Spec) -> str:
    if request.attention is not None:
        return patterns.write(patterns.read(request.attention))
    return patterns.write(patterns.parse(spec.attention.pattern, spec.attention.args))


def _check(params: SamplingParams, spec: Spec, given: Collection[str]) -> None:
    pattern, has_gates = patterns.read(params.attention), bool(spec.dit.config.get("gate_compress"))
    patterns.check_gates(pattern, has_gates=has_gates, drop_gates=params.drop_gates, name=spec.name)
    if params.drop_gates:
        logger.info("attention %s drops the VSA gates of %s", params.attention, spec.name)
    check_lora_samplers(params.lora, spec, named=given)
    _check_steps(params.num_inference_steps, spec)
    grid = check_clip(PixelShape(params.num_frames, params.height, params.width), spec)
    heads = spec.dit.config.get("num_attention_heads")
    patterns.check_fits(pattern, grid, num_heads=heads)


def _check_steps(num_steps: int, spec: Spec) -> None:
    """Raise `ValueError` for another number of steps than a distilled model takes."""
    if spec.scheduler.name != "few_step":
        return
    sigmas = spec.scheduler.args.get("sigmas", FASTWAN_SIGMAS)
    if len(sigmas) != num_steps:
        raise ValueError(
            f"num_inference_steps {num_steps}: this distilled model takes exactly {len(sigmas)}"
            f" steps; nearest: {len(sigmas)}"
        )
