"""Layouts of model folders: a file here has `detect`, `derive_spec`, `configs`, `unknown_keys`,
`tensors`, `tokenizer_folder`, `MARKS`.

Nothing here imports torch until tensors are asked for: a request is judged from the spec alone.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fastvideo import files, foreign, registry

PARTS = ("text", "dit", "vae")
METADATA = "__metadata__"
"""Key of a safetensors header under which text stands."""

_OTHER = "another architecture than the text-to-video Wan that this release runs"
# Tensors that make a network another architecture, though everything else fits a plain Wan.
_VARIANTS = {
    "to_gate_compress": "a video sparse attention (VSA) network, which is read from folders in the"
    " diffusers layout alone; convert it",
    "local_attn.proj_l": f"a sparse-linear attention (SLA, TurboDiffusion) network, {_OTHER}",
    "delta_embedder": f"an AnyFlow network, {_OTHER}",
    "k_img": f"an image-to-video network, {_OTHER}",
    "add_k_proj": f"an image-to-video network, {_OTHER}",
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
        values = json.loads(files.read_text(path))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


def find_unknown_keys(folder: Path, kinds: Mapping[str, foreign.Keys]) -> tuple[str, ...]:
    """Return the keys that are not known here of configs by name, those that are there."""
    found: list[str] = []
    for name, keys in kinds.items():
        if (path := folder / name).is_file():
            entries = foreign.check(read_json(path), keys, source=path)
            found += (f"{name}: {entry}" for entry in entries)
    return tuple(found)


def tensor_names(folder: Path, stem: str) -> list[str]:
    """Read the names of a part's tensors without torch.

    Empty if no weights are there (yet), or cut short: whoever reads them says what is wrong.
    """
    index, single = (folder / f"{stem}.safetensors{end}" for end in (".index.json", ""))
    if index.is_file():
        return list(foreign.weight_map(index))
    return [name for name in read_header(single) if name != METADATA]


def read_header(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file without torch; empty if there is no whole one."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if 8 + size <= path.stat().st_size else b""
    try:
        header = json.loads(text)
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}


def refuse_variants(
    names: Iterable[str], *, source: str | Path, known: Collection[str] = ()
) -> None:
    """Raise `ValueError` if a tensor's name tells that its network is not a plain Wan.

    `known` are marks of variants that the caller's layout can describe.
    """
    for name in names:
        for mark, kind in _VARIANTS.items():
            if mark in name and mark not in known:
                raise ValueError(f"{source} holds {name}: {kind}")
