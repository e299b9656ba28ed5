"""`fastvideo eval --compare`: rows that are paired, reused and resumed, and the table of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fastvideo_inference import comparison
from fastvideo_inference.comparison import Comparison, read
from fastvideo_inference.contrast import Contrast
from fastvideo_inference.evaluation import Evaluation
from fastvideo_inference.goodput import quality
from fastvideo_inference.paired import difference
from fastvideo_inference.recipe import fingerprint
from fastvideo_inference.scores import Records

from fastvideo import hub, media
from fastvideo.cli import main
from fastvideo.formats import diffusers as layout
from fastvideo.measure import Scorer
from fastvideo.metrics.diversity import diversity
from fastvideo.metrics.faithfulness import wilson
from fastvideo.model import load
from fastvideo.models import decoder as decoders
from fastvideo.models.decoder import taehv
from fastvideo.sampling import GenerateRequest
from fastvideo.spec import Scheduler
from fastvideo.worlds.shapes import ATTRIBUTES, CLASSIFIER
from tests.clips import frames

SIGMAS = [1.0, 0.909091, 0.714286]
FILE = """
base = "teacher, 2 steps"
prompts = 4
repeats = 2
diverse = 2
batch = 2
timed = 0
shown = 2

[models]
teacher = "{teacher}"
student = "{student}"

[[rows]]
name = "teacher, 2 steps"
model = "teacher"

[[rows]]
name = "teacher, 3 steps"
model = "teacher"
steps = 3
prompts = 2

[[rows]]
name = "student, 3 steps"
model = "student"

[[rows]]
name = "student, 2 steps"
model = "student"
sigmas = [1.0, 0.714286]
"""
ALL = 3 * (4 + 2) + (2 + 2)


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's weights under a few-step scheduler."""
    model = load(tiny_folder, dtype="float32")
    args = {"sigmas": SIGMAS, "renoise": False}
    few = {"num_inference_steps": 3, "guidance_scale": 1.0}
    changes: dict[str, Any] = {
        "name": "student",
        "scheduler": Scheduler(name="few_step", args=args),
        "defaults": model.spec.defaults.model_copy(update=few),
    }
    folder = tmp_path_factory.mktemp("students") / "student"
    return layout.save(
        dataclasses.replace(model, spec=model.spec.model_copy(update=changes)), folder
    )


