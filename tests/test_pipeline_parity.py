"""The whole pipeline against diffusers.WanPipeline: one folder, one noise, the same clip."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastvideo_inference.pipeline import Video
from torch import Tensor

from fastvideo import VideoPipeline, rng
from fastvideo.formats import diffusers as layout
from fastvideo.model import Model, load
from fastvideo.models.dit.wan import WanConfig, WanDiT
from fastvideo.models.vae.wan import WanVae, WanVaeConfig
from fastvideo.spec import Scheduler
from fastvideo.stages import prepare_latents
from tests import clips

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

FEW = {"sigmas": [1.0, 0.909091, 0.714286], "renoise": False}
FASTWAN = {"sigmas": [1.0, 0.756757, 0.521739], "timesteps": [1000.0, 757.0, 522.0]}

# scheduler, its arguments, VAE dims, DiT heads and layers
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, int]] = {
    "unipc": ("unipc", {"shift": 3.0}, WAN22, 2, 2),
    "euler": ("euler", {"shift": 5.0}, WAN22, 3, 1),
    "unipc-wan21": ("unipc", {"shift": 5.0}, WAN21, 5, 1),
    "euler-wan21": ("euler", {"shift": 1.0}, WAN21 | {"num_res_blocks": 2}, 2, 4),
    "unipc-deep": ("unipc", {"shift": 8.0}, WAN22 | {"num_res_blocks": 2}, 3, 4),
    "euler-wide": ("euler", {"shift": 3.0}, WAN22 | {"dim_mult": (1, 4, 4)}, 5, 3),
    "few": ("few_step", FEW, WAN22, 2, 2),
    "few-wan21": ("few_step", FEW | {"sigmas": [1.0, 0.6]}, WAN21, 3, 1),
    "few-renoise": ("few_step", FEW | {"renoise": True}, WAN22, 2, 2),
    "few-fastwan": ("few_step", FASTWAN | {"renoise": False}, WAN22, 2, 2),
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
    scheduler, args, dims, heads, num_layers = MODELS[name]
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
            "scheduler": Scheduler(name=scheduler, args=args),
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


@pytest.mark.parametrize(("name", "num_steps"), [("few", 3), ("few-wan21", 2)])
def test_a_distilled_folder_makes_the_same_clip_in_a_stock_pipeline(
    pair_of: Callable[[str], Pair], name: str, num_steps: int
):
    # its scheduler config alone gives the sigmas: WanPipeline passes only the number of steps
    steps = {"num_inference_steps": num_steps, "guidance_scale": 1.0}
    pair = pair_of(name)
    _assert_equal(pair, _noise(3, (4, 6)), **steps)
    told = torch.tensor(MODELS[name][1]["sigmas"] + [0.0])
    torch.testing.assert_close(pair.theirs.scheduler.sigmas, told, rtol=0, atol=1e-6)


def test_the_snippet_for_stock_diffusers_runs_on_a_distilled_folder(
    pair_of: Callable[[str], Pair],
):
    pair = pair_of("few")
    page = (Path(__file__).parents[1] / "inference" / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    (code,) = (block for block in blocks if "WanPipeline" in block)
    assert '"runs/student"' in code and "num_frames=81" in code
    code = code.replace('"runs/student"', repr(str(pair.ours.model.folder)))
    code = code.replace("num_frames=81", "num_frames=5").replace("=128", "=32")
    made: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), made)
    assert made["clip"].shape == (5, 32, 32, 3)
    assert made["pipe"].scheduler.sigmas.tolist() == pytest.approx([*FEW["sigmas"], 0.0], abs=1e-6)


def test_two_steps_of_a_stock_pipeline_are_the_first_and_the_last_of_three(
    pair_of: Callable[[str], Pair],
):
    pair = pair_of("few")
    pair.theirs.scheduler.set_timesteps(2)
    assert pair.theirs.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.714286, 0.0], abs=1e-6)
    with pytest.raises(ValueError, match=r"num_inference_steps 2: .* exactly 3 steps; nearest: 3"):
        pair.ours(PROMPT, num_inference_steps=2, guidance_scale=1.0)


def test_times_that_are_not_1000_sigma_reach_a_stock_pipeline_through_set_timesteps(
    pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
):
    pair = pair_of("few-fastwan")
    steps = {"num_inference_steps": 3, "guidance_scale": 1.0}
    scheduler = pair.theirs.scheduler
    own = functools.partial(scheduler.set_timesteps, **FASTWAN)
    monkeypatch.setattr(scheduler, "set_timesteps", own)
    _assert_equal(pair, _noise(3, (4, 6)), **steps)
    monkeypatch.undo()
    latents, _, z, _ = pair.clips(_noise(3, (4, 6)), **steps)
    assert _relative(latents.latents, z) > 1e-2


def test_a_renoising_student_is_the_same_in_a_stock_pipeline_but_for_the_noise_it_draws(
    pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
):
    pair = pair_of("few-renoise")
    steps = {"num_inference_steps": 3, "guidance_scale": 1.0, "prompt": PROMPT}
    steps |= {"num_frames": 9, "height": 32, "width": 48}
    start = _noise(3, (4, 6))
    mine = pair.ours(**steps, seed=5, latents=start, output="latents").latents

    def stock() -> Tensor:
        limit = pair.ours.model.spec.defaults.max_text_tokens
        out = pair.theirs(**steps, latents=start, output_type="latent", max_sequence_length=limit)
        latents: Tensor = out.frames
        return latents

    torch.manual_seed(5)
    assert _relative(mine, stock()) > 1e-2  # of torch's global generator
    drawn = itertools.count()

    def our_noise(shape: Any, **_: Any) -> Tensor:
        return rng.clip_noise(tuple(shape[1:]), seeds=[5], purpose="renoise", step=next(drawn))

    module = sys.modules[type(pair.theirs.scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", our_noise)
    assert _relative(mine, stock()) <= 1e-4
    assert next(drawn) == 3  # the last is drawn too, and multiplied by 0


def test_defaults_of_the_spec_are_what_a_stock_pipeline_gets_told(pair_of: Callable[[str], Pair]):
    pair = pair_of("unipc")
    defaults = pair.ours.model.spec.defaults
    told = {
        "num_inference_steps": defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale,
        "negative_prompt": defaults.negative_prompt,
    }
    model = pair.ours.model
    noise = prepare_latents.draw(model, clips.params(model, PROMPT), seeds=[5])
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
