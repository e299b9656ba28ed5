"""Several processes make the clip that one makes: in a pool of ranks, and under torchrun."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastvideo_inference import recipe, sharing
from fastvideo_inference.pipeline import Video

from fastvideo import VideoPipeline, cli, hub, media
from fastvideo.parallel.degrees import ParallelConfig, parse
from fastvideo.resolve import resolve
from fastvideo.sampling import GenerateRequest, SamplingParams
from fastvideo.spec import Spec

PROMPT = "a red ball moving left"
ODD = {"num_frames": 5, "height": 48, "width": 32, "num_inference_steps": 3}


def open_pipe(folder: Path, parallel: str | None = None) -> VideoPipeline:
    return VideoPipeline.from_pretrained(folder, dtype="float32", device="cpu", parallel=parallel)


def levels_apart(ours: Any, theirs: Any) -> int:
    assert ours.shape == theirs.shape
    return int(np.abs(ours.astype(int) - theirs).max())


# A script under torchrun, in a pool of ranks


def script(rank: int, size: int, folder: Path, parallel: str, out: Path, words: Any) -> Video:
    torch.manual_seed(rank)
    video = open_pipe(folder, parallel)(PROMPT, **words)
    video.save(out / "clip.mp4")
    return video


@pytest.mark.parametrize("parallel", ["guidance=2", "ring=3", "guidance=2,ulysses=2"])
def test_every_process_gets_the_clip_of_a_single_one_and_one_of_them_writes_it(
    ranks, tiny_folder: Path, tmp_path: Path, parallel: str
):
    alone = open_pipe(tiny_folder)(PROMPT, seed=3, **ODD)
    size = parse(parallel).world_size
    everywhere = ranks(size, script, tiny_folder, parallel, tmp_path, {"seed": 3, **ODD})
    first = everywhere[0]
    assert levels_apart(first.frames, alone.frames) <= 1
    assert [video.writes for video in everywhere] == [True] + [False] * (size - 1)
    assert {video.frames_sha256 for video in everywhere} == {first.frames_sha256}
    assert all(video.recipe == alone.recipe for video in everywhere)
    assert recipe.read_recipe(tmp_path / "clip.mp4").model_dump(mode="json") == alone.recipe


def test_a_seed_that_nobody_gave_is_drawn_once(ranks, tiny_folder: Path, tmp_path: Path):
    words = {"num_frames": 5, "num_inference_steps": 1}
    one, other = ranks(2, script, tiny_folder, "ulysses=2", tmp_path, words)
    assert one.recipe == other.recipe
    again = open_pipe(tiny_folder)(PROMPT, seed=one.recipe["request"]["seed"], **words)
    assert levels_apart(one.frames, again.frames) <= 1


def sparse(rank: int, size: int, folder: Path, words: Any) -> Video:
    return open_pipe(folder, "guidance=2,ulysses=2")(PROMPT, **words)


def test_a_sparse_model_is_shared_too(ranks, gated_folder: Path):
    words = {"seed": 3, "num_frames": 9, "num_inference_steps": 2}
    alone = open_pipe(gated_folder)(PROMPT, **words)
    for video in ranks(4, sparse, gated_folder, words):
        assert levels_apart(video.frames, alone.frames) <= 1


def own_clips(rank: int, size: int, folder: Path) -> tuple[bool, int]:
    """Processes in halves, each with a request of its own; the second process of each follows."""
    video = open_pipe(folder, "data=2,guidance=2")(PROMPT, seed=rank, num_frames=1)
    return video.writes, video.recipe["request"]["seed"]


def test_replicas_make_clips_of_their_own_and_the_first_of_each_decides(ranks, tiny_folder: Path):
    clips = ranks(4, own_clips, tiny_folder)
    assert clips == [(True, 0), (False, 0), (True, 2), (False, 2)]


def in_another_thread(rank: int, size: int, folder: Path) -> str:
    pipe = open_pipe(folder, "guidance=2")
    with ThreadPoolExecutor(1) as other:
        return str(other.submit(pipe, PROMPT, num_frames=1).exception())


def test_processes_make_their_clips_in_the_thread_that_loaded_the_model(ranks, tiny_folder: Path):
    errors = ranks(2, in_another_thread, tiny_folder)
    assert all("in the thread that loaded the pipeline" in error for error in errors)


def command(rank: int, size: int, words: list[str]) -> tuple[int, list[str]]:
    with redirect_stdout(io.StringIO()) as out:
        code = cli.main(words)
    return code, out.getvalue().splitlines()


def test_prompts_are_dealt_out_to_replicas_that_make_the_clips_of_one_process(
    ranks, tiny_folder: Path, tmp_path: Path
):
    (tmp_path / "three.txt").write_text("a red ball\na big square\na green ball at night\n")
    fixed = ["generate", "-m", str(tiny_folder), "--prompts", str(tmp_path / "three.txt")]
    fixed += ["--seed", "1", "--frames", "5", "--dtype", "float32", "--device", "cpu"]
    (code, out), (other, rest) = ranks(
        2, command, [*fixed, "--parallel", "data=2", "-o", f"{tmp_path}/many-{{index}}.mp4"]
    )
    assert (code, other) == (0, 0)
    assert out == [f"{tmp_path}/many-{i}.mp4" for i in (0, 2)]
    assert rest == [f"{tmp_path}/many-1.mp4"]
    assert cli.main([*fixed, "-o", f"{tmp_path}/one-{{index}}.mp4"]) == 0
    for i in range(3):
        pair = [json.loads((tmp_path / f"{n}-{i}.json").read_text()) for n in ("many", "one")]
        assert pair[0]["frames_sha256"] == pair[1]["frames_sha256"]
        assert pair[0]["recipe"] == pair[1]["recipe"]


# What is refused, and when


def params_of(folder: Path, **fields: Any) -> tuple[SamplingParams, Spec]:
    spec, _ = hub.open_spec(folder)
    return resolve(GenerateRequest(prompt=PROMPT, **fields), spec), spec


@pytest.mark.parametrize(
    ("degrees", "fields", "text"),
    [
        ({"guidance": 2}, {"guidance_scale": 1}, "guidance=2 has no second forward to run"),
        ({"ring": 2}, {"attention": "vsa(sparsity=0.5)"}, "nearest: ulysses=2 without ring"),
        ({"ulysses": 5}, {"height": 32}, "5 processes cannot decode a clip of 4 latent rows"),
    ],
)
def test_a_clip_that_so_many_processes_cannot_make_is_refused(
    tiny_folder: Path, degrees: dict[str, int], fields: dict[str, Any], text: str
):
    params, spec = params_of(tiny_folder, **fields)
    with pytest.raises(ValueError, match=text):
        sharing.check(ParallelConfig(**degrees), params, spec)


def test_a_small_decoder_needs_no_row_for_each_process(tiny_folder: Path):
    params, spec = params_of(tiny_folder, height=32)
    sharing.check(ParallelConfig(ulysses=5), params, spec, has_small_decoder=True)


def test_processes_without_degrees_are_refused_with_two_that_are_legal():
    with pytest.raises(ValueError, match=r"world size 2: ulysses=2 or guidance=2$"):
        sharing.read(None, world_size=2)
    with pytest.raises(ValueError, match=r": ulysses=8 or guidance=2,ulysses=4$"):
        sharing.read(None, world_size=8)
    with pytest.raises(ValueError, match=r": ulysses=3 or ring=3$"):
        sharing.read(None, world_size=3)
    with pytest.raises(ValueError, match=r": ulysses=2 or ring=2$"):
        sharing.read(None, world_size=2, is_legal=lambda degrees: degrees.guidance == 1)
    assert sharing.read(None, world_size=1) == ParallelConfig()


def test_degrees_are_written_as_they_are_read():
    for text in ("guidance=2,ulysses=3", "data=2,ring=3", ""):
        assert sharing.write(sharing.read(text, world_size=parse(text).world_size)) == text


REFUSED = [
    (["--parallel", "ulysses=3"], "need 3 processes, not 2; start a multiple of 3"),
    (["--parallel", "ulises=2"], "ulises in parallel is unknown; did you mean 'ulysses'"),
    (["--parallel", "shard=2"], "shard=2, which cuts the weights of a training"),
    (["--parallel", "data=2"], "data=2 exceeds the number of prompts (1); nearest: data=1"),
    (["--parallel", "guidance=2", "--guidance", "1"], "no second forward to run"),
    ([], "degrees must equal the world size 2: ulysses=2 or guidance=2"),
    (["--guidance", "1"], ": ulysses=2 or ring=2"),
    (["--parallel", "ulysses=2", "--device", "cuda:1"], "one device for 2 processes"),
]


def test_a_process_of_several_is_refused_with_2_in_one_line_before_torch_is_there(
    tiny_copy: Path,
):
    for weights in tiny_copy.rglob("*.safetensors"):
        weights.write_bytes(b"not to be read")
    code = (
        "import json, sys\n"
        "from fastvideo.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.stderr.write(f'{main(words)}\\n')\n"
        "assert 'torch' not in sys.modules\n"
    )
    rows = [["generate", PROMPT, "-m", str(tiny_copy), *words] for words, _ in REFUSED]
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(rows)],
        env=environment() | {"WORLD_SIZE": "2", "RANK": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stderr.splitlines()
    assert lines[1::2] == ["2"] * len(REFUSED)
    for line, (_, text) in zip(lines[::2], REFUSED, strict=True):
        assert line.startswith("error: ") and text in line


def test_one_process_is_told_how_to_start_more(tiny_folder: Path, capsys):
    words = ["generate", PROMPT, "-m", str(tiny_folder), "--parallel", "ulysses=2"]
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "need 2 processes, not 1" in line
    assert "torchrun --nproc-per-node 2" in line


# As torchrun starts them


def environment() -> dict[str, str]:
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


def torchrun(*program: str, folder: Path) -> subprocess.Popen[str]:
    """Start `program` in two processes; a port of its own is why it is standalone."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launcher, "--nproc-per-node=2", *program],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(run: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Return exit code, stdout and what our processes said on stderr; a hang fails."""
    try:
        out, err = run.communicate(timeout=120)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    said = [line for line in err.splitlines() if line.startswith(("error:", "seed ", "interr"))]
    return run.returncode, out, said