@pytest.fixture(scope="module")
def file(tiny_folder: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "compare.toml"
    path.write_text(FILE.format(teacher=tiny_folder, student=student))
    return path


def plan(file: Path, output: Path, **changes: Any) -> Comparison:
    return Comparison.plan(read(file, changes=changes), output=output, dtype="float32")


def finish(compared: Comparison) -> Contrast:
    for _ in compared.run():
        pass
    return compared.report()


@pytest.fixture(scope="module")
def done(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Contrast]:
    compared = plan(file, tmp_path_factory.mktemp("eval"))
    return compared, finish(compared)


def records(compared: Comparison, row: int, name: str = "made") -> list[dict[str, Any]]:
    evaluation = compared.entries[row].evaluation
    found = Records(evaluation.results / f"{name}.jsonl")
    return found.first(evaluation.prompts if name == "made" else evaluation.diverse)


def share(record: dict[str, Any]) -> float:
    right = [record["parse"].get(name) == record["truth"][name] for name in ATTRIBUTES]
    return sum(right) / len(right)


def test_every_row_has_its_settings_and_rates(done):
    _, table = done
    assert [r.name for r in table.rows][1:] == [
        "teacher, 3 steps", "student, 3 steps", "student, 2 steps",
    ]  # fmt: skip
    assert [r.n for r in table.rows] == [4, 2, 4, 4]
    assert [r.sampler.steps for r in table.rows] == [2, 3, 3, 2]
    assert [r.sampler.forwards for r in table.rows] == [4, 6, 3, 2]
    assert [r.sampler.sigmas for r in table.rows] == [None, None, tuple(SIGMAS), (1.0, 0.714286)]
    assert [r.sampler.own for r in table.rows] == [True, True, True, False]
    for row in table.rows:
        assert list(row.rates) == [*ATTRIBUTES, "all"]
        for rate in row.rates.values():
            right = round(rate.value * row.n)
            assert (rate.low, rate.high) == wilson(right, row.n)
        own = [row.rates[name].value for name in ATTRIBUTES]
        assert row.mean == pytest.approx(sum(own) / len(own))
    assert table.truth["diversity"] > 0 < table.truth["flicker"]


def test_rows_are_made_of_the_same_prompts_and_noise(done):
    compared, _ = done
    for row in (1, 2, 3):
        for mine, its in zip(records(compared, row), records(compared, 0), strict=False):
            assert (mine["prompt"], mine["truth"]) == (its["prompt"], its["truth"])
    seeds = [
        media.read_metadata(entry.evaluation.clip_path(1))["seed"] for entry in compared.entries
    ]
    assert set(seeds) == {"1"}


@pytest.mark.parametrize(("row", "n"), [(1, 2), (2, 4), (3, 4)])
def test_a_difference_is_that_of_the_prompts_that_both_were_made_of(done, row: int, n: int):
    compared, table = done
    mine, its = ([share(r) for r in records(compared, i)][:n] for i in (row, 0))
    groups = [tuple(r["truth"].items()) for r in records(compared, 0)[:n]]
    found = table.rows[row].against
    assert found.prompts == n
    assert found.mean.value == pytest.approx(sum(mine) / n - sum(its) / n)
    assert found.mean == difference(mine, its, groups)
    assert found.all == difference([m == 1 for m in mine], [i == 1 for i in its], groups)
    assert table.rows[0].against is None


def test_diversity_is_a_share_of_the_bases(done):
    compared, table = done

    def spread(row: int, i: int) -> float:
        return diversity(
            [[records(compared, row, name)[i]["features"] for name in ("made", "take-1")]]
        )

    mine, its = ([spread(row, i) for i in range(2)] for row in (2, 0))
    assert table.rows[2].diversity == pytest.approx(sum(mine) / 2)
    assert table.rows[2].against.diversity.value == pytest.approx(sum(mine) / sum(its))


def test_other_sigmas_are_what_the_network_is_evaluated_at(done, student: Path):
    compared, _ = done
    model = load(student, dtype="float32")
    args = {"sigmas": [1.0, 0.714286], "renoise": False}
    changed = model.spec.model_copy(update={"scheduler": Scheduler(name="few_step", args=args)})
    prompts = [records(compared, 3)[i]["prompt"] for i in (0, 1)]
    clips = frames(dataclasses.replace(model, spec=changed), prompts, num_inference_steps=2)
    scorer = Scorer(hub.ZOO / CLASSIFIER)
    assert [records(compared, 3)[i]["features"] for i in (0, 1)] == [scorer(c)[0] for c in clips]


def test_sigmas_of_its_own_keep_the_times_that_the_network_was_told(student: Path, tmp_path: Path):
    copy = tmp_path / "student"
    model = load(student, dtype="float32")
    args = {"sigmas": [1.0, 0.75, 0.5], "timesteps": [1000.0, 757.0, 522.0]}
    changed = model.spec.model_copy(update={"scheduler": Scheduler(name="few_step", args=args)})
    layout.save(dataclasses.replace(model, spec=changed), copy)

    def told(*sigmas: float) -> Any:
        made = Evaluation.plan(str(copy), output=tmp_path, prompts=1, sigmas=sigmas)
        return made.scheduler.args["timesteps"]

    assert told(1.0, 0.5) == [1000.0, 522.0]
    assert told(1.0, 0.75, 0.5) == args["timesteps"]
    assert told(1.0, 0.6) is None  # 1000 sigma


def test_a_row_is_the_evaluation_that_eval_makes(done, tiny_folder: Path):
    compared, _ = done
    words = ["eval", str(tiny_folder), "--prompts", "4", "--reconstructions", "1", "--diverse", "2"]
    words += ["--repeats", "2", "--dtype", "float32", "-o", str(compared.output)]
    evaluation = compared.entries[0].evaluation
    before = {p: p.stat().st_mtime_ns for p in evaluation.results.glob("clips/*")}
    assert main(words) == 0
    assert {p: p.stat().st_mtime_ns for p in evaluation.results.glob("clips/*")} == before
    assert (evaluation.results / "table.json").is_file()


def test_an_evaluation_that_is_there_is_reused(file: Path, tiny_folder: Path, tmp_path: Path):
    alone = Evaluation.plan(
        str(tiny_folder), output=tmp_path, prompts=4, reconstructions=1, repeats=2, diverse=2,
        batch=2, dtype="float32",
    )  # fmt: skip
    for _ in alone.run():
        pass
    assert next(plan(file, tmp_path).run()) == (6, ALL)


def test_a_finished_comparison_gives_its_table_again_and_makes_nothing(done, file: Path):
    compared, table = done
    again = plan(file, compared.output)
    before = {p: p.stat().st_mtime_ns for p in compared.output.glob("*/clips/*")}
    assert list(again.run()) == [(ALL, ALL)]
    assert again.report().to_json() == table.to_json()
    assert {p: p.stat().st_mtime_ns for p in compared.output.glob("*/clips/*")} == before
    names = {p.name for p in compared.results.iterdir()}
    assert names == {"recipe.json", "table.json", "table.md", "sheet.png", "clips.webp"}


@pytest.mark.parametrize(("batches", "made"), [(1, 2), (8, 16)])
def test_a_killed_comparison_goes_on_and_gives_the_same_table(
    done, file: Path, tmp_path: Path, batches: int, made: int
):
    compared = plan(file, tmp_path)
    running = compared.run()
    assert next(running) == (0, ALL)
    assert [next(running) for _ in range(batches)][-1] == (made, ALL)
    running.close()
    again = plan(file, tmp_path)
    assert next(again.run()) == (made, ALL)
    assert finish(again).to_json() == done[1].to_json()


@pytest.mark.full
def test_a_killed_process_loses_no_finished_row(done, file: Path, tmp_path: Path):
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = ["eval", "--compare", str(file), "-o", str(tmp_path), "--dtype", "float32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvideo", *words], env=path, stdout=subprocess.DEVNULL
    )
    second = plan(file, tmp_path).entries[1].evaluation.results / "made.jsonl"
    while process.poll() is None and not second.is_file():
        time.sleep(0.005)
    process.kill()
    process.wait()
    there, total = next(plan(file, tmp_path).run())
    assert 8 <= there < total == ALL
    assert finish(plan(file, tmp_path)).to_json() == done[1].to_json()


