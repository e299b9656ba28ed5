"""Sampling fields as people write them: names, aliases, layers, and values that are refused."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fastvideo.sampling import (
    MAX_SEED,
    GenerateRequest,
    SamplingParams,
    clips,
    read_layers,
    read_with_origins,
    spelled,
)

COMPLETE = {
    "prompt": "a ball",
    "negative_prompt": "grey",
    "num_frames": 17,
    "height": 64,
    "width": 96,
    "fps": 24,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "seed": 5,
}
NEWER = {"attention": "dense", "backend": "auto", "drop_gates": False, "lora": ()}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps 0 in the call: must be at least 1"),
        ({"num_inference_steps": 1001}, "num_inference_steps 1001 in the call: must be at most 10"),
        ({"guidance_scale": -0.5}, "guidance_scale -0.5 in the call: must be at least 0"),
        ({"guidance_scale": 100.5}, "guidance_scale 100.5 in the call: must be at most 100"),
        ({"guidance_scale": float("nan")}, "guidance_scale NaN in the call: .* finite"),
        ({"num_frames": 0}, "num_frames 0 in the call: must be at least 1"),
        ({"fps": 0}, "fps 0 in the call: must be at least 1"),
        ({"fps": 241}, "fps 241 in the call: must be at most 240"),
        ({"seed": -2}, "seed -2 in the call: must be at least -1"),
        ({"seed": 2**63}, f"seed {2**63} in the call: must be at most {2**63 - 1}"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"num_framse": 5}, "num_framse in the call is unknown; did you mean 'num_frames'"),
        ({"framez": 5}, "framez in the call is unknown; did you mean 'frames'"),
        ({"num_steps": 5}, "num_steps in the call is unknown; did you mean 'steps'"),
        ({"szie": "8x8"}, "szie in the call is unknown; did you mean 'size'"),
        ({"": 5}, " in the call is unknown"),
    ],
)
def test_illegal_values_are_one_line_with_value_and_rule(fields: dict, text: str):
    with pytest.raises(ValueError, match=text) as caught:
        read_layers(("the call", {"prompt": "x", **fields}))
    assert "\n" not in str(caught.value)


WHOLE = ["num_frames", "height", "width", "num_inference_steps", "seed"]


@pytest.mark.parametrize("value", [True, 2.5, 2.0, "2"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_is_no_switch_no_fraction_and_no_text(name: str, value: object):
    with pytest.raises(ValueError, match=rf"^{name} .* in the call: must be a valid integer"):
        read_layers(("the call", {"prompt": "x", name: value}))
    with pytest.raises(ValueError, match=name):
        SamplingParams.model_validate({**COMPLETE, name: value})


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (24, 24),
        (24.0, 24),
        ("24", 24),
        (Fraction(48, 2), 24),
        ("24000/1001", 24000 / 1001),
        (Fraction(30000, 1001), 30000 / 1001),
        (24000 / 1001, 24000 / 1001),
        (23.976024, 24000 / 1001),
        ("23.976", 23.976),
        (12.5, 12.5),
        (240, 240),
    ],
)
def test_a_frame_rate_is_whole_or_a_fraction(given: Any, kept: float):
    for values in ({"prompt": "x", "fps": given}, {**COMPLETE, "fps": given}):
        model = SamplingParams if len(values) > 2 else GenerateRequest
        made = model.model_validate(values)
        assert (made.fps, type(made.fps)) == (kept, type(kept))
        assert model.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (True, "must be a number such as 16, 23.976 or 24000/1001"),
        ("fast", "must be a number"),
        ("24000/0", "must be a number"),
        ([24], "must be a number"),
        (float("nan"), "must be a number"),
        (float("inf"), "must be a number"),
        (24.0001, "must be a fraction with a denominator up to 1001; nearest: 24$"),
        ("999/1000", "must be at least 1"),
        (Fraction(481, 2), "must be at most 240"),
    ],
)
def test_a_rate_that_no_file_holds_is_refused(given: Any, rule: str):
    with pytest.raises(ValueError, match=rf"^fps .* in the call: {rule}"):
        read_layers(("the call", {"prompt": "x", "fps": given}))


@pytest.mark.parametrize("value", [True, "2"])
def test_a_scale_is_no_switch_and_no_text(value: object):
    with pytest.raises(ValueError, match=r"^guidance_scale .* in the call: must be a valid number"):
        read_layers(("the call", {"prompt": "x", "guidance": value}))
    assert read_layers(("the call", {"prompt": "x", "guidance": 2})).guidance_scale == 2.0


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a\0ball", "must not hold a NUL"),
        ("a \ud800 ball", r"a lone '\\ud800'"),
        ("\udcff", r"a lone '\\udcff'"),
    ],
)
def test_text_that_no_tokenizer_and_no_file_can_hold_is_refused(name: str, text: str, rule: str):
    with pytest.raises(ValueError, match=rule) as caught:
        read_layers(("the call", {"prompt": "x", name: text}))
    assert str(caught.value).isprintable(), "the line can be printed on any terminal"
    assert name in str(caught.value)


@pytest.mark.parametrize("text", ["größe 🎈", "e\u0301", "\U0010ffff", "a\nb"])
def test_text_of_any_other_characters_is_kept_as_it_is(text: str):
    assert read_layers(("the call", {"prompt": text, "negative": text})).negative_prompt == text


def test_a_backend_is_a_known_name():
    for wrong in ("gathr", ""):
        with pytest.raises(ValueError, match=rf"'{wrong}' is unknown.* \(known: auto, "):
            read_layers(("the call", {"prompt": "x", "backend": wrong}))
    with pytest.raises(ValueError, match=r"'gathr' is unknown; did you mean 'gather'\? \(known: a"):
        read_layers(("the call", {"prompt": "x", "backend": "gathr"}))
    assert read_layers(("the call", {"prompt": "x", "backend": "flex"})).backend == "flex"


@pytest.mark.parametrize(
    ("words", "uses"),
    [
        ("a.safetensors", [("a.safetensors", 1.0)]),
        ("a.safetensors:0.5", [("a.safetensors", 0.5)]),
        ("C:/x/a.safetensors", [("C:/x/a.safetensors", 1.0)]),
        (["owner/name:-1", "b.safetensors"], [("owner/name", -1.0), ("b.safetensors", 1.0)]),
        ([{"path": "a", "strength": 2}], [("a", 2.0)]),
    ],
)
def test_loras_are_paths_with_strengths(words: object, uses: list[tuple[str, float]]):
    request = GenerateRequest.model_validate({"prompt": "x", "lora": words})
    assert [(use.path, use.strength) for use in request.lora or ()] == uses


def test_later_layers_win_and_a_wrong_layer_is_named():
    low, high = ("a.toml", {"fps": 10, "seed": 1}), ("flags", {"prompt": "x", "seed": 2})
    assert read_layers(low, high).model_dump(exclude_none=True) == {
        "prompt": "x",
        "fps": 10,
        "seed": 2,
    }
    with pytest.raises(ValueError, match=r"fps 0 in a\.toml"):
        read_layers(("a.toml", {"fps": 0}), ("flags", {"prompt": "x", "fps": 8}))


def test_a_source_may_name_the_place_of_each_key():
    file = (lambda keys: f"a.toml:{len(str(keys[0]))}"), {"steps": 0, "fps": 8}
    with pytest.raises(ValueError, match=r"^num_inference_steps 0 in a\.toml:5: must be at"):
        read_layers(file)
    later = "flags", {"num_inference_steps": 3, "size": "48x32"}
    request, origin = read_with_origins((file[0], {"text": "x", "steps": 9, "fps": 8}), later)
    assert request == read_layers(("any", {"prompt": "x", "fps": 8}), later)
    found = {"num_inference_steps": "flags", "width": "flags", "height": "flags"}
    assert origin == {"prompt": "a.toml:4", "fps": "a.toml:3", **found}
    with pytest.raises(ValueError, match=r"modle in a is unknown; did you mean 'model'"):
        read_with_origins(("a", {"modle": "x"}), beside=("model",))


def test_whole_numbers_of_numpy_are_whole_numbers():
    made = read_layers(("the call", {"prompt": "x", "seed": np.int64(3), "frames": np.uint8(5)}))
    assert (made.seed, made.num_frames) == (3, 5) and type(made.seed) is int
    for wrong in (np.float64(3), np.bool_(True), True):
        with pytest.raises(ValueError, match=r"^seed .* in the call: must be a valid integer$"):
            read_layers(("the call", {"prompt": "x", "seed": wrong}))


def test_clips_of_a_prompt_differ_in_their_seeds_alone():
    first = SamplingParams(**COMPLETE)
    made = clips(first, 3)
    assert [one.seed for one in made] == [5, 6, 7]
    assert {one.model_copy(update={"seed": 5}).model_dump_json() for one in made} == {
        first.model_dump_json()
    }
    last = first.model_copy(update={"seed": MAX_SEED - 1})
    assert [one.seed for one in clips(last, 2)] == [MAX_SEED - 1, MAX_SEED]
    with pytest.raises(ValueError, match=rf"seed {MAX_SEED - 1} of 3 clips .* {MAX_SEED - 2}$"):
        clips(last, 3)
    for wrong in (0, -1, True, 2.0, "2"):
        with pytest.raises(ValueError, match=r"count .* must be a whole number of at least 1"):
            clips(first, wrong)


def test_short_names_stand_for_full_ones_and_the_later_layer_wins_under_either():
    short = {"text": "x", "negative": "y", "frames": 5, "steps": 2, "guidance": 1.5}
    full = {
        "prompt": "x",
        "negative_prompt": "y",
        "num_frames": 5,
        "num_inference_steps": 2,
        "guidance_scale": 1.5,
    }
    assert read_layers(("a", short)) == read_layers(("a", full)) == GenerateRequest(**full)
    sized = read_layers(("a", {**full, "size": "96x64"}))
    assert (sized.width, sized.height) == (96, 64)
    for low, high in ((short, {"num_frames": 9}), (full, {"frames": 9})):
        assert read_layers(("low", low), ("high", high)).num_frames == 9
    widened = read_layers(("low", {**full, "size": "96x64"}), ("high", {"width": 32}))
    assert (widened.width, widened.height) == (32, 64)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"frames": 5, "num_frames": 5}, "num_frames in a.toml gives num_frames a second time"),
        ({"num_inference_steps": 5, "steps": 6}, "steps in a.toml gives num_inference_steps a sec"),
        ({"height": 32, "size": "48x32"}, "size in a.toml gives height a second time"),
        ({"size": "48x32", "width": 48}, "width in a.toml gives width a second time"),
    ],
)
def test_a_field_that_is_given_twice_is_refused(values: dict, text: str):
    with pytest.raises(ValueError, match=text):
        spelled(values, source="a.toml")


@pytest.mark.parametrize("size", ["224", 224, True, None, [48, 32]])
def test_a_size_that_is_none_is_refused(size: object):
    with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
        read_layers(("a.toml", {"prompt": "x", "size": size}))


def test_parameters_are_complete():
    made = SamplingParams(**COMPLETE)
    assert made.model_dump() == {**COMPLETE, **NEWER}, "recipes of older releases lack the newer"
    for name in COMPLETE:
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{k: v for k, v in COMPLETE.items() if k != name})
    with pytest.raises(ValueError, match="seed"):
        SamplingParams(**{**COMPLETE, "seed": -1})


def test_fields_at_defaults_that_older_releases_did_not_write_are_left_out():
    """Evaluations are kept by what is written, and those of the last release are found again."""
    made = SamplingParams(**COMPLETE)
    assert made.without_newer_defaults() == {**COMPLETE, "attention": "dense"}
    named = {*COMPLETE, "attention"} - {"prompt"}
    assert made.without_newer_defaults(exclude={"prompt"}).keys() == named
    newer = {"attention": "sta(windows=[[1, 1, 1]])", "backend": "gather", "drop_gates": True}
    assert SamplingParams(**COMPLETE, **newer).without_newer_defaults() == {**COMPLETE, **newer}
