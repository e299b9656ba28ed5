"""The Wan VAE against diffusers' AutoencoderKLWan, whole clip against stream, and its rules."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.models.vae.wan import Config, Vae, WanVae, WanVaeConfig, init_for_training
from fastvideo.models.wan_vae.norm import RmsNorm

WAN21 = {"base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
WAN22 = WAN21 | {
    "decoder_base_dim": 12,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
}
NANO = WAN22 | {
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "scale_factor_spatial": 8,
}

# dims, batch, latent frames, latent height and width
CASES: dict[str, tuple[dict[str, Any], int, int, tuple[int, int]]] = {
    "wan21-one-frame": (WAN21 | {"dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}, 1, 1, (3, 5)),
    "wan21-released-shape": (WAN21, 3, 5, (3, 2)),
    "wan21-three-stages": (
        WAN21
        | {
            "dim_mult": [1, 2, 2],
            "temperal_downsample": [True, True],
            "num_res_blocks": 1,
            "scale_factor_spatial": 4,
        },
        1,
        21,
        (2, 3),
    ),
    "wan22-nano": (NANO, 3, 5, (3, 5)),
    "wan22-nano-long": (NANO | {"num_res_blocks": 2}, 1, 21, (2, 3)),
    "wan22-released-shape": (WAN22 | {"scale_factor_spatial": 16}, 1, 5, (2, 1)),
    "wan22-halving-where-time-doubles": (
        WAN22 | {"temperal_downsample": [True, True, False], "scale_factor_spatial": 16},
        1,
        3,
        (1, 2),
    ),
    "wan22-one-frame": (
        NANO
        | {
            "dim_mult": [1, 4, 4],
            "temperal_downsample": [False, True],
            "scale_factor_temporal": 2,
        },
        3,
        1,
        (3, 2),
    ),
}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def randomise(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "gamma" in name:
            p.data = 1 + 0.3 * noise
        else:
            p.data = noise * (0.2 if p.ndim == 1 else p[0].numel() ** -0.5)


def pair(values: dict[str, Any]) -> tuple[Any, WanVae]:
    """Build both implementations with the same random weights."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKLWan(**values).eval()
    randomise(theirs, seed=1)
    ours = WanVae(WanVaeConfig.parse(json.loads(theirs.to_json_string())))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours.eval()


def tiny(**changes: Any) -> WanVae:
    vae = WanVae(WanVaeConfig.parse(NANO | changes))
    randomise(vae, seed=2)
    return vae


def latents(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def pixels(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(4)) * 2 - 1


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_encoding_equals_diffusers(case: str) -> None:
    values, batch, frames, (height, width) = CASES[case]
    theirs, ours = pair(values)
    stride = ours.config.spatial_stride
    x = pixels(batch, 3, 4 * (frames - 1) + 1, height * stride, width * stride)
    expected = theirs.encode(x).latent_dist
    mean, logvar = ours.encode_moments(x)
    assert relative_error(mean, expected.mean) <= 1e-5
    assert relative_error(logvar, expected.logvar) <= 1e-5


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_decoding_equals_diffusers(case: str) -> None:
    values, batch, frames, (height, width) = CASES[case]
    theirs, ours = pair(values)
    z = latents(batch, 4, frames, height, width)
    expected = theirs.decode(z).sample
    assert expected.abs().median() < 0.9, "clamping would hide errors"
    assert relative_error(ours.decode(z), expected) <= 1e-5


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("case", ["wan21-released-shape", "wan22-nano"])
def test_a_stream_of_any_chunk_equals_the_whole_clip(case: str, chunk: int) -> None:
    values, batch, frames, (height, width) = CASES[case]
    _, ours = pair(values)
    z = latents(batch, 4, frames, height, width)
    whole = ours.decode(z)  # under grad mode: one pass over the whole clip
    parts = list(ours.stream(z, chunk))
    assert parts[0].shape[2] == 4 * (min(chunk, frames) - 1) + 1
    assert len(parts) == -(-frames // chunk)
    assert relative_error(torch.cat(parts, dim=2), whole.detach()) <= 1e-5


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("case", ["wan21-released-shape", "wan22-nano"])
@torch.no_grad()
def test_encoding_in_chunks_equals_the_whole_clip(case: str, chunk: int) -> None:
    values, batch, frames, (height, width) = CASES[case]
    _, ours = pair(values)
    stride = ours.config.spatial_stride
    x = pixels(batch, 3, 4 * (frames - 1) + 1, height * stride, width * stride)
    assert relative_error(ours.encode(x, chunk=chunk), ours.encode(x)) <= 1e-5


@torch.no_grad()
def test_two_streams_of_one_network_do_not_disturb_each_other() -> None:
    vae = tiny()
    z = latents(2, 4, 3, 2, 2)
    alone = [list(vae.stream(z[i : i + 1])) for i in range(2)]
    together = list(zip(vae.stream(z[:1]), vae.stream(z[1:]), strict=True))
    for i in range(2):
        assert all(torch.equal(a, t[i]) for a, t in zip(alone[i], together, strict=True))


@torch.no_grad()
def test_no_later_latent_frame_changes_earlier_pixels() -> None:
    vae = tiny()
    z = latents(1, 4, 4, 2, 2)
    changed = z.clone()
    changed[:, :, 2:] += 1
    before, after = vae.decode(z), vae.decode(changed)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5], after[:, :, 5])


