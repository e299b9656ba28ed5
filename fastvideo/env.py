"""The only reader of the environment: three variables, read when asked for."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder for files that can be made again: `FASTVIDEO_CACHE`, else `~/.cache/fastvideo`."""
    return Path(os.environ.get("FASTVIDEO_CACHE") or Path.home() / ".cache" / "fastvideo")


def log_level() -> str:
    """Level of the log on stderr: `FASTVIDEO_LOG` (debug, info, warning, error), else warning."""
    return os.environ.get("FASTVIDEO_LOG", "warning").upper()


def is_offline() -> bool:
    """Whether model hubs must not be asked: the hub client's own `HF_HUB_OFFLINE`."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
