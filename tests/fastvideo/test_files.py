"""Names that processes hold, and what is left of those that are gone."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvideo import files

HOLDER = """
import os, sys
from pathlib import Path
from fastvideo import files
path = Path(sys.argv[1])
with files.claimed(path) as is_ours, files.atomic(path, overwrite=False) as new:
    new.write_text("half")
    print(is_ours, flush=True)
    sys.stdin.read()
"""
WRITER = """
import sys
from pathlib import Path
from fastvideo import files
files.write_text(Path(sys.argv[1]), "whole")
"""


def write_in_a_process(path: Path) -> None:
    subprocess.run([sys.executable, "-c", WRITER, str(path)], check=True)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a.mp4 and has half of it written."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "a.mp4")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_a_name_is_one_process_s_until_that_is_gone(holder, tmp_path: Path):
    for taken in ("a.mp4", "a.json"):
        with files.claimed(tmp_path / taken) as is_ours:
            assert not is_ours
    with files.claimed(tmp_path / "a-2.mp4") as is_ours:
        assert is_ours
    holder.kill()
    holder.wait()
    with files.claimed(tmp_path / "a.mp4") as is_ours:
        assert is_ours
    assert not (tmp_path / ".a.fastvideo").exists()


def test_the_next_process_removes_what_a_killed_one_left_and_nothing_else(holder, tmp_path: Path):
    (tmp_path / ".own.partial").mkdir()
    (tmp_path / ".other-host.fastvideo").write_text("another-host")
    kept = {tmp_path / ".own.partial", tmp_path / ".other-host.fastvideo", tmp_path / "b.txt"}
    alive = set(tmp_path.iterdir())
    write_in_a_process(tmp_path / "b.txt")
    assert set(tmp_path.iterdir()) == alive | kept
    holder.kill()
    holder.wait()
    assert set(tmp_path.iterdir()) == alive | kept, "a kill leaves all of it"
    write_in_a_process(tmp_path / "c.txt")
    assert set(tmp_path.iterdir()) == kept | {tmp_path / "c.txt"}


def test_a_holder_that_ends_well_leaves_the_file_alone(holder, tmp_path: Path):
    holder.communicate()
    assert holder.returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_folder_is_replaced_when_the_new_one_is_whole(tmp_path: Path):
    path = tmp_path / "model"
    with files.folder(path, overwrite=False) as new:
        (new / "weights").write_text("old")
    with pytest.raises(ValueError, match="model exists; choose another folder"):
        files.folder(path, overwrite=False).__enter__()
    with pytest.raises(KeyboardInterrupt), files.folder(path, overwrite=True) as new:
        (new / "weights").write_text("half")
        raise KeyboardInterrupt
    assert (path / "weights").read_text() == "old"
    with files.folder(path, overwrite=True) as new:
        (new / "weights").write_text("new")
        assert (path / "weights").read_text() == "old"
    assert (path / "weights").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_made_by_one_process_at_a_time(tmp_path: Path):
    path = tmp_path / "model"
    with files.folder(path, overwrite=False) as new:
        (new / "a").touch()
        for overwrite in (False, True):
            held = pytest.raises(ValueError, match="model is being written by another process")
            with held, files.folder(path, overwrite=overwrite):
                raise AssertionError("it is held")
    assert [file.name for file in path.iterdir()] == ["a"] and len(list(tmp_path.iterdir())) == 1


def test_a_claim_names_its_machine_and_leaves_no_folder_that_it_made(tmp_path: Path):
    with files.claimed(tmp_path / "new" / "a.mp4"):
        (lock,) = (tmp_path / "new").iterdir()
        assert lock.read_text() == os.uname().nodename
    assert not list(tmp_path.iterdir())


def test_a_folder_comes_back_that_a_kill_left_between_its_two_renames(tmp_path: Path):
    (tmp_path / ".0123.fastvideo-aside").touch()
    for name in ("model", "there"):
        (tmp_path / ".0123.partial" / ".old" / name).mkdir(parents=True)
    (tmp_path / ".0123.partial" / "model").mkdir()
    (tmp_path / "there").write_text("newer")
    write_in_a_process(tmp_path / "b.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.txt", "model", "there"]
    assert (tmp_path / "there").read_text() == "newer"


def test_more_names_can_be_held_than_files_may_be_open_at_first(tmp_path: Path):
    script = (
        "import contextlib, resource, sys\nfrom pathlib import Path\nfrom fastvideo import files\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        "files.allow_many_claims()\n"
        "with contextlib.ExitStack() as held:\n"
        "    for i in range(200):\n"
        "        assert held.enter_context(files.claimed(Path(sys.argv[1]) / f'{i}.mp4'))\n"
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 300, "this machine allows too few"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_locks_is_written_to_and_never_swept(tmp_path: Path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / ".a.fastvideo").touch()
    with files.claimed(tmp_path / "b.mp4") as is_ours:
        assert is_ours
    files.write_text(tmp_path / "b.txt", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.fastvideo", "b.txt"]


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_name_below_what_is_no_folder_is_refused(tmp_path: Path, kind: str):
    if kind == "file":
        (tmp_path / "out").touch()
    else:
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match=r"out is not a folder: '.*out/a\.mp4'"):
        files.claimed(tmp_path / "out" / "a.mp4").__enter__()
