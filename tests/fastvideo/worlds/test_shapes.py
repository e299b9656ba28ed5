"""The shapes world says what it shows, and reads what it says back out of the frames."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastvideo import rng
from fastvideo.worlds import shapes
from fastvideo.worlds.shapes import ATTRIBUTES, SPLITS, World, held_out, truth_of, words

FULL, SHORT = World(), World(64, 64, 17)
CAPTION_V1 = "a small purple sphere hopping in the daytime"
SUMS_V1 = (13814346, 14672977, 16410704)
UNREAD = dict.fromkeys(ATTRIBUTES, "unknown")


def accuracy(world, count, change=lambda frames: frames):
    hits = dict.fromkeys(ATTRIBUTES, 0)
    for index in range(count):
        clip = world.clip(7, index)
        read = world.parse(change(clip.frames_THWC))
        for attribute in ATTRIBUTES:
            hits[attribute] += read[attribute] == clip.truth[attribute]
    return {attribute: hit / count for attribute, hit in hits.items()}


def blur(frames, sigma):
    reach = int(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    blurred = frames.astype(np.float32)
    for _ in range(2):
        wide = np.pad(blurred, [(0, 0), (reach, reach), (0, 0), (0, 0)], mode="edge")
        size = blurred.shape[1]
        blurred = sum(weight * wide[:, i : i + size] for i, weight in enumerate(kernel))
        blurred = blurred.swapaxes(1, 2)
    return blurred.round().astype(np.uint8)


def test_a_clip_is_a_function_of_its_arguments():
    first, again, other = SHORT.clip(1, 2), SHORT.clip(1, 2), SHORT.clip(1, 3)
    assert np.array_equal(first.frames_THWC, again.frames_THWC)
    assert (first.caption, first.truth) == (again.caption, again.truth)
    assert not np.array_equal(first.frames_THWC, other.frames_THWC)


@pytest.mark.parametrize(("height", "width", "frames"), [(64, 64, 17), (128, 224, 5), (48, 32, 1)])
def test_frames_have_the_sizes_asked_for(height, width, frames):
    clip = World(height, width, frames).clip(0, 0)
    assert clip.frames_THWC.shape == (frames, height, width, 3)
    assert clip.frames_THWC.dtype == np.uint8
    assert clip.frames_THWC.flags.c_contiguous


@pytest.mark.parametrize("index", range(8))
def test_a_short_clip_is_the_beginning_of_a_long_one(index):
    long, short = FULL.clip(0, index), World(num_frames=17).clip(0, index)
    assert np.array_equal(long.frames_THWC[:17], short.frames_THWC)
    assert long.caption == short.caption


def test_speeds_are_per_second_so_half_the_rate_shows_every_second_frame():
    fast, slow = World(64, 64, 17, fps=16).clip(0, 5), World(64, 64, 9, fps=8).clip(0, 5)
    assert np.array_equal(fast.frames_THWC[::2], slow.frames_THWC)


def test_the_clips_of_a_generator_version_stay_what_they_are():
    clip = SHORT.clip(0, 0)
    assert shapes.GENERATOR_VERSION == 1
    assert clip.caption == CAPTION_V1
    # sums, with room for the last bits of another machine's mathematics
    sums = clip.frames_THWC.astype(np.int64).sum(axis=(0, 1, 2))
    assert np.abs(sums - SUMS_V1).max() < 200


def test_every_caption_of_the_grammar_inverts_exactly():
    generator = rng.numpy_generator(0, "test")
    for values in itertools.product(*ATTRIBUTES.values()):
        truth = dict(zip(ATTRIBUTES, values, strict=True))
        for _ in range(5):
            caption = shapes.text.caption(truth, generator)
            assert truth_of(caption) == truth, caption


def test_every_phrase_of_the_grammar_names_its_value():
    for table, attribute in (
        (shapes.text.SIZES, "size"),
        (shapes.text.COLOURS, "colour"),
        (shapes.text.SHAPES, "shape"),
        (shapes.text.SCENES, "scene"),
        (shapes.text.MOTIONS, "motion"),
    ):
        for value, phrases in table.items():
            flat = [w for p in phrases for w in (p if isinstance(p, tuple) else (p,))]
            assert all(truth_of(phrase) == {attribute: value} for phrase in flat)


def test_captions_use_only_the_listed_words():
    known = set(words())
    generator = rng.numpy_generator(0, "test")
    said = set()
    for index in range(2000):
        truth = shapes.combinations("train")[index % 800]
        said |= set(shapes.text.caption(truth, generator).replace(",", " ,").split())
    assert said == known
    assert len(known) < 100


@pytest.mark.parametrize(
    ("prompt", "truth"),
    [
        ("A big red ball bouncing over the sea.", ("ball", "red", "sea", "bouncing", "big")),
        ("By day: tiny violet stars, hopping up", ("star", "purple", "day", "bouncing", "small")),
    ],
)
def test_prompts_by_hand_are_understood(prompt, truth):
    assert tuple(truth_of(prompt)[attribute] for attribute in ATTRIBUTES) == truth


def test_a_prompt_leaves_out_what_it_does_not_name():
    assert truth_of("a red ball") == {"shape": "ball", "colour": "red"}
    assert truth_of("hello") == {}


def test_a_prompt_with_two_colours_is_refused_by_name():
    with pytest.raises(ValueError, match="more than one colour: red, blue"):
        truth_of("a red and blue ball")


def test_splits_share_no_combination_and_leave_none_out():
    train, heldout = (shapes.combinations(split) for split in SPLITS)
    every = len(list(itertools.product(*ATTRIBUTES.values())))
    assert len(train) + len(heldout) == every == 960
    assert 0.07 < len(heldout) / every < 0.13
    assert not any(truth in train for truth in heldout)


def test_clips_of_a_split_stay_in_it():
    for split in SPLITS:
        truths = [World(32, 32, 1).clip(0, index, split).truth for index in range(60)]
        assert all(held_out(truth) == (split == "heldout") for truth in truths)


def test_each_split_shows_every_value_of_every_attribute():
    for split in SPLITS:
        for attribute, values in ATTRIBUTES.items():
            assert {t[attribute] for t in shapes.combinations(split)} == set(values)


def test_render_shows_the_truth_it_is_given():
    truth = {"shape": "star", "colour": "blue", "scene": "sea", "motion": "up", "size": "big"}
    frames = FULL.render(truth, np.random.default_rng(0))
    assert FULL.parse(frames) == truth


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: World(height=16), "height 16 must be at least 32"),
        (lambda: World(num_frames=0), "num_frames 0 must be at least 1"),
        (lambda: SHORT.clip(0, 0, "test"), "split 'test' is unknown .known: train, heldout"),
        (lambda: held_out({"shape": "cube"}), "shape 'cube' is unknown .known: ball"),
        (lambda: SHORT.render({}, np.random.default_rng(0)), "shape None is unknown"),
    ],
)
def test_illegal_values_are_refused_with_the_legal_ones(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("world", "count"),
    [(FULL, 60), (SHORT, 200), (World(128, 224, 33), 40)],
    ids=["full", "short", "wide"],
)
def test_the_parser_reads_every_attribute_of_true_clips(world, count):
    assert min(accuracy(world, count).values()) >= 0.99


def test_the_parser_reads_blurred_clips():
    assert min(accuracy(World(num_frames=17), 36, lambda frames: blur(frames, 3)).values()) >= 0.97


def test_the_parser_survives_a_change_of_brightness_and_contrast():
    def dim(frames):
        return (frames * 0.8 + 20).astype(np.uint8)

    assert min(accuracy(SHORT, 100, dim).values()) >= 0.95


def test_accuracy_falls_with_noise():
    generator = np.random.default_rng(0)

    def mean_accuracy(sigma):
        def add(frames):
            noise = generator.standard_normal(frames.shape, dtype=np.float32) * sigma
            return (frames + noise).clip(0, 255).astype(np.uint8)

        read = accuracy(World(num_frames=17), 24, add)
        return np.mean([value for name, value in read.items() if name != "scene"])

    clean, mild, strong, worst = (mean_accuracy(sigma) for sigma in (0, 20, 60, 120))
    assert clean >= mild >= strong > worst
    assert worst < 0.6


def test_an_empty_scene_has_no_object():
    scenes = shapes.scenes
    for name in ATTRIBUTES["scene"]:
        canvas = scenes.Canvas(64, 64, np.arange(17) / 16)
        picture = scenes.paint(name, canvas, np.random.default_rng(3)).still_HW3
        frames = np.broadcast_to(picture.astype(np.uint8), (17, 64, 64, 3))
        assert SHORT.parse(frames) == UNREAD | {"scene": name}


def test_a_still_object_has_no_motion():
    frames = SHORT.clip(0, 1).frames_THWC
    read = SHORT.parse(np.repeat(frames[:1], 17, axis=0))
    assert read["motion"] == "unknown"
    assert read["shape"] == SHORT.clip(0, 1).truth["shape"]


def test_a_reversed_clip_reads_as_the_opposite_motion():
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for index in range(12):
        clip = SHORT.clip(2, index)
        motion = clip.truth["motion"]
        read = SHORT.parse(clip.frames_THWC[::-1])["motion"]
        assert read == opposite.get(motion, motion)


def test_garbage_is_unknown_and_never_raises(garbage):
    read = SHORT.parse(garbage)
    assert set(read) == set(ATTRIBUTES)
    assert read["shape"] == read["motion"] == "unknown"


def test_a_mover_that_left_the_frame_comes_back_and_still_reads_as_moving():
    world = World(64, 64, 321)
    truth = {"shape": "ball", "colour": "red", "scene": "day", "size": "small"}
    for motion in ("left", "right", "up", "down", "bouncing"):
        frames = world.render(truth | {"motion": motion}, np.random.default_rng(1))
        assert world.parse(frames)["motion"] == motion


def test_what_a_clip_keeps_of_its_prompt_is_read_attribute_by_attribute():
    clip = shapes.World(num_frames=33).clip(3, 0)
    kept = shapes.kept(clip.caption, clip.frames_THWC)
    assert kept == dict.fromkeys(shapes.ATTRIBUTES, True)
    other = next(c for c in shapes.ATTRIBUTES["colour"] if c != clip.truth["colour"])
    assert shapes.kept(f"a {other} {clip.truth['shape']}", clip.frames_THWC) == {
        "shape": True,
        "colour": False,
    }
    assert shapes.kept("a cat on a red sofa", clip.frames_THWC) == {}
    assert shapes.kept("a red and a blue ball", clip.frames_THWC) == {}
