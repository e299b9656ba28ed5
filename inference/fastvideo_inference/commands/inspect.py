"""`fastvideo inspect`: the recipe inside a clip, or the parts and spec of a model folder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from fastvideo import files, hub, media
from fastvideo.errors import refusing
from fastvideo.models import decoder as decoders
from fastvideo.spec import Spec
from fastvideo_inference import naming
from fastvideo_inference.recipe import fingerprint, read_recipe

Facts = dict[str, Any]


def inspect(
    target: Annotated[str, Argument(help="A clip, a model folder or a model's name.")],
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Tell what a clip or a model folder is made of."""
    if Path(target).is_file():
        facts = clip_facts(Path(target))
    else:
        with refusing():
            if Path(target).suffix.lower() in media.VIDEO_SUFFIXES:
                raise FileNotFoundError(f"clip {target} does not exist")
            spec, folder = hub.open_spec(target)
        facts = model_facts(spec, folder)
    print(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))
    return 0


def clip_facts(path: Path) -> Facts:
    """Return the stream's facts and the recipe, or why there is none."""
    stream = dataclasses.asdict(media.read_facts(path))
    try:
        recipe: Any = read_recipe(path).model_dump(mode="json")
    except ValueError as error:
        recipe = f"none: {error}"
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "video": stream,
        "recipe": recipe,
        "timings_s": sidecar_timings(path),
    }


def sidecar_timings(path: Path) -> Any:
    """Return the seconds by stage out of the JSON beside a clip, or why there are none."""
    beside = naming.sidecar(path)
    try:
        return json.loads(files.read_text(beside))["timings_s"]
    except FileNotFoundError:
        return f"none: {beside} is not there"
    except (OSError, ValueError, KeyError, TypeError):
        return f"none: {beside} is no sidecar of fastvideo"


def model_facts(spec: Spec, folder: Path) -> Facts:
    """Return the spec, and for each part its parameters counted from the headers of its files."""
    from fastvideo import weights  # imports torch, so not before the name is known to be good

    parts: Facts = {}
    for file in sorted(folder.rglob("*.safetensors")):
        part = file.parent.relative_to(folder).as_posix()
        entry = parts.setdefault(part, {"parameters": 0, "dtypes": Counter(), "files": 0})
        entry["files"] += 1
        tensors = weights.Checkpoint(file)  # refuses a file that is shorter than its header says
        for name in tensors.names():
            count = math.prod(tensors.shape(name))
            entry["parameters"] += count
            entry["dtypes"][str(tensors.dtype(name)).removeprefix("torch.")] += count
    return {
        "folder": str(folder),
        "fingerprint": fingerprint(folder),
        "parts": {name: {**e, "dtypes": dict(e["dtypes"])} for name, e in parts.items()},
        "decoders": decoder_facts(folder),
        "spec": spec.model_dump(mode="json"),
    }


def decoder_facts(folder: Path) -> Facts:
    """Return the small decoders of a model folder, which `--decoder` takes by name: their dims."""
    places = {name: decoders.locate(name, folder) for name in decoders.names(folder)}
    return {
        name: {"family": decoders.family(place)} | dataclasses.asdict(decoders.read_config(place))
        for name, place in places.items()
    }


def _lines(tree: Any, indent: int = 0) -> list[str]:
    pad = "  " * indent
    lines = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            lines += [f"{pad}{key}", *_lines(value, indent + 1)]
        elif isinstance(value, list):
            lines.append(f"{pad}{key}  {json.dumps(value)}")
        elif isinstance(value, int) and not isinstance(value, bool) and key != "seed":
            lines.append(f"{pad}{key}  {value:,}")
        else:
            lines.append(f"{pad}{key}  {'none' if value in ({}, '', None) else value}")
    return lines