def words_for(folder: Path, *more: str) -> list[str]:
    fixed = ["--dtype", "float32", "--device", "cpu", "--seed", "4", "-m", str(folder)]
    return ["generate", PROMPT, *fixed, "--size", "32x48", "--frames", "5", *more]


def test_torchrun_makes_the_clip_of_one_process_and_only_the_first_speaks(
    tiny_folder: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = words_for(tiny_folder, "-o", "many.mp4", "--parallel", "guidance=2")
    code, out, said = ended(torchrun("-m", "fastvideo", *words, folder=tmp_path))
    assert (code, out) == (0, "many.mp4\n"), said
    assert len(said) == 1 and said[0].startswith("seed 4, ")
    assert cli.main(words_for(tiny_folder, "-o", "one.mp4")) == 0
    many, one = (json.loads(Path(name).read_text()) for name in ("many.json", "one.json"))
    assert many["parallel"] == "guidance=2" and "parallel" not in one
    assert many["recipe"] == one["recipe"]
    ours, theirs = (media.read_video(name)[0].astype(int) for name in ("many.mp4", "one.mp4"))
    assert np.abs(ours - theirs).max() <= 3  # a level here and there, through a lossy codec
    assert cli.main(words_for(tiny_folder, "-o", "other.mp4", "--seed", "5")) == 0
    assert np.abs(ours - media.read_video("other.mp4")[0]).max() > 30


KEPT = """
import atexit, os, sys, weakref
from fastvideo import VideoPipeline

groups = []
def tell():  # in one write, as two processes share the pipe
    os.write(1, f"{[ref() for ref in groups]}\\n".encode())

atexit.register(tell)  # after the pipeline's own
pipe = VideoPipeline.from_pretrained(sys.argv[1], dtype="float32", parallel="guidance=2")
axes = [pipe.model.meshes.axis("guidance"), pipe.model.meshes.axis("sample")]
groups.extend(weakref.ref(axis.group) for axis in axes)
pipe("a red ball", seed=1, num_frames=1, height=32, width=32, num_inference_steps=1)
"""


def test_no_group_outlives_a_script_that_keeps_its_pipeline(tiny_folder: Path, tmp_path: Path):
    """One whose thread is late would abort a process whose work is done."""
    (tmp_path / "kept.py").write_text(KEPT)
    code, out, _ = ended(torchrun("kept.py", str(tiny_folder), folder=tmp_path))
    assert (code, out.splitlines()) == (0, ["[None, None]"] * 2)


def test_torchrun_with_a_wrong_product_ends_with_one_line_and_2(tiny_folder: Path, tmp_path: Path):
    words = words_for(tiny_folder, "--parallel", "ulysses=3")
    run = torchrun("-m", "fastvideo", *words, folder=tmp_path)
    code, out, said = ended(run)
    assert code != 0 and not out
    assert said == [
        "error: parallel degrees ulysses 3 need 3 processes, not 2; start a multiple of 3"
        " processes (from --parallel)"
    ]


FAULT = """
import os, sys
from fastvideo.cli import main
from fastvideo.stages import decode as stage

decode = stage.decode

def fails(*args, **how):
    if os.environ["RANK"] == "1":
        raise MemoryError("no room for a row")
    return decode(*args, **how)

stage.decode = fails
sys.exit(main(sys.argv[1:]))
"""


def test_an_error_on_one_process_is_told_once_and_ends_all(tiny_folder: Path, tmp_path: Path):
    (tmp_path / "fault.py").write_text(FAULT)
    words = words_for(tiny_folder, "-o", "a.mp4", "--parallel", "ulysses=2")
    code, out, said = ended(torchrun("fault.py", *words, folder=tmp_path))
    assert code != 0 and not out
    assert said == [
        "error: MemoryError: no room for a row (FASTVIDEO_LOG=debug shows where) (rank 1)"
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fault.py"]


def rank_of(pid: int) -> str | None:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((pair[5:].decode() for pair in pairs if pair.startswith(b"RANK=")), None)


def in_the_middle(folder: Path, out: Path) -> subprocess.Popen[str]:
    """A run of many steps that has made some."""
    words = words_for(folder, "-o", "a.mp4", "--parallel", "ulysses=2", "--json", "--steps", "1000")
    run = torchrun("-m", "fastvideo", *words, folder=out)
    assert run.stdout is not None
    for line in run.stdout:
        event = json.loads(line)
        if event.get("stage") == "denoise" and event["index"] == 3:
            return run
    raise AssertionError(f"the run ended by itself: {ended(run)}")


@pytest.mark.full
def test_a_process_that_is_killed_ends_all(tiny_folder: Path, tmp_path: Path):
    run = in_the_middle(tiny_folder, tmp_path)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    (second,) = (int(pid) for pid in children if rank_of(int(pid)) == "1")
    os.kill(second, signal.SIGKILL)
    code, _, said = ended(run)
    assert code != 0
    assert len(said) <= 1  # torchrun ends the first one at once, or it tells of the lost connection
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_all(tiny_folder: Path, tmp_path: Path):
    run = in_the_middle(tiny_folder, tmp_path)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does, to every process
    code, _, said = ended(run)
    assert code != 0
    assert said in (["interrupted"], [])  # torchrun may be faster in ending them
    assert not list(tmp_path.iterdir())
