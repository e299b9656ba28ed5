"""A folder of videos with captions: which files belong together, and which cannot be used.

found = find("clips/")                       # names and captions alone
scanned = scan(found.videos, workers=2)      # what is in each file, in order

A caption is the text beside a video (`a.mp4`, `a.txt`), or its entry in a listing: the only jsonl,
csv or parquet file at the top of the folder, or the one that is named.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastvideo.footage import CONTAINERS, Footage, UnusableError, probe
from fastvideo_train.data import listing
from fastvideo_train.data._workers import in_order

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Video:
    """A file with its caption; `name` is its path from the folder, with slashes."""

    name: str
    path: Path
    caption: str


@dataclass(frozen=True)
class Bad:
    """Something that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Found:
    """What names and captions tell of a folder.

    others: how many files are no videos, by suffix; captions and listings are not among them.
    lone: texts beside which there is no video.
    """

    videos: tuple[Video, ...]
    bad: tuple[Bad, ...]
    others: Mapping[str, int]
    captions: Path | None = None
    lone: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scanned:
    """A video and what was found in its file: facts and a hash of its bytes, or a reason."""

    video: Video
    footage: Footage | None
    reason: str = ""
    digest: str = ""


@dataclass
class _Notes:
    videos: list[Video] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)


def find(folder: str | Path, captions: str | Path | None = None) -> Found:
    """List a folder's videos by name, with their captions; `ValueError` if there is none at all."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    paths = [
        path
        for path in sorted(path.relative_to(folder) for path in folder.rglob("*"))
        if not any(part.startswith(".") for part in path.parts) and not _is_folder(folder / path)
    ]
    videos = [path for path in paths if path.suffix.lower() in CONTAINERS]
    if not videos:
        raise ValueError(f"{folder} holds no videos; looked for {', '.join(CONTAINERS)}")
    table = Path(captions) if captions is not None else _only_listing(folder, paths)
    notes = _by_text(folder, videos) if table is None else _by_listing(folder, videos, table)
    _refuse_links(notes, folder, videos)
    others, lone = _others(folder, paths, videos, texts=table is None)
    order = sorted(notes.videos, key=lambda video: video.name)
    bad = sorted(notes.bad, key=lambda one: one.name)
    return Found(tuple(order), tuple(bad), others, table, lone)


def scan(
    videos: Sequence[Video],
    *,
    workers: int = 0,
    decode: bool = False,
    known: Mapping[str, Scanned] | None = None,
    report: Report | None = None,
) -> Iterator[Scanned]:
    """Yield what is in each file, in order; worker processes look at those that are not `known`.

    With `decode` every frame is decoded, without it every packet is read.
    """
    known = known or {}
    new = [video for video in videos if video.name not in known]
    look = _Look(tuple(new), decode)
    with closing(in_order(look, start=0, stop=len(new), workers=workers)) as fresh:
        for done, video in enumerate(videos, 1):
            yield known[video.name] if video.name in known else next(fresh)
            if report:
                report(done, len(videos))


def stamp(path: Path) -> tuple[int, int]:
    """Return size and time of change, which tell an unchanged file without reading it."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def to_line(scanned: Scanned) -> str:
    """Return a line of a journal: what is known of a file, and the stamp it had."""
    values = {
        "name": scanned.video.name,
        "stamp": stamp(scanned.video.path),
        "digest": scanned.digest,
        "reason": scanned.reason,
        "footage": asdict(scanned.footage) if scanned.footage else None,
    }
    return json.dumps(values, ensure_ascii=False) + "\n"


def from_lines(text: str, videos: Sequence[Video]) -> dict[str, Scanned]:
    """Return what a journal knows of files that have not changed since; a cut last line is left."""
    by_name, known = {video.name: video for video in videos}, {}
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        video = by_name.get(values["name"])
        if video is not None and tuple(values["stamp"]) == stamp(video.path):
            footage = Footage(**values["footage"]) if values["footage"] else None
            known[video.name] = Scanned(video, footage, values["reason"], values["digest"])
    return known


