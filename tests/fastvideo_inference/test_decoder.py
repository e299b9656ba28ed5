"""A small decoder as a user asks for it: by name or path, never unasked, and refused if wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fastvideo_inference import recipe
from fastvideo_inference.evaluation import Evaluation
from safetensors.torch import save_file

from fastvideo import VideoPipeline, cli, media
from fastvideo.model import load
from fastvideo.models import decoder as decoders
from fastvideo.models.decoder.taehv import Config, Decoder, init_for_training
from fastvideo.stages import decode

PROMPT = "a red ball moving left"
TINY = Config(
    z_dim=4,
    widths=(8, 6, 4, 4),
    num_blocks=(1, 1, 1),
    space=(True, True, False),
    patch_size=2,
    latents_mean=(0.1, -0.2, 0.3, 0.0),
    latents_std=(1.1, 0.9, 1.3, 0.7),
)


def random_decoder(config: Config = TINY, seed: int = 0) -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Decoder(config).eval().requires_grad_(False)
        init_for_training(net)
    with torch.no_grad():
        net.decoder[-1].weight.mul_(5)  # else a random clip is grey, and all are alike
    return net


def write(net: Decoder, folder: Path) -> Path:
    decoders.write(net, folder, family="taehv", dtype=torch.float32)
    return folder


@pytest.fixture
def folder(tiny_copy: Path) -> Path:
    """The tiny model with a decoder `small` of its own."""
    write(random_decoder(), tiny_copy / "decoders" / "small")
    return tiny_copy


@pytest.fixture
def generate(folder: Path, tmp_path: Path, monkeypatch, capsys):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*words: str) -> tuple[int, list[str]]:
        model = [] if "--from" in words else ["--model", str(folder)]
        code = cli.main(["generate", *model, "--dtype", "float32", *words])
        return code, capsys.readouterr().err.splitlines()

    return run


def frames_of(path: str) -> np.ndarray:
    return media.read_video(path)[0].astype(int)


def test_it_gets_the_normalised_latents_and_its_frames_are_the_clip(folder: Path):
    pipe = VideoPipeline.from_pretrained(folder, dtype="float32", decoder="small")
    latents = pipe(PROMPT, seed=3, output="latents").latents
    made = pipe(PROMPT, seed=3).frames
    assert latents is not None and made is not None and made.shape == (9, 32, 48, 3)
    want = decode.to_uint8(random_decoder().decode(latents)[0])
    assert np.abs(made.astype(int) - want).max() <= 1
    raw = decode.to_uint8(random_decoder().decode(pipe.model.vae.denormalize(latents))[0])
    assert np.abs(made.astype(int) - raw).mean() > 1, "raw latents would give another clip"


def test_a_stream_of_it_is_its_clip(folder: Path):
    pipe = VideoPipeline.from_pretrained(folder, dtype="float32", decoder="small")
    whole = pipe(PROMPT, seed=3).frames
    assert np.array_equal(np.stack(list(pipe.stream(PROMPT, seed=3))), whole)
    latents = pipe(PROMPT, seed=3, output="latents").latents
    pieces = np.concatenate(list(decode.decode(pipe.model, latents, chunk=1)))
    assert np.abs(pieces.astype(int) - whole).max() <= 1


def test_the_command_uses_it_and_records_it(generate, folder: Path):
    assert generate(PROMPT, "--seed", "4", "-o", "own.mp4")[0] == 0
    assert generate(PROMPT, "--seed", "4", "--decoder", "small", "-o", "a.mp4")[0] == 0
    assert np.abs(frames_of("a.mp4") - frames_of("own.mp4")).mean() > 2
    used = recipe.read_recipe("a.mp4").decoder
    assert used is not None and used.name_or_path == "small"
    assert used.fingerprint == recipe.fingerprint(folder / "decoders" / "small")
    beside = json.loads(Path("a.json").read_text())
    assert beside["recipe"]["decoder"] == used.model_dump()


def test_nobody_gets_it_who_did_not_ask(generate, folder: Path):
    generate(PROMPT, "--seed", "4", "-o", "a.mp4")
    generate(PROMPT, "--seed", "4", "--decoder", "vae", "-o", "b.mp4")
    assert recipe.read_recipe("a.mp4").decoder is recipe.read_recipe("b.mp4").decoder is None
    assert (
        json.loads(Path("a.json").read_text())["frames_sha256"]
        == (json.loads(Path("b.json").read_text())["frames_sha256"])
    )
    assert load(folder, dtype="float32").decoder is None


def test_a_clip_is_repeated_with_its_decoder_unless_told_otherwise(generate):
    generate(PROMPT, "--seed", "4", "--decoder", "small", "-o", "a.mp4")
    assert generate("--from", "a.mp4", "-o", "b.mp4")[0] == 0
    assert recipe.read_recipe("b.mp4") == recipe.read_recipe("a.mp4")
    assert generate("--from", "a.mp4", "--decoder", "vae", "-o", "c.mp4")[0] == 0
    assert recipe.read_recipe("c.mp4").decoder is None


def test_a_clip_is_not_repeated_with_a_decoder_that_was_replaced(generate, folder: Path):
    generate(PROMPT, "--decoder", "small", "-o", "a.mp4")
    write(random_decoder(seed=1), folder / "decoders" / "small")
    code, err = generate("--from", "a.mp4", "-o", "b.mp4")
    assert code == 2 and err[0].startswith("error: a.mp4 was made by another decoder small than")


def test_a_config_may_name_it(generate):
    Path("c.toml").write_text('decoder = "small"\nprompt = "a blue ball"\n')
    assert generate("--config", "c.toml", "-o", "a.mp4")[0] == 0
    assert recipe.read_recipe("a.mp4").decoder is not None


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_published_file_serves_by_its_path(generate, tmp_path: Path, suffix: str):
    config = Config(z_dim=4, widths=(8, 6, 4, 4))  # published strides, at widths of a test
    state = {**random_decoder(config).state_dict(), "encoder.0.weight": torch.zeros(4, 3, 3, 3)}
    path = tmp_path / f"taew2_1{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert generate(PROMPT, "--decoder", str(path), "-o", "a.mp4")[0] == 0
    used = recipe.read_recipe("a.mp4").decoder
    assert used is not None and used.fingerprint == recipe.fingerprint(path)
    assert frames_of("a.mp4").shape == (9, 32, 48, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"z_dim": 8, "latents_mean": (), "latents_std": ()}, "takes latents of 8 channels; the"),
        ({"patch_size": 1}, "makes 4 frames of 4x4 pixels from a latent; the model needs 4 of 8x8"),
        ({"time": (True, True, True)}, "makes 8 frames of 8x8 pixels"),
        ({"latents_std": (2.0, 0.9, 1.3, 0.7)}, "belongs to another VAE"),
    ],
)
def test_one_that_does_not_fit_is_refused_with_the_reason(generate, folder: Path, change, words):
    write(Decoder(dataclasses.replace(TINY, **change)), folder / "decoders" / "wrong")
    code, err = generate(PROMPT, "--decoder", "wrong", "-o", "a.mp4")
    assert code == 2 and words in err[0] and not Path("a.mp4").exists()
    with pytest.raises(ValueError, match=words):
        VideoPipeline.from_pretrained(folder, decoder="wrong")


def test_a_file_that_does_not_fit_is_refused_before_a_clip_is_made(generate, tmp_path: Path):
    path = tmp_path / "taew2_2.pth"
    torch.save(Decoder(Config(z_dim=48, widths=(8, 6, 4, 4), patch_size=2)).state_dict(), path)
    code, err = generate(PROMPT, "--decoder", str(path), "-o", "a.mp4")
    assert code == 1 and "takes latents of 48 channels; the model's have 4" in err[-1]
    assert not Path("a.mp4").exists()


def test_an_unknown_name_is_refused_with_those_that_are_there(generate):
    code, err = generate(PROMPT, "--decoder", "smal", "-o", "a.mp4")
    assert code == 2 and "(vae, small)" in err[0] and "did you mean 'small'" in err[0]


def test_inspect_tells_which_there_are(folder: Path, capsys):
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["decoders"]["small"]["family"] == "taehv"
    assert facts["decoders"]["small"]["widths"] == [8, 6, 4, 4]
    count = sum(tensor.numel() for tensor in random_decoder().state_dict().values())
    assert facts["parts"]["decoders/small"]["parameters"] == count
    assert cli.main(["inspect", str(folder)]) == 0
    assert "small" in capsys.readouterr().out


def test_a_models_fingerprint_is_the_same_with_and_without_decoders(
    folder: Path, tiny_folder: Path
):
    assert recipe.fingerprint(folder) == recipe.fingerprint(tiny_folder)
    small = folder / "decoders" / "small"
    before = recipe.fingerprint(small)
    write(random_decoder(seed=1), small)
    assert recipe.fingerprint(small) != before


def test_an_evaluation_measures_it_and_keeps_its_results_apart(folder: Path, tmp_path: Path):
    few = {"prompts": 2, "reconstructions": 2, "repeats": 0, "num_inference_steps": 1}
    made = [
        Evaluation.plan(str(folder), output=tmp_path / "eval", dtype="float32", decoder=name, **few)
        for name in (None, "small")
    ]
    assert made[0].results != made[1].results and "decoder" not in made[0].recipe
    tables = []
    for evaluation in made:
        assert list(evaluation.run())[-1] == (4, 4)
        tables.append(evaluation.report())
    assert tables[0].psnr != tables[1].psnr
    assert tables[1].recipe["decoder"]["name_or_path"] == "small"


def test_the_evaluate_command_says_whose_reconstruction_it_is(folder: Path, tmp_path, capsys):
    words = ["--prompts", "1", "--repeats", "0", "--steps", "1", "-o", str(tmp_path / "eval")]
    assert cli.main(["eval", str(folder), *words, "--decoder", "small"]) == 0
    assert "VAE with decoder small on 1 held-out clips" in capsys.readouterr().out
    assert cli.main(["eval", str(folder), *words, "--decoder", "smal"]) == 2
    assert "did you mean 'small'" in capsys.readouterr().err
