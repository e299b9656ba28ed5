"""Checkpoints survive full disks, kills and damage."""

from __future__ import annotations

import errno
import resource
import signal
from pathlib import Path

import pytest
import torch
from fastvideo_train import checkpoints as module
from fastvideo_train.checkpoints import Checkpoints


def _state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((4,), value)}


def test_a_new_folder_has_no_checkpoint(tmp_path: Path):
    assert Checkpoints(tmp_path / "none").latest() is None


def test_what_is_saved_is_read_back(tmp_path: Path):
    store = Checkpoints(tmp_path)
    path = store.save(3, _state(1.5), {"step": 3})
    assert store.latest() == path
    assert store.read_info(path) == {"step": 3}
    assert torch.equal(store.read_state(path)["w"], _state(1.5)["w"])


def test_only_the_newest_are_kept(tmp_path: Path):
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 10, 11):
        store.save(step, _state(step), {})
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000010", "step-00000011"]


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path: Path, monkeypatch, kind):
    store = Checkpoints(tmp_path)
    before = store.save(1, _state(1.0), {"step": 1})

    def full(state, file):
        file.write(b"half of it")
        raise kind(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full)
    with pytest.raises(ValueError, match="step-00000001 is still whole"):
        store.save(2, _state(2.0), {"step": 2})
    assert store.latest() == before
    assert torch.equal(store.read_state(before)["w"], _state(1.0)["w"])
    assert not list(tmp_path.glob(".step-*"))


def test_a_file_system_that_takes_no_more_leaves_the_previous_checkpoint_whole(tmp_path: Path):
    """A real refusal of the system in the midst of the file, as a full disk gives it."""
    store = Checkpoints(tmp_path)
    before = store.save(1, _state(1.0), {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ValueError, match="step-00000001 is still whole"):
            store.save(2, {"w": {"x": torch.zeros(100_000)}}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert store.latest() == before
    assert store.read_state(before).keys() == _state(1.0).keys()
    assert not list(tmp_path.glob(".step-*"))


def test_a_kill_while_writing_is_not_seen_and_swept_up_later(tmp_path: Path):
    store = Checkpoints(tmp_path)
    before = store.save(1, _state(1.0), {})
    (tmp_path / ".step-00000002.writing").mkdir()
    (tmp_path / ".step-00000002.writing" / "state.pt").write_bytes(b"half")
    assert store.latest() == before
    store.save(3, _state(3.0), {})
    assert not list(tmp_path.glob(".step-*"))


def test_a_kill_between_rename_and_pointer_keeps_the_old_one(tmp_path: Path):
    store = Checkpoints(tmp_path)
    before = store.save(1, _state(1.0), {})
    (tmp_path / "step-00000002").mkdir()
    assert store.latest() == before
    assert store.save(2, _state(2.0), {}) == store.latest()


def test_the_checkpoint_that_is_pointed_to_is_never_pruned(tmp_path: Path):
    store = Checkpoints(tmp_path, keep=1)
    (tmp_path / "step-00000009").mkdir()  # whole, but a kill came before the pointer
    assert store.save(5, _state(5.0), {}) == store.latest()


def test_a_dangling_pointer_is_an_error(tmp_path: Path):
    (tmp_path / "latest").write_text("step-00000009\n")
    with pytest.raises(ValueError, match="names step-00000009, which is not there"):
        Checkpoints(tmp_path).latest()


def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path):
    store = Checkpoints(tmp_path)
    path = store.save(1, _state(1.0), {})
    (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"state\.pt cannot be read"):
        store.read_state(path)
    (path / "state.pt").write_bytes(b"another kind of file")
    with pytest.raises(ValueError, match=r"state\.pt cannot be read"):
        store.read_state(path)
