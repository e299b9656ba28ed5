"""Noise to latents: one event a step, each with the state from which the stage could resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvideo import attention, preview, schedulers
from fastvideo.errors import NotFiniteError
from fastvideo.log import logger
from fastvideo.parallel import guidance
from fastvideo.parallel.sequence import spread
from fastvideo.sample import Denoiser, Step, Velocity, guide, sample
from fastvideo.shapes import LatentShape
from fastvideo.stages import Done, Event, Preview, Progress, State

if TYPE_CHECKING:
    from fastvideo.model import Model

NAME = "denoise"
NEEDS = ("requests", "cond", "uncond", "noise")
GIVES = ("latents",)
PARTS = ("dit",)


def run(model: Model, state: State) -> Iterator[Event]:
    """Run the steps that are left: all of them, or those after `state.step` of a stored state."""
    total = state.params.num_inference_steps
    yield Progress(NAME, state.step, total)
    if state.step < total:
        params, start = state.params, _start(state)
        pattern = attention.read(params.attention)
        denoiser = with_attention(model, start, params.backend, pattern=pattern)
        state = dataclasses.replace(state, backends=denoiser.attend.names)
        loop = steps(model, state, denoiser)
        rgb = _preview_map(model) if state.previews else None
        for step in loop:
            done = step.index + 1
            state = dataclasses.replace(state, latents=step.x, step=done, solver=step.state)
            if rgb:
                yield Preview(NAME, done, preview.to_rgb(step.clean, rgb))
            yield Progress(NAME, done, step.total, state)
    yield Done(NAME, dataclasses.replace(state, solver=None))


def _preview_map(model: Model) -> preview.PreviewMap | None:
    found = preview.find(model.folder, model.vae)
    if found is None:
        logger.info("no previews: %s has no %s", model.spec.name, preview.FILE)
    return found


@torch.no_grad()
def steps(model: Model, state: State, denoiser: Denoiser[Any]) -> Iterator[Step]:
    """Yield the steps from the state's latents, or its noise, to the clips.

    Gradients are off only while a step is computed. Raises `NotFiniteError` that names the step and
    the likely cause.
    """
    try:
        yield from sample(
            _velocity(model, denoiser, state),
            schedulers.create(model.spec.scheduler.name, model.spec.scheduler.args),
            latents=_start(state),
            num_steps=state.params.num_inference_steps,
            seed=state.seeds,
            dtype=model.dtype,
            start=state.step,
            state=state.solver,
        )
    except NotFiniteError as error:
        raise NotFiniteError(f"{error}; {_cause(model, state)}") from None


def _start(state: State) -> Tensor:
    start = state.noise if state.latents is None else state.latents
    assert start is not None, "prepare_latents runs before denoise"
    return start


@dataclass(frozen=True)
class Attending:
    """A denoiser with the attention that was chosen for latents of one size."""

    denoiser: Callable[..., Tensor]
    attend: attention.Attention
    layout: attention.Layout

    def __call__(self, x_BCTHW: Tensor, t_BT: Tensor, cond: Any, cache: Any = None) -> Tensor:
        """Return the velocity (B, C, T, H, W)."""
        how = {"attend": self.attend, "layout": self.layout}
        return self.denoiser(x_BCTHW, t_BT, cond, cache, **how)


def _velocity(model: Model, denoiser: Denoiser[Any], state: State) -> Velocity:
    scale, prepare = state.params.guidance_scale, model.dit.prepare
    cond = prepare(state.cond)  # what no step changes, once for all steps
    if scale == 1 or state.uncond is None:
        return guide(denoiser, scale=scale, cond=cond)
    uncond, halves = prepare(state.uncond), model.meshes.axis("guidance")
    if halves.size == 1:
        return guide(denoiser, scale=scale, cond=cond, uncond=uncond)
    return guidance.guide(denoiser, halves, scale=scale, cond=cond, uncond=uncond)


def with_attention(
    model: Model,
    latents: Tensor,
    name: str = "auto",
    *,
    pattern: attention.Pattern | None = None,
) -> Attending:
    """Bind the denoiser to an attention for latents of this size, under the spec's pattern or
    another, and spread it over the processes that share a sequence.
    """
    if pattern is None:
        pattern = attention.parse(model.spec.attention.pattern, model.spec.attention.args)
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
    return Attending(spread(model.dit, model.meshes), attend, layout)


def _cause(model: Model, state: State) -> str:
    """Return in words what most likely made latents that are not finite."""
    scale = state.params.guidance_scale
    active = model.loras.active or ()
    loras = ", ".join(f"{use.path.name} at strength {use.strength:g}" for use in active)
    if not all(bool(p.isfinite().all()) for p in model.dit.parameters()):
        return f"weights of the denoiser are not finite{loras and f' with LoRA {loras}'}"
    states = (x for x in vars(state.cond).values() if isinstance(x, Tensor))
    if not all(bool(x.isfinite().all()) for x in states):
        return "the text encoder's states are not finite"
    likely = [
        f"LoRA {loras}" if loras else "",
        "float16, which overflows at 65,504 (bfloat16 does not)" * (model.dtype == torch.float16),
        f"guidance_scale {scale:g}" * (scale > 1),
    ]
    return f"likely cause: {' or '.join(filter(None, likely)) or 'the weights, or the noise given'}"
