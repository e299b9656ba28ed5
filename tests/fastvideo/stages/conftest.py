"""A model put together in memory, of another VAE than the shared tiny folder's."""

from __future__ import annotations

import pytest
import torch

from fastvideo import spec
from fastvideo.model import Model
from fastvideo.models.dit.wan import WanConfig, WanDiT
from fastvideo.models.text.tokenizer import build_word_tokenizer
from fastvideo.models.text.umt5 import Umt5Config, Umt5Encoder
from fastvideo.models.vae.wan import WanVae, WanVaeConfig

WORDS = "a red ball two blue cubes at night"
SMALL = {"num_frames": 9, "height": 32, "width": 48}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    tokenizer = build_word_tokenizer(WORDS.split(), tmp_path_factory.mktemp("tokenizer"))
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
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
