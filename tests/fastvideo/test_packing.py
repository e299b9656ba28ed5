"""A state that is stored, sent, and gone on with."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from fastvideo import packing, stages
from fastvideo.model import Model, load
from fastvideo.packing import pack, unpack
from fastvideo.stages import Progress, State
from tests import clips

PROMPTS = ["a red ball moving left", "a blue square"]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load(tiny_folder, device="cpu", dtype="float32")


def asked(model: Model, **fields: object) -> State:
    """Two requests of one shape, neither prompt, negative prompt nor seed alike."""
    first, second = (
        clips.params(model, prompt, seed=seed, num_frames=5, negative_prompt=prompt[2:], **fields)
        for seed, prompt in enumerate(PROMPTS, start=3)
    )
    return State((first, second))


def test_a_state_that_was_stored_at_a_step_goes_on_to_the_same_frames(model: Model):
    events = list(stages.run(model.spec.stages, model, asked(model, num_inference_steps=4)))
    stored = [e.state for e in events if isinstance(e, Progress) and e.state is not None]
    assert [s.step for s in stored] == [1, 2, 3, 4]
    tensors, text = pack(stored[1])
    resumed = unpack(load_tensors(save_tensors(tensors)), text)
    assert resumed.step == 2
    *_, last = stages.run(("denoise", "decode"), model, resumed)
    assert (last.state.frames == events[-1].state.frames).all()


def test_packing_keeps_every_field(model: Model):
    *_, last = stages.run(model.spec.stages, model, asked(model))
    copy = unpack(*pack(last.state))
    assert copy.requests == last.state.requests
    assert copy.timings == last.state.timings
    for name in ("cond", "uncond"):
        mine, its = (getattr(state, name).text_BLC for state in (copy, last.state))
        assert torch.equal(mine, its)
    for name in ("noise", "latents"):
        assert torch.equal(getattr(copy, name), getattr(last.state, name))
    assert (copy.frames == last.state.frames).all()
    assert (copy.step, copy.solver) == (last.state.step, None)


@pytest.mark.parametrize(
    "kind",
    [
        "os:stat_result",
        "subprocess:Popen",
        "fastvideo.models.dit.wan:math",
        "fastvideo.stages:time",
    ],
)
def test_packed_text_cannot_name_foreign_types(kind: str):
    with pytest.raises(ValueError, match="packed state names"):
        unpack({}, f'{{"type": "{kind}", "fields": {{}}}}')


def test_a_packed_value_that_is_no_state_is_refused():
    with pytest.raises(ValueError, match="packed value is a dict, not a State"):
        unpack({}, '{"dict": {}}')


def test_a_state_in_one_file_is_the_state_after_the_file_is_closed(model: Model):
    with tempfile.TemporaryFile() as file:
        *_, last = stages.run(("encode_text", "prepare_latents"), model, asked(model))
        state = dataclasses.replace(last.state, latents=last.state.noise.to(torch.bfloat16))
        num_bytes = packing.write(state, file.fileno())
        assert num_bytes == os.fstat(file.fileno()).st_size
        copy = packing.read(file.fileno())
    assert copy.requests == state.requests
    assert torch.equal(copy.cond.text_BLC, state.cond.text_BLC)
    assert torch.equal(copy.noise, state.noise)
    assert copy.latents.dtype == torch.bfloat16 and torch.equal(copy.latents, state.latents)
