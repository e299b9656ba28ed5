"""The trio world shows up to three objects at once, and reads each back by its colour."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fastvideo import rng
from fastvideo.metrics.faithfulness import faithfulness
from fastvideo.worlds import attributes, open_world, shapes, trio
from fastvideo.worlds.trio import ATTRIBUTES, OF_EACH, World, join, separate

SHORT = World(64, 112, 33)
CAPTION_V1 = (
    "a small red circle moving right, a big orange box going down and "
    "a small green star drifting down at night"
)
SUMS_V1 = (13380985, 11385774, 15451307)
UNREAD = dict.fromkeys(ATTRIBUTES, "unknown")
TRUTH = {
    "number": "two",
    "scene": "sea",
    "colour": "red+blue",
    "shape": "red ball+blue star",
    "motion": "red left+blue up",
    "size": "red big+blue small",
}


def rates(world, count, change=lambda frames: frames):
    clips = [world.clip(7, index) for index in range(count)]
    read = [world.parse(change(clip.frames_THWC)) for clip in clips]
    rows = faithfulness([clip.truth for clip in clips], read, legal=ATTRIBUTES)
    return {row.attribute: row.rate for row in rows}


def said(caption):
    """Read a caption back: its scene, and the things that it begins with `a` and a size."""
    sizes = "|".join(word for words in shapes.text.SIZES.values() for word in words)
    before, *parts = re.split(rf"\b(?:a )?(?=(?:{sizes})\b)", caption)
    things = [shapes.truth_of(part) for part in parts if part]
    scenes = [thing.pop("scene", None) for thing in things] + [shapes.truth_of(before).get("scene")]
    (scene,) = (s for s in scenes if s)
    return join(scene, things)


def test_a_clip_is_a_function_of_its_arguments():
    first, again, other = SHORT.clip(1, 2), SHORT.clip(1, 2), SHORT.clip(1, 3)
    assert np.array_equal(first.frames_THWC, again.frames_THWC)
    assert (first.caption, first.truth) == (again.caption, again.truth)
    assert not np.array_equal(first.frames_THWC, other.frames_THWC)


def test_the_clips_of_a_generator_version_stay_what_they_are():
    clip = SHORT.clip(0, 0)
    assert trio.GENERATOR_VERSION == 1
    assert clip.caption == CAPTION_V1
    # sums, with room for the last bits of another machine's mathematics
    sums = clip.frames_THWC.astype(np.int64).sum(axis=(0, 1, 2))
    assert np.abs(sums - SUMS_V1).max() < 200


@pytest.mark.parametrize("index", range(6))
def test_a_short_clip_is_the_beginning_of_a_long_one(index):
    long, short = World().clip(0, index), World(num_frames=17).clip(0, index)
    assert np.array_equal(long.frames_THWC[:17], short.frames_THWC)
    assert long.caption == short.caption


def test_a_caption_says_what_the_truth_says_and_nothing_else():
    known = set(trio.words())
    for index in range(300):
        clip = World(32, 56, 1).clip(0, index)
        assert said(clip.caption) == clip.truth, clip.caption
        assert set(clip.caption.replace(",", " ,").split()) <= known


def test_every_number_of_objects_occurs_and_no_colour_twice():
    truths = [World(32, 56, 1).clip(0, index).truth for index in range(60)]
    assert {truth["number"] for truth in truths} == set(trio.NUMBERS)
    for truth in truths:
        colours = truth["colour"].split("+")
        assert len(set(colours)) == len(colours) == trio.NUMBERS.index(truth["number"]) + 1
        for name in OF_EACH:
            parts = truth[name].split("+")
            assert [part.split()[0] for part in parts] == colours
            assert set(parts) <= set(ATTRIBUTES[name])


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_each_object_is_a_combination_of_the_split(split):
    for index in range(40):
        scene, things = separate(World(32, 56, 1).clip(0, index, split).truth)
        for thing in things:
            assert shapes.held_out({**thing, "scene": scene}) == (split == "heldout")


def test_render_shows_the_truth_it_is_given():
    world = World()
    assert world.parse(world.render(TRUTH, np.random.default_rng(0))) == TRUTH


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"shape": "red ball+green star"},
            "shape 'green star' must be of a colour of its own of red, blue",
        ),
        ({"motion": "red left+blue sideways"}, "motion 'sideways' is unknown"),
        ({"size": "red big"}, "size None is unknown"),
        ({"number": "three"}, "number 'three' must be 'two', as its things are"),
        ({"shape": "red ball+blue star+blue ball"}, "shape 'blue ball' must be of a colour of"),
        (
            {"shape": "blue star+red ball"},
            "shape 'blue star.red ball' must be 'red ball.blue star'",
        ),
        ({"colour": ""}, "must be of a colour of its own"),
        ({"scene": "space"}, "scene 'space' is unknown"),
    ],
)
def test_truths_that_no_clip_shows_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SHORT.render(TRUTH | change, np.random.default_rng(0))


def test_illegal_sizes_splits_and_numbers_are_refused():
    with pytest.raises(ValueError, match="height 16 must be at least 32"):
        World(height=16)
    with pytest.raises(ValueError, match="split 'test' is unknown"):
        SHORT.clip(0, 0, "test")
    for numbers in ((), (0, 1), (4,), (1, 1)):
        with pytest.raises(ValueError, match="must be some of 1, 2, 3"):
            World(numbers=numbers)


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.full) for n in ("one", "two")), "three"]
)
def test_a_world_of_one_number_is_opened_by_name_and_read_in_every_attribute(name):
    path = f"fastvideo.worlds.trio:{name}"
    world = open_world(path, height=64, width=112, num_frames=81)
    assert attributes(path) == ATTRIBUTES
    assert {world.clip(3, index).truth["number"] for index in range(10)} == {name}
    assert min(rates(world, 30).values()) >= 0.99


def test_the_parser_reads_clips_of_full_size():
    assert min(rates(World(), 20).values()) >= 0.99


@pytest.mark.parametrize("index", [77, 140, 214, 251])
def test_an_orange_object_is_not_confused_with_the_rim_of_a_yellow_one_at_night(index):
    clip = World(numbers=(3,)).clip(0, index)
    assert clip.truth["scene"] == "night" and {"orange", "yellow"} <= set(
        clip.truth["colour"].split("+")
    )
    assert World().parse(clip.frames_THWC) == clip.truth


def test_noise_and_dimmer_light_are_survived():
    generator = np.random.default_rng(0)

    def worse(frames):
        noise = 12 * generator.standard_normal(frames.shape, dtype=np.float32)
        return (0.8 * frames + 20 + noise).clip(0, 255).astype(np.uint8)

    assert min(rates(World(num_frames=33), 16, worse).values()) >= 0.99


def test_an_object_that_is_painted_out_is_missed_alone():
    world = World()
    scene, things = separate(TRUTH)
    frames = world.render(join(scene, things[:1]), np.random.default_rng(0))
    read = world.parse(frames)
    assert read == join(scene, things[:1])
    (row,) = (r for r in faithfulness([TRUTH], [read], legal=ATTRIBUTES) if r.attribute == "shape")
    assert (row.right, row.n) == (1, 2)


def test_a_reversed_clip_reads_as_the_opposite_motion():
    world = World()
    opposite = TRUTH | {"motion": "red right+blue down"}
    assert world.parse(world.render(TRUTH, np.random.default_rng(1))[::-1]) == opposite


def test_garbage_shows_no_object_and_never_raises(garbage):
    assert SHORT.parse(garbage) | {"scene": "unknown"} == UNREAD


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_object_is_whole_and_apart_for_half_of_the_time(number):
    world = World(numbers=(number,))
    for index in range(30):
        draws = (rng.numpy_generator(0, f"test/{use}", index) for use in ("things", "places"))
        assert world._choose("train", *draws)[2].free >= 0.5
