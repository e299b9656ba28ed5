"""`quality.toml`: settings of a model and their measured quality, by which budgets choose.

It stands beside the model; `fastvideo eval --compare FILE --quality` writes it. Torch-free.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fastvideo import files, hub
from fastvideo.config import Strict, parse, read_toml, toml_line
from fastvideo.hub import OpenModel
from fastvideo.metrics.faithfulness import ALL
from fastvideo.resolve import resolve
from fastvideo.sampling import GenerateRequest, spelled
from fastvideo_inference.goodput.profile import Setting

if TYPE_CHECKING:
    from fastvideo_inference.comparison import Comparison
    from fastvideo_inference.contrast import Contrast

FILE = "quality.toml"
_METHOD = (
    "share of held-out prompts with every attribute right, times overlap with the ideal shapes,"
    " times the share of the default clip's pixels"
)


class Option(Strict):
    """One setting and its measured quality; fields that are not given are the model's defaults."""

    quality: float = Field(ge=0, allow_inf_nan=False)
    size: str | None = None
    frames: int | None = None
    steps: int | None = None
    attention: str | None = None
    decoder: str = ""


class Quality(Strict):
    """The file: settings, and how their quality was measured."""

    measured: str
    option: tuple[Option, ...] = Field(min_length=1)


def read(path: Path) -> Quality:
    """Read the file; `ValueError` names the line that is wrong."""
    return parse(Quality, read_toml(path), source=lambda keys: toml_line(path, keys))


def candidates(
    request: GenerateRequest, found: OpenModel, *, decoder: str | None
) -> tuple[Setting, ...]:
    """Return the settings that differ in what a request (and `decoder`) leaves open, best first.

    Raises `ValueError` for a model without a `quality.toml`, and what no setting of it allows.
    """
    path = found.folder / FILE if found.folder else None
    if path is None or not path.is_file():
        raise ValueError(
            f"budget: {found.name} has no {FILE} (its settings in the order of their quality);"
            " make it by: fastvideo eval --compare FILE --quality"
        )
    given = request.model_dump(exclude_none=True) | {"seed": request.seed or 0}
    made: dict[Any, Setting] = {}
    reason = None
    for option in sorted(read(path).option, key=lambda one: -one.quality):
        own = option.model_dump(exclude_none=True, exclude={"quality", "decoder"})
        fields = {**spelled(own, source=FILE), **given}
        try:
            params = resolve(GenerateRequest(**fields), found.spec)
        except ValueError as error:  # of this setting with what is given
            reason = error
            continue
        name = option.decoder if decoder is None else decoder
        made.setdefault((params.model_dump_json(), name), Setting(params, name, option.quality))
    if reason and not made:
        raise reason
    return tuple(made.values())


def folder_of(plan: Comparison | Any) -> Path:
    """Return the folder of the model of a comparison's rows; `ValueError` if there are several."""
    if not hasattr(plan, "entries"):
        raise ValueError("--quality orders the rows of a comparison; give --compare FILE too")
    folders = {entry.evaluation.folder for entry in plan.entries}
    if len(folders) > 1:
        raise ValueError("--quality orders settings of one model; the rows have several")
    return folders.pop()


def write(plan: Comparison | Any, table: Contrast | Any) -> Path:
    """Write the settings of a comparison's rows beside their model, and keep its other ones."""
    folder, found = folder_of(plan), dict[str, Option]()
    path, usual = folder / FILE, hub.open_model(folder).spec.defaults
    for option in read(path).option if path.exists() else ():
        found[_key(option)] = option
    for entry, row in zip(plan.entries, table.rows, strict=True):
        how = entry.evaluation.how
        pixels = how.num_frames * how.height * how.width
        share = pixels / (usual.num_frames * usual.height * usual.width)
        right = row.rates[ALL].value * (1.0 if row.overlap is None else row.overlap)
        option = Option(
            quality=round(right * min(1.0, share), 4),
            size=f"{how.width}x{how.height}",
            frames=how.num_frames,
            steps=how.num_inference_steps,
            attention=how.attention,
            decoder=row.sampler.decoder or "",
        )
        found[_key(option)] = option
    rows = sorted(found.values(), key=lambda one: -one.quality)
    day, count = datetime.date.today().isoformat(), table.rows[0].n
    lines = [f'measured = "{_METHOD}; {count} prompts, {day}"']
    for option in rows:
        values = option.model_dump(exclude_none=True)
        lines += ["", "[[option]]", *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
    return files.write_text(path, "\n".join(lines) + "\n", overwrite=True)


def _key(option: Option) -> str:
    return option.model_dump_json(exclude={"quality"})
