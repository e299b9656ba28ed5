"""Predicted profiles against the published roofline tables and the real networks' sizes."""

from __future__ import annotations

import pytest
from fastvideo_inference.goodput import predict
from fastvideo_inference.goodput.predict import DEVICES, SHAPES

from fastvideo import attention as patterns
from fastvideo import weights
from fastvideo.models.dit.wan import WanDiT
from fastvideo.resolve import resolve
from fastvideo.sampling import GenerateRequest
from fastvideo.shapes import TokenGrid

GRID_480P, GRID_720P = TokenGrid(21, 30, 52), TokenGrid(21, 45, 80)
SPARSE = "vsa(sparsity=0.8)"


@pytest.mark.parametrize(
    ("shape", "grid", "pattern", "linear_tf", "attention_tf", "h200_ms", "b200_ms"),
    [
        ("1.3B", GRID_480P, "dense", 82, 201, 372, 133),
        ("1.3B", GRID_480P, SPARSE, 87, 62, 202, 73),
        ("1.3B", GRID_480P, "vsa(sparsity=0.9)", 87, 33, 165, 60),
        ("1.3B", GRID_720P, SPARSE, 200, 321, 690, 248),
        ("14B", GRID_480P, "dense", 785, 893, 2184, 779),
        ("14B", GRID_480P, SPARSE, 854, 276, 1490, 534),
        ("14B", GRID_720P, "dense", 1810, 4714, 8394, 2979),
    ],
)
def test_floors_of_a_forward_are_those_of_the_roofline_table(
    shape: str,
    grid: TokenGrid,
    pattern: str,
    linear_tf: float,
    attention_tf: float,
    h200_ms: float,
    b200_ms: float,
):
    config, seen = SHAPES[shape], patterns.read(pattern)
    linear, attention = predict.dit_flop(config, grid, seen)
    assert linear == pytest.approx(1e12 * linear_tf, rel=0.02)
    assert attention == pytest.approx(1e12 * attention_tf, rel=0.02)
    for device, floor_ms in (("H200", h200_ms), ("B200", b200_ms)):
        found = predict.forward_s(DEVICES[device], config, grid, seen)
        assert found == pytest.approx(floor_ms / 1e3, rel=0.02)


@pytest.mark.parametrize(
    ("device", "shape", "ulysses", "speed_up"),
    [
        *(("H200", "1.3B", 2, 1.89), ("H200", "14B", 4, 3.78), ("H200", "14B", 8, 7.46)),
        *(("B200", "1.3B", 4, 3.46), ("B200", "14B", 2, 1.89), ("B200", "14B", 8, 7.2)),
    ],
)
def test_the_speed_up_by_ulysses_is_that_of_the_table(
    device: str, shape: str, ulysses: int, speed_up: float
):
    def seconds(degree: int) -> float:
        given = DEVICES[device], SHAPES[shape], GRID_480P, patterns.Dense()
        return predict.forward_s(*given, ulysses=degree)

    assert seconds(1) / seconds(ulysses) == pytest.approx(speed_up, rel=0.02)


@pytest.mark.parametrize(
    ("latents", "flop", "tiny_flop", "h200_s", "b200_s"),
    [((21, 60, 104), 275e12, 11.4e12, 0.401, 0.151), ((21, 90, 160), 639e12, None, 0.931, 0.350)],
)
def test_floors_of_decoders_and_of_text_are_those_of_the_table(
    latents: tuple[int, int, int], flop: float, tiny_flop: float, h200_s: float, b200_s: float
):
    assert predict.vae_work(*latents)[0] == pytest.approx(flop, rel=0.03)
    assert tiny_flop is None or predict.tiny_flop(*latents) == pytest.approx(tiny_flop, rel=0.02)
    assert predict.decode_s(DEVICES["H200"], latents) == pytest.approx(h200_s, rel=0.03)
    assert predict.decode_s(DEVICES["B200"], latents) == pytest.approx(b200_s, rel=0.03)
    assert predict.text_flop() == pytest.approx(4.84e12, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bytes_of_the_denoiser_are_those_of_the_real_network(shape: str):
    network = weights.build(lambda: WanDiT(SHAPES[shape]))
    size = 2 * sum(p.numel() for p in network.parameters())
    assert predict.part_bytes(SHAPES[shape])["dit"] == pytest.approx(size, rel=0.01)


def test_a_profile_says_that_it_is_predicted_and_reaches_the_published_denoising():
    profile = predict.predicted("H200", "1.3B")
    assert profile.source == "predicted"
    for pattern, seconds in (("dense", 1.49), (SPARSE, 0.98)):
        request = GenerateRequest(prompt="x", seed=0, attention=pattern)
        params = resolve(request, profile.spec)
        assert profile.stage_s("denoise", params).median == pytest.approx(seconds, rel=0.05)
    with pytest.raises(ValueError, match=r"is of .* predicted"):
        profile.check(fingerprint="f" * 64)


def test_degrees_divide_the_heads_and_datasheets_are_believed_by_half():
    degrees = {
        shape: {c.parallel for c in predict.predicted("B200", shape).cells} for shape in SHAPES
    }
    assert degrees["1.3B"] == {"", "ulysses=2", "ulysses=4"}
    assert degrees["14B"] - degrees["1.3B"] == {"ulysses=8"}
    for name in predict.EFFICIENCY:
        assert DEVICES["B200"].efficiency(name) <= 0.5
        assert DEVICES["H200"].efficiency(name) == predict.EFFICIENCY[name]


@pytest.mark.parametrize(("device", "shape"), [("H100", "14B"), ("H200", "5B")])
def test_what_is_not_known_is_refused_with_what_is(device: str, shape: str):
    with pytest.raises(ValueError, match=r"unknown \(known: .*(GB200|14B)"):
        predict.predicted(device, shape)
