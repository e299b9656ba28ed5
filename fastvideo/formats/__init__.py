"""Layouts of model folders: a file here has `detect`, `derive_spec`, `configs`, `tensors`, `MARKS`.

Nothing here imports torch until tensors are asked for: a request is judged from the spec alone.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from fastvideo import registry

PARTS = ("text", "dit", "vae")

# Tensors that make a network another architecture, though everything else fits a plain Wan.
_VARIANTS = {
    "to_gate_compress": "a video sparse attention (VSA) network",
    "local_attn.proj_l": "a sparse-linear attention (SLA, TurboDiffusion) network",
    "delta_embedder": "an AnyFlow network",
    "k_img": "an image-to-video network",
    "add_k_proj": "an image-to-video network",
}


def find(folder: Path) -> ModuleType:
    """Return the format of a folder; raise `ValueError` saying what was looked for."""
    names = registry.names(__name__)
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    for module in modules:
        if module.detect(folder):
            return module
    wanted = "; ".join(module.MARKS for module in modules)
    raise ValueError(f"{folder} is not a model folder; looked for {wanted}")


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file; raise a one-line `ValueError` naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


def refuse_variants(names: Iterable[str], *, source: str | Path) -> None:
    """Raise `ValueError` if a tensor's name tells that its network is not a plain Wan."""
    for name in names:
        for mark, kind in _VARIANTS.items():
            if mark in name:
                raise ValueError(
                    f"{source} holds {name}: {kind}, another architecture than the dense "
                    "text-to-video Wan that this release runs"
                )
