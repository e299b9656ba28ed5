"""A folder for one process at a time: a lock on its file `lock`, which ends with the process."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastvideo.errors import RefusedError, refusing
from fastvideo.log import logger


@contextmanager
def locked(folder: Path, verb: str, *, hint: str) -> Iterator[None]:
    """Hold a folder that exists for the time of a block.

    Raises `RefusedError` if another process holds it: what that does there (`verb`), and what can
    be done about it (`hint`). On a disk without locks nothing is held, with a warning.
    """
    with refusing():
        file = (folder / "lock").open("w", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RefusedError(f"another process {verb} {folder}; {hint}") from None
        except OSError as error:
            logger.warning("%s cannot be locked: %s", folder, error.strerror)
        yield
