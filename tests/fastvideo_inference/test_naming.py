"""Names of clips: whole characters, few enough bytes, and nothing that leads elsewhere."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from fastvideo_inference import naming

FAMILY = "👨\u200d👩\u200d👧"
ACCENTED = "e\u0323\u0307"  # two marks, of which one stays a mark when composed
HINDI = "हि"


def test_names_are_filled_from_prompt_seed_and_index(tmp_path: Path):
    template = naming.check_template(f"{tmp_path}/{{index}}-{{prompt:9}}-{{seed}}.mp4", num_clips=2)
    path = naming.fill(template, prompt="A Red  ball/../über", seed=7, index=1)
    assert path == tmp_path / "1-a-red-bal-7.mp4"


def test_a_folder_gets_the_default_name(tmp_path: Path):
    assert naming.check_template(str(tmp_path), num_clips=3) == f"{tmp_path}/{naming.DEFAULT_NAME}"
    assert naming.check_template("new/", num_clips=3) == f"new/{naming.DEFAULT_NAME}"


def fill(template: str, prompt: str, seed: int = 7) -> Path:
    template = naming.check_template(template, num_clips=1)
    return naming.fill(template, prompt=prompt, seed=seed, index=0)


@pytest.mark.parametrize(
    "template", ["{prompt}.mp4", "{prompt:400}-{seed}.mp4", "x/{prompt:99}/{prompt:99}.mp4"]
)
@pytest.mark.parametrize("character", ["a", "红", "🐱", FAMILY, ACCENTED, HINDI, "👍🏽"])
def test_a_name_holds_whole_characters_and_all_its_companions(template: str, character: str):
    path = fill(template, character * 500)
    counted = path.with_name(f"{path.stem}-99999.mp4")
    for name in (counted.name, f".{counted.stem}.fastvideo", naming.sidecar(counted).name):
        assert len(os.fsencode(name)) <= 255
    assert all(len(os.fsencode(part)) <= 255 for part in path.parts)
    whole = unicodedata.normalize("NFC", character)
    for part in (path.stem, *path.parts[:-1]):
        assert not part.replace(whole, "").strip("x-7"), part
    length = len(path.stem.removesuffix("-7").replace(whole, "."))
    assert length in (80, 99) or len(os.fsencode(path.stem)) + len(whole.encode()) > 238


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ('a/b\\c:d*e?f"g<h>i|j\0k', "a-b-c-d-e-f-g-h-i-j-k"),
        ("..", "clip"),
        ("../../etc/passwd", "etc-passwd"),
        ("-rf .hidden. ", "rf-hidden"),
        ("\u202egnp.exe \u200d\ud800", "gnp-exe"),
        ("cafe\u0301 🐱!", "café-🐱"),
        ("नमस्ते दुनिया", "नमस्ते-दुनिया"),
        ("a \u0301 b", "a-b"),
        ("एक\u200d/x", "एक\u200d-x"),
    ],
)
def test_a_prompt_is_a_name_without_signs_that_mean_something(prompt: str, name: str):
    assert fill("{prompt}.mp4", prompt) == Path(f"{name}.mp4")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{sed}.mp4", r"\{sed\} is unknown; did you mean 'seed'"),
        ("{prompt:x}.mp4", "must have a length"),
        ("{prompt.mp4", "is not a template"),
        ("{}.mp4", r"\{\} is unknown"),
        ("a.mp4", r"one file for 2 clips; add \{index\}"),
    ],
)
def test_wrong_templates_are_refused(template: str, text: str):
    with pytest.raises(ValueError, match=text):
        naming.check_template(template, num_clips=2)


@pytest.mark.parametrize(
    ("template", "missing"),
    [
        ("{index}.mp4", None),
        ("{prompt}-{seed}.mp4", None),
        ("{prompt}.mp4", "{seed}"),
        ("{seed}.mp4", "{prompt}"),
    ],
)
def test_clips_of_several_prompts_and_seeds_need_names_that_tell_them_apart(
    template: str, missing: str | None
):
    if missing is None:
        assert naming.check_template(template, num_clips=6, count=3) == template
        return
    with pytest.raises(ValueError, match=rf"for \d clips; add {{index}} or {missing}"):
        naming.check_template(template, num_clips=6, count=3)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("", r"output '' is empty"),
        ("{prompt!s}.mp4", r"\{prompt!s\} must be \{prompt\}"),
        ("{prompt:²}.mp4", "must have a length"),
        ("ä" * 123 + ".mp4", r"output name ä{24}\.\.\. is too long: it has at most 248 bytes"),
        ("x" * 240 + "{prompt}.mp4", "at most 242 bytes"),
        ("x" * 256 + "/a.mp4", r"output folder x{24}\.\.\. .* 255 bytes"),
        ("\udcff.mp4", "is not valid Unicode text"),
        ("a\0b.mp4", "is not valid Unicode text"),
        ("{seed:q}.mp4", r"output .* \{seed:q\} must have a width"),
        ("{seed:99999999999}.mp4", "must have a width"),
        ("{date:%Y}.mp4", r"must be \{date\}"),
    ],
)
def test_what_is_no_name_is_refused_in_one_line(template: str, text: str):
    with pytest.raises(ValueError, match=text) as caught:
        fill(template, "a red ball")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_the_longest_names_are_kept_as_they_are():
    for name in ("x" * 244, "ä" * 122):
        assert fill(f"{name}.mp4", "p") == Path(f"{name}.mp4")
