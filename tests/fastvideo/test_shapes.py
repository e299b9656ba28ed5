"""Sizes shrink and grow back; illegal ones are refused with the nearest legal ones."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvideo.shapes import Compression, LatentShape, PixelShape, TokenGrid, parse_size

WAN = Compression()


def test_wan_480p_clip_has_32760_tokens():
    latent = PixelShape(81, 480, 832).latent(WAN)
    assert latent == LatentShape(21, 60, 104)
    assert latent.tokens(WAN.patch).num_tokens == 32_760


def test_nano_clip_has_1344_tokens():
    grid = PixelShape(81, 128, 128).latent(WAN).tokens(WAN.patch)
    assert grid == TokenGrid(21, 8, 8)
    assert grid.num_tokens == 1344


factors = st.integers(1, 8)
families = st.builds(
    Compression, temporal=factors, spatial=factors, patch=st.tuples(st.just(1), factors, factors)
)


@settings(deadline=None)
@given(c=families, t=st.integers(1, 30), h=st.integers(1, 30), w=st.integers(1, 30))
def test_latents_decode_to_the_clip_that_they_came_from(c, t, h, w):
    down, across = c.pixel_multiple
    clip = PixelShape((t - 1) * c.temporal + 1, h * down, w * across)
    latent = clip.latent(c)
    assert latent.pixels(c) == clip
    assert latent.tokens(c.patch) == TokenGrid(t, h, w)


@settings(deadline=None)
@given(frames=st.integers(-10, 200), height=st.integers(-50, 900), width=st.integers(-50, 900))
def test_what_an_error_offers_is_legal(frames, height, width):
    sizes = {"num_frames": frames, "height": height, "width": width}
    for _ in sizes:
        try:
            PixelShape(*sizes.values()).latent(WAN)
            return
        except ValueError as error:
            name, value, *_ = str(error).split()
            assert int(value) == sizes[name]
            offered = [int(n) for n in str(error).partition("nearest: ")[2].split(", ")]
            assert min(abs(n - sizes[name]) for n in offered) < 16 or sizes[name] < 1
            sizes[name] = offered[-1]
    PixelShape(*sizes.values()).latent(WAN)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((80, 480, 832), "num_frames 80 must be 4k+1 for this model; nearest: 77, 81"),
        ((0, 480, 832), "num_frames 0 must be 4k+1 for this model; nearest: 1"),
        ((81, 481, 832), "height 481 must be a multiple of 16 for this model; nearest: 480, 496"),
        ((81, 480, 7), "width 7 must be a multiple of 16 for this model; nearest: 16"),
    ],
)
def test_error_names_value_rule_and_nearest(sizes, message):
    with pytest.raises(ValueError) as error:
        PixelShape(*sizes).latent(WAN)
    assert str(error.value) == message


def test_sizes_are_width_by_height():
    for text in ("224x128", "224X128", "224*128", "224\u00d7128", " 224 x 128 ", "224 * 128"):
        assert parse_size(text) == (224, 128)
    for wrong in ("224", "x", "224x", "-1x5", "224xx128", "224x128x5", "2 24x128", "224:128", 224):
        with pytest.raises(ValueError, match=r"^size .* in --size: must look like WIDTHxHEIGHT"):
            parse_size(wrong)


def test_latents_that_patches_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 5, 4\) .* not divisible by patches \(1, 2, 2\)"):
        LatentShape(3, 5, 4).tokens((1, 2, 2))


@pytest.mark.parametrize("c", [{"temporal": 0}, {"spatial": -8}, {"patch": (1, 0, 2)}])
def test_family_that_does_not_shrink_is_refused(c):
    with pytest.raises(ValueError, match="factors of at least 1"):
        Compression(**c)
