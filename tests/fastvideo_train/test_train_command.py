"""`fastvideo train` as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_recipes import CONFIGS, ROOT

from fastvideo.cli import main

VAE = str(CONFIGS / "vae.toml")


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.toml")))
def test_a_smoke_run_trains_saves_and_goes_on(name, tmp_path: Path, capsys):
    command = ["train", str(CONFIGS / f"{name}.toml"), "--smoke", "--run-dir", str(tmp_path / "r")]
    assert main(command) == 0
    assert "step 3: saved" in capsys.readouterr().out
    assert main([*command, "--resume", "--set", "run.steps=4"]) == 0
    assert "step 3 of 4" in capsys.readouterr().out


def test_fresh_sets_the_old_run_aside(tmp_path: Path, capsys):
    command = ["train", VAE, "--smoke", "--run-dir", str(tmp_path / "r"), "--set", "run.steps=1"]
    assert main(command) == 0 and main([*command, "--fresh"]) == 0
    assert (tmp_path / "r.old-1" / "checkpoints" / "latest").is_file()
    assert "step 0 of 1" in capsys.readouterr().out.split("the old run is now")[1]


def test_resume_without_a_checkpoint_is_a_usage_error(tmp_path: Path, capsys):
    assert main(["train", VAE, "--smoke", "--run-dir", str(tmp_path), "--resume"]) == 2
    assert "has no checkpoint to resume" in capsys.readouterr().err


def test_a_device_that_is_not_here_is_a_usage_error_and_auto_takes_one_that_is(tmp_path, capsys):
    words = ["train", VAE, "--smoke", "--run-dir", str(tmp_path / "r"), "--set", "run.steps=1"]
    assert main([*words, "--set", "run.device=gpu"]) == 2
    assert "device 'gpu' is unknown; use auto, cpu" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([*words, "--set", "run.device=cuda"]) == 2
        assert "torch finds no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--set", "run.device=auto"]) == 0
    assert "step 1: saved" in capsys.readouterr().out


def test_a_dry_run_describes_and_writes_nothing(tmp_path: Path, capsys):
    folder = tmp_path / "r"
    assert main(["train", VAE, "--smoke", "--run-dir", str(folder), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "vae: vae/wan" in out and "trained, new weights" in out
    assert not folder.exists()


def test_a_wrong_key_is_a_usage_error(capsys):
    assert main(["train", VAE, "--set", "optim.lrr=1"]) == 2
    assert "optim.lrr" in capsys.readouterr().err


def test_a_wrong_export_table_is_refused_before_the_run(tmp_path: Path, capsys):
    words = ["--smoke", "--run-dir", str(tmp_path / "r"), "--set", "export.dtyp=float32"]
    assert main(["train", VAE, *words]) == 2
    assert "did you mean 'dtype'" in capsys.readouterr().err


def test_a_missing_vae_of_a_validation_is_refused_before_the_run(tmp_path: Path, capsys):
    words = ["--smoke", "--run-dir", str(tmp_path / "r"), "--set", "validate.vae=nowhere"]
    command = ["train", str(CONFIGS / "dit-image.toml"), *words, "--dry-run"]
    assert main(command) == 0, "a run that never validates needs none"
    assert main([*command, "--set", "run.validate_every=2"]) == 2
    assert "[validate] vae of nano-dit-image: nowhere" in capsys.readouterr().err


def test_a_missing_vae_of_an_export_is_only_a_warning(tmp_path: Path, capsys):
    words = ["--smoke", "--run-dir", str(tmp_path / "r"), "--set", "export.vae=nowhere"]
    assert main(["train", str(CONFIGS / "dit.toml"), *words, "--dry-run"]) == 0
    assert "vae of nano-dit is needed after the run: nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    "how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)]
)
def test_a_stopped_run_saves_exits_130_and_keeps_others_out(tmp_path: Path, capsys, how):
    words = ["--smoke", "--run-dir", str(tmp_path / "r"), "--set", "run.steps=100000"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = subprocess.Popen(
        [sys.executable, "-m", "fastvideo", "train", VAE, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert running.stdout is not None
    try:
        for line in running.stdout:
            if line.startswith("step 2:"):
                break
        assert main(["train", VAE, *words]) == 2
        assert "another process trains" in capsys.readouterr().err
        running.send_signal(how)
        rest = running.stdout.read()
        assert running.wait(60) == 130
    finally:
        running.kill()
    assert "saved" in rest and "the same command resumes" in rest
    assert (tmp_path / "r" / "checkpoints" / "latest").is_file()


def test_a_terminal_free_run_prints_one_line_per_logged_step(tmp_path: Path, capsys):
    words = ["--smoke", "--run-dir", str(tmp_path), "--set", "run.log_every=2"]
    assert main(["train", VAE, *words]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if ": loss" in x]
    assert [x.split(":")[0] for x in lines] == ["step 1", "step 2", "step 3"]
