"""Checkpoints that survive being killed at any moment: written aside, synced, then renamed.

runs/vae/checkpoints/latest                 the name of the newest whole checkpoint
runs/vae/checkpoints/step-00000200/state.pt, info.json
                                  .../shards/   what processes hold parts of (`shards.py`)

Of several processes all call `save`, and the first one writes what is written once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastvideo_train import shards
from fastvideo_train.world import World

STATE, INFO, POINTER = "state.pt", "info.json", "latest"


@dataclass(frozen=True)
class Checkpoints:
    """The last `keep` checkpoints of a run, under one folder."""

    folder: Path
    keep: int = 2
    world: World = field(default_factory=World)

    def latest(self) -> Path | None:
        """Return the newest whole checkpoint or None; `ValueError` if the pointer dangles."""
        pointer = self.folder / POINTER
        if not pointer.is_file():
            return None
        path = self.folder / Path(pointer.read_text(encoding="utf-8").strip()).name
        if not (path / STATE).is_file():
            raise ValueError(f"{pointer} names {path.name}, which is not there; was it moved?")
        return path

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        info: Mapping[str, Any],
        *,
        more: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write a checkpoint, point to it, drop old ones; on failure the previous one stays whole.

        step: number of finished steps. more: writes further files into the folder, by all
        processes together. Raises `ValueError` if the disk refuses.
        """
        final = self.folder / f"step-{step:08d}"
        aside = self.folder / f".{final.name}.writing"
        rest, cut = shards.split(state)
        try:
            self.world.on_first(lambda: _emptied(aside))
            if cut:
                shards.write(cut, aside / shards.FOLDER)
            if more is not None:
                more(aside)
            self.world.on_first(lambda: self._finish(aside, final, rest, info))
        except (OSError, RuntimeError, ValueError) as error:  # torch.save: RuntimeError if full
            if self.world.is_first:
                shutil.rmtree(aside, ignore_errors=True)
            before = self.latest()
            safe = f"; {before.name} is still whole" if before else ""
            raise ValueError(f"cannot save checkpoint {final}: {error}{safe}") from error
        return final

    def read_info(self, path: Path) -> dict[str, Any]:
        """Return what `save` was given as `info`."""
        values: dict[str, Any] = json.loads((path / INFO).read_text(encoding="utf-8"))
        return values

    def read_state(
        self, path: Path, *, like: Mapping[str, Any] | None = None, mapped: bool = False
    ) -> dict[str, Any]:
        """Return the state that was saved, on the CPU; `ValueError` if a file is damaged.

        like: the live state, whose cut tensors take their parts in place. mapped: tensors are
        mapped from the file, and those that several processes wrote stay on meta.
        """
        how: dict[str, Any] = {"map_location": "cpu", "weights_only": True, "mmap": mapped}
        try:
            state: dict[str, Any] = torch.load(path / STATE, **how)
        except Exception as error:  # damaged bytes lead the reader into errors of every kind
            raise ValueError(f"checkpoint {path / STATE} cannot be read: {error}") from None
        if (path / shards.FOLDER).is_dir() and not mapped:
            return shards.filled(state, path / shards.FOLDER, like)  # type: ignore[no-any-return]
        return state

    def _finish(
        self, aside: Path, final: Path, state: Mapping[str, Any], info: Mapping[str, Any]
    ) -> None:
        self._write(aside, state, info)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        self._point_to(final)
        self._prune(final)

    def _write(self, aside: Path, state: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        with (aside / STATE).open("wb") as file:
            torch.save(dict(state), file)
            _sync(file.fileno())
        with (aside / INFO).open("w", encoding="utf-8") as text:
            text.write(json.dumps(info, indent=2) + "\n")
            text.flush()
            _sync(text.fileno())
        _sync_folder(aside)

    def _point_to(self, path: Path) -> None:
        aside = self.folder / f".{POINTER}.writing"
        with aside.open("w", encoding="utf-8") as text:
            text.write(path.name + "\n")
            text.flush()
            _sync(text.fileno())
        aside.replace(self.folder / POINTER)
        _sync_folder(self.folder)

    def _prune(self, newest: Path) -> None:
        """Drop all but the last `keep` up to `newest`, and what a kill left half written.

        A later one, whole but not pointed to when a kill came, does not count: it is written anew.
        """
        whole = sorted(p for p in self.folder.glob("step-*") if p.is_dir() and p <= newest)
        for path in [*whole[: -self.keep], *self.folder.glob(".step-*.writing")]:
            shutil.rmtree(path, ignore_errors=True)


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
