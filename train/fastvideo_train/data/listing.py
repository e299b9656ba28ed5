"""Captions of many videos in one file: jsonl, csv, or parquet by an optional package."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_KEYS = ("file", "file_name", "video", "path")
CAPTION_KEYS = ("caption", "text", "prompt")

Rows = Iterator[tuple[str, Mapping[str, Any] | None]]


@dataclass(frozen=True)
class Line:
    """One entry: where it stands, the file that it names and its caption; empty where absent."""

    place: str
    file: str
    caption: str


def read(path: Path) -> list[Line]:
    """Read a listing; raise `ValueError` if it is none or lacks the columns.

    A line that cannot be read gives an entry without a file.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"captions {path} must end in one of: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"captions {path} does not exist or is not a file")
    try:
        rows = list(SUFFIXES[path.suffix.lower()](path))
    except UnicodeDecodeError:
        raise ValueError(f"captions {path} is not UTF-8 text") from None
    except csv.Error as error:
        raise ValueError(f"captions {path} is not a csv file: {error}") from None
    known = [row for _, row in rows if row is not None]
    if rows and not any(_first(row, FILE_KEYS) for row in known):
        raise ValueError(f"captions {path} names no file; looked for: {', '.join(FILE_KEYS)}")
    return [
        Line(place, _first(row or {}, FILE_KEYS), _first(row or {}, CAPTION_KEYS))
        for place, row in rows
    ]


def _first(row: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    found = (row[key] for key in keys if isinstance(row.get(key), str))
    return next(found, "").strip()


def _jsonl(path: Path) -> Rows:
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if text.strip():
            try:
                row = json.loads(text)
            except ValueError:
                row = None
            yield f"{path.name} line {number}", row if isinstance(row, dict) else None


def _csv(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield f"{path.name} line {reader.line_num}", row


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"captions {path} needs pyarrow, which is not installed: pip install -e '.[data]'"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = [n for n in file.schema_arrow.names if n in FILE_KEYS + CAPTION_KEYS]
        rows = file.read(columns=names).to_pylist()
    except pyarrow.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"captions {path} is not a parquet file: {reason}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path.name} row {number}", row


SUFFIXES: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
