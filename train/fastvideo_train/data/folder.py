"""A folder of videos with captions: which files belong together, and which cannot be used.

found = find("clips/")                       # names and captions alone
scanned = scan(found.videos, workers=2)      # what is in each file, in order

A caption is the text beside a video (`a.mp4`, `a.txt`), or its entry in a listing: the only jsonl,
csv, tsv or parquet file at the top of the folder, or the one that is named. Names are compared in
Unicode's composed form (NFC); a name that differs in more, such as its case, is only pointed at.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from fastvideo import files
from fastvideo.footage import CONTAINERS, Footage, UnusableError, probe
from fastvideo_train.data import listing
from fastvideo_train.data._workers import in_order

Report = Callable[[int, int], None]
TEXT = ".txt"
T = TypeVar("T")


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
    strange = [path for path in videos if _shown(path) != path.as_posix()]
    videos = [path for path in videos if path not in strange]
    table = Path(captions) if captions is not None else _only_listing(folder, paths)
    texts = [path for path in paths if path.suffix.lower() == TEXT]
    notes = _by_text(folder, videos, texts) if table is None else _by_listing(folder, videos, table)
    notes.bad += [Bad(_shown(path), "file name is not UTF-8: rename it") for path in strange]
    _refuse_links(notes, folder, videos)
    others, lone = _others(folder, paths, [*videos, *strange], texts=table is None)
    order = sorted(notes.videos, key=lambda video: video.name)
    bad = sorted(notes.bad, key=lambda one: one.name)
    return Found(tuple(order), tuple(bad), others, table, lone)


def scan(
    videos: Sequence[Video],
    *,
    workers: int = 0,
    decode: bool = True,
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


def to_line(scanned: Scanned) -> str:
    """Return a line of a journal: what is known of a file, and the stamp it had."""
    values = {
        "name": scanned.video.name,
        "stamp": files.stamp(scanned.video.path),
        "digest": scanned.digest,
        "reason": scanned.reason,
        "footage": asdict(scanned.footage) if scanned.footage else None,
    }
    return json.dumps(values, ensure_ascii=False) + "\n"


def from_lines(text: str, videos: Sequence[Video]) -> dict[str, Scanned]:
    """Return what a journal knows of files that have not changed since; a cut last line is left."""
    by_name, known = {video.name: video for video in videos}, {}
    for line in files.lines(text):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        video = by_name.get(values["name"])
        if video is not None and tuple(values["stamp"]) == files.stamp(video.path):
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
    counted, used = Counter[str](), {_stem(path) for path in videos}
    lone = []
    for path in paths:
        suffix = path.suffix.lower()
        if suffix in CONTAINERS or suffix in listing.SUFFIXES:
            continue
        if suffix == TEXT and _stem(path) in used:
            continue
        if (folder / path).is_dir():
            counted["links to folders"] += 1
        elif suffix == TEXT and texts:
            lone.append(_shown(path))
        else:
            counted[suffix or _shown(path)] += 1
    return dict(counted), tuple(lone)


def _only_listing(folder: Path, paths: Sequence[Path]) -> Path | None:
    found = [p for p in paths if len(p.parts) == 1 and p.suffix.lower() in listing.SUFFIXES]
    # a .tsv has many uses: it counts alone, and with the columns of a listing
    usual = [p for p in found if p.suffix.lower() != ".tsv"]
    found = usual or [p for p in found if listing.names_files(folder / p)]
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"{folder} holds several listings ({names}); choose one with --captions")
    return folder / found[0] if found else None


def _by_text(folder: Path, videos: Sequence[Path], texts: Sequence[Path]) -> _Notes:
    notes, stems = _Notes(), _grouped(videos, _stem)
    beside, alike = _grouped(texts, _stem), _grouped(texts, lambda path: _stem(path).casefold())
    for path in videos:
        name, stem = path.as_posix(), _stem(path)
        exact = path.with_suffix(TEXT)
        found = [exact] if exact in beside[stem] else beside[stem]
        if len(stems[stem]) > 1:
            notes.bad.append(Bad(name, f"duplicate name: {_names(stems[stem])}"))
        elif len(found) > 1:
            notes.bad.append(Bad(name, f"duplicate caption: {_names(found)}"))
        elif not found:
            near = alike[stem.casefold()]
            hint = f"; rename {_names(near)}" if near else ""
            notes.bad.append(Bad(name, f"missing caption: there is no {exact.name}{hint}"))
        else:
            _add_text(notes, Video(name, folder / path, ""), folder / found[0])
    return notes


def _add_text(notes: _Notes, video: Video, path: Path) -> None:
    try:
        caption = " ".join(files.read_text(path).split())
    except ValueError as error:
        reason = str(error).removeprefix(f"{path.parent}/")
        notes.bad.append(Bad(video.name, f"unreadable caption: {reason}"))
    except OSError as error:
        notes.bad.append(Bad(video.name, f"unreadable caption: {error.strerror}"))
    else:
        _add(notes, replace(video, caption=caption), f"{path.name} is empty")


def _by_listing(folder: Path, videos: Sequence[Path], table: Path) -> _Notes:
    notes, names = _Notes(), _Names(folder, videos)
    named = [(names.find(line.file) if line.file else "", line) for line in listing.read(table)]
    counts = Counter(name for name, _ in named)
    for name, line in named:
        if not line.file:
            reason = line.wrong or "the line names no file"
            notes.bad.append(Bad(line.place, f"unreadable caption: {reason}"))
        elif not name:
            near = names.near(line.file)
            notes.bad.append(Bad(line.file, f"missing file: {line.place} names it{near}"))
        elif counts[name] == 1:
            caption = " ".join(line.caption.split())
            _add(notes, Video(name, folder / name, caption), f"{line.place} has none")
    for name in sorted(path.as_posix() for path in videos):
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


class _Names:
    """The videos of a folder by every spelling that means them without doubt."""

    def __init__(self, folder: Path, videos: Sequence[Path]) -> None:
        self._folder = folder
        self._exact = {path.as_posix(): path.as_posix() for path in videos}
        self._composed = _grouped(self._exact, _composed)
        self._alike = _grouped(self._exact, _rough)

    def find(self, file: str) -> str:
        """Return the video that a listing means: as it stands, with slashes, or by its real path.

        Empty if it means none, or several.
        """
        for text in (file, file.replace("\\", "/")):
            name = self._inside(text)
            found = self._exact.get(name) or _only(self._composed[_composed(name)])
            if not found and "/" in text:
                found = _only(self._real[os.path.realpath(self._folder / text)])
            if found:
                return found
        return ""

    def near(self, file: str) -> str:
        """Return words that point at videos of nearly this name, if there are any."""
        found = self._alike[_rough(file.replace("\\", "/"))]
        return f"; did you mean {', '.join(found[:3])}?" if found else ""

    def _inside(self, text: str) -> str:
        """Return a path from the folder on, whose links may lead to one file."""
        path = Path(*(part for part in Path(text).parts if part != "."))
        for base in (self._folder, self._folder.absolute(), self._folder.resolve()):
            if path.is_absolute() and path.is_relative_to(base):
                return path.relative_to(base).as_posix()
        return path.as_posix()

    @cached_property
    def _real(self) -> defaultdict[str, list[str]]:
        return _grouped(self._exact, lambda name: os.path.realpath(self._folder / name))


def _grouped(items: Iterable[T], key: Callable[[T], str]) -> defaultdict[str, list[T]]:
    groups = defaultdict[str, list[T]](list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _only(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ""


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _stem(path: Path) -> str:
    return _composed(path.with_suffix("").as_posix())


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _rough(name: str) -> str:
    return _composed(Path(name).stem).casefold()


def _shown(path: Path) -> str:
    """Return a name that can be printed and stored: bytes that are not UTF-8 as `\\xff`."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
