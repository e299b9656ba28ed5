"""Names of output files: a template such as `{date}-{prompt:40}-{seed}`, filled and claimed."""

from __future__ import annotations

import itertools
import os
import re
import string
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from fastvideo import files, media
from fastvideo.registry import did_you_mean

DEFAULT_NAME = "{date}-{prompt:40}-{seed}.mp4"
DEFAULT_TEMPLATE = f"outputs/{DEFAULT_NAME}"
PLACEHOLDERS = ("date", "index", "prompt", "seed")
_NUMBER_BYTES = len("-99999")
_JOINERS = "\u200c\u200d"  # the second one makes one picture of two
_SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"


def check_template(template: str, *, num_clips: int, count: int = 1) -> str:
    """Return the template, the default name added to a folder; raise `ValueError` if wrong.

    `count` clips of each prompt differ in their seeds, so that a prompt does not tell them apart.
    """
    if "\0" in template or template.encode(errors="ignore").decode() != template:
        raise ValueError(f"output {template!r} is not valid Unicode text")
    if not template:
        raise ValueError("output '' is empty; give a file, a folder/ or a template")
    with suppress(OSError):  # a name that is too long to be one
        if template.endswith("/") or Path(template).is_dir():
            template = str(Path(template) / DEFAULT_NAME)
    used = _used(template)
    legal = ", ".join("{" + name + "}" for name in PLACEHOLDERS)
    for name in used:
        if name not in PLACEHOLDERS:
            hint = did_you_mean(name, PLACEHOLDERS)
            raise ValueError(f"output {template!r}: {{{name}}} is unknown{hint} (known: {legal})")
    for number, name in ((num_clips // count, "prompt"), (count, "seed")):
        if number > 1 and not {"index", name} & set(used):
            need = f"add {{index}} or {{{name}}}"
            raise ValueError(f"output {template!r} names one file for {number} clips; {need}")
    return template


def fill(template: str, *, prompt: str, seed: int, index: int) -> Path:
    """Return the path that a checked template names for one clip.

    A prompt is cut to what a file name holds, its sidecar's, a number and a claim included. Raises
    `ValueError` if the rest of a name is too long.
    """
    values = {"date": date.today().isoformat(), "seed": seed, "index": index}
    most = files.STEM_BYTES - (_NUMBER_BYTES if "prompt" in _used(template) else 0)
    characters = _characters(prompt)
    for room in range(most, 0, -1):
        path = Path(template.format_map({**values, "prompt": _Slug(characters, room)}))
        sizes = [len(os.fsencode(part)) for part in (*path.parts[:-1], path.stem)]
        if sizes[-1] <= most and max(sizes) <= files.NAME_BYTES:
            return path
    is_name = sizes[-1] > most
    part = path.name if is_name else max(path.parts[:-1], key=len)
    limit = most + len(path.suffix) if is_name else files.NAME_BYTES
    what = "name" if is_name else "folder"
    raise ValueError(f"output {what} {part[:24]}... is too long: it has at most {limit} bytes")


def claim(path: Path, held: ExitStack, *, numbered: bool, overwrite: bool) -> Path:
    """Hold the name of a clip and its sidecar, or the first free number of it (`name-2.mp4`).

    Raises `FileExistsError` where no number may be added and the name is held by another process,
    or is there already (unless `overwrite`).
    """
    for number in itertools.count(1):
        name = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            held.enter_context(_claimed(name, overwrite=overwrite))
        except FileExistsError:
            if not numbered:
                raise
        else:
            return name
    raise AssertionError("numbers do not end")


def sidecar(path: Path) -> Path:
    """Return the place of a clip's JSON: `clip.mp4` has `clip.json` beside it."""
    return path.with_suffix(".json")


@dataclass(frozen=True)
class _Slug:
    """A prompt in a file name, of at most `room` bytes; `{prompt:40}` cuts it to 40 characters."""

    characters: list[str]
    room: int

    def __format__(self, length: str) -> str:
        kept = self.characters[: int(length or 80)]
        while len("".join(kept).encode()) > self.room:
            kept.pop()
        return "".join(kept).strip(f"-{_JOINERS}") or "clip"


def _characters(prompt: str) -> list[str]:
    """Split a prompt into what a reader takes for characters, a "-" for all that is not a word.

    Marks and skin tones belong to what they follow, and two pictures around a joiner together.
    """
    found: list[str] = []
    for char in unicodedata.normalize("NFC", prompt.lower()):
        kind = unicodedata.category(char)
        extends = kind[0] == "M" or char in _JOINERS or char in _SKIN_TONES
        if not (extends or char.isalnum() or char == "_" or kind == "So"):
            found += ["-"] if found and found[-1] != "-" else []
        elif found and found[-1] != "-" and (extends or found[-1].endswith(_JOINERS[1])):
            found[-1] += char
        elif not extends:
            found.append(char)
    return found


def _used(template: str) -> list[str]:
    try:
        parsed = list(string.Formatter().parse(template))
        for _, name, spec, conversion in parsed:
            if conversion:
                raise ValueError(f"{{{name}!{conversion}}} must be {{{name}}}")
            if name == "prompt" and spec and not re.fullmatch("[0-9]{1,4}", spec):
                raise ValueError(f"{{prompt:{spec}}} must have a length, as in {{prompt:40}}")
            if name in ("index", "seed") and spec and not re.fullmatch("0?[0-9]{1,2}", spec):
                raise ValueError(f"{{{name}:{spec}}} must have a width, as in {{{name}:03}}")
            if name == "date" and spec:
                raise ValueError(f"{{date:{spec}}} must be {{date}}")
    except ValueError as error:
        raise ValueError(f"output {template!r} is not a template: {error}") from None
    return [name for _, name, _, _ in parsed if name is not None]


@contextmanager
def _claimed(path: Path, *, overwrite: bool) -> Iterator[None]:
    """Hold a name if it is free, also when it is held: who held it before may have used it."""
    _check_free(path, overwrite=overwrite)
    with files.claimed(path) as is_ours:
        if not is_ours:
            raise FileExistsError(f"{path} is being made by another process; choose another name")
        _check_free(path, overwrite=overwrite)
        yield


def _check_free(path: Path, *, overwrite: bool) -> None:
    media.check_output(path, overwrite=overwrite)
    files.check_free(sidecar(path), overwrite=overwrite)
