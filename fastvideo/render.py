"""Prompts to frames in the plainest form; the pipeline's stages and training's validation call it.

cond = encode_text(model, ["a red ball"])
noise = initial_latents(model, num_frames=81, height=128, width=128, seed=0)
for step in denoise(model, cond, latents=noise, num_steps=50): ...
for chunk in decode(model, step.x): ...  # uint8, (t, H, W, 3)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastvideo import attention, registry, rng, schedulers
from fastvideo.errors import NotFiniteError
from fastvideo.log import logger
from fastvideo.models.text import encode_prompts
from fastvideo.parallel import decode as bands
from fastvideo.parallel import guidance
from fastvideo.parallel.sequence import spread
from fastvideo.sample import Denoiser, Step, Velocity, guide, sample
from fastvideo.shapes import LatentShape

if TYPE_CHECKING:
    from fastvideo.model import Model

Frames = npt.NDArray[np.uint8]


@torch.no_grad()
def encode_text(model: Model, prompts: Sequence[str]) -> Any:
    """Encode prompts into the conditioning of the model's own family, one row for each."""
    limit = model.spec.defaults.max_text_tokens
    states_BLC = encode_prompts(
        model.text, model.tokenizer, prompts, max_tokens=limit, device=str(model.device)
    )
    conditioning = registry.load("fastvideo.models.dit", model.spec.dit.family, "Conditioning")
    return conditioning(states_BLC.to(model.device, model.dtype))


def initial_latents(
    model: Model, *, num_frames: int, height: int, width: int, seed: int | Sequence[int]
) -> Tensor:
    """Draw the starting noise, float32 (B, C, T, H, W), on the CPU so that every device agrees.

    `seed` is one number for one clip, or one for each clip of a batch. Raises `ValueError` for a
    size that the model cannot make, naming the nearest ones that it can.
    """
    seeds = rng.clip_seeds(seed, 1) if isinstance(seed, int) else tuple(seed)
    grid = model.spec.latent_shape(frames=num_frames, height=height, width=width)
    shape = (model.vae.config.z_dim, grid.frames, grid.height, grid.width)
    return rng.clip_noise(shape, seeds=seeds, purpose="latents").to(model.device)


@torch.no_grad()
def denoise(
    model: Model,
    cond: Any,
    *,
    latents: Tensor,
    num_steps: int,
    guidance_scale: float = 1.0,
    uncond: Any = None,
    batched: bool = False,
    pattern: attention.Pattern | None = None,
    backend: str = "auto",
    drop_gates: bool = False,
    seed: int | Sequence[int] = 0,
    start: int = 0,
    state: Any = None,
) -> Iterator[Step]:
    """Yield the steps from `latents` to the clip, under the scheduler that the model's spec names.

    The arguments are those of `sample.guide` and `sample.sample`, `pattern` an attention other
    than the spec's, `backend` the name of one that computes it, and `drop_gates` lets a pattern
    drop the gates of a VSA model. Gradients are off only while a step is computed, never in the
    consumer. Raises `NotFiniteError` that names the step and the likely cause.
    """
    scheduler = schedulers.create(model.spec.scheduler.name, model.spec.scheduler.args)
    prepare = model.dit.prepare  # what no step changes, once for all steps
    velocity = _guide(
        model,
        with_attention(model, latents, backend, pattern=pattern, drop_gates=drop_gates),
        scale=guidance_scale,
        cond=prepare(cond),
        uncond=None if uncond is None or guidance_scale == 1 else prepare(uncond),
        batched=batched,
    )
    steps = sample(
        velocity,
        scheduler,
        latents=latents,
        num_steps=num_steps,
        seed=seed,
        dtype=model.dtype,
        start=start,
        state=state,
    )
    try:
        yield from steps
    except NotFiniteError as error:
        raise NotFiniteError(f"{error}; {_cause(model, cond, guidance_scale)}") from None


def _cause(model: Model, cond: Any, guidance_scale: float) -> str:
    """Return in words what most likely made latents that are not finite."""
    active = model.loras.active or ()
    loras = ", ".join(f"{use.path.name} at strength {use.strength:g}" for use in active)
    if not all(bool(p.isfinite().all()) for p in model.dit.parameters()):
        return f"weights of the denoiser are not finite{loras and f' with LoRA {loras}'}"
    if not all(bool(x.isfinite().all()) for x in vars(cond).values() if isinstance(x, Tensor)):
        return "the text encoder's states are not finite"
    likely = [
        f"LoRA {loras}" if loras else "",
        "float16, which overflows at 65,504 (bfloat16 does not)" * (model.dtype == torch.float16),
        f"guidance_scale {guidance_scale:g}" * (guidance_scale > 1),
    ]
    return f"likely cause: {' or '.join(filter(None, likely)) or 'the weights, or the noise given'}"


