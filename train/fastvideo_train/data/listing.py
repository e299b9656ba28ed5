"""Captions of many videos in one file: jsonl, csv (`,` `;` tab or `|`), parquet with pyarrow."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastvideo import files
from fastvideo.footage import CONTAINERS

FILE_KEYS = ("file", "file_name", "video", "path")
CAPTION_KEYS = ("caption", "text", "prompt")
DELIMITERS = ",;\t|"

Rows = Iterator[tuple[str, Mapping[Any, Any] | str]]
"""Where a row stands, and the row or what is wrong with it."""


@dataclass(frozen=True)
class Line:
    """One entry: where it stands, the file that it names and its caption; empty where absent."""

    place: str
    file: str
    caption: str
    wrong: str = ""


def read(path: Path) -> list[Line]:
    """Read a listing; raise `ValueError` if it is none or lacks the columns.

    A line that cannot be read gives an entry that says what is `wrong`. Names of columns count in
    any case.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"captions {path} must end in one of: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"captions {path} does not exist or is not a file")
    rows = list(SUFFIXES[path.suffix.lower()](path))
    known = [row for _, row in rows if not isinstance(row, str)]
    if known and not any(_first(row, FILE_KEYS) for row in known):
        raise ValueError(f"captions {path} names no file; looked for: {', '.join(FILE_KEYS)}")
    return [
        Line(place, "", "", row)
        if isinstance(row, str)
        else _checked(Line(place, _first(row, FILE_KEYS), _first(row, CAPTION_KEYS)))
        for place, row in rows
    ]


def _checked(line: Line) -> Line:
    """Refuse what no file can be called and no tokenizer reads: half an emoji, a NUL."""
    text = line.file + line.caption
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        return replace(
            line, file="", wrong="it holds a NUL, or half a character (a lone surrogate)"
        )
    return line


def _first(row: Mapping[Any, Any], keys: tuple[str, ...]) -> str:
    texts = {_plain(key): value for key, value in row.items() if isinstance(value, str)}
    return next((texts[key].strip() for key in keys if key in texts), "")


def _plain(key: object) -> str:
    return str(key).strip().lower()


def _jsonl(path: Path) -> Rows:
    for number, text in enumerate(_lines(path), 1):
        if text.strip():
            try:
                row, wrong = json.loads(text), "not a JSON object"
            except ValueError as error:
                row, wrong = None, f"not valid JSON: {error}"
            yield f"{path.name} line {number}", row if isinstance(row, dict) else wrong


def _csv(path: Path) -> Rows:
    lines = _lines(path)
    try:
        title, header, delimiter = _title(lines)
    except csv.Error as error:
        raise ValueError(f"captions {path} line 1: {error} (lines end in LF or CRLF)") from None
    reader = csv.reader(
        (f"{line}\n" for line in lines), delimiter=delimiter, strict=True, skipinitialspace=True
    )
    first = 1
    try:
        for row in reader:
            place = f"{path.name} line {first}"
            if first > 1 + lines.index(title) and row:
                # the last line of a row ends in its own cells, unless its file comes first
                end = reader.line_num - bool(_file_column(header))
                _refuse_swallowed(lines[first:end], header, delimiter, path, first)
                extra = any(text.strip() for text in row[len(header) :])
                wrong = f"it has {len(row)} fields, the header {len(header)}; quote a {delimiter!r}"
                yield place, wrong if extra else dict(zip(header, row, strict=False))
            first = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"captions {path} line {first}: {error} (an open quote?)") from None


def _refuse_swallowed(
    lines: list[str], header: list[str], delimiter: str, path: Path, first: int
) -> None:
    """Refuse a quoted text that goes on over lines which are rows of their own."""
    column = _file_column(header)
    for number, line in enumerate(lines, first + 1):
        row = _fields(line, delimiter)
        is_row = column is not None and len(row) == len(header)
        if is_row and Path(row[column or 0].strip()).suffix.lower() in CONTAINERS:
            raise ValueError(f"captions {path} line {first}: a quote is open, into line {number}")


def names_files(path: Path) -> bool:
    """Tell whether a table has the columns of a listing, such as a .tsv of another purpose."""
    try:
        return _file_column(_title(_lines(path))[1]) is not None
    except (ValueError, OSError, csv.Error):
        return False


def _title(lines: list[str]) -> tuple[str, list[str], str]:
    """Return the line of the header, its names, and their delimiter."""
    title = next((line for line in lines if line.strip()), "")
    delimiter = next((d for d in DELIMITERS if _file_column(_fields(title, d)) is not None), ",")
    return title, _fields(title, delimiter), delimiter


def _fields(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])


def _file_column(header: list[str]) -> int | None:
    return next((i for i, name in enumerate(header) if _plain(name) in FILE_KEYS), None)


def _lines(path: Path) -> list[str]:
    try:
        return files.lines(files.read_text(path))
    except ValueError as error:
        raise ValueError(f"captions {error}") from None


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
        names = [n for n in file.schema_arrow.names if _plain(n) in FILE_KEYS + CAPTION_KEYS]
        rows = file.read(columns=names).to_pylist()
    except pyarrow.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"captions {path} is not a parquet file: {reason}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path.name} row {number}", row


SUFFIXES: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
