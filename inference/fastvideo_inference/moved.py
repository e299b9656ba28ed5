"""Documented names of the last release that moved: read for one more release, with a warning.

from fastvideo_inference.events import Done   # DeprecationWarning: ... is now fastvideo.stages.Done
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

NEW = {
    "fastvideo_inference.events.Chunk": "fastvideo.stages",
    "fastvideo_inference.events.Done": "fastvideo.stages",
    "fastvideo_inference.events.Progress": "fastvideo.stages",
    "fastvideo_inference.stages.check": "fastvideo.stages",
    "fastvideo_inference.stages.run": "fastvideo.stages",
    "fastvideo_inference.state.State": "fastvideo.stages",
}


def find(module: str, name: str) -> Any:
    """Return what a name of an old module is now; `AttributeError` if it was none."""
    home = NEW.get(f"{module}.{name}")
    if home is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    text = f"{module}.{name} is now {home}.{name}; the next release reads only that"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    return getattr(import_module(home), name)
