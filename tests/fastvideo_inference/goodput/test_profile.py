"""What a profile estimates, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fastvideo_inference.goodput import profile as profiles
from fastvideo_inference.goodput.measure import served
from fastvideo_inference.goodput.profile import Cell, Estimate, Profile

from fastvideo import cli, registry
from fastvideo.resolve import resolve
from fastvideo.sampling import GenerateRequest, SamplingParams
from tests.fastvideo_inference.goodput.conftest import Make


def test_seconds_lie_on_the_line_between_two_sizes_and_go_on_beyond_them(
    make_profile: Make, params: SamplingParams
):
    cells = [Cell(stage="decode", work=w, seconds=(s,)) for w, s in ((1e6, 1.0), (2e6, 1.5))]
    profile = make_profile(cells=tuple(cells))

    def decode_s(side: int, frames: int) -> float:
        clip = params.model_copy(update={"width": side, "height": side, "num_frames": frames})
        return profile.stage_s("decode", clip).median

    assert decode_s(1000, 1) == pytest.approx(1.0)
    assert decode_s(1000, 2) == pytest.approx(1.5)
    assert decode_s(500, 6) == pytest.approx(1.25)
    assert decode_s(1000, 4) == pytest.approx(2.5)
    assert decode_s(500, 1) == pytest.approx(0.625)
    assert decode_s(1, 1) >= 1.0 * 1e-6


def test_steps_are_counted_and_a_second_forward_too(make_profile: Make, params: SamplingParams):
    profile = make_profile()
    assert profile.stage_s("denoise", params).median == pytest.approx(3 * 0.2)
    guided = params.model_copy(update={"guidance_scale": 4.0})
    assert profile.stage_s("denoise", guided).median == pytest.approx(2 * 3 * 0.2)
    assert profile.stage_s("encode_text", guided).median == pytest.approx(2 * 0.1)


def test_the_high_quantile_is_of_the_spread_and_sums_as_independent_ones(
    make_profile: Make, params: SamplingParams
):
    found = make_profile(spread=1.5).stage_s("decode", params)
    assert found == Estimate(0.5, pytest.approx(0.75))
    both = found + Estimate(1.0, 1.0 + 0.25)
    assert both.median == 1.5
    assert both.high == pytest.approx(1.5 + (2 * 0.25**2) ** 0.5)


def test_what_took_no_time_has_no_spread(make_profile: Make, params: SamplingParams):
    cell = Cell(stage=profiles.DISPATCH, work=1.0, seconds=(0.0, 0.0, 0.1))
    profile = make_profile()
    assert Profile(**{**dict(profile), "cells": (*profile.cells, cell)}).dispatch_s == 0.0


def test_a_factor_of_later_clips_counts(make_profile: Make, params: SamplingParams):
    profile = make_profile(factors={"decode": 1.2})
    assert profile.stage_s("decode", params).median == pytest.approx(0.6)
    assert profile.stage_s("encode_text", params).median == pytest.approx(0.1)


@pytest.mark.parametrize(
    "change", [{"attention": "dense"}, {"decoder": "tiny"}, {"parallel": "ring=2"}]
)
def test_what_was_not_measured_is_refused_with_what_was(
    make_profile: Make, params: SamplingParams, change: dict[str, str]
):
    params = params.model_copy(update={k: v for k, v in change.items() if k == "attention"})
    stage = "decode" if "decoder" in change else "denoise"
    how = {k: v for k, v in change.items() if k != "attention"}
    with pytest.raises(ValueError, match=f"profile has no {stage}"):
        make_profile().stage_s(stage, params, **how)


@pytest.mark.parametrize("field", ["name", "kind", "threads", "torch", "fastvideo"])
def test_a_profile_of_another_device_or_version_is_refused(make_profile: Make, field: str):
    profile = make_profile()
    here = profile.device.model_dump()
    profile.check(fingerprint=profile.fingerprint, **here)
    with pytest.raises(ValueError, match=field):
        profile.check(fingerprint=profile.fingerprint, **{**here, field: "other"})


def test_a_profile_of_other_weights_is_refused(make_profile: Make):
    with pytest.raises(ValueError, match="the model is 000000000000"):
        make_profile().check(fingerprint="0" * 64)


def test_a_file_comes_back_equal_and_what_is_none_is_refused_by_name(
    make_profile: Make, tmp_path: Path
):
    path = tmp_path / "p.json"
    profiles.write(make_profile(), path)
    assert profiles.read(path) == make_profile()
    for text, why in (("{", "not JSON"), ('{"version": 2}', "version"), ("[]", "keys and values")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path}.*{why}|{why}.*{path}"):
            profiles.read(path)
    with pytest.raises(ValueError, match=r"absent\.json"):
        profiles.read(tmp_path / "absent.json")


@pytest.mark.parametrize("parallel", ["", pytest.param("ulysses=2", marks=pytest.mark.full)])
def test_several_processes_are_the_workers_of_a_loaded_server(
    tiny_folder: Path, tmp_path: Path, parallel: str, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("fastapi")
    path = tmp_path / "p.json"
    words = ["--processes", "2", "--repeats", "2", "--device", "cpu", "--frames", "5"]
    words += ["--parallel", parallel] if parallel else []
    assert cli.main(["profile", str(tiny_folder), *words, "-o", str(path)]) == 0
    made = profiles.read(path)
    clip = resolve(GenerateRequest(prompt="a ball", seed=1, num_frames=5), made.spec)
    alone = made.row_s(clip)
    assert [*alone] == [*made.spec.stages]
    assert any(cell.stage == "dispatch" for cell in made.cells)
    assert (made.processes, made.device.threads) == (2, 1)
    reloads = made.reload_s(made.spec.stages, max(made.gib.values()))
    assert {stage for stage, s in reloads.items() if s > 0} == {"encode_text", "denoise", "decode"}
    assert made.reload_s(made.spec.stages, None)["denoise"] == 0
    if parallel:
        assert made.row_s(clip, parallel=parallel) != alone


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--parallel", "ulysses=2"], "parallel ulysses=2 takes 2 processes"),
        (["--parallel", "data=1", "--processes", "2"], "parallel data=1 takes 1 processes"),
        (["--attention", "dense", "--processes", "2"], "attention: a server makes"),
    ],
)
def test_what_a_loaded_server_cannot_do_is_refused(
    tiny_folder: Path, words: list[str], why: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["profile", str(tiny_folder), *words]) == 2
    assert why in capsys.readouterr().err


def test_a_server_that_does_not_start_is_told_in_its_own_words(tmp_path: Path):
    (tmp_path / "serve.toml").write_text('[[worker]]\nstages = ["dance"]\n')
    with pytest.raises(RuntimeError, match="dance"), served(tmp_path / "serve.toml"):
        pass


def test_parts_of_stages_are_those_of_their_modules_and_bring_no_torch(
    make_profile: Make, tmp_path: Path
):
    for stage in make_profile().spec.stages:
        own = registry.module("fastvideo.stages", stage).PARTS
        assert profiles.PARTS.get(stage, ()) == own
    profiles.write(make_profile(), tmp_path / "p.json")
    code = (
        "import sys; from fastvideo_inference.goodput import plan, profile;"
        f" made = profile.read({str(tmp_path / 'p.json')!r});"
        " assert made.reload_s(made.spec.stages, 0.1)['denoise'];"
        " list(plan.placements(made, devices=2, memory_gib=None));"
        " assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
