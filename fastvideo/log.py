"""One logger for the three packages; commands decide where its lines go."""

from __future__ import annotations

import logging
import sys

from fastvideo import env

logger = logging.getLogger("fastvideo")


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
