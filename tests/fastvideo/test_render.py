"""Prompts become frames through real networks of tiny size."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from fastvideo import render, rng, spec
from fastvideo.model import Model
from fastvideo.models.dit.wan import WanConfig, WanDiT
from fastvideo.models.text.tokenizer import build_word_tokenizer
from fastvideo.models.text.umt5 import Umt5Config, Umt5Encoder
from fastvideo.models.vae.wan import WanVae, WanVaeConfig

PROMPTS = ["a red ball", "two blue cubes at night"]
SMALL = {"num_frames": 9, "height": 32, "width": 48}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.manual_seed(0)
    tokenizer = build_word_tokenizer(
        " ".join(PROMPTS).split(), tmp_path_factory.mktemp("tokenizer")
    )
    text = Umt5Config(
        vocab_size=tokenizer.vocab_size, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    dit = WanConfig(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2,
    )  # fmt: skip
    vae = WanVaeConfig(
        base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1,
        latents_mean=(0.1, 0, 0, 0), latents_std=(1, 2, 1, 1),
    )  # fmt: skip
    networks = WanDiT(dit), WanVae(vae), Umt5Encoder(text)
    torch.nn.init.normal_(networks[0].proj_out.weight)  # a fresh head predicts nothing
    for network in networks:
        network.eval().requires_grad_(False)
    described = spec.Spec(
        name="tiny",
        dit=spec.Network(family="wan"),
        vae=spec.Network(family="wan"),
        text=spec.Network(family="umt5"),
        scheduler=spec.Scheduler(name="unipc", args={"shift": 3.0}),
        defaults=spec.Defaults(**SMALL, num_inference_steps=3, max_text_tokens=8),
    )
    return Model(described, *networks, tokenizer, torch.device("cpu"), torch.float32)


def _with(model: Model, **defaults: object) -> Model:
    changed = model.spec.defaults.model_copy(update=defaults)
    return dataclasses.replace(model, spec=model.spec.model_copy(update={"defaults": changed}))


def test_frames_are_bytes_of_the_size_that_was_asked_for(model):
    first, second = render.frames(model, PROMPTS, num_steps=2, num_frames=5, height=16, width=32)
    assert first.dtype == np.uint8
    assert first.shape == second.shape == (5, 16, 32, 3)
    assert not np.array_equal(first, second)


def test_what_is_not_given_is_the_default_of_the_spec(model):
    plain = render.frames(model, PROMPTS[:1], seed=4)
    explicit = render.frames(
        model, PROMPTS[:1], seed=4, num_steps=3, guidance_scale=5.0, negative_prompt="", **SMALL
    )
    assert np.array_equal(plain, explicit)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"num_steps": 2}, {"guidance_scale": 1.0}, {"negative_prompt": "red"}]
)
def test_every_argument_changes_the_frames(model, change):
    before, after = (render.frames(model, PROMPTS[:1], **c) for c in ({}, change))
    assert not np.array_equal(before, after)


def test_a_clip_of_a_batch_is_the_clip_made_alone(model):
    together = render.frames(model, PROMPTS, seed=7)
    for b, prompt in enumerate(PROMPTS):
        (alone,) = render.frames(model, [prompt], seed=7 + b)
        assert np.abs(together[b].astype(int) - alone).max() <= 1


def test_initial_latents_are_the_documented_draw(model):
    noise = render.initial_latents(model, **SMALL, seed=5)
    assert torch.equal(noise, rng.noise((1, 4, 3, 4, 6), seed=5, purpose="latents"))


def test_size_that_the_model_lacks_is_refused_with_the_nearest(model):
    with pytest.raises(ValueError, match="nearest: 32, 48"):
        render.initial_latents(model, num_frames=9, height=33, width=48, seed=0)


def _run(model: Model, **changes: object) -> list[render.Step]:
    cond, uncond = (render.encode_text(model, [p]) for p in PROMPTS)
    noise = render.initial_latents(model, **SMALL, seed=0)
    arguments = {"latents": noise, "num_steps": 4, "guidance_scale": 3.0, "uncond": uncond}
    return list(render.denoise(model, cond, **{**arguments, **changes}))


def test_guidance_batched_or_apart_makes_the_same_latents(model):
    batched, apart = _run(model, batched=True), _run(model, batched=False)
    torch.testing.assert_close(batched[-1].x, apart[-1].x, rtol=1e-4, atol=1e-4)


def test_denoising_resumes_from_any_step_bitwise(model):
    steps = _run(model)
    for step in steps[:-1]:
        rest = _run(model, latents=step.x, state=step.state, start=step.index + 1)
        assert torch.equal(rest[-1].x, steps[-1].x)


def test_gradients_are_off_in_the_steps_and_on_between_them(model):
    cond = render.encode_text(model, PROMPTS[:1])
    noise = render.initial_latents(model, **SMALL, seed=0)
    for step in itertools.islice(render.denoise(model, cond, latents=noise, num_steps=4), 2):
        assert torch.is_grad_enabled()
        assert not step.x.requires_grad


def test_conditioning_is_in_the_models_dtype_and_padded_to_the_specs_length(model):
    half = dataclasses.replace(_with(model, max_text_tokens=11), dtype=torch.bfloat16)
    cond = render.encode_text(half, PROMPTS)
    assert cond.text_BLC.dtype == torch.bfloat16
    assert cond.text_BLC.shape == (2, 11, 16)


def test_decoded_chunks_are_the_whole_clip_in_order(model):
    z = torch.randn(1, 4, 3, 2, 2, generator=torch.manual_seed(0))
    chunks = list(render.decode(model, z, chunk=1))
    whole = render.to_uint8(model.vae.decode(model.vae.denormalize(z))[0])
    assert [len(c) for c in chunks] == [1, 4, 4]
    assert np.abs(np.concatenate(chunks).astype(int) - whole).max() <= 1


def test_pixels_map_to_the_ends_and_middle_of_a_byte():
    pixels = torch.tensor([-1.0, 0.0, 1.0, 3.0]).view(4, 1, 1, 1).expand(4, 2, 1, 1)
    assert render.to_uint8(pixels)[0, 0, 0].tolist() == [0, 128, 255, 255]
