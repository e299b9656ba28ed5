"""The pipeline on a tiny model: its calls and streams, cancelling, equal frames, recipes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fastvideo_inference import recipe

from fastvideo import VideoPipeline, media
from fastvideo.sampling import GenerateRequest
from fastvideo.stages import decode, prepare_latents
from tests import clips

PROMPT = "a red ball moving left"


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> VideoPipeline:
    return VideoPipeline.from_pretrained(tiny_folder, dtype="float32")


def test_a_model_is_opened_once_and_its_derived_lines_are_logged_once(
    tiny_diffusers_folder: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO", logger="fastvideo"):
        pipe = VideoPipeline.from_pretrained(tiny_diffusers_folder, dtype="float32")
    assert caplog.text.count("compression: from the dims") == 1
    assert pipe.model.folder == tiny_diffusers_folder
    assert pipe.model_id.fingerprint == recipe.fingerprint(tiny_diffusers_folder)


def request(**fields: object) -> GenerateRequest:
    return GenerateRequest.model_validate({"prompt": PROMPT, "seed": 3, **fields})


def test_the_pipeline_makes_what_the_plain_stages_make(pipe: VideoPipeline):
    video = pipe(PROMPT, seed=3, num_frames=5, guidance_scale=2.0)
    plain = clips.frames(pipe.model, [PROMPT], seed=3, num_frames=5, guidance_scale=2.0)
    assert (video.frames == plain[0]).all()
    assert video.frames.shape == (5, 32, 48, 3)
    assert video.frames.dtype == np.uint8


def test_the_same_request_gives_the_same_frames_and_another_seed_others(pipe: VideoPipeline):
    first, again, other = (pipe(PROMPT, seed=s, num_frames=5).frames for s in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_stream_yields_the_frames_of_a_call_one_by_one(pipe: VideoPipeline):
    frames = list(pipe.stream(PROMPT, seed=3, num_frames=5))
    assert all(frame.shape == (32, 48, 3) for frame in frames)
    assert (np.stack(frames) == pipe(PROMPT, seed=3, num_frames=5).frames).all()


def test_stream_refuses_an_illegal_request_before_the_first_frame(pipe: VideoPipeline):
    with pytest.raises(ValueError, match="num_frames 6 must be 4k"):
        pipe.stream(PROMPT, num_frames=6)


def test_latents_are_the_undecoded_clip(pipe: VideoPipeline):
    video = pipe(PROMPT, seed=3, num_frames=5, output="latents")
    assert video.frames is None
    assert video.latents.shape == (1, 4, 2, 4, 6)
    decoded = np.concatenate(list(decode.decode(pipe.model, video.latents)))
    assert (decoded == pipe(PROMPT, seed=3, num_frames=5).frames).all()
    with pytest.raises(ValueError, match="no frames to save"):
        video.save("never.mp4")


def test_given_noise_replaces_that_of_the_seed(pipe: VideoPipeline):
    noise = prepare_latents.draw(pipe.model, clips.params(pipe.model, num_frames=5), seeds=[3])
    given = pipe(PROMPT, seed=4, num_frames=5, latents=noise)
    assert (given.frames == pipe(PROMPT, seed=3, num_frames=5).frames).all()
    assert given.recipe["latents"] == "given"


@pytest.mark.parametrize(
    "bad", [torch.zeros(1, 4, 3, 4, 6), torch.full((1, 4, 2, 4, 6), torch.nan)]
)
def test_noise_that_does_not_fit_is_refused(pipe: VideoPipeline, bad: torch.Tensor):
    with pytest.raises(ValueError, match=r"latents (of shape .* do not fit|hold values)"):
        pipe(PROMPT, num_frames=5, latents=bad)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"height": 40}, "height 40 must be a multiple of 16"),
        ({"num_inference_steps": 0}, "num_inference_steps 0 in the call"),
        ({"output": "gif"}, "output 'gif' is unknown; use one of: frames, latents"),
    ],
)
def test_a_call_refuses_what_the_model_cannot_make(pipe: VideoPipeline, fields: dict, text: str):
    with pytest.raises(ValueError, match=text):
        pipe(PROMPT, **fields)


def test_dropping_the_iterator_stops_the_work(pipe: VideoPipeline, monkeypatch):
    calls = []
    forward = pipe.model.dit.forward
    monkeypatch.setattr(
        pipe.model.dit, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k)
    )
    for event in pipe.events(request(num_inference_steps=5, guidance_scale=1.0)):
        if event.stage == "denoise" and event.index == 2:
            break
    assert len(calls) == 2


def test_a_saved_clip_carries_the_recipe_that_made_it(pipe: VideoPipeline, tmp_path: Path):
    video = pipe('say "größe"', seed=9, num_frames=5)
    path = video.save(tmp_path / "a.mp4")
    read = recipe.read_recipe(path)
    assert read.model_dump(mode="json") == video.recipe
    assert read.request.prompt == 'say "größe"'
    assert read.model.fingerprint == recipe.fingerprint(pipe.model_id.name_or_path)
    assert media.read_facts(path).fps == 8
    with pytest.raises(FileExistsError):
        video.save(path)


def test_a_digest_is_of_every_bit_of_the_frames(pipe: VideoPipeline):
    video = pipe(PROMPT, seed=3, num_frames=5)
    again = pipe(PROMPT, seed=3, num_frames=5)
    assert video.frames_sha256 == again.frames_sha256
    again.frames[-1, -1, -1, -1] ^= 1
    assert video.frames_sha256 != again.frames_sha256
    with pytest.raises(ValueError, match="no frames to digest"):
        _ = pipe(PROMPT, num_frames=5, output="latents").frames_sha256


def test_a_clip_without_our_recipe_is_said_to_have_none(tmp_path: Path):
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    for name, tags in (
        ("none", {}),
        ("foreign", {"comment": "hello"}),
        ("list", {"comment": "[]"}),
    ):
        path = media.write_video(tmp_path / f"{name}.mp4", frames, fps=8, metadata=tags)
        with pytest.raises(ValueError, match="carries no recipe"):
            recipe.read_recipe(path)


def test_a_fingerprint_changes_with_the_weights_and_not_with_the_place(
    tiny_folder: Path, tiny_copy: Path
):
    before = recipe.fingerprint(tiny_folder)
    assert recipe.fingerprint(tiny_copy) == before
    weights = next(tiny_copy.glob("transformer/*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert recipe.fingerprint(tiny_copy) != before
