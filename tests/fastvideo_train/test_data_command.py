"""`fastvideo data` and `fastvideo export`: files written, errors of one line."""

from __future__ import annotations

import json

import pytest
import torch
from fastvideo_train.data.latents import LatentBatches

from fastvideo import media
from fastvideo.cli import main
from fastvideo.worlds.shapes import World

SMALL = ["--size", "48x32", "--frames", "5"]


def test_render_writes_clips_that_say_what_they_show(tmp_path, capsys):
    assert main(["data", "render", "-o", str(tmp_path), "--count", "3", *SMALL]) == 0
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    world = World(height=32, width=48, num_frames=5)
    assert [line["caption"] for line in lines] == [world.clip(0, i).caption for i in range(3)]
    frames, fps = media.read_video(tmp_path / lines[2]["file"])
    assert frames.shape == (5, 32, 48, 3) and fps == 16
    assert media.read_metadata(tmp_path / lines[2]["file"])["caption"] == lines[2]["caption"]
    assert "3 clips" in capsys.readouterr().out


def test_render_again_keeps_what_is_there(tmp_path):
    words = ["data", "render", "-o", str(tmp_path), *SMALL]
    assert main([*words, "--count", "2", "--fps", "16/1"]) == 0
    before = (tmp_path / "000001.mp4").stat().st_mtime_ns
    assert main([*words, "--count", "3"]) == 0
    assert (tmp_path / "000001.mp4").stat().st_mtime_ns == before
    assert len(list(tmp_path.glob("*.mp4"))) == 3


def test_render_refuses_a_folder_of_other_clips(tmp_path, capsys):
    words = ["data", "render", "-o", str(tmp_path), "--count", "1", *SMALL]
    assert main(words) == 0 and main([*words, "--seed", "1"]) == 2
    assert "holds shapes train seed 0 index 0" in capsys.readouterr().err


def test_preview_writes_a_sheet_and_reads_every_clip_back(tmp_path, capsys):
    path = tmp_path / "sheet.png"
    assert main(["data", "preview", "-o", str(path), "--count", "2", "--size", "128x128"]) == 0
    out = capsys.readouterr().out
    assert path.is_file() and out.count("\n") == 3
    assert World().clip(0, 1).caption in out and "2 read back without a mistake" in out


def test_encode_makes_latents_that_a_recipe_can_name(tiny_folder, tmp_path, capsys):
    words = ["data", "encode", "-o", str(tmp_path / "l"), "--vae", str(tiny_folder), *SMALL]
    words += ["--batch", "2", "--shard", "4", "--dtype", "float32"]
    assert main([*words, "--clips", "5"]) == 0
    assert "5 clips in 2 shards" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert main([*words, "--clips", "5", "--device", "cuda"]) != 0
        assert "torch finds no CUDA device" in capsys.readouterr().err
    batch = LatentBatches(tmp_path / "l", seed=0, batch=5).batch(0)
    assert batch["latents"].shape == (5, 4, 2, 4, 6)
    assert main([*words, "--clips", "6"]) == 0
    assert len(LatentBatches(tmp_path / "l", seed=0, batch=1)) == 6
    capsys.readouterr()
    for illegal in (["--clips", "4"], ["--clips", "6", "--seed", "1"], ["--batch", "3"]):
        assert main([*words, *illegal]) == 2, "what the folder holds is known before any work"
        assert capsys.readouterr().err.count("error: ") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["preview", "-o", "x.png", "--size", "12"], "must look like WIDTHxHEIGHT"),
        (["preview", "-o", "x.png", "--split", "test"], "split 'test' is unknown"),
        (["render", "-o", "x", "--world", "shape"], "did you mean 'shapes'"),
        (["render", "-o", "x", "--fps", "24000/1001"], "must be whole for clips of a world"),
        (["render", "-o", "x", "--fps", "fast"], "such as 16, 23.976 or 24000/1001"),
        (["render", "-o", "x", "--count", "2.0"], "Invalid value for '--count'"),
        (["encode", "-o", "x", "--vae", "nowhere", "--fps", "30000/1001"], "nearest: 30"),
        (["encode", "-o", "x", "--vae", "nowhere"], "nowhere"),
        (["encode", "-o", "x"], "Missing option '--model' / '--vae'"),
        (["encode", "-o", "x", "--vae", "wan-nano", "--size", "16x16"], "must be at least 32"),
        (["encode", "-o", "x", "--vae", "wan-nano", "--size", "16400x32"], "has 1024 on an axis"),
        (["encode", "-o", "x", "--vae", "wan-nano", "--size", "99200x99200"], "this machine has"),
    ],
)
def test_wrong_words_are_refused_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "-o", "out"], "run nowhere is not a folder"),
        ([".", "-o", "."], "exists; choose another folder or say --overwrite"),
        ([".", "-o", "out", "--set", "vae"], "must look like key.subkey=value"),
    ],
)
def test_export_refuses_wrong_words_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_export_of_a_run_says_what_it_compared(tmp_path, capsys):
    from tiny_recipes import finish, tiny

    finish(tiny("vae"), tmp_path / "run")
    words = ["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")]
    sizes = {"count": 2, "num_frames": 5, "height": 64, "width": 64}
    sets = [part for key, value in sizes.items() for part in ("--set", f"clips.{key}={value}")]
    assert main([*words, *sets]) == 0
    assert "read back; one forward differs by" in capsys.readouterr().out
    assert (tmp_path / "out" / "vae" / "config.json").is_file()


@pytest.mark.gpu
def test_a_gpu_encodes_a_worlds_clips_as_the_cpu_does(tiny_folder, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    words = ["data", "encode", "--vae", str(tiny_folder), *SMALL, "--clips", "4"]
    for device in ("cpu", "cuda"):
        folder = str(tmp_path / device)
        assert main([*words, "-o", folder, "--dtype", "float32", "--device", device]) == 0
    made = [LatentBatches(tmp_path / d, seed=0, batch=4).batch(0) for d in ("cpu", "cuda")]
    torch.testing.assert_close(made[0]["latents"], made[1]["latents"], atol=2e-2, rtol=0)
    assert made[0]["captions"] == made[1]["captions"]