def test_every_row_is_timed_in_every_round_and_a_kill_loses_one_round(
    done, file: Path, monkeypatch
):
    compared, _ = done
    order: list[str] = []
    seconds = comparison._seconds

    def spy(evaluation: Any, model: Any, index: int) -> Any:
        (name,) = (e.name for e in timed.entries if e.evaluation is evaluation)
        order.append(f"{index} {name}")
        return seconds(evaluation, model, index)

    monkeypatch.setattr(comparison, "_seconds", spy)
    timed = plan(file, compared.output, timed=2)
    running = timed.run()
    assert next(running) == (ALL, ALL + 8)
    assert next(running) == (ALL + 4, ALL + 8)
    running.close()
    names = [e.name for e in timed.entries]
    assert order == [f"0 {n}" for n in (names[0], names[2], *names)], (
        "a warm-up of each model first"
    )
    order.clear()
    timed = plan(file, compared.output, timed=2)
    assert next(timed.run()) == (ALL + 4, ALL + 8)
    table = finish(timed)
    assert order[2:] == [f"1 {n}" for n in (*names[1:], names[0])]
    for row in table.rows:
        low, high = row.seconds.total["range"]
        assert row.seconds.rounds == 2 and 0 < row.seconds.denoise["s"] < row.seconds.total["s"]
        assert 0 < low <= row.seconds.total["s"] <= high
    assert table.rows[0].seconds.faster == {"ratio": 1.0, "range": [1.0, 1.0]}
    assert table.machine["torch"] and table.versions["fastvideo"]


def test_a_row_with_a_small_decoder_is_made_and_timed_with_it(
    file: Path, tiny_copy: Path, tmp_path: Path, monkeypatch
):
    vae = load(tiny_copy, parts=("vae",)).vae.config
    config = taehv.Config(
        z_dim=vae.z_dim, widths=(8, 6, 4, 4), num_blocks=(1, 1, 1), space=(True, True, False),
        patch_size=2, latents_mean=vae.latents_mean, latents_std=vae.latents_std,
    )  # fmt: skip
    small = taehv.Decoder(config).eval()
    decoders.write(small, tiny_copy / "decoders" / "small", family="taehv", dtype=torch.float32)
    used: dict[str, Any] = {}
    seconds = comparison._seconds

    def spy(evaluation: Any, model: Any, index: int) -> Any:
        used[evaluation.results.name] = model.decoder
        return seconds(evaluation, model, index)

    monkeypatch.setattr(comparison, "_seconds", spy)
    rows = [{"name": "own", "model": "teacher"}, {"name": "small", "model": "teacher"}]
    rows[1]["decoder"] = "small"
    few = {"prompts": 1, "repeats": 0, "diverse": 1, "timed": 1, "rows": rows, "base": "own"}
    table = finish(plan(file, tmp_path / "eval", models={"teacher": str(tiny_copy)}, **few))
    assert [row.sampler.decoder for row in table.rows] == [None, "small"]
    own, tiny = (used[row.evaluation] for row in table.rows)
    assert own is None and isinstance(tiny, taehv.Decoder)