@dataclass(frozen=True)
class _Look:
    videos: tuple[Video, ...]
    decode: bool

    def __call__(self, index: int) -> Scanned:
        video = self.videos[index]
        try:
            footage = probe(video.path, decode=self.decode)
            return Scanned(video, footage, digest=_digest(video.path))
        except UnusableError as error:
            return Scanned(video, None, reason=str(error))
        except OSError as error:
            return Scanned(video, None, reason=f"cannot be read: {error.strerror}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _is_folder(path: Path) -> bool:
    """Tell a folder that is looked into from a file, and from a link, which is not followed."""
    return path.is_dir() and not path.is_symlink()


def _refuse_links(notes: _Notes, folder: Path, videos: Sequence[Path]) -> None:
    """Give videos that are broken links, or links to folders, that reason instead of any other."""
    reasons = {
        path.as_posix(): f"broken link: {(folder / path).readlink()} is not there"
        for path in videos
        if (folder / path).is_symlink() and not (folder / path).exists()
    }
    notes.videos = [video for video in notes.videos if video.name not in reasons]
    notes.bad = [one for one in notes.bad if one.name not in reasons]
    notes.bad += [Bad(name, reason) for name, reason in reasons.items()]


def _others(
    folder: Path, paths: Sequence[Path], videos: Sequence[Path], *, texts: bool
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the counts of files that are no videos, and if `texts` are captions the lone ones."""
    counted, used = Counter[str](), {path.with_suffix("") for path in videos}
    lone = []
    for path in paths:
        suffix = path.suffix.lower()
        if suffix in CONTAINERS or suffix in listing.SUFFIXES:
            continue
        if suffix == ".txt" and path.with_suffix("") in used:
            continue
        if (folder / path).is_dir():
            counted["links to folders"] += 1
        elif suffix == ".txt" and texts:
            lone.append(path.as_posix())
        else:
            counted[suffix or path.name] += 1
    return dict(counted), tuple(lone)


def _only_listing(folder: Path, paths: Sequence[Path]) -> Path | None:
    found = [p for p in paths if len(p.parts) == 1 and p.suffix.lower() in listing.SUFFIXES]
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"{folder} holds several listings ({names}); choose one with --captions")
    return folder / found[0] if found else None


def _by_text(folder: Path, videos: Sequence[Path]) -> _Notes:
    notes, stems = _Notes(), Counter(path.with_suffix("") for path in videos)
    for path in videos:
        text = path.with_suffix(".txt")
        if stems[path.with_suffix("")] > 1:
            others = [p.name for p in videos if p.with_suffix("") == path.with_suffix("")]
            notes.bad.append(Bad(path.as_posix(), f"duplicate name: {', '.join(others)}"))
            continue
        try:
            caption = " ".join((folder / text).read_text(encoding="utf-8-sig").split())
        except FileNotFoundError:
            notes.bad.append(Bad(path.as_posix(), f"missing caption: there is no {text.name}"))
        except UnicodeDecodeError:
            notes.bad.append(
                Bad(path.as_posix(), f"unreadable caption: {text.name} is not UTF-8 text")
            )
        except OSError as error:
            notes.bad.append(Bad(path.as_posix(), f"unreadable caption: {error.strerror}"))
        else:
            _add(notes, Video(path.as_posix(), folder / path, caption), f"{text.name} is empty")
    return notes


def _by_listing(folder: Path, videos: Sequence[Path], table: Path) -> _Notes:
    notes, lines = _Notes(), listing.read(table)
    there = {path.as_posix() for path in videos}
    named = [(_inside(folder, line.file), line) for line in lines]
    counts = Counter(name for name, _ in named)
    for name, line in named:
        if not line.file:
            notes.bad.append(Bad(line.place, "unreadable caption: the line names no file"))
        elif name not in there:
            notes.bad.append(Bad(line.file, f"missing file: {line.place} names it"))
        elif counts[name] == 1:
            caption = " ".join(line.caption.split())
            _add(notes, Video(name, folder / name, caption), f"{line.place} has none")
    for name in sorted(there):
        if counts[name] > 1:
            times = f"{table.name} names it {counts[name]} times"
            notes.bad.append(Bad(name, f"duplicate name: {times}"))
        elif not counts[name]:
            notes.bad.append(Bad(name, f"missing caption: {table.name} does not name it"))
    return notes


def _add(notes: _Notes, video: Video, absent: str) -> None:
    if video.caption:
        notes.videos.append(video)
    else:
        notes.bad.append(Bad(video.name, f"missing caption: {absent}"))


def _inside(folder: Path, file: str) -> str:
    """Return a listed file's path from the folder as `find` names it."""
    path = Path(file)
    if path.is_absolute() and path.is_relative_to(folder.resolve()):
        path = path.relative_to(folder.resolve())
    return Path(*(part for part in path.parts if part != ".")).as_posix()
