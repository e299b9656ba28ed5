"""Placements: which exist, how they rank, what is refused, and the config that starts one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fastvideo_inference.commands.plan import FILES
from fastvideo_inference.goodput import plan as planning
from fastvideo_inference.goodput import profile as profiles
from fastvideo_inference.goodput.plan import Placement, Slo

from fastvideo import cli
from fastvideo.sampling import SamplingParams
from tests.fastvideo_inference.goodput.conftest import SECONDS, Make

pytest.importorskip("simpy")

CLIP_S = sum(SECONDS.values()) + 2 * SECONDS["denoise"]  # of three steps
SLO = Slo(deadline_s=3 * CLIP_S)


def sizes(found: Placement) -> list[tuple[int, str, int]]:
    return [(len(group.stages), group.parallel, group.count) for group in found.groups]


def test_every_split_that_fits_is_a_placement_once(make_profile: Make):
    profile = make_profile(ulysses={"denoise": 0.1, "decode": 0.3})
    for devices, expected in ((1, 1), (2, 2 + 1 + 2)):
        found = list(planning.placements(profile, devices=devices, memory_gib=None))
        assert len(found) == len({*found}) == expected
        assert all(sum(group.devices for group in one) <= devices for one in found)
    stages = {group.stages for one in found for group in one}
    assert ("encode_text", "prepare_latents") not in stages


def test_the_monolith_wins_if_nothing_speaks_against_it_and_ties_go_to_fewer_devices(
    make_profile: Make, params: SamplingParams
):
    found = planning.plan(make_profile(), params, devices=2, slo=SLO)
    assert found[0].is_monolith
    levels = [planning._order(one) for one in found]
    assert levels == sorted(levels)
    (group,) = found[0].groups
    one, two = (
        Placement((replace(group, count=n),), rate=rate, bursty_rate=0.0, clip_s=1.0)
        for n, rate in ((1, 1.0), (2, 2.001))
    )
    assert planning._order(one) < planning._order(two)


def test_splitting_wins_where_a_monolith_must_reload_its_parts(
    make_profile: Make, params: SamplingParams
):
    found = planning.plan(make_profile(), params, devices=3, slo=SLO, memory_gib=2.5)
    assert not found[0].is_monolith
    monoliths = [one for one in found if one.is_monolith]
    assert monoliths
    assert found[0].goodput > 1.1 * max(one.goodput for one in monoliths)
    assert all(one.clip_s >= CLIP_S + 1.0 for one in monoliths), "it loads three parts each time"


def test_a_monolith_that_is_too_slow_is_reported_last_with_no_goodput(
    make_profile: Make, params: SamplingParams
):
    slo = Slo(deadline_s=CLIP_S + 0.5)
    *better, last = planning.plan(make_profile(), params, devices=3, slo=slo, memory_gib=2.5)
    assert better
    assert last.is_monolith
    assert (last.rate, last.bursty_rate) == (0.0, 0.0)


def test_goodput_is_the_highest_rate_that_attains_the_target(
    make_profile: Make, params: SamplingParams
):
    (best, *_) = planning.plan(make_profile(), params, devices=2, slo=SLO)
    pools = [planning.pool_of(group, make_profile(), params) for group in best.groups]
    assert planning.attainment(pools, SLO, best.rate) >= SLO.target
    assert planning.attainment(pools, SLO, 1.05 * best.rate) < SLO.target
    assert best.bursty_rate < best.rate <= planning.capacity(pools) / SLO.target
    tight, wide = (Slo(scale * CLIP_S, target=0.9) for scale in (1.05, 10.0))
    assert planning.goodput(pools, tight) < best.rate < planning.goodput(pools, wide)
    late = replace(SLO, delivery_s=SLO.deadline_s - 1.05 * CLIP_S)
    assert planning.attainment(pools, late, best.rate) < SLO.target
    toml = planning.serve_toml(best, make_profile(), late, profile_path=None)
    assert f"deadline_s = {1.05 * CLIP_S:g}" in toml


def test_no_placement_that_was_not_simulated_is_better_than_those_that_were(
    make_profile: Make, params: SamplingParams
):
    profile = make_profile(ulysses={"denoise": 0.12, "decode": 0.3})
    found = planning.plan(profile, params, devices=4, slo=SLO)
    best = max(
        planning.goodput([planning.pool_of(group, profile, params) for group in groups], SLO)
        / sum(group.devices for group in groups)
        for groups in planning.placements(profile, devices=4, memory_gib=None)
        if sum(planning.pool_of(group, profile, params).count for group in groups)
    )
    assert found[0].goodput == pytest.approx(best, rel=0.03)


def test_a_plot_of_scales_that_leave_nothing_for_the_clip_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--shape", "1.3B", "--devices", "1", "--slo", "10", "--delivery", "4.5"]
    assert cli.main(["plan", "H200", *words, "-o", str(tmp_path)]) == 0
    assert (tmp_path / "plan.svg").exists()


def test_the_command_turns_a_measured_profile_into_a_config_that_serve_accepts(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("fastapi")
    profile, folder = str(tmp_path / "p.json"), tmp_path / "plan"
    assert cli.main(["profile", str(tiny_folder), "--repeats", "2", "-o", profile]) == 0
    made, alone = profiles.read(Path(profile)), str(tmp_path / "alone.json")
    device = made.device.model_copy(update={"threads": 2})
    profiles.write(made.model_copy(update={"device": device}), Path(alone))
    assert cli.main(["plan", alone, "--devices", "2", "--slo", "20", "-o", str(folder)]) == 2
    assert "--processes" in capsys.readouterr().err, "a worker has one core"
    words = ["plan", profile, "--devices", "2", "--slo", "20", "-o", str(folder)]
    assert cli.main(words) == 0
    table = capsys.readouterr().out
    assert "seconds are measured" in table and "monolith" in table
    found = json.loads((folder / "plan.json").read_text())
    assert found["profile"]["source"] == "measured"
    assert found["placements"][0]["goodput"] > 0
    assert (folder / "plan.svg").read_text().count("<polyline") == 2 * len(found["placements"][:4])
    config = folder / "serve.toml"
    assert '"cpu:0"' in config.read_text()
    assert cli.main(["serve", "--check", "--config", str(config)]) == 0
    assert cli.main(words) == 2, "nothing is overwritten"


def test_what_is_predicted_is_called_so_in_table_json_config_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--shape", "1.3B", "--devices", "1", "--slo", "10", "--decoder", "taehv"]
    assert cli.main(["plan", "H200", *words, "-o", str(tmp_path)]) == 0
    written = [(tmp_path / name).read_text() for name in FILES]
    assert all("predicted" in text for text in (capsys.readouterr().out, *written))
    assert cli.main(["serve", "--check", "--config", str(tmp_path / "serve.toml")]) == 0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--devices 0 --slo 5", "devices 0"),
        ("--devices 1 --slo 0.1", "the fastest takes"),
        ("--devices 1 --slo -1", "deadline -1"),
        ("--devices 1 --slo 5 --target 0", "target 0"),
        ("--devices 1 --slo 5 --delivery -1", "delivery -1"),
        ("--devices 1 --slo 5 --memory 1", "memory 1 GiB"),
        ("--devices 1 --slo 5 --steps -3", "num_inference_steps"),
        ("--devices 1 --slo 5 --decoder none", "has no decode none"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    words: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["plan", "H200", "--shape", "14B", *words.split(), "-o", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
