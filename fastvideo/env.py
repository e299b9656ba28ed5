"""The only reader of the environment: two variables, read when asked for."""

from __future__ import annotations

import os


def log_level() -> str:
    """Level of the log on stderr: `FASTVIDEO_LOG` (debug, info, warning, error), else warning."""
    return os.environ.get("FASTVIDEO_LOG", "warning").upper()


def is_offline() -> bool:
    """Whether model hubs must not be asked: the hub client's own `HF_HUB_OFFLINE`."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
