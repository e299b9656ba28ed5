"""`fastvideo eval`: what it measures, what it keeps, what it refuses."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fastvideo_inference.evaluation import REPEAT_STRIDE, Evaluation
from fastvideo_inference.recipe import fingerprint, versions
from fastvideo_inference.scores import Records, Table, fits

from fastvideo import hub, media, rng
from fastvideo.cli import main
from fastvideo.measure import Scorer
from fastvideo.metrics.diversity import diversity
from fastvideo.metrics.faithfulness import wilson
from fastvideo.worlds import shapes
from fastvideo.worlds.shapes import ATTRIBUTES, CLASSIFIER, World
from tests.clips import frames

FEW = {
    "prompts": 5,
    "reconstructions": 3,
    "repeats": 2,
    "diverse": 3,
    "batch": 2,
    "num_inference_steps": 1,
}
ALL = 5 + 3 + 3


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
    truths = [World().clip(0, i, "heldout").truth for i in range(5)]
    shapes_of = [truth["shape"] for truth in truths]
    assert shape.chance == max(shapes_of.count(one) for one in shapes_of) / 5
    assert table.combinations == len({tuple(truth.items()) for truth in truths})
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
    (alone,) = frames(load(tiny_folder), [clip.caption], seed=3, num_inference_steps=1)
    kept, other = (media.read_video(evaluation.clip_path(i))[0] for i in (3, 2))
    assert (
        abs(blocks(kept) - blocks(alone)).mean() < 0.4 * abs(blocks(other) - blocks(alone)).mean()
    )


def blocks(frames: np.ndarray) -> np.ndarray:
    """Grey means of 8x8 pixels, which survive the video codec even in noise."""
    t, h, w, _ = frames.shape
    return frames.mean(3).reshape(t, h // 8, 8, w // 8, 8).mean((2, 4))


def test_one_process_at_a_time_makes_an_evaluation(done):
    first, second = done[0].run(), done[0].run()
    assert next(first) == (ALL, ALL)
    with pytest.raises(ValueError, match="another process writes into"):
        next(second)
    first.close()
    assert list(done[0].run()) == [(ALL, ALL)]


def test_what_is_asked_of_an_evaluation_and_not_done_is_told(tiny_folder, tmp_path, caplog):
    logger = logging.getLogger("fastvideo")
    logger.addHandler(caplog.handler)
    asked = {"guidance": 1.0, "negative": "blue", "output": tmp_path, "prompts": 5}
    Evaluation.plan(str(tiny_folder), **asked)
    logger.removeHandler(caplog.handler)
    assert "negative_prompt is not used" in caplog.text


def test_a_finished_evaluation_gives_its_table_again_and_makes_nothing(done):
    evaluation, table = done
    before = {p: p.stat().st_mtime_ns for p in evaluation.results.glob("clips/*")}
    assert len(before) == 5 + 3
    assert list(evaluation.run()) == [(ALL, ALL)]
    assert evaluation.report().to_json() == table.to_json()
    assert {p: p.stat().st_mtime_ns for p in evaluation.results.glob("clips/*")} == before
    assert json.loads((evaluation.results / "table.json").read_text())["model"] == "tiny"
    assert (evaluation.results / "sheet.png").is_file()
    assert (evaluation.results / "clips.webp").is_file()


@pytest.mark.parametrize(
    ("batches", "done_then", "file", "torn"),
    [
        (1, 2, "made.jsonl", '{"index": 2, "prom'),
        (7, 10, "take-1.jsonl", '{"index": 2, "features": [0.1, 0'),
    ],
)
def test_a_killed_evaluation_goes_on_and_gives_the_same_table(
    done, tiny_folder, tmp_path, batches, done_then, file, torn
):
    evaluation = plan(tiny_folder, tmp_path)
    running = evaluation.run()
    assert next(running) == (0, ALL)
    assert [next(running) for _ in range(batches)][-1] == (done_then, ALL)
    running.close()
    with (evaluation.results / file).open("a") as lines:
        lines.write(torn)  # what a kill leaves
    again = plan(tiny_folder, tmp_path)
    assert next(again.run()) == (done_then, ALL)
    table = finish(again)
    assert table.to_json() == done[1].to_json()
    assert list(again.run()) == [(ALL, ALL)]
    for name in ("made", "reconstructed", "take-1"):
        whole, here = (Records(e.results / f"{name}.jsonl") for e in (done[0], again))
        assert whole.first(3) == here.first(3)


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_ended_among_the_later_takes_gives_the_same_table(
    done, tiny_folder, tmp_path, how
):
    words = ["eval", str(tiny_folder), "--prompts", "5", "--reconstructions", "3", "--steps", "1"]
    words += ["--diverse", "3", "--repeats", "2", "--batch", "2", "-o", str(tmp_path)]
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvideo", *words], env=path, stdout=subprocess.DEVNULL
    )
    results = plan(tiny_folder, tmp_path).results
    while process.poll() is None and not (results / "take-1.jsonl").is_file():
        time.sleep(0.005)
    process.send_signal(how)
    assert process.wait() == (143 if how == signal.SIGTERM else -how)
    made, total = next(plan(tiny_folder, tmp_path).run())
    assert 8 <= made < total == ALL
    assert finish(plan(tiny_folder, tmp_path)).to_json() == done[1].to_json()


def test_a_batch_that_a_kill_split_is_made_again_as_it_was(tmp_path):
    records = Records(tmp_path / "r.jsonl")
    records.add([{"index": i} for i in (0, 1, 2)])
    assert list(Records(records.path).missing(6, 2)) == [([2, 3], 1), ([4, 5], 2)]
    assert list(Records(records.path).missing(5, 4)) == [([0, 1, 2, 3], 1), ([4], 1)]


def test_diversity_is_of_the_clips_of_one_prompt_beside_the_worlds_own(done, tiny_folder):
    from fastvideo.model import load

    evaluation, table = done
    how, scorer = evaluation.how, Scorer(hub.ZOO / CLASSIFIER)
    world = World(height=how.height, width=how.width, num_frames=how.num_frames, fps=how.fps)
    spread = table.features.spread
    assert (spread.prompts, spread.repeats) == (3, 2) and spread.made > 0 < spread.truth
    files = (evaluation.results / f"{name}.jsonl" for name in ("made", "take-1"))
    takes = [Records(file).first(3) for file in files]
    for key, value in (("features", spread.made), ("truth_features", spread.truth)):
        assert value == diversity([[take[i][key] for take in takes] for i in range(3)])
    seeds = {int(media.read_metadata(p)["seed"]) for p in evaluation.results.glob("clips/*")}
    assert seeds == {0, 1, 2, 3, 4} | {i + REPEAT_STRIDE for i in range(3)}
    clip = world.clip(0, 1, "heldout")
    captions = [world.clip(0, 0, "heldout").caption, clip.caption]
    pair = frames(load(tiny_folder), captions, seed=REPEAT_STRIDE, num_inference_steps=1)
    assert takes[1][1]["features"] == scorer(pair[1])[0]
    assert takes[0][1]["truth_features"] == scorer(clip.frames_THWC)[0]
    assert takes[1][1]["truth_features"] != takes[0][1]["truth_features"]


def test_the_reference_is_made_of_other_true_clips_of_the_same_prompts(done):
    evaluation, table = done
    how, scorer = evaluation.how, Scorer(hub.ZOO / CLASSIFIER)
    world = World(height=how.height, width=how.width, num_frames=how.num_frames, fps=how.fps)
    made = Records(evaluation.results / "made.jsonl").first(5)
    clip = world.clip(0, 4, "heldout")
    anew = world.render(clip.truth, rng.numpy_generator(0, "evaluation/heldout/take 0", 4))
    assert not np.array_equal(anew, clip.frames_THWC)
    assert made[4]["reference_features"] == scorer(anew)[0]
    assert made[4]["labels"] == scorer(world.clip(0, 4, "heldout").frames_THWC)[1]
    assert table.features.made is None, "5 clips are too few for a covariance"
    assert set(table.features.classifier.truth) == {*ATTRIBUTES, "all"}


def test_objects_are_held_against_their_ideal_shapes_beside_the_ceilings(done):
    evaluation, table = done
    made, kept, *_ = evaluation.records()
    for index, record in enumerate(made):
        true = evaluation._open_world().clip(0, index, "heldout")
        found = shapes.FIT(true.frames_THWC, true.truth)
        assert record["fit_truth"] == (found and vars(found))
    assert table.fits == {
        name: one
        for name, one in (
            ("made", fits(made, "fit")),
            ("VAE", fits(kept, "fit")),
            ("truth", fits(made, "fit_truth")),
        )
        if one
    }
    assert table.fits["truth"].overlap > 0.9


def test_without_repeats_there_is_no_diversity_and_the_other_results_are_kept(done, tiny_folder):
    evaluation, table = done
    for off in (0, 1):
        short = plan(tiny_folder, evaluation.output, repeats=off)
        assert list(short.run()) == [(8, 8)]
        again = short.report()
        assert again.features.spread is None and again.lines == table.lines
    evaluation.report()


def test_a_world_without_a_classifier_has_no_feature_numbers(
    tiny_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(shapes, "CLASSIFIER", None)
    evaluation = plan(tiny_folder, tmp_path, prompts=2, reconstructions=1, diverse=None)
    table = finish(evaluation)
    assert table.features is None and evaluation.recipe["classifier"] is None
    assert json.loads(table.to_json())["features"] is None
    words = ["eval", str(tiny_folder), "--prompts", "2", "--reconstructions", "1", "--steps", "1"]
    assert main([*words, "-o", str(tmp_path)]) == 0
    assert "no feature numbers: the world has no classifier" in capsys.readouterr().out


def test_each_of_several_objects_counts_for_itself(tiny_folder, tmp_path, capsys):
    few = ["--prompts", "3", "--reconstructions", "1", "--steps", "1", "-o", str(tmp_path)]
    assert main(["eval", str(tiny_folder), "--world", "fastvideo.worlds.trio:two", *few]) == 0
    out = capsys.readouterr().out
    assert "3 prompts of 3 held-out combinations" in out
    rows = [line.partition("  ")[0] for line in out.splitlines()[2:9]]
    several = [f"{name} (n=6)" for name in ("colour", "shape", "motion", "size")]
    assert "overlap" not in out
    assert rows == ["number", "scene", *several, "all"]
    assert "intervals count each object as a clip of its own" in out


def test_another_classifier_is_another_recipe(done, monkeypatch, tmp_path):
    evaluation, _ = done
    folder = shutil.copytree(hub.ZOO / CLASSIFIER, tmp_path / "c")
    monkeypatch.setattr(shapes, "CLASSIFIER", str(folder))
    assert evaluation.results == plan(evaluation.folder, evaluation.output).results
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert evaluation.results != plan(evaluation.folder, evaluation.output).results


def test_a_model_replaced_while_it_is_evaluated_gives_no_table(done, tiny_copy, tmp_path):
    evaluation = plan(tiny_copy, tmp_path, prompts=1, reconstructions=1, repeats=0, diverse=1)
    for _ in evaluation.run():
        pass
    path = tiny_copy / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="was replaced while it was evaluated"):
        evaluation.report()


def test_another_attention_makes_other_clips(done, tiny_folder, tmp_path):
    evaluation, _ = done
    one = {"prompts": 1, "reconstructions": 1, "repeats": 0, "diverse": 1}
    sparse = plan(tiny_folder, tmp_path, attention="vsa(top_k=1, tile=[1, 1, 1])", **one)
    finish(sparse)
    clips = [media.read_video(e.clip_path(0))[0] for e in (sparse, evaluation)]
    assert not np.array_equal(*clips)


def test_other_settings_and_other_weights_are_kept_apart(done, tiny_folder, tiny_copy, tmp_path):
    evaluation, _ = done
    same = plan(tiny_folder, evaluation.output, prompts=4, batch=1)
    assert same.results == evaluation.results
    assert next(same.run()) == (ALL - 1, ALL - 1)
    assert plan(tiny_folder, evaluation.output, seed=1).results != evaluation.results
    sparse = plan(tiny_folder, evaluation.output, attention="vsa(top_k=1, tile=[1, 1, 1])")
    assert sparse.results != evaluation.results
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
    assert auto.recipe["dtype"] in ("float32", "bfloat16")
    assert auto.results in (float32.results, bfloat16.results)
    assert float32.results != bfloat16.results
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert plan(tiny_folder, tmp_path).results == float32.results
    assert auto.recipe["versions"] == versions()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "0"], "prompts 0 must be at least 1"),
        (["--prompts", "4", "--reconstructions", "9"], "reconstructions 9 must be from 1 to 4"),
        (["--prompts", "4", "--diverse", "5"], "diverse 5 must be from 1 to 4"),
        (["--repeats", "-1"], "repeats -1 must be at least 0"),
        (["--prompts", "2000000"], "prompts 2000000 must be at least 1 and at most 1000000"),
        (["--frames", "8"], "num_frames 8 must be 4k+1"),
        (["--size", "33x48"], "width 33 must be a multiple of 16"),
        (["--size", "big"], "must look like WIDTHxHEIGHT"),
        (["--world", "shape"], "did you mean 'shapes'"),
        (["--steps", "0"], "num_inference_steps 0 in --steps: must be at least 1"),
        (["--fps", "fast"], 'fps "fast" in --fps: must be a number'),
        (["--fps", "24000/1001"], "fps 23.976 must be whole for clips of a world; nearest: 24"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(tiny_folder, capsys, words, message):
    assert main(["eval", str(tiny_folder), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_the_command_prints_the_table_or_its_json(done, tiny_folder, capsys):
    evaluation, table = done
    words = ["eval", str(tiny_folder), "--prompts", "5", "--reconstructions", "3", "--steps", "1"]
    words += ["-o", str(evaluation.output), "--diverse", "3", "--repeats", "2"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "made (n=5)" in text and "VAE on 3 held-out clips" in text and "sheet.png" in text
    assert "diversity, 2 clips of each of 3 prompts: made" in text and ", truth " in text
    assert "made not measured, too few clips" in text
    assert "shapes-classifier is right on true clips: shape" in text
    assert "flicker: made" in text and "fvd" not in text.lower()
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(table.to_json())


def test_arguments_are_judged_before_torch_is_imported():
    code = (
        "import sys; from fastvideo.cli import main; code = main(['eval', 'nowhere']);"
        "sys.exit(code if 'torch' not in sys.modules else 99)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 2
