"""The whole pipeline against diffusers.WanPipeline: one folder, one noise, the same clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastvideo_inference.pipeline import Video
from torch import Tensor

from fastvideo import VideoPipeline, render
from fastvideo.formats import diffusers as layout
from fastvideo.model import Model, load
from fastvideo.models.dit.wan import WanConfig, WanDiT
from fastvideo.models.vae.wan import WanVae, WanVaeConfig
from fastvideo.spec import Scheduler

diffusers = pytest.importorskip("diffusers")

Z_DIM = 4
PROMPT, NEGATIVE = "a big red ball moving left &amp; up", "a blue square at night"
STATISTICS = {"latents_mean": (0.1, -0.2, 0.3, 0.0), "latents_std": (1.1, 0.9, 1.3, 0.7)}
WAN21 = {"base_dim": 8, "z_dim": Z_DIM, "num_res_blocks": 1, **STATISTICS}
WAN22 = WAN21 | {
    "decoder_base_dim": 12,
    "dim_mult": (1, 2, 2),
    "temperal_downsample": (True, True),
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
}

# scheduler, shift, VAE dims, DiT heads and layers
MODELS: dict[str, tuple[str, float, dict[str, Any], int, int]] = {
    "unipc": ("unipc", 3.0, WAN22, 2, 2),
    "euler": ("euler", 5.0, WAN22, 3, 1),
    "unipc-wan21": ("unipc", 5.0, WAN21, 5, 1),
    "euler-wan21": ("euler", 1.0, WAN21 | {"num_res_blocks": 2}, 2, 4),
    "unipc-deep": ("unipc", 8.0, WAN22 | {"num_res_blocks": 2}, 3, 4),
    "euler-wide": ("euler", 3.0, WAN22 | {"dim_mult": (1, 4, 4)}, 5, 3),
}
# model, latent frames, latent height and width, steps, guidance
OTHERS = [
    ("unipc-wan21", 5, (2, 6), 3, 4.0),
    ("euler-wan21", 1, (6, 2), 3, 4.0),
    ("unipc-deep", 21, (2, 2), 4, 6.0),
    ("euler-wide", 5, (6, 10), 4, 1.0),
]


@dataclasses.dataclass(frozen=True)
class Pair:
    """One folder, loaded by both."""

    ours: VideoPipeline
    theirs: Any

    def clips(self, noise: Tensor, **changes: Any) -> tuple[Video, Video, Tensor, Tensor]:
        """Return our latents and frames, and their latents and frames (B T C H W in 0..1)."""
        stride = self.ours.model.vae.config.spatial_stride
        request = {
            "prompt": PROMPT,
            "negative_prompt": NEGATIVE,
            "num_frames": 4 * (noise.shape[2] - 1) + 1,
            "height": noise.shape[3] * stride,
            "width": noise.shape[4] * stride,
            "latents": noise,
            **changes,
        }
        mine = [self.ours(**request, output=kind) for kind in ("latents", "frames")]
        limit = self.ours.model.spec.defaults.max_text_tokens
        z, frames = (
            self.theirs(**request, output_type=kind, max_sequence_length=limit).frames
            for kind in ("latent", "pt")
        )
        return mine[0], mine[1], z, frames


@pytest.fixture(scope="module")
def pair_of(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp("parity") / name
            layout.save(_model(load(tiny_folder, dtype="float32"), name), folder)
            theirs = diffusers.WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
            theirs.set_progress_bar_config(disable=True)
            made[name] = Pair(VideoPipeline.from_pretrained(folder, dtype="float32"), theirs)
        return made[name]

    return make


def _model(base: Model, name: str) -> Model:
    """Put fresh random networks of other dims beside the base's text encoder."""
    scheduler, shift, dims, heads, num_layers = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        vae = WanVae(WanVaeConfig.parse(dims))
        config = dataclasses.replace(
            base.dit.config,
            num_attention_heads=heads,
            num_layers=num_layers,
            in_channels=Z_DIM,
            out_channels=Z_DIM,
        )
        dit = WanDiT(WanConfig.parse(dataclasses.asdict(config)))
        for network in (vae, dit):
            _randomise(network)
    spec = base.spec.model_copy(
        update={
            "scheduler": Scheduler(name=scheduler, args={"shift": shift}),
            "compression": layout.compression(
                dataclasses.asdict(config), dataclasses.asdict(vae.config)
            ),
        }
    )
    return dataclasses.replace(base, spec=spec, dit=dit.eval(), vae=vae.eval())