@pytest.mark.parametrize("values", [WAN21, NANO], ids=["wan21", "wan22"])
def test_gradients_equal_diffusers(values: dict[str, Any]) -> None:
    theirs, ours = pair(values)
    stride = ours.config.spatial_stride
    x = pixels(2, 3, 5, 2 * stride, stride)
    out = theirs.decode(theirs.encode(x).latent_dist.mean).sample
    ours_out = ours.decode(ours.encode(x))
    for result in (out, ours_out):
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert p.grad is not None and expected[name] is not None, name
        assert relative_error(p.grad, expected[name]) <= 1e-3, name


def test_an_unclamped_decode_passes_gradients_to_pixels_out_of_range() -> None:
    vae = tiny()
    z = (latents(1, 4, 1, 2, 2) * 50).requires_grad_()
    free = vae.decode(z, clamp=False)
    assert free.abs().max() > 1
    assert torch.equal(free.clamp(-1, 1), vae.decode(z))
    outside = free.abs() > 1
    (gradient,) = torch.autograd.grad(free[outside].sum(), z)
    assert gradient.abs().max() > 0


@torch.no_grad()
def test_bfloat16_stays_close_to_float32() -> None:
    vae = tiny()
    z = latents(1, 4, 5, 4, 4)
    exact = vae.decode(z)
    rough = vae.bfloat16().decode(z)
    assert rough.dtype == torch.bfloat16
    error = (rough.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.03


@torch.no_grad()
def test_every_decoder_layer_keeps_channels_last_memory() -> None:
    vae = tiny().bfloat16()  # float32 convolutions of this size take another path in torch
    lost: list[str] = []

    def hook(name: str) -> Any:
        def check(module: torch.nn.Module, args: Any, out: Tensor) -> None:
            if not out.is_contiguous(memory_format=torch.channels_last_3d):
                lost.append(name)

        return check

    for name, module in vae.decoder.named_modules():
        if not name.startswith("mid_block.attentions.0."):
            module.register_forward_hook(hook(name))
    for chunk in (1, 2, 3):
        list(vae.stream(latents(1, 4, 3, 4, 4), chunk))
    assert not lost


def test_normalising_and_back_gives_the_latents_and_the_statistics_are_the_configs() -> None:
    vae = tiny()
    vae.set_statistics(mean=[1, 2, 3, 4], std=[2, 2, 4, 4])
    assert vae.config.latents_mean == (1.0, 2.0, 3.0, 4.0)
    z = latents(2, 4, 3, 2, 2)
    normal = vae.normalize(z)
    assert torch.allclose(normal[:, 2], (z[:, 2] - 3) / 4)
    assert torch.allclose(vae.denormalize(normal), z, atol=1e-6)
    with pytest.raises(ValueError, match="latents_mean has 1 entries"):
        vae.set_statistics(mean=[0], std=[1])


def test_fresh_weights_begin_with_a_small_variance() -> None:
    torch.manual_seed(0)
    vae = WanVae(WanVaeConfig.parse(NANO))
    init_for_training(vae)
    _, logvar = vae.encode_moments(pixels(1, 3, 5, 16, 16))
    assert ((logvar + 5).abs() < 0.5).all()


def test_a_config_survives_a_round_trip_through_json() -> None:
    config = WanVaeConfig.parse(NANO)
    assert WanVaeConfig.parse(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert (config.temporal_stride, config.spatial_stride) == (4, 8)
    assert Config is WanVaeConfig and Vae is WanVae


def test_bookkeeping_keys_are_ignored() -> None:
    extra = {"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.42", "clip_output": False}
    assert WanVaeConfig.parse(NANO | extra) == WanVaeConfig.parse(NANO)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal_downsample": [True]}, "did you mean 'temperal_downsample'"),
        ({"temperal_downsample": [True]}, "has 1 entries and must have 2"),
        ({"latents_std": [1.0]}, "latents_std has 1 entries"),
        ({"attn_scales": [1.0]}, "attn_scales must be"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial is 16 but the dims make it 8"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WanVaeConfig.parse(NANO | change)


def test_dims_whose_shortcuts_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="dim_mult"):
        WanVae(WanVaeConfig.parse(NANO | {"dim_mult": [1, 2, 3]}))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 16, 16), r"num_frames 4 must be 4k\+1 for this model; nearest: 1, 5"),
        ((1, 3, 5, 16, 12), "width 12 must be a multiple of 8 for this model; nearest: 8, 16"),
        ((1, 4, 5, 16, 16), "\\(batch, 3, frames"),
    ],
)
def test_pixels_of_an_illegal_size_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny().encode(torch.zeros(shape))


def test_latents_of_an_illegal_size_are_refused() -> None:
    with pytest.raises(ValueError, match="latents"):
        tiny().decode(torch.zeros(1, 5, 1, 2, 2))
    with pytest.raises(ValueError, match="chunk 0"):
        list(tiny().stream(latents(1, 4, 1, 2, 2), 0))


def test_a_network_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        vae = WanVae(WanVaeConfig())
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531  # the published Wan2.1 VAE


def test_a_compiled_norm_equals_the_eager_one_at_every_size():
    norm = RmsNorm(6)
    torch.nn.init.normal_(norm.gamma)

    def f(x: Tensor) -> Tensor:
        return norm.with_silu(x, room=2)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for frames in (1, 4, 3):
        x = torch.randn(1, 6, frames, 4, 5).to(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(compiled(x), f(x))
