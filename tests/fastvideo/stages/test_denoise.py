"""Noise becomes latents, step by step."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from fastvideo import preview, schedulers
from fastvideo.model import Model
from fastvideo.sample import guide, sample
from fastvideo.stages import Done, Preview, Progress, State, denoise, encode_text, prepare_latents
from tests import clips


@pytest.fixture(scope="module")
def start(model: Model) -> State:
    """Conditioning and noise, before the first of four steps."""
    fields = {"num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": "two blue cubes"}
    state = State((clips.params(model, **fields),))
    for stage in (encode_text, prepare_latents):
        *_, done = stage.run(model, state)
        state = done.state
    return state


def run(model: Model, state: State) -> list[State]:
    """Return the states after the steps that are left, and the last once more as the result."""
    *events, done = denoise.run(model, state)
    assert isinstance(done, Done)
    return [e.state for e in events if isinstance(e, Progress) and e.state] + [done.state]


def test_denoising_resumes_from_any_step_bitwise(model: Model, start: State):
    *states, last = run(model, start)
    assert [state.step for state in states] == [1, 2, 3, 4]
    assert last.solver is None, "nothing is left to go on with"
    for state in states:
        *rest, again = run(model, state)
        assert len(rest) == 4 - state.step
        assert torch.equal(again.latents, last.latents)


@pytest.mark.parametrize("side", [2, 300])
def test_previews_show_the_clean_estimate_after_each_step_if_asked(
    model: Model, start: State, tmp_path: Path, side: int
):
    preview.write(preview.PreviewMap(((0.05, 0.0, 0.0),) * 4, (0.0, 0.5, -2.0)), tmp_path)
    asked = dataclasses.replace(start, previews=True)
    assert not [e for e in denoise.run(model, asked) if isinstance(e, Preview)], "it has no map"
    mapped = dataclasses.replace(model, folder=tmp_path)
    assert not [e for e in denoise.run(mapped, start) if isinstance(e, Preview)], "unasked"
    shown = [e for e in denoise.run(mapped, asked) if isinstance(e, Preview)]
    assert [e.index for e in shown] == [1, 2, 3, 4]
    assert shown[0].frames.shape == (1, 3, *start.noise.shape[3:], 3)
    assert set(shown[0].frames[..., 1].flat) == {191} and not shown[0].frames[..., 2].any()
    assert len(set(shown[0].frames[..., 0].flat)) > 9
    wide = preview.to_rgb(torch.zeros(1, 4, 1, 4, side), preview.find(tmp_path, model.vae))
    assert wide.shape == (1, 1, *((3, 256) if side > 256 else (4, side)), 3)


def test_guidance_batched_or_apart_makes_the_same_latents(model: Model, start: State):
    velocity = guide(
        denoise.with_attention(model, start.noise),
        scale=3.0,
        cond=start.cond,
        uncond=start.uncond,
        batched=True,
    )
    scheduler = schedulers.create("unipc", {"shift": 3.0})
    *_, batched = sample(velocity, scheduler, latents=start.noise, num_steps=4)
    apart = run(model, start)[-1].latents
    torch.testing.assert_close(batched.x, apart, rtol=1e-4, atol=1e-4)


def test_gradients_are_off_in_the_steps_and_on_between_them(
    model: Model, start: State, monkeypatch: pytest.MonkeyPatch
):
    forward, seen = model.dit.forward, []

    def noted(*args, **kwargs):
        seen.append(torch.is_grad_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.dit, "forward", noted)
    for event in itertools.islice(denoise.run(model, start), 3):
        assert torch.is_grad_enabled()
        assert event.state is None or not event.state.latents.requires_grad
    assert seen == [False] * 4


def test_guidance_runs_two_forwards_a_step_and_one_without_it(
    model: Model, start: State, monkeypatch: pytest.MonkeyPatch
):
    forward, sizes = model.dit.forward, []

    def counted(x, *args, **kwargs):
        sizes.append(len(x))
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(model.dit, "forward", counted)
    run(model, start)
    assert sizes == [1] * 8
    sizes.clear()
    unguided = start.params.model_copy(update={"guidance_scale": 1.0})
    run(model, dataclasses.replace(start, requests=(unguided,), uncond=None))
    assert sizes == [1] * 4