def _randomise(module: torch.nn.Module) -> None:
    """Give every tensor a size at which it matters: no gate, shift or bias near 0."""
    for name, p in module.named_parameters():
        scale = 0.3 if p.ndim < 2 or "table" in name else p[0].numel() ** -0.5
        centre = 1.0 if "gamma" in name or ("norm" in name and name.endswith("weight")) else 0.0
        p.data = centre + scale * torch.randn(p.shape)


def _noise(frames: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(1, Z_DIM, frames, *size, generator=torch.Generator().manual_seed(7))


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _assert_equal(pair: Pair, noise: Tensor, **changes: Any) -> None:
    latents, video, z, frames = pair.clips(noise, **changes)
    assert _relative(latents.latents, z) <= 1e-4
    with torch.no_grad():
        pixels = pair.ours.model.vae.decode(pair.ours.model.vae.denormalize(latents.latents))
    expected = frames.permute(0, 2, 1, 3, 4) * 2 - 1
    assert expected.abs().median() < 0.9, "clamping would hide errors"
    assert _relative(pixels, expected) <= 1e-4
    # the bytes are the same values rounded: half a level off, and what 1e-4 may add
    levels = 255 * frames[0].permute(0, 2, 3, 1).double().numpy()
    assert video.frames.shape == levels.shape
    assert np.abs(video.frames - levels).max() <= 0.5 + 255e-4


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("num_steps", range(1, 11))
@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_the_same_noise_becomes_the_same_clip(
    pair_of: Callable[[str], Pair], name: str, num_steps: int, guidance: float
):
    steps = {"num_inference_steps": num_steps, "guidance_scale": guidance}
    _assert_equal(pair_of(name), _noise(3, (4, 6)), **steps)


@pytest.mark.parametrize(("name", "frames", "size", "num_steps", "guidance"), OTHERS)
def test_other_dims_and_sizes_give_the_same_clip(
    pair_of: Callable[[str], Pair],
    name: str,
    frames: int,
    size: tuple[int, int],
    num_steps: int,
    guidance: float,
):
    steps = {"num_inference_steps": num_steps, "guidance_scale": guidance}
    _assert_equal(pair_of(name), _noise(frames, size), **steps)


def test_defaults_of_the_spec_are_what_a_stock_pipeline_gets_told(pair_of: Callable[[str], Pair]):
    pair = pair_of("unipc")
    defaults = pair.ours.model.spec.defaults
    told = {
        "num_inference_steps": defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale,
        "negative_prompt": defaults.negative_prompt,
    }
    noise = render.initial_latents(
        pair.ours.model,
        num_frames=defaults.num_frames,
        height=defaults.height,
        width=defaults.width,
        seed=5,
    )
    _, _, z, _ = pair.clips(noise, **told)
    assert _relative(pair.ours(PROMPT, seed=5, output="latents").latents, z) <= 1e-4


CHANGES: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "a small red ball moving left &amp; up"},
    "negative prompt": {"negative_prompt": "a blue square at day"},
    "guidance": {"guidance_scale": 4.01},
    "steps": {"num_inference_steps": 4},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_a_small_change_of_the_request_moves_the_clip_beyond_the_tolerance(
    pair_of: Callable[[str], Pair], name: str, change: str
):
    pair = pair_of(name)
    fixed = {"latents": _noise(2, (4, 6)), "output": "latents", "negative_prompt": NEGATIVE}
    fixed |= {"num_frames": 5, "height": 32, "width": 48, "guidance_scale": 4.0}
    fixed |= {"prompt": PROMPT, "num_inference_steps": 3}
    before = pair.ours(**fixed).latents
    assert _relative(pair.ours(**{**fixed, **CHANGES[change]}).latents, before) > 1e-3


@pytest.mark.parametrize("part", ["text", "dit", "vae"])
def test_a_weight_that_is_off_by_a_hundredth_moves_the_frames_beyond_the_tolerance(
    pair_of: Callable[[str], Pair], part: str
):
    pair = pair_of("unipc")
    noise = _noise(2, (4, 6))

    def pixels() -> Tensor:
        steps = {"num_inference_steps": 2, "guidance_scale": 4.0, "output": "latents"}
        size = {"num_frames": 5, "height": 32, "width": 48}
        z = pair.ours(PROMPT, latents=noise, **steps, **size).latents
        with torch.no_grad():
            decoded: Tensor = pair.ours.model.vae.decode(pair.ours.model.vae.denormalize(z))
        return decoded

    before = pixels()
    matrices = [p for p in getattr(pair.ours.model, part).parameters() if p.ndim > 1]
    weight = matrices[-1]
    saved = weight.clone()
    try:
        weight.mul_(1.01)
        assert _relative(pixels(), before) > 1e-4
    finally:
        weight.copy_(saved)
