"""Files that appear whole or not at all, and never over another one unless asked."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_text(path: str | Path, text: str, *, overwrite: bool = False) -> Path:
    """Write a UTF-8 text file; raise `OSError` that names the path if that fails."""
    path = Path(path)
    with atomic(path, overwrite=overwrite) as new:
        new.write_text(text, encoding="utf-8")
    return path


@contextmanager
def atomic(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary sibling of `path` to write to; it takes the name only if all went well."""
    with sibling(path) as new:
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        _publish(new, path, overwrite=overwrite)


@contextmanager
def sibling(path: Path) -> Iterator[Path]:
    """Give a temporary sibling of `path`, removed in the end; errors name only `path`."""
    new = path.with_name(f".{path.stem[:80]}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{path.parent} is not a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def _publish(new: Path, path: Path, *, overwrite: bool) -> None:
    if overwrite:
        new.replace(path)
        return
    try:
        os.link(new, path)  # unlike a rename, a link fails if the name was taken meanwhile
    except FileExistsError:
        raise
    except OSError:  # file systems without hard links: claim the name first
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        new.replace(path)
