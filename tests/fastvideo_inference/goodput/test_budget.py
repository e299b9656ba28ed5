"""A budget: the best setting that is in time, refused where none is; and how seconds are learnt."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastvideo_inference.goodput import budget as budgets
from fastvideo_inference.goodput import measure, quality
from fastvideo_inference.goodput.budget import Budget
from fastvideo_inference.goodput.profile import Profile

from fastvideo import VideoPipeline, cli, hub
from fastvideo.hub import OpenModel
from fastvideo.sampling import GenerateRequest

QUALITY = """
measured = "by hand"
[[option]]
quality = 0.5
steps = 2
[[option]]
quality = 0.9
steps = 60
[[option]]
quality = 0.7
steps = 10
"""


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    made = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (made / quality.FILE).write_text(QUALITY)
    return made


@pytest.fixture
def found(folder: Path) -> OpenModel:
    return hub.open_model(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(budgets, "_CACHE", tmp_path / "profiles")
    monkeypatch.setattr(measure, "is_loaded", lambda: False)
    return tmp_path / "profiles"


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("fastvideo")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def steps_of(found: OpenModel, **given: Any) -> list[int]:
    request = GenerateRequest(prompt="a red ball", **given)
    settings = quality.candidates(request, found, decoder=None)
    return [one.params.num_inference_steps for one in settings]


def known(found: OpenModel) -> tuple[Any, ...]:
    return quality.candidates(GenerateRequest(prompt="a red ball"), found, decoder=None)


def test_settings_come_best_first_and_what_is_given_stays(found: OpenModel):
    assert steps_of(found) == [60, 10, 2]
    assert steps_of(found, num_inference_steps=7) == [7]


def test_a_model_without_the_order_of_its_settings_is_refused(tiny_folder: Path):
    with pytest.raises(ValueError, match=r"has no quality\.toml.*eval --compare"):
        known(hub.open_model(tiny_folder))


@pytest.mark.parametrize(
    ("text", "why"),
    [("quality = 0.5\nsteps = 0", "steps"), ("quality = -1.0", "quality"), ("stepz = 1", "stepz")],
)
def test_a_wrong_line_of_the_file_is_named(folder: Path, text: str, why: str):
    (folder / quality.FILE).write_text(f'measured = ""\n[[option]]\n{text}\n')
    with pytest.raises(ValueError, match=why):
        known(hub.open_model(folder))


@pytest.fixture
def made(found: OpenModel, make_tiny_profile) -> Budget:
    """A budget of 5 s where a step takes 0.1 s, and the rest of a clip 1 s."""
    budget = Budget(5.0, found, device="cpu")
    budget.profile = make_tiny_profile(found, denoise=0.1, decode=1.0)
    return budget


@pytest.fixture
def make_tiny_profile() -> Any:
    from tests.fastvideo_inference.engine.test_admission import profile_of

    def make(found: OpenModel, **seconds: float) -> Any:
        from fastvideo_inference.goodput import profile as profiles

        path = found.folder.parent / "by-hand.json"
        guided = known(found)[0].params
        return profiles.read(profile_of(found.folder, path, params=guided, **seconds))

    return make


def test_the_best_setting_in_time_is_chosen_and_why_is_said(made: Budget, found: OpenModel):
    choice = made.choose(known(found))
    assert choice.setting.params.num_inference_steps == 10
    assert choice.expected_s == pytest.approx(2.0, abs=0.02)
    assert "60 steps" in choice.reason and "budget 5 s" in choice.reason


def test_what_is_spent_and_a_first_clip_count(made: Budget, found: OpenModel):
    assert made.choose(known(found), spent_s=3.5).setting.params.num_inference_steps == 2
    assert made.profile
    made.profile = made.profile.with_factors({budgets.FIRST: 3.0, budgets.START: 4.0})
    assert made.choose(known(found), first=True).setting.params.num_inference_steps == 2
    with pytest.raises(ValueError, match="smallest budget"):
        made.choose_cold(known(found), spent_s=0.0)


def test_a_budget_that_none_meets_is_refused_with_the_smallest_that_one_would(
    made: Budget, found: OpenModel
):
    made.seconds = 0.5
    with pytest.raises(ValueError, match=r"smallest budget that could be met is 1\.3 s.*2 steps"):
        made.choose(known(found))


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_nonsense_is_no_budget(found: OpenModel, seconds: float):
    with pytest.raises(ValueError, match="must be above 0"):
        Budget(seconds, found)


def test_a_call_measures_once_and_says_what_was_predicted_and_taken(
    folder: Path, cache: Path, logged
):
    pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    video = pipe("a red ball", seed=1, budget=60)
    assert "measuring" in logged.text
    assert video.recipe["request"]["num_inference_steps"] == 60
    assert video.budget and video.budget["budget_s"] == 60
    assert 0 < video.budget["predicted_s"] <= video.budget["nine_of_ten_s"] < 60
    assert 0 < video.budget["actual_s"] < 60
    (kept,) = cache.glob("*.json")
    logged.clear()
    again = pipe("a red ball", seed=1, budget=60)
    assert "measuring" not in logged.text
    assert again.frames_sha256 == video.frames_sha256
    assert json.loads(kept.read_text())["factors"]
    with pytest.raises(ValueError, match="smallest budget"):
        pipe("a red ball", seed=1, budget=1e-6)


def measurements(logged: pytest.LogCaptureFixture) -> int:
    return len({id(one) for one in logged.records if "measuring" in one.getMessage()})


def test_what_a_busy_machine_took_is_said_to_be_so_and_measured_again_when_it_is_idle(
    folder: Path, cache: Path, logged, monkeypatch
):
    is_busy, pipe = [True], VideoPipeline.from_pretrained(folder, device="cpu")
    monkeypatch.setattr(measure, "is_loaded", lambda: is_busy[0])
    for times in (1, 1):  # though a new process asks, it is as busy as before
        pipe.profile = None
        pipe("a red ball", seed=1, budget=60)
        assert measurements(logged) == times
        assert "busy" in logged.text
    is_busy[0] = False
    pipe("a red ball", seed=1, budget=60)
    assert measurements(logged) == 2
    (kept,) = cache.glob("*.json")
    assert not json.loads(kept.read_text())["is_busy"]


def test_cores_are_busy_if_they_were_not_idle_for_a_quarter(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(measure, "_LOOK_S", 0.0)
    for idle, expected in ((90, False), (60, True)):
        clocks = iter([(0, 0), (idle, 100)])
        monkeypatch.setattr(measure, "_clocks", lambda clocks=clocks: next(clocks))
        assert measure.is_loaded() is expected


def test_another_pattern_is_measured_beside_what_is_known(
    folder: Path, cache: Path, logged, found: OpenModel
):
    pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    pipe("a red ball", seed=1, budget=60)
    for _ in range(2):
        for pattern in (None, "vsa(sparsity=0)"):
            pipe("a red ball", seed=1, budget=60, attention=pattern)
    assert measurements(logged) == 2


def test_a_step_is_measured_by_itself(folder: Path, found: OpenModel):
    pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    (best, *_) = known(found)
    made = measure.quick(pipe, [best], fingerprint="", repeats=2)
    clip = pipe(**best.params.model_dump(include={"prompt", "seed", "num_inference_steps"}))
    step_s = made.stage_s("denoise", best.params).median / 60
    assert step_s == pytest.approx(clip.timings["denoise"] / 60, rel=0.9)


def test_a_setting_is_in_time_if_nine_of_ten_of_its_clips_are(made: Budget, found: OpenModel):
    assert made.profile
    spread = [
        cell.model_copy(update={"seconds": (cell.seconds[0],) * 7 + (4 * cell.seconds[0],) * 3})
        for cell in made.profile.cells
    ]
    made.profile = Profile(**{**dict(made.profile), "cells": spread})
    choice = made.choose(known(found))  # 2 s at 10 steps, and up to 8
    assert choice.setting.params.num_inference_steps == 2


def test_a_first_clip_teaches_how_long_a_start_and_a_first_clip_take(
    made: Budget, found: OpenModel
):
    assert made.profile
    (_, ten, _), took = known(found), {"load": 9.0, "denoise": 2.0, "decode": 2.0}
    made.note(ten, took, start_s=1.25)
    assert made.profile.factors[budgets.START] == 1.25
    assert made.profile.factors[budgets.FIRST] == pytest.approx(2.0, rel=0.02)  # loads count apart


def test_the_file_counts_where_it_is_written(made: Budget, found: OpenModel):
    (_, ten, _) = known(found)
    for saves in (True, False):
        budget = Budget(5.0, found, device="cpu", saves=saves)
        budget.profile = made.profile
        budget.note(ten, {"denoise": 1.0, "save": 2.0})
        assert budget.profile and ("save" in budget.profile.factors) == saves


def test_the_command_chooses_says_why_and_writes_it_beside_the_clip(
    folder: Path, tmp_path: Path, capsys
):
    asked = ["generate", "a red ball", "-m", str(folder), "--device", "cpu", "--seed", "1"]
    path = tmp_path / "ball.mp4"
    # its clock counts from the start of this process, which tests
    age_s = budgets.process_age_s()
    assert cli.main([*asked, "-o", str(path), "--budget", f"{age_s + 60:.0f}s", "--json"]) == 0
    beside = json.loads(path.with_suffix(".json").read_text())
    assert beside["budget"]["reason"] in beside["notices"]
    assert beside["recipe"]["request"]["num_inference_steps"] == 60
    assert beside["budget"]["actual_s"] > age_s
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert beside["budget"]["reason"] in [one.get("text") for one in lines]
    other = tmp_path / "late.mp4"
    assert cli.main([*asked, "-o", str(other), "--budget", "0.001"]) == 2
    assert "smallest budget" in capsys.readouterr().err
    assert not other.exists()


@pytest.mark.parametrize("text", ["0", "-1", "soon", "1e9", "nan"])
def test_a_wrong_budget_is_refused_before_anything_is_loaded(folder: Path, text: str, capsys):
    asked = ["generate", "a red ball", "-m", str(folder), f"--budget={text}"]
    assert cli.main(asked) == 2
    assert "--budget" in capsys.readouterr().err


def test_the_age_of_a_process_counts_from_its_start():
    text = "import time; time.sleep(0.3); from fastvideo_inference.goodput import budget"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", f"{text}; print(budget.process_age_s())"],
        capture_output=True,
        check=True,
    )
    assert 0.3 <= float(done.stdout) <= time.perf_counter() - began + 0.02  # a tick
