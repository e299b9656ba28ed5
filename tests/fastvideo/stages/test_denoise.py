"""Noise becomes latents, step by step."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from fastvideo import schedulers
from fastvideo.model import Model
from fastvideo.sample import guide, sample
from fastvideo.stages import Done, Progress, State, denoise, encode_text, prepare_latents
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
