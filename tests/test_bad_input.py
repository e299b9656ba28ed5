"""Bad input as a user meets it: one line with value, rule and source, an exit code, no half file.

Wrong words on the command line are in fastvideo_inference/test_commands.py; here are wrong folders,
wrong files, a refusing disk and Ctrl-C.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_recipes import CONFIGS

from fastvideo import cli, hub, media, weights

PROMPT = "a red ball moving left"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command that must fail; return its exit code and its one line."""

    def run(*words: str) -> tuple[int, str]:
        code = cli.main(list(words))
        out = capsys.readouterr()
        assert out.err.count("\n") == 1, out.err
        assert out.err.startswith("error: ")
        return code, out.err.removeprefix("error: ").rstrip()

    return run


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path, keep: int) -> None:
    """Keep the first bytes of a file, or all but the last if `keep` is negative."""
    path.write_bytes(path.read_bytes()[:keep])


# case: (damage, exit code, what the line must hold)
FOLDERS: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...]]] = {
    "no config": (
        lambda folder: (folder / "transformer/config.json").unlink(),
        2,
        ("tiny/transformer/config.json does not exist",),
    ),
    "broken spec": (
        lambda folder: (folder / "fastvideo.json").write_text("{"),
        2,
        ("tiny/fastvideo.json is not valid JSON",),
    ),
    "unknown key in the spec": (
        lambda folder: edit(folder / "fastvideo.json", defualts={}),
        2,
        ("defualts in ", "tiny/fastvideo.json is unknown; did you mean 'defaults'?"),
    ),
    "unknown key in a config": (
        lambda folder: edit(folder / "transformer/config.json", num_layer=3),
        1,
        ("num_layer", "did you mean 'num_layers'?", "tiny"),
    ),
    "no tokenizer": (
        lambda folder: shutil.rmtree(folder / "tokenizer"),
        1,
        ("tiny/tokenizer has no tokenizer.json",),
    ),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        1,
        ("tiny/transformer holds no weights; looked for diffusion_pytorch_model.safetensors",),
    ),
    "truncated data": (
        lambda folder: cut(folder / WEIGHTS, -100),
        1,
        (f"tiny/{WEIGHTS} is truncated: ", "its header needs"),
    ),
    "truncated header": (
        lambda folder: cut(folder / WEIGHTS, 50),
        1,
        (f"tiny/{WEIGHTS} is not a whole safetensors file: the header is cut off",),
    ),
    "wrong shapes": (
        lambda folder: edit(folder / "transformer/config.json", ffn_dim=52),
        1,
        ("6 mis-shaped: blocks.0.ffn.net.0.proj.weight (64, 48) instead of (52, 48)", "tiny"),
    ),
    "missing tensors": (
        lambda folder: edit(folder / "transformer/config.json", num_layers=3),
        1,
        ("27 missing: blocks.2.", " and 19 more", "tiny"),
    ),
    "unexpected tensors": (
        lambda folder: edit(folder / "transformer/config.json", num_layers=1),
        1,
        ("27 unexpected: blocks.1.", " and 19 more", "tiny"),
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_damaged_model_folder_is_told_in_one_line(fail, tiny_copy: Path, case: str):
    damage, code, texts = FOLDERS[case]
    damage(tiny_copy)
    got, line = fail("generate", PROMPT, "--model", str(tiny_copy), "-o", "a.mp4")
    assert got == code
    assert all(text in line for text in texts), line
    assert list(Path().iterdir()) == []


def test_a_folder_that_is_no_model_says_what_was_looked_for(fail):
    Path("empty").mkdir()
    for words in (["generate", PROMPT, "--model", "empty"], ["inspect", "empty"]):
        code, line = fail(*words)
        assert (code, line.partition(";")[0]) == (2, "empty is not a model folder")
        assert "fastvideo.json, or model_index.json" in line


def test_inspect_notices_truncated_weights(fail, tiny_copy: Path):
    cut(tiny_copy / WEIGHTS, -100)
    code, line = fail("inspect", str(tiny_copy))
    assert code == 1
    assert f"{WEIGHTS} is truncated" in line


def test_an_unknown_model_gets_a_suggestion(fail, tiny_folder: Path, monkeypatch):
    Path("zoo/wan-nano").mkdir(parents=True)
    monkeypatch.setattr(hub, "ZOO", Path("zoo"))
    for verb in (["generate", PROMPT, "--model"], ["inspect"], ["eval"]):
        code, line = fail(*verb, "wan-nan")
        assert code == 2
        assert line.startswith("model 'wan-nan' is neither bundled (wan-nano), nor a folder")
        assert line.endswith("did you mean 'wan-nano'?")


def test_a_clip_that_is_not_there_is_called_a_clip(fail):
    assert fail("inspect", "none.mp4") == (2, "clip none.mp4 does not exist")


def test_a_clip_whose_model_has_moved_says_where_the_name_is_from(fail, tiny_copy: Path, capsys):
    tiny_copy.rename("here")
    assert cli.main(["generate", PROMPT, "--model", "here", "-o", "a.mp4"]) == 0
    capsys.readouterr()
    Path("here").rename("there")
    code, line = fail("generate", "--from", "a.mp4", "-o", "b.mp4")
    assert code == 2
    assert line.startswith("model 'here' is neither bundled")
    assert line.endswith("(named by the recipe in a.mp4; --model says where it is now)")
    assert cli.main(["generate", "--from", "a.mp4", "--model", "there", "-o", "b.mp4"]) == 0


@pytest.mark.parametrize("keep", [-1000, 2500, 40])
def test_a_clip_cut_short_is_told_in_one_line(fail, tiny_folder: Path, capsys, keep: int):
    words = ["--model", str(tiny_folder), "--size", "64x64", "-o", "a.mp4"]
    assert cli.main(["generate", PROMPT, *words]) == 0
    capsys.readouterr()
    cut(Path("a.mp4"), keep)
    code, line = fail("inspect", "a.mp4")
    assert code == 1
    assert line.startswith("a.mp4 is not a video that can be read: ")


def test_an_unwritable_output_is_refused_before_any_work(fail, tiny_folder: Path):
    code, line = fail("generate", PROMPT, "--model", str(tiny_folder), "-o", "/sys/a.mp4")
    assert code == 2
    assert line.startswith("/sys/a.mp4: ")  # the system's own reason follows


def fill(folder: Path, name: str, part: str, value: float) -> None:
    """Set one number of a tensor of a model folder's part."""
    path = next((folder / part).glob("*.safetensors"))
    state = dict(weights.Checkpoint(path))
    state[name] = state[name].clone()
    state[name].view(-1)[0] = value
    weights.save(path, state)


# case: (part, tensor, value, what the line must hold)
NOT_FINITE = {
    "denoiser": (
        "transformer",
        "proj_out.weight",
        float("nan"),
        "latents are not finite after denoising step 1 of 2; weights of the denoiser are not",
    ),
    "text": (
        "text_encoder",
        "encoder.final_layer_norm.weight",
        float("inf"),
        "after denoising step 1 of 2; the text encoder's states are not finite",
    ),
    "vae": ("vae", "post_quant_conv.weight", float("nan"), "decoded pixels are not finite"),
}


@pytest.mark.parametrize("case", NOT_FINITE)
@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_a_clip_that_is_not_finite_is_told_in_one_line_and_not_written(
    capsys, tiny_copy: Path, case: str, verb: str
):
    part, name, value, text = NOT_FINITE[case]
    fill(tiny_copy, name, part, value)
    size = ["--size", "64x64", "--frames", "5", "--steps", "2"]
    words = {
        "generate": ["generate", PROMPT, "--model", str(tiny_copy), "-o", "a.mp4", *size],
        "eval": ["eval", str(tiny_copy), "--prompts", "1", "-o", "found", *size],
    }
    assert cli.main(words[verb]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and text in errors[0]
    assert {path.name for path in Path().rglob("*") if path.is_file()} <= {"recipe.json"}


def test_a_number_that_can_only_overflow_is_refused(fail, tiny_folder: Path):
    for words, rule in (
        (["--guidance", "1e38"], "guidance_scale 1e+38"),
        (["--guidance", "100.5"], "guidance_scale 100.5"),
        (["--lora", "a.safetensors:1e30"], "lora.0.strength 1e+30"),
        (["--lora", "a.safetensors:-101"], "lora.0.strength -101"),
    ):
        code, line = fail("generate", PROMPT, "--model", str(tiny_folder), *words)
        assert (code, line.startswith(rule)) == (2, True), line
        assert "100" in line.removeprefix(rule)


class FullDisk(io.FileIO):
    """A file on a disk without space."""

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(
    fail, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(media, "_PatientFile", type("P", (media._PatientFile, FullDisk), {}))
    for words in (
        ["generate", PROMPT, "--model", str(tiny_folder), "-o", "a.mp4"],
        ["data", "render", "--count", "1", "--size", "64x64", "--frames", "5", "-o", "."],
    ):
        code, line = fail(*words)
        assert code == 1
        assert line.endswith(".mp4: No space left on device")
        assert list(Path().iterdir()) == []


def test_ctrl_c_while_a_clip_is_written_leaves_no_half_file(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def interrupted(frames: Any) -> Iterator[Any]:
        yield from [next(single(frames))] * 3
        raise KeyboardInterrupt

    single = media._single
    monkeypatch.setattr(media, "_single", interrupted)
    assert cli.main(["generate", PROMPT, "--model", str(tiny_folder), "-o", "a.mp4"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert list(Path().iterdir()) == []


# case: (lines after those of vae.toml, words, what the line must hold)
RECIPES = {
    "unknown table": ("[optin]\nlr = 1", (), "optin in bad.toml is unknown; did you mean 'optim'?"),
    "unknown key": (
        "[run]\nstep = 1",
        (),
        "run.step in bad.toml is unknown; did you mean 'steps'?",
    ),
    "no steps": ("[run]\nsteps = 0", (), "run.steps 0 in bad.toml: must be at least 1"),
    "wrong type": ("[run]\nsteps = 'x'", (), 'run.steps "x" in bad.toml: must be a valid integer'),
    "unknown data": (
        "[data]\nname = 'clip'",
        (),
        "data.name \"clip\" in bad.toml is unknown; did you mean 'clips'? (known: clips, latents",
    ),
    "unknown method": (
        "[method]\nname = 'vea'",
        (),
        "method 'vea' is unknown; did you mean 'vae'?",
    ),
    "unknown argument": ("[method.args]\nl11 = 1", (), "l11 in method.args of nano-vae is unknown"),
    "not TOML": ("= 1", (), "config bad.toml is not valid TOML"),
    "run folder": ("", ("--run-dir", "bad.toml/run"), "bad.toml/run: "),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_wrong_recipe_is_refused_in_one_line(fail, case: str):
    lines, words, text = RECIPES[case]
    Path("bad.toml").write_text(f'extends = "{CONFIGS / "vae.toml"}"\n{lines}\n')
    code, line = fail("train", "bad.toml", *words)
    assert code == 2
    assert text in line
    assert [path.name for path in Path().iterdir() if path.name != "runs"] == ["bad.toml"]


@pytest.mark.parametrize(
    ("part", "size", "frames", "text"),
    [
        ("vae", "70x64", "5", "width 70 must be a multiple of 8 for this model; nearest: 64, 72"),
        (".", "72x64", "5", "width 72 must be a multiple of 16 for this model; nearest: 64, 80"),
        (".", "64x64", "6", "num_frames 6 must be 4k+1 for this model; nearest: 5, 9"),
    ],
)
def test_sizes_that_a_vae_or_its_model_cannot_have_are_refused(
    fail, tiny_folder: Path, tmp_path: Path, part: str, size: str, frames: str, text: str
):
    model = tmp_path.with_name(f"{tmp_path.name}-model")
    shutil.copytree(tiny_folder / part, model / part)
    given = ["--vae", str(model), "--size", size, "--frames", frames]
    assert fail("data", "encode", "-o", "latents", *given) == (2, text)
    assert list(Path().iterdir()) == []


# What no request can say: refused with 2 before any weight is read, wherever it stands


@pytest.fixture
def unread(tiny_copy: Path) -> Path:
    """A model folder whose weights nobody can read."""
    for path in tiny_copy.rglob("*.safetensors"):
        path.write_bytes(b"not to be read")
    return tiny_copy


# case: (key, value, what the line must hold)
VALUES: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "switch as seed": ("seed", True, ("seed true in ", "integer")),
    "fraction as seed": ("seed", 1.0, ("seed 1.0 in ", "integer")),
    "text as seed": ("seed", "1", ('seed "1" in ', "integer")),
    "fraction as steps": ("steps", 2.5, ("num_inference_steps 2.5 in ", "integer")),
    "switch as frames": ("frames", True, ("num_frames true in ", "integer")),
    "switch as fps": ("fps", True, ("fps true in ", "number")),
    "switch as guidance": ("guidance", True, ("guidance_scale true in ", "number")),
    "number as prompt": ("text", 3, ("prompt 3 in ", "string")),
    "NUL in a prompt": ("text", "a\0b", ("prompt ", "must not hold a NUL")),
    "NUL in a negative": ("negative", "\0", ("negative_prompt ", "must not hold a NUL")),
    "number as size": ("size", 48, ("48", "WIDTHxHEIGHT")),
    "frames": ("frames", 4097, ("num_frames 4097 ", "nearest: 4093")),
    "height": ("size", "48x16400", ("height 16400 ", "nearest: 16384")),
    "width": ("width", 16400, ("width 16400 ", "nearest: 16384")),
}


@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_no_request_has_is_refused_before_weights_are_read(
    fail, unread: Path, case: str
):
    key, value, texts = VALUES[case]
    text, prompt = json.dumps(value), [] if key == "text" else [PROMPT]  # a JSON value is TOML too
    Path("c.toml").write_text(f"{key} = {text}\n")
    Path("p.jsonl").write_text(json.dumps({**({"prompt": "x"} if prompt else {}), key: value}))
    for source, words in (
        ("c.toml", [*prompt, "--config", "c.toml"]),
        ("--set", [*prompt, "--set", f"{key}={text}"]),
        ("p.jsonl:1", ["--prompts", "p.jsonl"]),
    ):
        code, line = fail("generate", "--model", str(unread), *words)
        assert code == 2 and all(part in line for part in (*texts, source)), line
    assert {path.name for path in Path().iterdir()} == {"c.toml", "p.jsonl"}


LONE = r"it holds a lone '\ud800'"


@pytest.mark.parametrize(
    ("verb", "words", "texts"),
    [
        ("generate", [PROMPT, "--steps", "2.5"], ("--steps", "integer")),
        ("generate", [PROMPT, "--seed", "true"], ("--seed", "integer")),
        ("generate", ["a\0b"], ("prompt ", "must not hold a NUL")),
        ("generate", ["a \ud800"], ("prompt ", LONE)),
        ("generate", [PROMPT, "--negative", "\ud800"], ("negative_prompt ", LONE, "--negative")),
        ("generate", ["--prompts", "p.jsonl"], ("prompt ", LONE, "p.jsonl:1")),
        ("generate", [PROMPT, "--frames", "4097"], ("num_frames 4097 ", "4093", "--frames")),
        ("generate", [PROMPT, "--size", "48x16400"], ("height 16400 ", "16384", "--size")),
        ("eval", ["--steps", "2.5"], ("--steps", "integer")),
        ("eval", ["--seed", "true"], ("--seed", "integer")),
        ("eval", ["--negative", "a\0b"], ("negative_prompt ", "must not hold a NUL")),
        ("eval", ["--negative", "\ud800"], ("negative_prompt ", LONE)),
        ("eval", ["--frames", "4097"], ("num_frames 4097 ", "4093")),
        ("eval", ["--size", "16400x32"], ("width 16400 ", "16384")),
    ],
)
def test_a_word_that_no_request_has_is_refused_before_weights_are_read(
    fail, unread: Path, verb: str, words: list[str], texts: tuple[str, ...]
):
    Path("p.jsonl").write_text(json.dumps({"prompt": "a \ud800"}))
    model = ["--model", str(unread)] if verb == "generate" else [str(unread)]
    code, line = fail(verb, *model, *words)
    assert code == 2 and all(text in line for text in texts), line
    assert line.isascii() and [path.name for path in Path().iterdir()] == ["p.jsonl"]


def test_other_steps_than_a_distilled_model_takes_are_refused_before_weights_are_read(
    fail, unread: Path
):
    few = {"name": "few_step", "args": {"sigmas": [1.0, 0.9, 0.7], "renoise": False}}
    edit(unread / "fastvideo.json", scheduler=few)
    Path("p.jsonl").write_text('{"prompt": "x", "steps": 4}')
    told = "takes exactly 3 steps; nearest: 3"
    for verb, words, where in (
        ("generate", [PROMPT, "--steps", "4"], "--steps"),
        ("generate", [PROMPT, "--set", "num_inference_steps=50"], "--set num_inference_steps"),
        ("generate", ["--prompts", "p.jsonl"], "p.jsonl:1"),
        ("generate", [PROMPT], "the defaults of tiny"),  # that say 2
        ("eval", ["--steps", "4"], "--steps"),
        ("eval", [], "the defaults of tiny"),
    ):
        model = ["--model", str(unread)] if verb == "generate" else [str(unread)]
        code, line = fail(verb, *model, *words)
        assert code == 2 and told in line and line.endswith(f"(from {where})"), line
    assert [path.name for path in Path().iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("seed = true\n{row}", "seed true in "),
        ("frames = 5.0\n{row}", "frames 5.0 in "),
        ("frames = 4097\n{row}", "num_frames 4097 "),
        ("{row}steps = 2.5\n", "steps 2.5 in "),
        ("{row}guidance = true\n", "guidance true in "),
    ],
)
def test_a_comparison_refuses_them_too(fail, unread: Path, lines: str, text: str):
    row = f'[[rows]]\nname = "a"\nmodel = "{unread}"\n'
    Path("c.toml").write_text('base = "a"\n' + lines.format(row=row))
    code, line = fail("eval", "--compare", "c.toml", "-o", "found")
    assert code == 2 and text in line, line
    assert [path.name for path in Path().iterdir()] == ["c.toml"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("steps = 2.5", "steps 2.5 in [validate]"),
        ("steps = true", "steps true in [validate]"),
        ("guidance = true", "guidance true in [validate]"),
        ("num_frames = true", "num_frames true in [validate]"),
        ("fps = true", "fps true in [validate]"),
        ("seed = true", "seed true in [validate]"),
        ("frames = 5", "frames in [validate]"),
    ],
)
def test_a_validation_refuses_them_too(fail, tiny_folder: Path, line: str, text: str):
    own = f'[validate]\nvae = "{tiny_folder}"\n{line}\n'
    Path("bad.toml").write_text(f'extends = "{CONFIGS / "dit-image.toml"}"\n{own}')
    code, error = fail("train", "bad.toml")
    assert code == 2 and text in error, error
    assert [path.name for path in Path().iterdir() if path.name != "runs"] == ["bad.toml"]
