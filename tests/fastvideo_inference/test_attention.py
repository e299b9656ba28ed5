"""Which attention a clip is made with: gates that are never dropped unasked, backends by name."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastvideo_inference import recipe
from fastvideo_inference.comparison import Comparison, read
from fastvideo_inference.evaluation import Evaluation
from fastvideo_inference.merging import merge
from fastvideo_inference.pipeline import VideoPipeline

from fastvideo import cli, media, spec, weights
from fastvideo.model import load
from fastvideo.resolve import find_lora
from fastvideo.sampling import LoraUse

PROMPT = "a red ball moving left"
STA = "sta(windows=[[1, 1, 1]], tile=[1, 1, 2])"
REASON = "would drop the VSA gates that gated was trained with; nearest: vsa(sparsity=0)"
QUICK = {"seed": 3, "num_frames": 5, "guidance_scale": 1.0}
ONE = {"prompts": 1, "reconstructions": 1, "repeats": 0, "diverse": 1, "num_inference_steps": 1}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run `fastvideo ...`; return exit code, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        code = cli.main(list(words))
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="module")
def pipe(gated_folder: Path) -> VideoPipeline:
    return VideoPipeline.from_pretrained(gated_folder, device="cpu", dtype="float32")


def contradicting(gated_folder: Path, folder: Path) -> Path:
    """Copy the gated folder with a spec that names a dense pattern."""
    import shutil

    shutil.copytree(gated_folder, folder)
    path = folder / spec.FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention": {}}))
    return folder


@pytest.mark.parametrize("pattern", ["dense", STA])
def test_generate_and_eval_refuse_to_drop_gates_before_torch_is_imported(gated_folder, pattern):
    code = (
        "import json, sys; from fastvideo.cli import main\n"
        "code = main(json.loads(sys.argv[1]))\n"
        "sys.exit(code if 'torch' not in sys.modules else 99)"
    )
    for words in (["generate", PROMPT, "--model"], ["eval"]):
        line = json.dumps([*words, str(gated_folder), "--attention", pattern])
        done = subprocess.run(
            [sys.executable, "-c", code, line],
            env={"PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr
        assert REASON in done.stderr and "--drop-gates" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_folder_whose_spec_would_drop_its_gates_is_refused_unless_asked_otherwise(
    gated_folder, tmp_path, run
):
    """Each way out that the refusal names works."""
    folder = contradicting(gated_folder, tmp_path / "dense")
    words = ["generate", PROMPT, "--model", str(folder), "--frames", "5", "--steps", "1"]
    code, _, error = run(*words)
    assert code == 2 and REASON in error and "(from the defaults of gated)" in error
    assert run(*words, "--attention", "vsa(sparsity=0)", "-o", "a.mp4")[0] == 0
    assert run(*words, "--drop-gates", "-o", "b.mp4")[0] == 0
    used = [recipe.read_recipe(name).request for name in ("a.mp4", "b.mp4")]
    assert [(u.attention, u.drop_gates) for u in used] == [
        ("vsa(sparsity=0, tile=[4, 4, 4])", False),
        ("dense", True),
    ]


def test_gates_that_are_dropped_on_purpose_are_in_the_recipe_and_from_repeats_it(
    gated_folder, tiny_folder, run
):
    """Without its gates the model is the one that it was made of."""
    common = ["--seed", "4", "--dtype", "float32", "--steps", "1"]
    words = ["generate", PROMPT, "--model", str(gated_folder), *common, "--attention", "dense"]
    assert run(*words, "--drop-gates", "-o", "a.mp4")[0] == 0
    assert run("generate", "--from", "a.mp4", "-o", "b.mp4")[0] == 0
    assert run("generate", PROMPT, "--model", str(tiny_folder), *common, "-o", "c.mp4")[0] == 0
    sides = [json.loads(Path(f"{name}.json").read_text()) for name in "abc"]
    assert len({side["frames_sha256"] for side in sides}) == 1
    asked = [side["recipe"]["request"]["drop_gates"] for side in sides]
    assert asked == [True, True, False]
    code, _, error = run("generate", "--from", "a.mp4", "--no-drop-gates", "-o", "d.mp4")
    assert code == 2 and REASON in error


def test_calls_and_streams_refuse_it_too_and_say_when_they_do_it(pipe, tiny_folder, caplog):
    for pattern in ("dense", STA):
        with pytest.raises(ValueError, match="would drop the VSA gates"):
            pipe(PROMPT, **QUICK, attention=pattern)
        with pytest.raises(ValueError, match="would drop the VSA gates"):
            pipe.stream(PROMPT, **QUICK, attention=pattern)
    own, kept = (pipe(PROMPT, **QUICK, attention=a) for a in (None, "vsa(sparsity=0)"))
    with caplog.at_level(logging.INFO, logger="fastvideo"):
        dropped = pipe(PROMPT, **QUICK, attention="dense", drop_gates=True)
    assert "attention dense drops the VSA gates of gated" in caplog.text
    dense = VideoPipeline.from_pretrained(tiny_folder, device="cpu", dtype="float32")
    assert np.array_equal(dropped.frames, dense(PROMPT, **QUICK).frames)
    for one, other in ((own, kept), (own, dropped), (kept, dropped)):
        assert not np.array_equal(one.frames, other.frames), "gates and sparsity both count"


def test_eval_keeps_an_override_in_its_recipe_and_makes_the_clips_of_the_model_without_gates(
    gated_folder, tiny_folder, tmp_path
):
    place = {"output": tmp_path / "eval", "device": "cpu", "dtype": "float32", **ONE}
    dropped = Evaluation.plan(str(gated_folder), attention="dense", drop_gates=True, **place)
    dense = Evaluation.plan(str(tiny_folder), **place)
    assert dropped.recipe["request"]["drop_gates"] is True
    assert not {"drop_gates", "backend", "lora"} & dense.recipe["request"].keys()
    for evaluation in (dropped, dense):
        for _ in evaluation.run():
            pass
    digests = [
        media.read_video(evaluation.clip_path(0))[0].astype(int) for evaluation in (dropped, dense)
    ]
    assert np.abs(digests[0] - digests[1]).mean() < 0.5  # the encoder may differ, frames do not


def test_a_row_of_a_comparison_may_drop_gates_if_it_says_so(gated_folder, tmp_path):
    rows = [
        {"name": "own", "model": str(gated_folder)},
        {"name": "dense", "model": str(gated_folder), "attention": "dense"},
    ]
    path = tmp_path / "rows.toml"
    text = 'base = "own"\nprompts = 2\n'
    for row in rows:
        text += "[[rows]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in row.items())
    path.write_text(text)
    with pytest.raises(ValueError, match=r"row 'dense': attention dense would drop the VSA gates"):
        Comparison.plan(read(path), output=tmp_path)
    path.write_text(text + 'drop_gates = true\nbackend = "sdpa"\n')
    _, entry = Comparison.plan(read(path), output=tmp_path).entries
    assert entry.evaluation.how.drop_gates and entry.evaluation.how.backend == "sdpa"


def test_a_merged_model_keeps_its_gates_out_of_reach_of_stock_diffusers(gated_folder, tmp_path):
    name = "transformer.blocks.0.attn1.to_q"
    ab = {f"{name}.lora_A.weight": torch.ones(1, 48), f"{name}.lora_B.weight": torch.ones(48, 1)}
    lora = weights.save(tmp_path / "lora.safetensors", ab)
    merged = merge(gated_folder, [find_lora(LoraUse(path=str(lora)))], tmp_path / "merged")
    assert [p.name for p in (merged / "transformer").glob("*.safetensors")] == [
        "vsa_gated_model.safetensors"
    ]
    assert load(merged, device="cpu").dit.config.gate_compress


def test_a_backend_is_named_in_words_recorded_and_repeated(tiny_folder, run, monkeypatch):
    monkeypatch.setenv("FASTVIDEO_LOG", "info")
    words = ["generate", PROMPT, "--model", str(tiny_folder), "--seed", "4", "--dtype", "float32"]
    words += ["--steps", "1", "--attention", "vsa(sparsity=0.5, tile=[1, 2, 2])"]
    code, _, log = run(*words, "--backend", "reference", "-o", "a.mp4")
    assert code == 0 and "12 seen" not in log
    assert "6 tiles, 3 seen by each, 18 keys, head 24, float32, cpu, inference: reference" in log
    code, _, log = run("generate", "--from", "a.mp4", "-o", "b.mp4")
    assert code == 0 and "inference: reference" in log
    sides = [json.loads(Path(f"{name}.json").read_text()) for name in "ab"]
    assert sides[0]["frames_sha256"] == sides[1]["frames_sha256"]
    assert sides[0]["recipe"]["request"]["backend"] == "reference"


def test_a_backend_that_is_none_is_refused_and_one_that_cannot_serve_says_why(
    tiny_folder, run, tmp_path
):
    words = [PROMPT, "--model", str(tiny_folder)]
    code, _, error = run("generate", *words, "--backend", "gathr")
    assert code == 2 and "did you mean 'gather'?" in error and error.count("\n") == 1
    code, _, error = run("eval", str(tiny_folder), "--backend", "gathr", "-o", str(tmp_path))
    assert code == 2 and "did you mean 'gather'?" in error and error.count("\n") == 1
    code, _, error = run("generate", *words, "--backend", "gather", "-o", "a.mp4")
    assert code == 1 and "gather: serves sparse patterns only" in error and error.count("\n") == 1