def test_the_sheet_has_a_row_of_clips_for_each_setting(done, monkeypatch):
    compared, _ = done
    from PIL import Image

    with Image.open(compared.results / "sheet.png") as sheet:
        assert sheet.size == (2 * 3 * (48 + 4), 4 * (16 + 32 + 4))
    with Image.open(compared.results / "clips.webp") as moving:
        assert moving.size == (2 * (48 + 4), 4 * (32 + 4)) and moving.n_frames == 9


def test_the_command_prints_the_tables_or_their_json(done, file: Path, capsys):
    compared, table = done
    words = ["eval", "--compare", str(file), "-o", str(compared.output), "--dtype", "float32"]
    assert main(words) == 0
    text = capsys.readouterr().out
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "|" in line}
    assert {r.name for r in table.rows} <= rows.keys() and "true clips" in rows
    assert "2: 1, 0.7143 * | 1 | 4 |" in text and "2 unipc | 3 | 4 |" in text
    assert "`*`: sigmas given by hand" in text
    assert "Student's t" in text and "Seconds were not measured." in text and "torch " in text
    assert text.splitlines()[0].count("|") == text.splitlines()[2].count("|")
    assert (compared.results / "table.md").read_text() in text
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(table.to_json())


def test_the_order_of_settings_is_written_beside_their_model_and_others_are_kept(
    tiny_folder: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    text = 'base = "two"\nprompts = 2\nrepeats = 0\ntimed = 0\n'
    for name, steps in (("two", 2), ("one", 1)):
        text += f'[[rows]]\nname = "{name}"\nmodel = "{folder}"\nsteps = {steps}\n'
    (tmp_path / "rows.toml").write_text(text)
    asked = ["eval", "--compare", str(tmp_path / "rows.toml"), "--quality", "-o", str(tmp_path)]
    assert main([*asked, "--device", "cpu"]) == 0
    assert main([*asked, "--device", "cpu", "--set", "frames=5"]) == 0
    found = quality.read(folder / quality.FILE).option
    assert {(one.steps, one.frames) for one in found} == {(2, 9), (1, 9), (2, 5), (1, 5)}
    assert [one.quality for one in found] == sorted((one.quality for one in found), reverse=True)
    assert fingerprint(folder) == fingerprint(tiny_folder)
    settings = quality.candidates(GenerateRequest(prompt="a"), hub.open_model(folder), decoder=None)
    assert len(settings) == 4


def test_an_order_of_settings_is_of_one_model(file: Path, tmp_path: Path, capsys):
    assert main(["eval", "--compare", str(file), "--quality", "-o", str(tmp_path)]) == 2
    assert "one model" in capsys.readouterr().err
    assert main(["eval", "--quality", "-o", str(tmp_path)]) == 2
    assert "--compare" in capsys.readouterr().err


def test_prompts_cap_those_of_every_row(file: Path, tmp_path: Path):
    settings = read(file, at_most=3)
    compared = Comparison.plan(settings, output=tmp_path)
    assert [e.evaluation.prompts for e in compared.entries] == [3, 2, 3, 3]
    assert [e.evaluation.diverse for e in compared.entries] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "base=teacher, 2 step"], "did you mean 'teacher, 2 steps'"),
        (["--set", "models.student=nowhere"], "row 'student, 3 steps': model 'nowhere' is neither"),
        (["--set", "prompt=3"], "prompt in --set prompt is unknown; did you mean 'prompts'?"),
        (["--steps", "3"], "--compare takes no --steps: write it into"),
        (["wan-nano"], "--compare takes no MODEL"),
        (["--prompts", "0"], "prompts 0 must be at least 1"),
        (["--set", "size=big"], "must look like WIDTHxHEIGHT"),
        (["--set", "rows=[]"], "rows [] in"),
        (["--set", "batch=true"], "batch true in --set batch: must be a valid integer"),
        (["--set", "num_frames=6"], "nearest: 5, 9 (from --set num_frames)"),
        (["--set", "height=40", "--set", "width=32"], "nearest: 32, 48 (from --set height)"),
        (["--set", 'rows=[{name="a", model="teacher", backend="flx"}]', "--set", "base=a"],
         'backend "flx" in --set rows: '),
        (["--set", 'rows=[{name="a", model="teacher"}, {name="a", model="student"}]',
          "--set", "base=a"], "two rows are named 'a'"),
        (["--set", 'rows=[{name="a", model="teacher"}, {name="b", model="teacher", steps=2}]',
          "--set", "base=a"], "rows 'a' and 'b' are the same setting"),
        (["--set", 'rows=[{name="a", model="teacher", sigmas=[1.0]}]', "--set", "base=a"],
         "row 'a': sigmas [1.0] need a model of few steps; the scheduler of tiny is unipc"),
        (["--set", 'rows=[{name="a", model="student", sigmas=[0.5, 0.6]}]', "--set", "base=a"],
         "row 'a': few_step sigmas [0.5, 0.6] must fall strictly"),
        (["--set", 'rows=[{name="a", model="student", steps=2}]', "--set", "base=a"],
         "row 'a': num_inference_steps 2: this distilled model takes exactly 3 steps; nearest: 3"),
        (["--set", 'rows=[{name="a", model="student", steps=2, sigmas=[1.0]}]', "--set", "base=a"],
         "row 'a': 2 steps cannot take 1 sigmas"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_any_clip(
    file: Path, tmp_path: Path, capsys, words: list[str], message: str
):
    assert main(["eval", "--compare", str(file), "-o", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_line_of_the_file_is_named(file: Path, tmp_path: Path):
    text = file.read_text()
    odd = tmp_path / "odd.toml"
    row = text[: text.index("sigmas")].count("\n") + 1
    for wrong, rule in (("stepz = 3", "is unknown"), ("steps = 0", "must be at least 1")):
        odd.write_text(text.replace("sigmas = [1.0, 0.714286]", wrong))
        with pytest.raises(ValueError, match=rf"in {odd}:{row}[: ].*{rule}") as caught:
            read(odd)
        assert "Tuple" not in str(caught.value)
    for name in ("frames", "num_frames"):
        odd.write_text(f"{name} = 0\n{text}")
        with pytest.raises(ValueError, match=rf"^{name} 0 in {odd}:1: must be"):
            read(odd)
    wrong = 'num_inference_steps = 2\nattention = "sta(windows=[[99, 1, 1]])"'
    odd.write_text(text.replace("sigmas = [1.0, 0.714286]", wrong))
    with pytest.raises(ValueError, match=rf"^row 'student, 2 steps': .* \(from {odd}:{row}\)$"):
        Comparison.plan(read(odd), output=tmp_path)
    odd.write_text(text.replace("sigmas = [1.0, 0.714286]", wrong.partition("\n")[2]))
    with pytest.raises(ValueError, match=rf"^row 'student, 2 steps': .* \(from {odd}:{row}\)$"):
        Comparison.plan(read(odd), output=tmp_path)


def test_a_field_of_a_row_has_its_short_or_its_full_name(file: Path, tmp_path: Path):
    text, full = file.read_text(), tmp_path / "full.toml"
    full.write_text("num_frames = 5\n" + text.replace("\nsteps =", "\nnum_inference_steps ="))
    assert read(full).model_dump() == read(file, changes={"frames": 5}).model_dump()
    full.write_text(text.replace("\nsteps =", "\nnum_inference_steps = 3\nsteps ="))
    with pytest.raises(ValueError, match=r"^rows\.1\.num_inference_steps in .*:\d+ is unk"):
        read(full)


def test_models_of_other_sizes_are_not_paired(file: Path, student: Path, tmp_path: Path):
    other = tmp_path / "other"
    model = load(student, dtype="float32")
    wide = model.spec.defaults.model_copy(update={"width": 64})
    changed = model.spec.model_copy(update={"defaults": wide})
    layout.save(dataclasses.replace(model, spec=changed), other)
    with pytest.raises(ValueError, match="has width 64, the base 'teacher, 2 steps' 48"):
        plan(file, tmp_path, models={"student": str(other)})
    paired = plan(file, tmp_path, models={"student": str(other)}, size="32x32")
    assert {e.evaluation.how.width for e in paired.entries} == {32}


def test_settings_for_a_comparison_need_one(capsys):
    assert main(["eval", "--set", "prompts=3"]) == 2
    assert "--set changes a comparison; give --compare FILE too" in capsys.readouterr().err


def test_a_setting_that_is_given_twice_is_told(file: Path, tmp_path: Path, capsys):
    words = ["--set", "prompts=3", "--set", "prompts=0", "-o", str(tmp_path)]
    assert main(["eval", "--compare", str(file), *words]) == 2
    first, error = capsys.readouterr().err.splitlines()
    assert first.startswith("--set prompts is given twice") and "at least 1" in error


def test_the_comparison_of_the_bundled_models_is_read(monkeypatch):
    settings = read(Path(__file__).parents[2] / "configs" / "bench" / "nano-compare.toml")
    assert [r.prompts or settings.prompts for r in settings.rows] == [64] + [256] * 6
    assert {r.model for r in settings.rows} == set(settings.models)
