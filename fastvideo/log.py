"""One logger for the three packages; commands decide where its lines go."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterable

from fastvideo import env

logger = logging.getLogger("fastvideo")


def warned(lines: Iterable[str]) -> tuple[str, ...]:
    """Log each line once, as a warning, and return them."""
    lines = tuple(dict.fromkeys(lines))
    for line in lines:
        logger.warning("%s", line)
    return lines


def given_twice(names: Iterable[str]) -> tuple[str, ...]:
    """Return a line for each name that is there more than once."""
    twice = (name for name, times in Counter(names).items() if times > 1)
    return tuple(f"{name} is given twice: the last one counts" for name in twice)


def configure(level: str | None = None) -> None:
    """Send the log to stderr at `level` (default: `FASTVIDEO_LOG`). Called by commands only."""
    name = (level or env.log_level()).upper()
    if env.rank() > 0 and name in ("INFO", "WARNING"):
        name = "ERROR"  # of the processes that a launcher started, the first one tells the rest
    if name not in logging.getLevelNamesMapping():
        legal = "debug, info, warning, error"
        raise ValueError(f"log level {name.lower()!r} (from FASTVIDEO_LOG) is unknown; use {legal}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(name)
    logger.propagate = False
