"""generate, inspect and doctor as a user meets them, on a tiny model."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from fastvideo_inference import recipe
from fastvideo_inference.commands import demo, report

from fastvideo import Video, VideoPipeline, cli, hub, media
from fastvideo.stages import Progress, encode_text

PROMPT = "a red ball moving left"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.fixture
def generate(tiny_folder: Path, capsys: pytest.CaptureFixture[str]):
    """Run `fastvideo generate --model tiny ...`; return exit code, stdout lines, stderr lines."""

    def run(*words: str, model: Path | str = tiny_folder) -> tuple[int, list[str], list[str]]:
        own = [] if "--model" in words else ["--model", str(model)]
        code = cli.main(["generate", *own, *words])
        out = capsys.readouterr()
        return code, out.out.splitlines(), out.err.splitlines()

    return run


def frames_of(path: str) -> bytes:
    return media.read_video(path)[0].tobytes()


def test_a_prompt_becomes_a_clip_of_exactly_the_size_and_length_asked_for(generate):
    code, out, err = generate(
        PROMPT, "--size", "64x32", "--frames", "5", "--fps", "7", "--seed", "4", "-o", "a.mp4"
    )
    assert (code, out) == (0, ["a.mp4"])
    assert err[0].startswith("seed 4, ")
    assert "denoise" in err[0]
    facts = media.read_facts("a.mp4")
    assert (facts.width, facts.height, facts.num_frames, facts.fps) == (64, 32, 5, 7.0)
    assert sorted(str(p) for p in Path().iterdir()) == ["a.json", "a.mp4"]


def test_the_sidecar_holds_recipe_and_stage_times(generate):
    generate(PROMPT, "--seed", "4", "-o", "a.mp4")
    beside = json.loads(Path("a.json").read_text())
    assert beside["recipe"] == recipe.read_recipe("a.mp4").model_dump(mode="json")
    stages = ["load", "encode_text", "prepare_latents", "denoise", "decode", "save"]
    assert list(beside["timings_s"]) == stages


def test_without_an_output_a_new_name_is_found_each_time(generate):
    names = [generate(PROMPT, "--seed", "4")[1][0] for _ in range(2)]
    assert names[0].startswith("outputs/")
    assert names[0].endswith("-a-red-ball-moving-left-4.mp4")
    assert names[1] == names[0].replace("-4.mp4", "-4-2.mp4")


def test_a_sidecar_that_appears_meanwhile_is_replaced_only_if_asked(generate, monkeypatch):
    save = Video.save

    def beside(video: Video, path: Path, **how: bool) -> Path:
        path.with_suffix(".json").write_text("another's")
        return save(video, path, **how)

    monkeypatch.setattr(Video, "save", beside)
    words = [PROMPT, "--frames", "5", "--steps", "1", "-o", "a.mp4"]
    code, _, err = generate(*words)
    assert code == 1 and "a.json" in err[-1] and Path("a.json").read_text() == "another's"
    assert generate(*words, "--overwrite")[0] == 0
    assert json.loads(Path("a.json").read_text())["output"] == "a.mp4"


def test_from_repeats_a_clip_to_identical_frames(generate, monkeypatch):
    made, write = [], media.write_video

    def spy(path, frames, **how):
        made.append(np.concatenate([np.atleast_1d(part) for part in frames]))
        return write(path, [made[-1]], **how)

    monkeypatch.setattr(media, "write_video", spy)
    generate(PROMPT, "--steps", "3", "--guidance", "2.5", "--dtype", "float32", "-o", "a.mp4")
    code, _, _ = generate("--from", "a.mp4", "-o", "b.mp4")
    assert code == 0
    assert len(made) == 2 and np.array_equal(*made)
    digests = [json.loads(Path(f"{name}.json").read_text())["frames_sha256"] for name in "ab"]
    assert digests == [hashlib.sha256(frames.tobytes()).hexdigest() for frames in made]
    # The frames are equal; the encoder now and then writes another file of equal frames.
    first, second = (np.frombuffer(frames_of(name), np.uint8) for name in ("a.mp4", "b.mp4"))
    assert np.abs(first.astype(int) - second).mean() < 0.5
    assert recipe.read_recipe("a.mp4") == recipe.read_recipe("b.mp4")


def test_from_finds_the_model_by_itself_and_flags_change_the_rest(
    generate, tiny_folder: Path, capsys
):
    generate(PROMPT, "--seed", "1", "-o", "a.mp4")
    assert cli.main(["generate", "--from", "a.mp4", "--seed", "2", "-o", "b.mp4"]) == 0
    first, second = recipe.read_recipe("a.mp4"), recipe.read_recipe("b.mp4")
    assert second.request == first.request.model_copy(update={"seed": 2})
    assert second.model == first.model
    assert frames_of("a.mp4") != frames_of("b.mp4")


def test_from_refuses_other_weights(generate, tiny_copy: Path):
    generate(PROMPT, "-o", "a.mp4")
    weights = next(tiny_copy.glob("vae/*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, _, err = generate("--from", "a.mp4", "-o", "b.mp4", model=tiny_copy)
    assert code == 2
    assert err[0].startswith("error: a.mp4 was made by other weights than ")


def test_flags_win_over_set_over_config(generate):
    Path("c.toml").write_text('prompt = "a blue ball"\nnum_frames = 5\nfps = 5\nseed = 1\n')
    generate(
        "--config", "c.toml", "--set", "fps=6", "--set", "seed=2", "--seed", "3", "-o", "a.mp4"
    )
    made = recipe.read_recipe("a.mp4").request
    assert (made.prompt, made.num_frames, made.fps, made.seed) == ("a blue ball", 5, 6, 3)


def test_a_config_may_name_the_model(tiny_folder: Path):
    Path("c.toml").write_text(f'model = "{tiny_folder}"\nprompt = "a blue ball"\n')
    assert cli.main(["generate", "--config", "c.toml", "-o", "a.mp4"]) == 0


def test_json_is_one_event_a_line_from_start_to_saved(generate):
    code, out, err = generate(PROMPT, "--seed", "4", "--json", "-o", "a.mp4")
    events = [json.loads(line) for line in out]
    assert (code, err) == (0, [])
    start = {"event": "start", "index": 0, "total": 1, "prompt": PROMPT, "seed": 4}
    assert events[0] == start
    assert events[-1]["event"] == "saved"
    assert events[-1]["path"] == "a.mp4"
    steps = [e for e in events if e.get("stage") == "denoise"]
    assert [(e["index"], e["total"]) for e in steps] == [(0, 2), (1, 2), (2, 2)]


def test_a_prompt_file_makes_a_clip_for_each_row(generate):
    rows = [{"prompt": "a red ball", "seed": 1}, {"prompt": "a blue ball", "num_frames": 5}]
    Path("p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    code, out, _ = generate("--prompts", "p.jsonl", "--steps", "1", "-o", "out/{index}.mp4")
    assert (code, out) == (0, ["out/0.mp4", "out/1.mp4"])
    made = [recipe.read_recipe(path).request for path in out]
    assert [(m.prompt, m.num_frames) for m in made] == [("a red ball", 9), ("a blue ball", 5)]
    assert made[0].seed == 1


def test_several_clips_of_a_prompt_are_those_of_their_seeds(generate):
    words = [PROMPT, "--steps", "1", "--frames", "5"]
    code, out, _ = generate(*words, "--count", "3", "--seed", "4", "-o", "{seed}.mp4")
    assert (code, out) == (0, ["4.mp4", "5.mp4", "6.mp4"])
    code, out, _ = generate(*words, "--seed", "6,4", "-o", "of-{seed}.mp4")
    assert (code, out) == (0, ["of-6.mp4", "of-4.mp4"])
    beside = [json.loads(Path(f"{n}.json").read_text()) for n in ("4", "5", "6", "of-6", "of-4")]
    assert beside[2]["recipe"] == beside[3]["recipe"]
    digests = [one["frames_sha256"] for one in beside]
    assert digests[3:] == [digests[2], digests[0]]
    assert len(set(digests)) == 3
    assert ["load" in one["timings_s"] for one in beside] == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("source", "kept", "exact"),
    [
        (["--fps", "24000/1001"], 24000 / 1001, Fraction(24000, 1001)),
        (["--config", "c.toml"], 29.97, Fraction(2997, 100)),
        (["--set", "fps=24.0"], 24, Fraction(24)),
    ],
)
def test_a_frame_rate_is_kept_by_recipe_file_and_repetition(
    generate, capsys, source: list[str], kept: float, exact: Fraction
):
    Path("c.toml").write_text("fps = 29.97")
    generate(PROMPT, "--frames", "5", "--steps", "1", *source, "-o", "a.mp4")
    assert generate("--from", "a.mp4", "-o", "b.mp4")[0] == 0
    for name in ("a.mp4", "b.mp4"):
        made = recipe.read_recipe(name).request.fps
        assert (made, type(made)) == (kept, type(kept))
        with av.open(name) as file:
            assert file.streams.video[0].average_rate == exact
            times = [frame.time for frame in file.decode(video=0)]
        assert times == pytest.approx([float(k / exact) for k in range(5)])
    assert cli.main(["inspect", "a.mp4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["video"]["fps"] == facts["recipe"]["request"]["fps"] == kept


def test_one_failed_prompt_does_not_stop_the_batch(generate, monkeypatch: pytest.MonkeyPatch):
    encode = encode_text.encode

    def fail_once(model: object, words: list[str]) -> object:
        if "bad" in words[0]:
            raise ValueError("cannot say bad")
        return encode(model, words)

    monkeypatch.setattr(encode_text, "encode", fail_once)
    Path("p.txt").write_text("a bad ball\na red ball\n")
    code, out, err = generate("--prompts", "p.txt", "-o", "{index}.mp4")
    assert (code, out) == (1, ["1.mp4"])
    assert err[0] == "error: 'a bad ball': cannot say bad"
    assert not Path("0.mp4").exists()


def test_the_failure_of_a_single_prompt_is_an_event_and_one_line(
    generate, monkeypatch: pytest.MonkeyPatch
):
    def fail(model: object, words: list[str]) -> object:
        raise ValueError("cannot say it")

    monkeypatch.setattr(encode_text, "encode", fail)
    code, out, err = generate(PROMPT, "--json", "-o", "a.mp4")
    assert (code, err) == (1, ["error: cannot say it"])
    failed = {"event": "failed", "prompt": PROMPT, "error": "cannot say it"}
    assert json.loads(out[-1]) == failed
    assert generate(PROMPT, "-o", "a.mp4") == (1, [], ["error: cannot say it"])


def test_a_flag_given_twice_is_told_by_the_log_an_event_and_the_sidecar(generate):
    Path("p.jsonl").write_text('{"prompt": "a red ball", "fps": 8, "fps": 9}')
    words = ["--prompts", "p.jsonl", "--seed", "1", "--seed", "2", "--json", "-o", "a.mp4"]
    sets = ["--set", "frames=9", "--set", "frames = 5", "--set", "steps=1"]
    code, out, err = generate(*words, *sets)
    twice = ("--seed", "--set frames", "fps in p.jsonl:1")
    told = [f"{what} is given twice: the last one counts" for what in twice]
    assert (code, [line for line in err if "twice" in line]) == (0, told)
    notices = [line["text"] for line in map(json.loads, out) if line["event"] == "notice"]
    assert notices == json.loads(Path("a.json").read_text())["notices"] == told
    made = recipe.read_recipe("a.mp4").request
    assert (made.seed, made.num_frames, made.fps) == (2, 5, 9)


def test_what_holds_for_all_clips_is_logged_once_and_told_by_each(generate):
    Path("p.txt").write_text("a red ball\na blue ball\n")
    words = ["--prompts", "p.txt", "--count", "2", "--frames", "5", "--steps", "1", "--json"]
    sparse = ["--attention", "vsa(sparsity=0.5)", "-o", "{index}.mp4"]
    code, out, err = generate(*words, *sparse)
    assert code == 0 and ["sparsity" in line for line in err] == [True]
    told = [line["text"] for line in map(json.loads, out) if line["event"] == "notice"]
    assert told == err * 4
    assert json.loads(Path("3.json").read_text())["notices"] == err


REFUSED = {
    "no prompt": ([], "there is no prompt"),
    "empty": ([""], 'prompt "" in the command line: the prompt is empty'),
    "frames": (["x", "--frames", "6"], "num_frames 6 must be 4k+1 for this model; nearest: 5, 9"),
    "size": (["x", "--size", "50x32"], "width 50 must be a multiple of 16"),
    "size text": (["x", "--size", "50"], "size '50' in --size: must look like WIDTHxHEIGHT"),
    "size empty": (["x", "--size", ""], "size '' in --size: must look like WIDTHxHEIGHT"),
    "size by a sign": (["x", "--size", "50*32"], "width 50 must be a multiple of 16"),
    "fps": (["x", "--fps", "24.0001"], 'fps "24.0001" in --fps: must be a fraction with a'),
    "count": (["x", "--count", "0"], "Invalid value for '--count'"),
    "count in one file": (["x", "--count", "2", "-o", "a.mp4"], "2 clips; add {index} or {seed}"),
    "steps": (["x", "--steps", "0"], "num_inference_steps 0 in --steps: must be at least 1"),
    "type": (["x", "--steps", "ten"], "Invalid value for '--steps'"),
    "seed": (["x", "--seed", "-3"], "seed -3 in --seed: must be at least -1"),
    "key": (["x", "--set", "guidance_scal=2"], "did you mean 'guidance_scale'"),
    "config": (["x", "--config", "none.toml"], "config none.toml does not exist"),
    "toml": (["x", "--config", "bad.toml"], "config bad.toml is not valid TOML"),
    "toml key": (["--config", "odd.toml"], "stepz in odd.toml:2 is unknown; did you mean 'steps'?"),
    "both": (["x", "--prompts", "p.txt"], "give a prompt or --prompts FILE, not both"),
    "row": (["--prompts", "p.jsonl"], "num_frames 7 must be 4k+1"),
    "output": (["x", "-o", "there.mp4"], "there.mp4 exists already and is not overwritten"),
    "sidecar": (["x", "-o", "half.mp4"], "half.json exists already and is not overwritten"),
    "suffix": (["x", "-o", "a.webm"], "output 'a.webm' must end in one of: .mp4"),
    "folder": (["x", "-o", "there.mp4/a.mp4"], "there.mp4/a.mp4: there.mp4 is not a folder"),
    "template": (["x", "-o", "{promt}.mp4"], "did you mean 'prompt'"),
    "model": (["x", "--model", "wan-nan"], "model 'wan-nan' is neither bundled"),
    "model empty": (["x", "--model", ""], "model '' is neither bundled"),
    "dtype": (["x", "--dtype", "float23"], "did you mean 'float32'"),
    "device": (["x", "--device", "gpu"], "--device 'gpu' is unknown"),
    "from": (["--from", "p.txt"], "p.txt is not a video that can be read"),
    "from none": (["--from", "none.mp4"], "none.mp4 does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_illegal_is_refused_in_one_line_with_code_2(generate, case: str):
    Path("bad.toml").write_text("a = = 1")
    Path("odd.toml").write_text('prompt = "x"\nstepz = 1')
    Path("p.txt").write_text("x")
    Path("p.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "num_frames": 7}')
    Path("there.mp4").touch()
    Path("half.json").touch()
    words, text = REFUSED[case]
    code, out, err = generate(*words)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("error: ")
    assert text in err[0]
    assert not list(Path.cwd().rglob("*.partial*"))


def test_requests_are_refused_before_torch_is_imported(tiny_folder: Path):
    cases = [["generate", *words] for words, _ in REFUSED.values() if "none.toml" not in words]
    script = (
        "import sys\nfrom fastvideo.cli import main\n"
        f"for words in {cases!r}:\n"
        f"    given = [] if '--model' in words else ['--model', {str(tiny_folder)!r}]\n"
        "    assert main([*words, *given]) == 2, words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    files = {"bad.toml": "a = =", "odd.toml": "stepz = 1", "p.txt": "x", "there.mp4": ""}
    files |= {"half.json": "", "p.jsonl": '{"prompt": "x", "num_frames": 7}'}
    for name, text in files.items():
        Path(name).write_text(text)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_broken_weights_are_one_line_with_code_1(generate, tiny_copy: Path):
    weights = next(tiny_copy.glob("transformer/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    code, out, err = generate(PROMPT, model=tiny_copy)
    assert (code, out, len(err)) == (1, [], 1)
    assert "truncated" in err[0]
    assert weights.name in err[0]


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_leaves_no_half_file_and_exits_with_130(tiny_folder: Path):
    words = [sys.executable, "-m", "fastvideo", "generate", PROMPT, "--model", str(tiny_folder)]
    run = subprocess.Popen(
        [*words, "--steps", "1000", "--json", "-o", "a.mp4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    events = map(json.loads, run.stdout)
    # not at the first, which imports: Python ends with -SIGINT, 130 to a shell, if a dataclass is
    # being made then
    assert any(e.get("stage") == "denoise" and e["index"] == 3 for e in events)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert (run.returncode, err.strip()) == (130, "interrupted")
    assert list(Path().iterdir()) == []


def test_bars_are_drawn_on_a_terminal_and_end_full(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    with report.reporting(as_json=False) as listener:
        listener.start(index=0, total=2, prompt=PROMPT, seed=1)
        for index in range(3):
            listener.event(Progress("prepare_latents", index, 2))
        listener.saved("a.mp4", seed=1, timings={"load": 1.0})
    out = capsys.readouterr()
    assert out.out == "a.mp4\n"
    assert "[1/2] prepare latents" in out.err
    assert "2/2" in out.err


def test_inspect_tells_recipe_and_stream_of_a_clip(generate, capsys):
    generate(PROMPT, "--seed", "4", "-o", "a.mp4")
    assert cli.main(["inspect", "a.mp4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["recipe"] == recipe.read_recipe("a.mp4").model_dump(mode="json")
    assert (facts["video"]["width"], facts["video"]["num_frames"]) == (48, 9)
    assert {"load", "denoise", "decode", "save"} <= set(facts["timings_s"])
    Path("a.json").unlink()
    assert cli.main(["inspect", "a.mp4"]) == 0
    assert f"prompt  {PROMPT}" in capsys.readouterr().out


def test_inspect_says_so_if_a_clip_has_no_recipe(capsys):
    import numpy as np

    media.write_video("a.mp4", [np.zeros((2, 16, 16, 3), np.uint8)], fps=8)
    assert cli.main(["inspect", "a.mp4"]) == 0
    assert "recipe  none: a.mp4 carries no recipe" in capsys.readouterr().out


def test_inspect_counts_the_parameters_of_a_model_folder(tiny_folder: Path, capsys):
    from fastvideo.model import load

    assert cli.main(["inspect", str(tiny_folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = load(tiny_folder, dtype="float32")
    for part, network in (("transformer", model.dit), ("vae", model.vae)):
        total = sum(p.numel() for p in network.parameters())
        assert facts["parts"][part]["parameters"] == total
        assert facts["parts"][part]["dtypes"] == {"float32": total}
    assert facts["spec"]["dit"]["config"]["num_layers"] == 2


@pytest.mark.parametrize(("content", "code"), [(b"not a video", 1), (b"", 1), (None, 2)])
def test_inspect_answers_an_unreadable_file_in_one_line(content: bytes | None, code: int, capsys):
    if content is not None:
        Path("a.mp4").write_bytes(content)
    assert cli.main(["inspect", "a.mp4"]) == code
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert "a.mp4" in err[0]


def test_doctor_finds_this_machine_able_to_write_clips(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == []
    assert facts["attention"]["dense on cpu"]["reference"] == "usable"
    assert "NVIDIA" in facts["attention"]["dense on cpu"]["flash"]
    assert facts["attention"]["vsa on cpu"]["gather"] == "chosen"
    assert facts["video"] == "h264 yuv420p, tags read back"
    assert str(hub.cache_dir()) in facts["disk"]["hub cache"]


def test_doctor_reports_what_is_broken_and_goes_on(monkeypatch: pytest.MonkeyPatch, capsys):
    def no_codec(*args: object, **kwargs: object) -> None:
        raise OSError("no libx264")

    monkeypatch.setattr(media, "write_video", no_codec)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "video  FAILED: OSError: no libx264" in out
    assert "problems  video" in out


def test_the_server_of_the_demo_ends_with_it(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("fastapi")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with demo.own_server([str(tiny_folder)], {}) as process:
        pipe = VideoPipeline.connect(demo._url(process))
        offers = pipe.offers()
        assert [one["name"] for one in offers["slo_class"]] == ["any time"], "without a profile"
        assert [one["id"] for one in offers["data"]] == [tiny_folder.name]
    assert process.poll() is not None
    with pytest.raises(ConnectionError):
        pipe.offers()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--lora", "x.safetensors"], "must be NAME=PATH"),
        (["--server", "http://127.0.0.1:9", "--model", "wan-nano"], "not --server"),
    ],
)
def test_demo_refuses_words_that_do_not_go_together(words: list[str], text: str, capsys):
    pytest.importorskip("gradio")
    assert cli.main(["demo", *words]) == 2
    assert text in capsys.readouterr().err


def test_demo_finds_the_page_of_a_checkout_or_says_where_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    import fastvideo

    assert demo.find_page() == Path(fastvideo.__file__).parents[1] / "demos" / "app.py"
    monkeypatch.setattr(fastvideo, "__file__", str(tmp_path / "site" / "fastvideo" / "x.py"))
    assert cli.main(["demo"]) == 2
    assert "pip install -e '.[demo]'" in capsys.readouterr().err
