"""`fastvideo eval`: what it measures, what it keeps, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastvideo_inference.evaluation import Evaluation, Table, fingerprint
from fastvideo_inference.recipe import versions

from fastvideo import media, render
from fastvideo.cli import main
from fastvideo.metrics.faithfulness import wilson
from fastvideo.worlds.shapes import ATTRIBUTES, World

FEW = {"prompts": 5, "reconstructions": 3, "batch": 2, "num_inference_steps": 1}


def plan(model: Path, output: Path, **changes: object) -> Evaluation:
    return Evaluation.plan(str(model), output=output, **{**FEW, **changes})


def finish(evaluation: Evaluation) -> Table:
    for _ in evaluation.run():
        pass
    return evaluation.report()


@pytest.fixture(scope="module")
def done(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Table]:
    evaluation = plan(tiny_folder, tmp_path_factory.mktemp("eval"))
    return evaluation, finish(evaluation)


def test_the_table_has_every_attribute_beside_its_ceilings_and_chance(done):
    _, table = done
    assert [line.attribute for line in table.lines] == [*ATTRIBUTES, "all"]
    for line in table.lines:
        right = round(line.rate * 5)
        assert line.n == 5 and (line.low, line.high) == wilson(right, 5)
        assert 0 <= line.vae <= 1 and line.low <= line.rate <= line.high
    shape = table.lines[0]
    assert shape.chance == 1 / len(ATTRIBUTES["shape"])
    assert 3 < table.psnr < 30 and -1 < table.ssim < 1 and table.num_reconstructions == 3


def test_the_truth_ceiling_is_the_parser_on_true_clips(done):
    evaluation, table = done
    how = evaluation.how
    world = World(height=how.height, width=how.width, num_frames=how.num_frames, fps=how.fps)
    clips = [world.clip(0, i, "heldout") for i in range(5)]
    right = [world.parse(c.frames_THWC)["scene"] == c.truth["scene"] for c in clips]
    (scene,) = (line for line in table.lines if line.attribute == "scene")
    assert scene.truth == sum(right) / 5


def test_a_batch_gives_the_clips_that_the_prompts_give_alone(done, tiny_folder):
    from fastvideo.model import load

    evaluation, _ = done
    how = evaluation.how
    world = World(height=how.height, width=how.width, num_frames=how.num_frames, fps=how.fps)
    clip = world.clip(0, 3, "heldout")
    tags = media.read_metadata(evaluation.clip_path(3))
    assert tags["prompt"] == clip.caption and tags["seed"] == "3"
    (alone,) = render.frames(load(tiny_folder), [clip.caption], seed=3, num_steps=1)
    kept, other = (media.read_video(evaluation.clip_path(i))[0] for i in (3, 2))
    assert (
        abs(blocks(kept) - blocks(alone)).mean() < 0.4 * abs(blocks(other) - blocks(alone)).mean()
    )


def blocks(frames: np.ndarray) -> np.ndarray:
    """Grey means of 8x8 pixels, which survive the video codec even in noise."""
    t, h, w, _ = frames.shape
    return frames.mean(3).reshape(t, h // 8, 8, w // 8, 8).mean((2, 4))


def test_a_finished_evaluation_gives_its_table_again_and_makes_nothing(done):
    evaluation, table = done
    before = {p: p.stat().st_mtime_ns for p in evaluation.results.glob("clips/*")}
    assert len(before) == 5
    assert list(evaluation.run()) == [(8, 8)]
    assert evaluation.report().to_json() == table.to_json()
    assert {p: p.stat().st_mtime_ns for p in evaluation.results.glob("clips/*")} == before
    assert json.loads((evaluation.results / "table.json").read_text())["model"] == "tiny"
    assert (evaluation.results / "sheet.png").is_file()


def test_a_killed_evaluation_goes_on_and_gives_the_same_table(done, tiny_folder, tmp_path):
    evaluation = plan(tiny_folder, tmp_path)
    running = evaluation.run()
    assert [next(running), next(running)] == [(0, 8), (2, 8)]
    running.close()
    with (evaluation.results / "made.jsonl").open("a") as file:
        file.write('{"index": 2, "prom')  # what a kill leaves
    again = plan(tiny_folder, tmp_path)
    assert next(again.run()) == (2, 8)
    table = finish(again)
    assert table.to_json() == done[1].to_json()
    assert list(again.run()) == [(8, 8)]


def test_other_settings_and_other_weights_are_kept_apart(done, tiny_folder, tiny_copy, tmp_path):
    evaluation, _ = done
    same = plan(tiny_folder, evaluation.output, prompts=4, batch=1)
    assert same.results == evaluation.results
    assert next(same.run()) == (7, 7)
    assert plan(tiny_folder, evaluation.output, seed=1).results != evaluation.results
    assert fingerprint(tiny_copy) == fingerprint(tiny_folder)
    path = tiny_copy / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert fingerprint(tiny_copy) != fingerprint(tiny_folder)


def test_an_automatic_dtype_is_kept_apart_from_another_and_with_itself(
    tiny_folder, tmp_path, monkeypatch
):
    auto, float32, bfloat16 = (
        plan(tiny_folder, tmp_path, dtype=d) for d in ("auto", "float32", "bfloat16")
    )
    assert auto.recipe()["dtype"] in ("float32", "bfloat16")
    assert auto.results in (float32.results, bfloat16.results)
    assert float32.results != bfloat16.results
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert plan(tiny_folder, tmp_path).results == float32.results
    assert auto.recipe()["versions"] == versions()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "0"], "prompts 0 must be at least 1"),
        (["--prompts", "4", "--reconstructions", "9"], "reconstructions 9 must be from 1 to 4"),
        (["--frames", "8"], "num_frames 8 must be 4k+1"),
        (["--size", "33x48"], "width 33 must be a multiple of 16"),
        (["--size", "big"], "must look like WIDTHxHEIGHT"),
        (["--world", "shape"], "did you mean 'shapes'"),
        (["--steps", "0"], "num_inference_steps"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(tiny_folder, capsys, words, message):
    assert main(["eval", str(tiny_folder), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_the_command_prints_the_table_or_its_json(done, tiny_folder, capsys):
    evaluation, table = done
    words = ["eval", str(tiny_folder), "--prompts", "5", "--reconstructions", "3", "--steps", "1"]
    words += ["-o", str(evaluation.output)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "made (n=5)" in text and "VAE on 3 held-out clips" in text and "sheet.png" in text
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(table.to_json())


def test_arguments_are_judged_before_torch_is_imported():
    code = (
        "import sys; from fastvideo.cli import main; code = main(['eval', 'nowhere']);"
        "sys.exit(code if 'torch' not in sys.modules else 99)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 2
