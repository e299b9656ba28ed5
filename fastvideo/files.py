"""Files and folders that appear whole or not at all, and never over another one unless asked.

What is not whole yet lies in a hidden folder beside its name. A process holds that folder, or a
name that it is going to write, by the lock on a hidden file. The kernel drops the lock when the
process ends in any way, and the next one that writes beside it removes what was left.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

CLAIM, ASIDE, PARTIAL, OLD = ".fastvideo", ".fastvideo-aside", ".partial", ".old"
NAME_BYTES = 255
STEM_BYTES = NAME_BYTES - len(f".{CLAIM}")  # of a name that can be claimed
_HELD: set[Path] = set()
_MARKS = {  # byte order marks; UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_DOWNLOADS = (".incomplete", ".part", ".crdownload", ".download", ".aria2")  # what clients append
_UNFINISHED = "a download that did not finish; fetch it again"
_STAND_INS = {
    b"version https://git-lfs": "a Git LFS pointer; git lfs pull fetches the file itself",
    b"<!doctype html": "a web page; fetch the file itself",
    b"<html": "a web page; fetch the file itself",
}


def stand_in(path: str | Path) -> str:
    """Return what is there in place of a file, such as a Git LFS pointer; empty if it is itself."""
    path = Path(path)
    beside = f"{path.name}.aria2"
    is_short = len(os.fsencode(beside)) <= NAME_BYTES
    if path.suffix in _DOWNLOADS or (is_short and path.with_name(beside).exists()):
        return _UNFINISHED
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    return next((text for start, text in _STAND_INS.items() if head.startswith(start)), "")


def downloads(folder: Path) -> str:
    """Return words about downloads that did not finish in a folder or its cache, if there are."""
    folder = folder.absolute()
    places = [folder.glob("*")]
    for place in (folder, folder.parent):  # a part of a model is one deeper
        places.append((place / ".cache" / "huggingface" / "download").rglob("*"))
        if place.parent.name == "snapshots":
            places.append((place.parent.parent / "blobs").glob("*"))
    found = sorted(p.name for paths in places for p in paths if p.suffix in _DOWNLOADS)
    return f"; {found[0]} is {_UNFINISHED}" if found else ""


def read_text(path: str | Path) -> str:
    """Read a text file that others wrote: UTF-8, or what its byte order mark says.

    Raises `ValueError` that names the line which is no text, or what stands in for the file.
    """
    raw = Path(path).read_bytes()
    is_prompt = raw.lstrip()[:5].lower() == b"<html"  # of a sign, say: a page begins with its type
    if what := "" if is_prompt else stand_in(path):
        raise ValueError(f"{path} is {what}")
    encoding = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} line {line} is not {encoding.upper().removesuffix('-SIG')} text"
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} holds zero bytes: binary, or UTF-16 without a byte order mark")
    return text


def lines(text: str) -> list[str]:
    """Split at LF and CRLF alone: `splitlines` also does at U+2028, U+0085 and form feeds."""
    split = [line.removesuffix("\r") for line in text.split("\n")]
    return split[:-1] if split[-1] == "" else split


def write_text(path: str | Path, text: str, *, overwrite: bool = False) -> Path:
    """Write a UTF-8 text file; raise `OSError` that names the path if that fails."""
    path = Path(path)
    with atomic(path, overwrite=overwrite) as new:
        new.write_text(text, encoding="utf-8")
    return path


def stamp(path: str | Path) -> tuple[int, int, int, int]:
    """Return what tells an unchanged file without reading it.

    Besides size and time of change the inode and its own time, which no tool can set back.
    """
    stat = Path(path).stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@contextmanager
def atomic(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a hidden file to write in place of `path`; it takes the name only if all went well."""
    with _aside(path) as new:
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        _publish(new, path, overwrite=overwrite)


