"""Documented names of the last release that moved: read for one more release, with a warning.

from fastvideo_inference.events import Done   # DeprecationWarning: ... is now fastvideo.stages.Done
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Names:
    """The `__getattr__` of an old module."""

    module: str

    def __call__(self, name: str) -> Any:
        """Return what a name is now; `AttributeError` if it was none."""
        old = f"{self.module}.{name}"
        if old not in NEW:
            raise AttributeError(f"module {self.module!r} has no attribute {name!r}")
        home = NEW[old]
        text = f"{old} is now {home}.{name}; the next release reads only that"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(import_module(home), name)
