"""The row of stages on tiny networks: wiring, events, and batches of clips as each is alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fastvideo import registry, stages
from fastvideo.model import Model
from fastvideo.spec import TEXT_TO_VIDEO
from fastvideo.stages import Chunk, Done, Event, Progress, State
from tests import clips

PROMPTS = ["a red ball", "two blue cubes at night"]
DEFAULTS = {
    "num_frames": 9,
    "height": 32,
    "width": 48,
    "num_inference_steps": 3,
    "guidance_scale": 5.0,
    "negative_prompt": "",
}


def events_of(model: Model, *requests: clips.SamplingParams) -> list[Event]:
    return list(stages.run(model.spec.stages, model, State(requests)))


# Wiring


@pytest.mark.parametrize(
    ("row", "last"), [(TEXT_TO_VIDEO, "frames"), (TEXT_TO_VIDEO[:-1], "latents")]
)
def test_the_row_of_a_spec_is_wired(row: tuple[str, ...], last: str):
    assert stages.check(row)[-1] == last


@pytest.mark.parametrize("name", registry.names("fastvideo.stages"))
def test_a_stage_names_itself_and_real_fields(name: str):
    stage = registry.module("fastvideo.stages", name)
    fields = {f.name for f in dataclasses.fields(State)}
    assert name == stage.NAME
    assert {*stage.NEEDS, *stage.GIVES} <= fields
    assert len(fields) <= 20


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (("decode",), "'decode' needs latents"),
        (("denoise", "decode"), "'denoise' needs cond, uncond, noise"),
        (("encode_text", "denoice"), "stage 'denoice' is unknown; did you mean 'denoise'"),
    ],
)
def test_broken_wiring_is_found_without_weights(row: tuple[str, ...], text: str):
    with pytest.raises(ValueError, match=text):
        stages.check(row)


def test_a_spec_may_name_a_shorter_row(model: Model):
    spec = model.spec.model_copy(update={"stages": TEXT_TO_VIDEO[:-1]})
    made = stages.make(dataclasses.replace(model, spec=spec), [clips.params(model)])
    assert made.frames is None
    assert torch.equal(made.latents, stages.make(model, [clips.params(model)]).latents)


# Events


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_every_stage_counts_from_zero_to_its_total_and_ends_in_done(
    model: Model, guidance_scale: float
):
    both = [clips.params(model, p, guidance_scale=guidance_scale) for p in PROMPTS]
    events = events_of(model, *both)
    assert tuple(e.stage for e in events if isinstance(e, Done)) == TEXT_TO_VIDEO
    for name in TEXT_TO_VIDEO:
        mine = [e for e in events if e.stage == name]
        places = [(e.index, e.total) for e in mine if isinstance(e, Progress)]
        total = places[0][1]
        assert places[0] == (0, total)
        assert places[-1] == (total, total)
        assert places == sorted(places)
        assert isinstance(mine[-1], Done)
    assert tuple(events[-1].state.timings) == TEXT_TO_VIDEO


def test_chunks_joined_are_the_frames_of_each_clip(model: Model, monkeypatch):
    stream = model.vae.stream
    monkeypatch.setattr(model.vae, "stream", lambda z, chunk=None: stream(z, 1))
    *events, last = events_of(model, *(clips.params(model, p) for p in PROMPTS))
    assert last.state.frames.shape == (2, 9, 32, 48, 3)
    assert last.state.frames.dtype == np.uint8
    for clip, frames in enumerate(last.state.frames):
        chunks = [e for e in events if isinstance(e, Chunk) and e.clip == clip]
        assert len(chunks) > 1
        assert [c.start for c in chunks] == [0, *np.cumsum([len(c.frames) for c in chunks])[:-1]]
        assert (np.concatenate([c.frames for c in chunks]) == frames).all()


def test_timings_are_the_stages_own_and_not_their_consumers(model: Model, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(stages.time, "perf_counter", lambda: clock[0])
    events = []
    for event in stages.run(model.spec.stages, model, State((clips.params(model),))):
        clock[0] += 7.0  # a slow consumer, and stages that take no time at all
        events.append(event)
    assert set(events[-1].state.timings.values()) == {0.0}


# Frames


def test_frames_are_bytes_of_the_size_that_was_asked_for(model: Model):
    size = {"num_frames": 5, "height": 16, "width": 32}
    first, second = clips.frames(model, PROMPTS, num_inference_steps=2, **size)
    assert first.dtype == np.uint8
    assert first.shape == second.shape == (5, 16, 32, 3)
    assert not np.array_equal(first, second)


def test_what_is_not_given_is_the_default_of_the_spec(model: Model):
    plain = clips.frames(model, PROMPTS[:1], seed=4)
    assert np.array_equal(plain, clips.frames(model, PROMPTS[:1], seed=4, **DEFAULTS))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"num_inference_steps": 2},
        {"guidance_scale": 1.0},
        {"negative_prompt": "red"},
        {"attention": "vsa(top_k=1, tile=[1, 1, 1])"},
    ],
)
def test_every_parameter_changes_the_frames(model: Model, change: dict):
    before, after = (clips.frames(model, PROMPTS[:1], **c) for c in ({}, change))
    assert not np.array_equal(before, after)


# Batches


@pytest.mark.parametrize(
    "negatives", [("", ""), ("red", "red"), ("red", ""), ("blue cubes", "red")]
)
@pytest.mark.parametrize("scheduler", ["unipc", "few_step"])
def test_a_clip_of_a_batch_is_the_clip_made_alone(
    model: Model, negatives: tuple[str, str], scheduler: str
):
    """Also where steps draw noise of their own, and where clips are to avoid different things."""
    other = {"few_step": {"sigmas": [1.0, 0.7, 0.4]}, "unipc": {"shift": 3.0}}[scheduler]
    spec = model.spec.model_copy(
        update={
            "scheduler": model.spec.scheduler.model_copy(update={"name": scheduler, "args": other})
        }
    )
    model = dataclasses.replace(model, spec=spec)
    requests = [
        clips.params(model, prompt, seed=seed, negative_prompt=negative)
        for prompt, seed, negative in zip(PROMPTS, (7, 3), negatives, strict=True)
    ]
    together = stages.make(model, requests)
    alone = [stages.make(model, [request]) for request in requests]
    for b, one in enumerate(alone):
        torch.testing.assert_close(together.latents[b], one.latents[0], rtol=1e-4, atol=1e-4)
        assert np.abs(together.frames[b].astype(int) - one.frames[0]).max() <= 1
    swapped = stages.make(model, requests[::-1])
    torch.testing.assert_close(swapped.latents.flip(0), together.latents, rtol=1e-4, atol=1e-4)
    assert (alone[0].latents - alone[1].latents).abs().max() > 0.1, "the clips differ"


def test_a_negative_prompt_of_a_batch_counts_for_its_own_clip_alone(model: Model):
    requests = [clips.params(model, PROMPTS[0], negative_prompt=text) for text in ("red", "blue")]
    first, second = stages.make(model, requests).latents
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"num_frames": 5},
        {"height": 48},
        {"width": 32},
        {"fps": 8},
        {"num_inference_steps": 2},
        {"guidance_scale": 1.0},
        {"attention": "vsa(top_k=1, tile=[1, 1, 1])"},
        {"backend": "reference"},
    ],
)
def test_requests_that_differ_in_more_than_words_and_seed_cannot_share_a_batch(
    model: Model, change: dict
):
    first = clips.params(model, PROMPTS[0])
    alike = clips.params(model, PROMPTS[1], seed=9, negative_prompt="red")
    assert State((first, alike)).seeds == (0, 9)
    for place in (1, 2):
        row = [first, alike]
        row.insert(place, clips.params(model, PROMPTS[1], **change))
        with pytest.raises(AssertionError, match="alike"):
            stages.make(model, row)
