"""Whether a process that a test did not start itself has ended."""

from __future__ import annotations

import time
from pathlib import Path

PATIENCE_S = 60.0


def has_ended(pid: int) -> bool:
    """Wait for its end, which a kill brings a moment later; one that nobody reaps has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while _is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
