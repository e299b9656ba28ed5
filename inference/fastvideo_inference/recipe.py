"""The recipe that travels inside every clip: enough to make the same frames again."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import Field

import fastvideo
from fastvideo import media
from fastvideo.config import Strict, parse
from fastvideo_inference.request import Plan

# The comment tag is the one that every player shows and every copy keeps.
TAG = "comment"
_SAMPLE_BYTES = 1 << 20


class ModelId(Strict):
    """Which weights: the name asked for, the spec's name, and a fingerprint of the files."""

    name_or_path: str
    spec: str
    fingerprint: str


class Recipe(Strict):
    """Everything that decided the frames of one clip."""

    version: int = 1
    model: ModelId
    request: Plan
    device: str
    dtype: str
    latents: str = "seed"  # or "given", if the caller passed its own noise
    versions: dict[str, str] = Field(default_factory=dict)


def fingerprint(folder: str | Path) -> str:
    """Digest a model folder: names and sizes of all files, and the first and last MiB of each.

    Reading 28 GB of weights to the end would take longer than making a clip; new weights of the
    same shapes differ in these parts too.
    """
    digest = hashlib.blake2b(digest_size=16)
    root = Path(folder)
    files = (p for p in root.rglob("*") if p.suffix in {".json", ".safetensors", ".pth", ".pt"})
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()}:{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions that may decide the last bit of a frame."""
    found = {"fastvideo": fastvideo.__version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "av"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # pragma: no cover - a core dependency
            found[name] = "missing"
    return found


def read_recipe(path: str | Path) -> Recipe:
    """Read the recipe out of a clip; raise `ValueError` if it holds none of ours."""
    import json

    text = media.read_metadata(path).get(TAG)
    try:
        values: Any = json.loads(text or "")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} carries no recipe of fastvideo in its {TAG} tag")
    return parse(Recipe, values, source=str(path))
