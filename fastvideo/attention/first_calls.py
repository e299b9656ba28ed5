"""What the first calls of a backend that compiles cost: measured, logged, remembered."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

from fastvideo.log import logger

T = TypeVar("T")


@dataclass(frozen=True)
class FirstCalls:
    """Seconds of the first call of each kind, by a key that says what a compiler tells apart."""

    backend: str
    seconds: dict[Hashable, float] = field(default_factory=dict)

    def timed(self, key: Hashable, call: Callable[[], T]) -> T:
        """Call; log the seconds if it is the first of its kind."""
        if key in self.seconds:
            return call()
        began = time.perf_counter()
        out = call()
        self.seconds[key] = time.perf_counter() - began
        text = "%s: the first call took %.1f s to compile and run"
        logger.info(text, self.backend, self.seconds[key])
        return out
