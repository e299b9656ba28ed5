"""Prompt files: a `.txt` with a prompt a line (`#` comments), a `.jsonl` with a request a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvideo import files


def read_prompts(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (where, request fields) of every row; `ValueError` names the line that is wrong."""
    path = Path(path)
    readers = {".txt": _text_row, ".jsonl": _json_row}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"prompt file {path} must end in one of: {', '.join(readers)}")
    rows = [(w, readers[suffix](line, w)) for w, line in _lines(path)]
    if not rows:
        raise ValueError(f"prompt file {path} holds no prompt")
    return rows


def keys(path: str | Path) -> Iterator[str]:
    """Yield each key of a `.jsonl` as often as it is given, and where: `seed in p.jsonl:3`."""
    for place, line in _lines(Path(path)) if Path(path).suffix.lower() == ".jsonl" else ():
        pairs = json.loads(line, object_pairs_hook=list)
        yield from (f"{key} in {place}" for key, _ in pairs)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = files.read_text(path)
    except FileNotFoundError:
        raise ValueError(f"prompt file {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"prompt file {path} cannot be read: {error}") from None
    for number, line in enumerate(files.lines(text), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{path}:{number}", line.strip()


def _text_row(line: str, where: str) -> dict[str, Any]:
    return {"prompt": line}


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f'{where} must be an object such as {{"prompt": "a red ball"}}')
    return row
