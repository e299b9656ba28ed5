"""What happens to files around a clip: several commands at once, signals, kills, old clips."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fastvideo_inference import recipe

from fastvideo import cli, media

PROMPT = "a red ball moving left"
Start = Callable[..., subprocess.Popen[str]]
SIGNALLED = """
import os, sys
from fastvideo import cli, media
from fastvideo.stages import Progress
from fastvideo_inference.commands.report import JsonReport
stage, number, *words = sys.argv[1:]
event, single = JsonReport.event, media._single
def told(self, now):
    event(self, now)
    if isinstance(now, Progress) and (now.stage, now.index) == (stage, 0):
        os.kill(os.getpid(), int(number))
def frames(given):
    for index, frame in enumerate(single(given)):
        if (stage, index) == ("save", 5):
            os.kill(os.getpid(), int(number))
        yield frame
JsonReport.event, media._single = told, frames
sys.exit(cli.main(words))
"""


@pytest.fixture
def start(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start `fastvideo generate ... --json` on the tiny model in an empty folder.

    With a stage and a signal the process gets that signal when the stage is at work.
    """
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*words: str, at: tuple[str, int] | None = None) -> subprocess.Popen[str]:
        begin = ["-c", SIGNALLED, *map(str, at)] if at else ["-m", "fastvideo"]
        command = ["generate", PROMPT, "--model", str(tiny_folder), "--json", *words]
        return subprocess.Popen(
            [sys.executable, *begin, *command],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def saved(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate()
    assert process.returncode == 0, err
    path: str = json.loads(out.splitlines()[-1])["path"]
    return path


def names() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_three_equal_commands_at_once_make_three_clips(start: Start):
    made = sorted(saved(process) for process in [start("--seed", "4") for _ in range(3)])
    first = made[2].removesuffix(".mp4")
    assert made == [f"{first}-2.mp4", f"{first}-3.mp4", f"{first}.mp4"]
    assert names() == sorted([*made, *(name.replace(".mp4", ".json") for name in made)])
    for name in made:
        beside = json.loads(Path(name).with_suffix(".json").read_text())
        assert beside["output"] == Path(name).name
        assert beside["recipe"] == recipe.read_recipe(name).model_dump(mode="json")


def test_a_name_that_another_command_makes_is_refused_before_the_work(start: Start, tiny_folder):
    first = start("-o", "a.mp4", at=("denoise", signal.SIGSTOP))
    os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOWAIT)
    for words in (["-o", "a.mp4"], ["-o", "a.mp4", "--overwrite"]):
        second = start(*words)
        out, err = second.communicate()
        wrong = "error: a.mp4 is being made by another process; choose another name\n"
        assert (second.returncode, out, err) == (2, "", wrong)
    first.kill()
    first.wait()
    assert names() == [".a.fastvideo"], "a kill leaves its claim, which nobody holds"
    assert saved(start("-o", "a.mp4")) == "a.mp4"
    assert names() == ["a.json", "a.mp4"]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("stage", "how", "code", "words"),
    [
        ("denoise", signal.SIGTERM, 143, "terminated\n"),
        ("decode", signal.SIGTERM, 143, "terminated\n"),
        ("save", signal.SIGTERM, 143, "terminated\n"),
        ("save", signal.SIGINT, 130, "interrupted\n"),
    ],
)
def test_a_signal_leaves_one_line_and_no_file(start: Start, stage: str, how: int, code, words):
    process = start("-o", "a.mp4", at=(stage, how))
    _, err = process.communicate()
    assert (process.returncode, err) == (code, words)
    assert not list(Path().iterdir())


def test_what_a_kill_leaves_is_removed_by_the_next_clip(start: Start):
    process = start("-o", "a.mp4", at=("save", signal.SIGKILL))
    process.communicate()
    assert len(names()) == 3, "the claim, the half-written clip and its lock"
    saved(start("-o", "b.mp4"))
    assert names() == ["b.json", "b.mp4"]


def generate(tiny_folder: Path, *words: str) -> int:
    return cli.main(["generate", PROMPT, "--model", str(tiny_folder), "--frames", "5", *words])


def test_an_old_clip_stays_until_the_new_one_is_whole(start: Start, tiny_folder: Path, capsys):
    assert generate(tiny_folder, "--seed", "1", "-o", "a.mp4") == 0
    old = Path("a.mp4").read_bytes(), Path("a.json").read_text()
    assert generate(tiny_folder, "-o", "a.mp4") == 2
    assert "a.mp4 exists already and is not overwritten" in capsys.readouterr().err
    start("-o", "a.mp4", "--overwrite", at=("save", signal.SIGTERM)).communicate()
    assert (Path("a.mp4").read_bytes(), Path("a.json").read_text()) == old
    assert generate(tiny_folder, "--seed", "2", "-o", "a.mp4", "--overwrite") == 0
    assert recipe.read_recipe("a.mp4").request.seed == 2
    assert json.loads(Path("a.json").read_text())["recipe"]["request"]["seed"] == 2
    assert names() == ["a.json", "a.mp4"]


def test_a_default_name_is_overwritten_too_but_never_that_of_an_earlier_clip(
    start: Start, tiny_folder: Path, capsys
):
    for words in ([], [], ["--overwrite"]):
        assert generate(tiny_folder, "--seed", "4", "-o", "out/", *words) == 0
    first, second, third = capsys.readouterr().out.split()
    assert (second, third) == (first.replace(".mp4", "-2.mp4"), first)
    Path("p.txt").write_text("a red ball\na blue ball\na red ball\n")
    batch = ["generate", "--prompts", "p.txt", "--model", str(tiny_folder), "--frames", "5"]
    assert cli.main([*batch, "-o", "{prompt}.mp4", "--overwrite"]) == 0
    made = ["a-red-ball.mp4", "a-blue-ball.mp4", "a-red-ball-2.mp4"]
    assert capsys.readouterr().out.split() == made


@pytest.mark.parametrize("name", ["a.mp4", "a.json"])
def test_a_folder_is_no_old_clip(start: Start, tiny_folder: Path, capsys, name: str):
    Path(name).mkdir()
    assert generate(tiny_folder, "--seed", "1", "-o", "{prompt:1}.mp4", "--overwrite") == 2
    assert f"{name} exists already" in capsys.readouterr().err
    assert names() == []


def test_eighty_chinese_characters_are_a_name(start: Start, tiny_folder: Path, capsys):
    prompt = "红球向左移动" * 14
    words = ["generate", prompt, "--model", str(tiny_folder), "--frames", "5", "--seed", "1"]
    for _ in range(2):
        assert cli.main([*words, "-o", "{prompt:80}-{seed}.mp4", "--overwrite"]) == 0
    (path,) = set(capsys.readouterr().out.splitlines())
    assert path.removesuffix("-1.mp4") in prompt and 200 < len(path.encode()) < 250
    assert media.read_metadata(path)["title"] == prompt
