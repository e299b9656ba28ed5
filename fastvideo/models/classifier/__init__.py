"""Classifiers of a world's clips, one family per file, and the folder that one is kept in.

The folder holds `config.json` (the family and its dims) and `model.safetensors`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastvideo import files, registry

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write(net: Any, folder: str | Path, *, family: str, dtype: torch.dtype) -> None:
    """Write a classifier's folder."""
    from fastvideo import weights

    values = {"family": family, **dataclasses.asdict(net.config)}
    files.write_text(Path(folder) / CONFIG, json.dumps(values, indent=2) + "\n", overwrite=True)
    weights.save(Path(folder) / WEIGHTS, weights.cast(net.state_dict(), dtype=dtype))


def read(folder: str | Path) -> Any:
    """Load a classifier strictly, in float32, for evaluation; `ValueError` if that fails."""
    import torch

    from fastvideo import weights

    made, place, config = family(folder), Path(folder) / WEIGHTS, read_config(folder)
    net: Any = weights.build(lambda: made.Classifier(config))
    weights.load_into(net, weights.Checkpoint(place), source=place, dtype=torch.float32)
    return net.eval().requires_grad_(False)


def read_config(folder: str | Path) -> Any:
    """Read a classifier's dims; `ValueError` for what its family cannot be built from."""
    made, values = family(folder), _config(folder)
    values.pop("family")
    try:
        return made.Config.parse(values)
    except ValueError as error:
        raise ValueError(f"{error} (from {Path(folder) / CONFIG})") from None


def is_here(folder: Path) -> bool:
    """Tell whether a folder holds a classifier, perhaps with its card, and nothing else."""
    found = {path.name for path in folder.iterdir()}
    return {CONFIG, WEIGHTS} <= found <= {CONFIG, WEIGHTS, "README.md"}


def family(folder: str | Path) -> ModuleType:
    """Return the family's module of a classifier's folder; `ValueError` if it names none."""
    return registry.module(__name__, str(_config(folder).get("family")))


def _config(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / CONFIG
    try:
        return dict(json.loads(files.read_text(path)))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as the config of a classifier: {error}") from None
