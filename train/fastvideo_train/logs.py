"""Numbers of a run on disk: JSON lines always, TensorBoard when it is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

FILE_NAME = "metrics.jsonl"


class Logs:
    """Writes one line a record to `metrics.jsonl`, and the same scalars to TensorBoard.

    start_step: records after this step come from a life that was cut short and are dropped, so
    that a resumed run's file reads like that of one without interruption.
    """

    def __init__(self, folder: Path, *, start_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        _keep_until(path, start_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder, start_step)

    def write(self, step: int, values: Mapping[str, float], *, prefix: str = "train") -> None:
        """Write the numbers of one step under a prefix."""
        record = {"step": step} | {f"{prefix}/{k}": _short(v) for k, v in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{prefix}/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read(folder: Path) -> list[dict[str, float]]:
    """Return the records of `metrics.jsonl`, a half-written last line left out."""
    path = folder / FILE_NAME
    if not path.is_file():
        return []
    return [r for line in path.read_text(encoding="utf-8").splitlines() if (r := _record(line))]


def _record(line: str) -> dict[str, float] | None:
    try:
        record: dict[str, float] = json.loads(line)
    except ValueError:  # the machine stopped in the middle of this line
        return None
    return record


def _keep_until(path: Path, step: int) -> None:
    kept = [r for r in read(path.parent) if r["step"] <= step]
    if path.is_file():
        aside = path.with_suffix(".writing")
        aside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        aside.replace(path)


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _tensorboard(folder: Path, start_step: int) -> SummaryWriter | None:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
