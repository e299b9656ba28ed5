"""Names of output files: a template such as `{date}-{prompt:40}-{seed}`, filled and free."""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Collection, Iterator
from datetime import date
from pathlib import Path

from fastvideo.registry import did_you_mean

DEFAULT_NAME = "{date}-{prompt:40}-{seed}.mp4"
DEFAULT_TEMPLATE = f"outputs/{DEFAULT_NAME}"
PLACEHOLDERS = ("date", "index", "prompt", "seed")


def check_template(template: str, *, num_clips: int, count: int = 1) -> str:
    """Return the template, the default name added to a folder; raise `ValueError` if wrong.

    `count` clips of each prompt differ in their seeds, so that a prompt does not tell them apart.
    """
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
    """Return the path that a checked template names for one clip."""
    today = date.today().isoformat()
    name = template.format_map(
        {"date": today, "prompt": _Slug(prompt), "seed": seed, "index": index}
    )
    return Path(name)


def unused(path: Path, *, taken: Collection[Path] = ()) -> Path:
    """Return the path, or its first sibling (`name-2.mp4`) that is neither there nor `taken`."""
    free = (p for p in _numbered(path) if not (p in taken or p.exists() or sidecar(p).exists()))
    return next(free)


def sidecar(path: Path) -> Path:
    """Return the place of a clip's JSON: `clip.mp4` has `clip.json` beside it."""
    return path.with_suffix(".json")


class _Slug(str):
    """A prompt as a file name; the format `{prompt:40}` cuts it to 40 characters."""

    def __format__(self, length: str) -> str:
        words = re.sub(r"[^\w]+", "-", self.lower()).strip("-")
        return words[: int(length or 80)].strip("-") or "clip"


def _used(template: str) -> list[str]:
    try:
        parsed = list(string.Formatter().parse(template))
        for _, name, spec, _ in parsed:
            if name == "prompt" and spec and not spec.isdigit():
                raise ValueError(f"{{prompt:{spec}}} must have a length, as in {{prompt:40}}")
    except ValueError as error:
        raise ValueError(f"output {template!r} is not a template: {error}") from None
    return [name for _, name, _, _ in parsed if name is not None]


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(2):
        yield path.with_stem(f"{path.stem}-{number}")
