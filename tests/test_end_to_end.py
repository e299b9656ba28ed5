"""The second journey, by the commands that a user types: clips become a model that makes clips."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipes import CONFIGS

from fastvideo import media
from fastvideo.cli import main

SIZE = ["--size", "64x64", "--frames", "5"]
CLIPS = {"count": 4, "num_frames": 5, "height": 64, "width": 64}
DEFAULTS = {"num_frames": 5, "height": 64, "width": 64, "fps": 8, "num_inference_steps": 2}
PROMPT = "a big red ball moving left at night"
STEPS = 50
RECIPE = f"""
extends = "{CONFIGS / "dit-image.toml"}"
[run]
name = "tiny"
steps = {STEPS}
batch = 2
log_every = 1
save_every = 3
[roles.student.config]
num_attention_heads = 2
attention_head_dim = 12
num_layers = 2
ffn_dim = 48
in_channels = 4
out_channels = 4
text_dim = 16
freq_dim = 16
[roles.text.config]
d_model = 16
d_kv = 8
num_heads = 2
num_layers = 1
d_ff = 32
[data]
folder = "latents"
[optim]
warmup = 2
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty current folder."""
    folder, before = tmp_path_factory.mktemp("journey"), Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def latents(work: Path) -> Path:
    """Latents of a VAE that was trained for three steps and exported."""
    assert main(["train", str(CONFIGS / "vae.toml"), "--smoke", "--run-dir", "vae-run"]) == 0
    assert main(["export", "vae-run", "-o", "vae-only", *sets("clips", CLIPS)]) == 0
    words = ["--vae", "vae-only", *SIZE, "--clips", "8", "--batch", "2", "--shard", "4"]
    assert main(["data", "encode", "-o", "latents", *words]) == 0
    (work / "dit.toml").write_text(RECIPE)
    return work / "latents"


@pytest.fixture(scope="module")
def straight_run(latents: Path, work: Path) -> Path:
    """A denoiser and its text encoder, trained on the latents without interruption."""
    assert main(["train", "dit.toml", "--run-dir", "straight"]) == 0
    return work / "straight"


@pytest.fixture(scope="module")
def model(straight_run: Path, work: Path) -> Path:
    """The model folder that the run is exported to."""
    words = ["--set", "name=tiny", "--set", "vae=vae-only", *sets("defaults", DEFAULTS)]
    assert main(["export", "straight", "-o", "model", *words]) == 0
    return work / "model"


@pytest.fixture(scope="module")
def clip(model: Path, work: Path) -> Path:
    """A clip that the exported model made, of another size than its default."""
    words = ["--model", "model", "--seed", "7", "--size", "80x48", "--frames", "9"]
    assert main(["generate", PROMPT, *words, "-o", "a.mp4"]) == 0
    return work / "a.mp4"


def sets(table: str, values: dict[str, int]) -> list[str]:
    return [part for k, v in values.items() for part in ("--set", f"{table}.{k}={v}")]


def final_state(run: Path) -> dict[str, Any]:
    path = run / "checkpoints" / f"step-{STEPS:08d}" / "state.pt"
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every (path, leaf) of nested dicts and lists, tensors as bytes."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{name}/{key}")
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{name}/{index}")
    elif isinstance(tree, torch.Tensor):
        yield name, (tree.dtype, tree.shape, tree.flatten().view(torch.uint8).numpy().tobytes())
    else:
        yield name, tree


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def test_a_killed_run_goes_on_to_the_same_bits_as_one_that_was_not(straight_run: Path, work: Path):
    command = [sys.executable, "-m", "fastvideo", "train", "dit.toml", "--run-dir", "killed"]
    # Read byte by byte from a pipe of one page, the run cannot get to its end before it is killed.
    running = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        bufsize=0,
        pipesize=4096,
    )
    assert running.stdout is not None
    try:
        while not (line := running.stdout.readline()).startswith(b"step 11:"):
            assert line, "the run ended before it could be killed"
    finally:
        running.kill()
    assert running.wait(60) == -signal.SIGKILL
    pointer = (work / "killed" / "checkpoints" / "latest").read_text().strip()
    assert 0 < int(pointer.removeprefix("step-")) < STEPS
    assert main(["train", "dit.toml", "--run-dir", "killed", "--resume"]) == 0
    one, other = (dict(leaves(final_state(run))) for run in (straight_run, work / "killed"))
    assert len(one) > 100
    assert one == other
    assert losses(work / "killed") == losses(straight_run)
    assert set(losses(straight_run)) == set(range(1, STEPS + 1))


def test_the_exported_model_makes_a_readable_clip_of_the_exact_size(clip: Path):
    facts = media.read_facts(clip)
    assert (facts.width, facts.height, facts.num_frames, facts.fps) == (80, 48, 9, 8)
    frames, fps = media.read_video(clip)
    assert (frames.shape, fps) == ((9, 48, 80, 3), 8)


def test_inspect_reads_the_recipe_back_out_of_the_clip(clip: Path, capsys):
    assert main(["inspect", str(clip), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    request = facts["recipe"]["request"]
    assert (request["prompt"], request["seed"], request["width"]) == (PROMPT, 7, 80)
    assert facts["recipe"]["model"]["spec"] == "tiny"
    assert facts["video"]["num_frames"] == 9


def test_generate_from_a_clip_gives_the_same_frames_again(clip: Path, work: Path):
    assert main(["generate", "--from", str(clip), "-o", "b.mp4"]) == 0
    assert main(["generate", "--from", str(clip), "--seed", "8", "-o", "c.mp4"]) == 0
    # Bit for bit before the encoder, which now and then writes another file of equal frames.
    same, again, other = (json.loads((work / f"{n}.json").read_text()) for n in "abc")
    assert same["frames_sha256"] == again["frames_sha256"] != other["frames_sha256"]
    assert same["recipe"] == again["recipe"]


def test_stock_diffusers_loads_the_exported_folder_and_makes_our_frames(model: Path):
    diffusers = pytest.importorskip("diffusers")
    from fastvideo import VideoPipeline

    stock = diffusers.WanPipeline.from_pretrained(model, torch_dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    ours = VideoPipeline.from_pretrained(model, dtype="float32")
    latents = torch.randn((1, 4, 2, 8, 8), generator=torch.Generator().manual_seed(0))
    spec = ours.model.spec
    theirs = stock(
        PROMPT,
        negative_prompt=spec.defaults.negative_prompt,
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=2.0,
        max_sequence_length=spec.defaults.max_text_tokens,
        latents=latents.clone(),
        output_type="latent",
    ).frames
    mine = ours(
        PROMPT, num_inference_steps=3, guidance_scale=2.0, latents=latents, output="latents"
    ).latents
    assert (mine - theirs).abs().max() / theirs.abs().max() <= 1e-4
