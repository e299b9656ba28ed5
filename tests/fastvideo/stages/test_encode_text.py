"""Prompts become the family's conditioning."""

from __future__ import annotations

import dataclasses

import torch

from fastvideo import stages
from fastvideo.model import Model
from fastvideo.stages import Done, Notice, State, encode_text
from tests import clips

PROMPTS = ["a red ball", "two blue cubes at night"]


def last_of(model: Model, *requests: clips.SamplingParams) -> State:
    *_, done = encode_text.run(model, State(requests))
    assert isinstance(done, Done)
    return done.state


def test_conditioning_is_in_the_models_dtype_and_padded_to_the_specs_length(model: Model):
    defaults = model.spec.defaults.model_copy(update={"max_text_tokens": 11})
    spec = model.spec.model_copy(update={"defaults": defaults})
    half = dataclasses.replace(model, spec=spec, dtype=torch.bfloat16)
    cond = encode_text.encode(half, PROMPTS)
    assert cond.text_BLC.dtype == torch.bfloat16
    assert cond.text_BLC.shape == (2, 11, 16)


def test_without_guidance_the_negative_prompt_is_not_encoded(model: Model):
    assert last_of(model, clips.params(model, guidance_scale=1.0)).uncond is None


def test_prompts_and_negative_prompts_that_are_cut_are_told(model: Model):
    defaults = model.spec.defaults.model_copy(update={"max_text_tokens": 3})
    short = dataclasses.replace(model, spec=model.spec.model_copy(update={"defaults": defaults}))
    words = {"guidance_scale": 2.0, "negative_prompt": "blue cubes at night"}
    params = clips.params(model, "a red ball at night", **words)
    told = [e.text for e in encode_text.run(short, State((params,))) if isinstance(e, Notice)]
    assert [line.split(" of ")[0] for line in told] == ["prompt", "negative prompt"]
    assert all("is cut to 3" in line for line in told)
    *_, done = stages.run(("encode_text",), short, State((params,), notices=("before",)))
    assert done.state.notices == ("before", *told)


def test_every_row_is_the_text_encoded_alone(model: Model):
    words = zip(PROMPTS * 2, ("red", "blue cubes", "red", ""), strict=True)
    requests = [clips.params(model, p, negative_prompt=n) for p, n in words]
    made = last_of(model, *requests)
    for b, request in enumerate(requests):
        for rows, text in (
            (made.cond, request.prompt),
            (made.uncond, request.negative_prompt),
        ):
            alone = encode_text.encode(model, [text]).text_BLC[0]
            torch.testing.assert_close(rows.text_BLC[b], alone)