def _guide(
    model: Model, denoiser: Denoiser[Any], *, scale: float, cond: Any, uncond: Any, batched: bool
) -> Velocity:
    halves = model.meshes.axis("guidance")
    if halves.size == 1 or uncond is None:
        return guide(denoiser, scale=scale, cond=cond, uncond=uncond, batched=batched)
    return guidance.guide(denoiser, halves, scale=scale, cond=cond, uncond=uncond)


def with_attention(
    model: Model,
    latents: Tensor,
    name: str = "auto",
    *,
    pattern: attention.Pattern | None = None,
    drop_gates: bool = False,
) -> Denoiser[Any]:
    """Bind the denoiser to an attention for latents of this size, under the spec's pattern or
    another, and spread it over the processes that share a sequence.

    Raises `ValueError` for a network with VSA's gates under a pattern without them, unless
    `drop_gates`.
    """
    if pattern is None:
        pattern = attention.parse(model.spec.attention.pattern, model.spec.attention.args)
    _check_gates(model, pattern, drop_gates=drop_gates)
    grid = LatentShape(*latents.shape[2:]).tokens(model.spec.compression.patch)
    layout = attention.plan(pattern, grid, model.device)
    attend = attention.select(
        name,
        layout=layout,
        num_text_tokens=model.spec.defaults.max_text_tokens,
        dtype=model.dtype,
        device=model.device,
        needs_grad=False,
        head_dim=model.dit.config.attention_head_dim,
    )
    return partial(spread(model.dit, model.meshes), attend=attend, layout=layout)


@torch.no_grad()
def decode(model: Model, latents: Tensor, *, chunk: int | None = None) -> Iterator[Frames]:
    """Yield frames of one clip, uint8 (t, H, W, 3), as its normalised latents are decoded.

    `chunk` latent frames at a time: 1 shows the first frame soonest, None is fastest in all. A
    small decoder takes the latents normalised, the VAE's own takes them raw. Processes that work on
    one clip decode a band of rows each, and all get all frames; a small decoder runs on each.
    """
    assert len(latents) == 1, "frames of several clips cannot share one stream"
    if model.decoder is None:
        z = model.vae.denormalize(latents.float())
        parts = bands.stream(model.vae, z, model.meshes.axis("sample"), chunk=chunk)
    else:
        parts = model.decoder.stream(latents.float(), chunk)
    for pixels_BCTHW in parts:
        yield to_uint8(pixels_BCTHW[0])


def to_uint8(pixels_CTHW: Tensor) -> Frames:
    """Turn pixels in [-1, 1] into frames (T, H, W, C) of bytes, rounding to the nearest.

    Raises `NotFiniteError` for pixels that are not finite, which would be black.
    """
    if not bool(pixels_CTHW.isfinite().all()):
        raise NotFiniteError(
            f"decoded pixels are not finite in {pixels_CTHW.dtype}; try dtype float32"
        )
    levels = (pixels_CTHW.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def frames(
    model: Model,
    prompts: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    pattern: attention.Pattern | None = None,
    backend: str = "auto",
    drop_gates: bool = False,
) -> list[Frames]:
    """Render one clip (T, H, W, 3) for each prompt; what is not given is the spec's default.

    Clip b starts from seed + b, or from its own of a sequence, and is the clip that the prompt
    would give alone.
    """
    given = model.spec.defaults
    total = given.num_inference_steps if num_steps is None else num_steps
    scale = given.guidance_scale if guidance_scale is None else guidance_scale
    negative = given.negative_prompt if negative_prompt is None else negative_prompt
    seeds = rng.clip_seeds(seed, len(prompts))
    latents = initial_latents(
        model,
        num_frames=given.num_frames if num_frames is None else num_frames,
        height=given.height if height is None else height,
        width=given.width if width is None else width,
        seed=seeds,
    )
    cond = encode_text(model, prompts)
    uncond = None
    if scale != 1:
        one = encode_text(model, [negative])
        uncond = one.cat([one] * len(prompts))
    steps = denoise(
        model,
        cond,
        latents=latents,
        num_steps=total,
        guidance_scale=scale,
        uncond=uncond,
        pattern=pattern,
        backend=backend,
        drop_gates=drop_gates,
        seed=seeds,
    )
    latents = deque(steps, maxlen=1).pop().x
    return [np.concatenate(list(decode(model, z))) for z in latents[:, None]]


def _check_gates(model: Model, pattern: attention.Pattern, *, drop_gates: bool) -> None:
    if not model.dit.config.gate_compress or isinstance(pattern, attention.Vsa):
        return
    name = model.spec.name
    if not drop_gates:
        attention.check_keeps_gates(pattern, name=name)
    logger.info("attention %s drops the VSA gates of %s, as asked", attention.write(pattern), name)
