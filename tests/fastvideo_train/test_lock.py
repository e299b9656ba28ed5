"""One process at a time writes into a folder, whatever verb it was started with."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastvideo_train.lock import locked
from odd_videos import captioned, write
from tiny_recipes import CONFIGS, ROOT

from fastvideo.cli import RefusedError, main

HOLDER = """
import sys
from pathlib import Path
from fastvideo_train.lock import locked
with locked(Path(sys.argv[1]), "works in", hint="wait"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A folder that another process holds, and that process."""
    folder = tmp_path / "held"
    folder.mkdir()
    paths = os.pathsep.join(str(ROOT / p) for p in (".", "inference", "train"))
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield folder, process
        process.kill()


@pytest.mark.parametrize("verb", ["videos", "world", "train"])
def test_a_folder_that_another_process_holds_is_refused_untouched(
    verb, held, tiny_folder, tmp_path, capsys
):
    folder, process = held
    captioned(write(tmp_path / "clips" / "a.mp4", count=9), "a red ball")
    place = ["-o", str(folder), "--model", str(tiny_folder), "--size", "48x32", "--frames", "5"]
    place += ["--dtype", "float32", "--workers", "0"]
    words = {
        "videos": ["data", "encode", str(tmp_path / "clips"), *place, "--device", "cpu"],
        "world": ["data", "encode", *place, "--clips", "2"],
        "train": ["train", str(CONFIGS / "vae.toml"), "--smoke", "--run-dir", str(folder)],
    }[verb]
    assert main(words) == 2
    error = capsys.readouterr().err
    done = "trains in" if verb == "train" else "encodes into"
    assert f"another process {done} {folder}; " in error and error.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["lock"]
    process.kill()  # as hard as can be: its lock ends with it
    process.wait()
    assert main(words) == 0
    assert len(list(folder.iterdir())) > 1


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path, "works in", hint="wait"):
        pass
    assert f"{tmp_path} cannot be locked: No locks available" in caplog.text


def test_a_folder_that_is_not_there_cannot_be_held(tmp_path):
    with (
        pytest.raises(RefusedError, match="No such file"),
        locked(tmp_path / "no", "works in", hint="wait"),
    ):
        pass
