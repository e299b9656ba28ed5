"""Old home of the state of stages; see `moved`."""

from __future__ import annotations

from typing import Any

from fastvideo_inference import moved


def __getattr__(name: str) -> Any:
    return moved.find(__name__, name)