@contextmanager
def folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a hidden folder to fill in place of `path`; it takes the name only if all went well.

    Raises `ValueError` if the name is taken (unless `overwrite`) or cannot be written.
    """
    check_new(path, overwrite=overwrite)
    try:
        with claimed(path) as is_ours:
            if not is_ours:
                raise ValueError(f"{path} is being written by another process")
            check_new(path, overwrite=overwrite)
            with _aside(path) as new:
                new.mkdir()
                yield new
                if overwrite and path.exists():
                    (new.parent / OLD).mkdir()
                    path.rename(new.parent / OLD / path.name)
                new.rename(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error}") from None


def check_new(path: Path, *, overwrite: bool = False) -> None:
    """Raise `ValueError` for the name of a folder that is taken, unless it may be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise ValueError(f"{path} exists; choose another folder or remove it")


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise `FileExistsError` for the name of a folder, or of a file that is not to be replaced."""
    if os.path.lexists(path) and (path.is_dir() or not overwrite):
        raise FileExistsError(f"{path} exists already and is not overwritten; choose another name")


@contextmanager
def claimed(path: Path, kind: str = CLAIM) -> Iterator[bool]:
    """Hold the name of a file to come, whatever its suffix; False if another process holds it.

    On a disk without locks nothing is held, and `atomic` alone refuses a name that is taken.
    """
    with _naming(path):
        is_new = not path.parent.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            text = f"{path.parent} is not a folder"
            raise NotADirectoryError(errno.ENOTDIR, text) from None
        _sweep(path.parent.absolute())
        lock = path.with_name(f".{path.stem}{kind}")
        descriptor = _locked(lock, make=True)
        if descriptor is not None:
            os.write(descriptor, os.uname().nodename.encode())
    if descriptor is None:
        yield False
        return
    _HELD.add(lock)
    try:
        yield True
    finally:
        _clear(lock)
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # something is in it
                path.parent.rmdir()


def allow_many_claims() -> None:
    """Raise the limit of open files, of which each claim is one, as far as the system lets us."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def leave() -> None:
    """Remove what this process holds or has half written: its clean-ups were interrupted."""
    for lock in tuple(_HELD):
        _clear(lock)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Give a hidden place for `path`, removed in the end; errors name only `path`."""
    token = os.urandom(8).hex()
    with _naming(path), claimed(path.with_name(token), ASIDE):
        place = path.with_name(f".{token}{PARTIAL}")
        place.mkdir()
        yield place / path.name


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from None


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


def _locked(lock: Path, *, make: bool) -> int | None:
    """Open and lock a file, made if need be (and open at least, on a disk without locks).

    None if another process holds it, or if it is not there to be locked.
    """
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | (os.O_CREAT if make else 0), 0o666)
        except OSError:
            if make and not lock.exists():
                raise
            return None  # another user's, or gone
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # its holder removed it between our opening and locking it
        except OSError as error:
            if make and not isinstance(error, BlockingIOError):
                return descriptor
            os.close(descriptor)
            return None
        os.close(descriptor)


@cache
def _sweep(parent: Path) -> None:
    """Remove, once a process, what processes of this host that are gone have left in a folder.

    On some shared disks a lock that another host holds is not seen here.
    """
    locks = [path for path in parent.glob(f".*{CLAIM}*") if path.suffix in (CLAIM, ASIDE)]
    for lock in locks:
        with suppress(OSError):
            is_ours = lock.read_bytes() in (b"", os.uname().nodename.encode())
            descriptor = _locked(lock, make=False) if is_ours else None
            if descriptor is not None:
                _clear(lock)
                os.close(descriptor)


def _clear(lock: Path) -> None:
    """Remove a lock's file, and before it the hidden folders that it holds."""
    with suppress(OSError):
        place = lock.with_suffix(PARTIAL)
        if lock.suffix == ASIDE:
            for old in (place / OLD).glob("*"):
                if not os.path.lexists(lock.with_name(old.name)):  # ended between two renames
                    old.rename(lock.with_name(old.name))
            if place.exists():
                shutil.rmtree(place)  # if that fails, the lock's file stays for the next process
        lock.unlink(missing_ok=True)
        _HELD.discard(lock)
