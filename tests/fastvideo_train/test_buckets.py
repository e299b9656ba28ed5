"""Sizes and lengths of videos: legal, full, nearest, and refused with a reason."""

from __future__ import annotations

import math

import pytest
from fastvideo_train.data.buckets import FULL, Bucket, Rules, UnfitError, cover, sizes_of_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvideo.config import parse
from fastvideo.footage import Footage, num_frames_at

multiples = st.tuples(st.sampled_from([8, 16, 32]), st.sampled_from([8, 16, 32]))
sides = st.integers(16, 4000)
QUICK = settings(deadline=None, max_examples=40)


def rules(**changes: object) -> Rules:
    values = {
        "width": 832,
        "height": 480,
        "frames": (17, 81),
        "fps": 16,
        "multiple": (16, 16),
        "temporal": 4,
    }
    return parse(Rules, values | changes, source="test")


def video(width: int = 1920, height: int = 1080, duration_s: float = 6.0) -> Footage:
    return Footage("h264", width, height, duration_s, 100, False, False, False, False)


@QUICK
@given(area=st.integers(1024, 500_000), multiple=multiples)
def test_sizes_of_a_budget_are_legal_and_full(area, multiple):
    down, across = multiple
    found = sizes_of_budget(area, multiple)
    assert found or area < down * across
    for width, height in found:
        assert width % across == 0 and height % down == 0 and width * height <= area
        grows = (width + across) * height <= area or width * (height + down) <= area
        assert width * height >= FULL * area or not grows


@QUICK
@given(
    width=st.integers(2, 50), height=st.integers(2, 50), shape=st.tuples(sides, sides), up=multiples
)
def test_a_video_goes_to_the_nearest_of_the_sizes_and_fills_it(width, height, shape, up):
    own = rules(
        width=width * up[1], height=height * up[0], multiple=up, max_upscale=1e6, min_kept=1e-9
    )
    fit = own.fit(video(*shape))
    chosen, wanted = (fit.bucket.width, fit.bucket.height), math.log(shape[0] / shape[1])
    apart = [abs(math.log(w / h) - wanted) for w, h in own.sizes]
    assert chosen in own.sizes
    assert abs(math.log(chosen[0] / chosen[1]) - wanted) <= min(apart) + 1e-8
    for w, h in own.sizes:
        assert w % up[1] == 0 and h % up[0] == 0 and w * h <= own.width * own.height
    assert fit.view.scaled[0] >= chosen[0] and fit.view.scaled[1] >= chosen[1]


@QUICK
@given(shape=st.tuples(sides, sides), size=st.tuples(sides, sides))
def test_a_cover_keeps_the_shape_and_cuts_around_the_centre(shape, size):
    view, scale = cover(*shape, *size)
    for have, want, full, start in zip(
        shape, size, view.scaled, (view.left, view.top), strict=True
    ):
        assert full >= want and abs(full - have * scale) <= 1
        assert start >= 0 and abs(full - want - 2 * start) <= 1
    assert view.scaled[0] == size[0] or view.scaled[1] == size[1]


@QUICK
@given(count=st.integers(1, 400), fps=st.sampled_from([8, 16, 24, 30, 60]))
def test_a_video_of_so_many_frames_gives_as_many_at_its_own_rate(count, fps):
    assert num_frames_at(count / fps, fps) == count
    assert num_frames_at(round(count / fps, 3), fps) == count  # as Matroska rounds


@QUICK
@given(
    count=st.integers(1, 300),
    lengths=st.lists(st.integers(0, 60).map(lambda k: 4 * k + 1), min_size=1, max_size=5),
)
def test_a_clip_has_the_largest_length_that_fits(count, lengths):
    own = rules(frames=tuple(lengths))
    if min(lengths) > count:
        with pytest.raises(UnfitError, match="too short"):
            own.fit(video(duration_s=count / 16))
    else:
        found = own.fit(video(duration_s=count / 16)).bucket.frames
        assert found == max(n for n in lengths if n <= count)


def test_wan_s_sizes_at_480p_have_the_usual_shapes():
    assert rules().sizes == (
        (832, 480),
        (768, 512),
        (720, 544),
        (624, 624),
        (544, 720),
        (512, 768),
        (480, 832),
    )
    assert rules().fit(video()).bucket == Bucket(832, 480, 81)
    assert rules().fit(video(1080, 1920)).bucket.name == "480x832x81"
    assert rules().fit(video(1440, 1080, 2.0)).bucket.name == "720x544x17"


def test_a_size_whose_turn_is_illegal_is_not_turned():
    own = rules(width=48, height=32, multiple=(32, 16), aspects=("16:9",))
    assert own.sizes == ((48, 32),)


@pytest.mark.parametrize(
    ("footage", "reason"),
    [
        (video(duration_s=1.0), r"too short: 1.00 s are 16 frames at 16 fps .at least 17"),
        (video(320, 180), r"too small: 320x180 would be enlarged 2.67 times to 832x480 .at most"),
        (video(4000, 1000), r"too far from every shape: 832x480 keeps 43% of 4000x1000"),
    ],
)
def test_a_video_that_the_rules_leave_out_has_its_reason(footage, reason):
    with pytest.raises(UnfitError, match=reason):
        rules().fit(footage)


def test_a_frame_rate_is_read_as_that_of_a_request():
    assert rules(fps="24000/1001").fps == 24000 / 1001 and rules(fps="16").fps == 16.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 830}, "width 830 must be a multiple of 16 for this model; nearest: 816, 832"),
        ({"frames": (80,)}, r"num_frames 80 must be 4k\+1 for this model; nearest: 77, 81"),
        ({"frames": ()}, "frames"),
        ({"aspects": ("16x9",)}, "aspect '16x9' must look like WIDTH:HEIGHT; did you mean '16:9'"),
        ({"aspects": ("0:1",)}, "must look like WIDTH:HEIGHT"),
        ({"max_upscal": 2}, "did you mean 'max_upscale'"),
        ({"fps": 0}, "fps"),
        ({"fps": "24/0"}, "fps"),
    ],
)
def test_illegal_rules_are_refused_with_the_nearest_legal_values(changes, message):
    with pytest.raises(ValueError, match=message):
        rules(**changes)
