"""Names of output files: templates, filled and free."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastvideo_inference import naming


def test_names_are_filled_from_prompt_seed_and_index(tmp_path: Path):
    template = naming.check_template(f"{tmp_path}/{{index}}-{{prompt:9}}-{{seed}}.mp4", num_clips=2)
    path = naming.fill(template, prompt="A Red  ball/../über", seed=7, index=1)
    assert path == tmp_path / "1-a-red-bal-7.mp4"


def test_a_prompt_cannot_leave_its_folder(tmp_path: Path):
    path = naming.fill(f"{tmp_path}/{{prompt}}.mp4", prompt="../../etc/passwd", seed=0, index=0)
    assert path.parent == tmp_path
    assert naming.fill("{prompt}.mp4", prompt="?!", seed=0, index=0) == Path("clip.mp4")


def test_a_folder_gets_the_default_name(tmp_path: Path):
    assert naming.check_template(str(tmp_path), num_clips=3) == f"{tmp_path}/{naming.DEFAULT_NAME}"
    assert naming.check_template("new/", num_clips=3) == f"new/{naming.DEFAULT_NAME}"


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


def test_a_free_name_is_one_that_neither_a_clip_nor_a_sidecar_has(tmp_path: Path):
    path = tmp_path / "a.mp4"
    assert naming.unused(path) == path
    path.touch()
    (tmp_path / "a-2.json").touch()
    assert naming.unused(path) == tmp_path / "a-3.mp4"
    assert naming.unused(path, taken={tmp_path / "a-3.mp4"}) == tmp_path / "a-4.mp4"
