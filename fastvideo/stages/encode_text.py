"""Prompts to conditioning; the negative prompts too, if guidance will look at them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastvideo import registry
from fastvideo.models.text import encode_prompts
from fastvideo.stages import Done, Event, Notice, Progress, State

if TYPE_CHECKING:
    from fastvideo.model import Model

NAME = "encode_text"
NEEDS = ("requests",)
GIVES = ("cond", "uncond")
PARTS = ("text",)


def run(model: Model, state: State) -> Iterator[Event]:
    """Encode prompts and negative prompts apart, so that neither pads the other."""
    guided = state.params.guidance_scale != 1
    total = 1 + guided
    yield Progress(NAME, 0, total)
    prompts = [request.prompt for request in state.requests]
    yield from _cuts(model, prompts, what="prompt")
    cond = encode(model, prompts)
    uncond = None
    if guided:
        yield Progress(NAME, 1, total)
        negatives = [request.negative_prompt for request in state.requests]
        yield from _cuts(model, [*dict.fromkeys(negatives)], what="negative prompt")
        known = {text: encode(model, [text]) for text in dict.fromkeys(negatives)}
        uncond = cond.cat([known[text] for text in negatives])
    yield Progress(NAME, total, total)
    yield Done(NAME, dataclasses.replace(state, cond=cond, uncond=uncond))


def _cuts(model: Model, prompts: Sequence[str], *, what: str) -> Iterator[Notice]:
    limit = model.spec.defaults.max_text_tokens
    yield from (Notice(NAME, text) for text in model.tokenizer.cuts(prompts, limit, what=what))


@torch.no_grad()
def encode(model: Model, prompts: Sequence[str]) -> Any:
    """Encode prompts into the conditioning of the model's own family, one row for each."""
    limit = model.spec.defaults.max_text_tokens
    states_BLC = encode_prompts(
        model.text, model.tokenizer, prompts, max_tokens=limit, device=str(model.device)
    )
    conditioning = registry.load("fastvideo.models.dit", model.spec.dit.family, "Conditioning")
    return conditioning(states_BLC.to(model.device, model.dtype))
