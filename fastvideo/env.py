"""The only reader of the environment: five variables, read when asked for."""

from __future__ import annotations

import os

_SPINS = "10000"  # as fast as the default on idle cores, twice as fast beside a busy loop on one


def log_level() -> str:
    """Level of the log on stderr: `FASTVIDEO_LOG` (debug, info, warning, error), else warning."""
    return os.environ.get("FASTVIDEO_LOG", "warning").upper()


def is_offline() -> bool:
    """Whether model hubs must not be asked: the hub client's own `HF_HUB_OFFLINE`."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def world_size() -> int:
    """How many processes a launcher started together: `WORLD_SIZE`, set by it; 1 without one."""
    return _whole("WORLD_SIZE", 1)


def rank() -> int:
    """Which of the launcher's processes this one is: `RANK`, set by it; 0 without one."""
    return _among("RANK")


def local_rank() -> int:
    """Which of its machine's processes this one is: `LOCAL_RANK`, set by the launcher."""
    return _among("LOCAL_RANK")


def check_launcher() -> None:
    """Raise `ValueError` for a launcher's variable that is wrong; without one, drop its leavings.

    Accelerate takes a `LOCAL_RANK` alone for a launcher.
    """
    world_size(), rank(), local_rank()
    if not _text("WORLD_SIZE"):
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)


def _among(name: str) -> int:
    """Return the place of this process among the launcher's: 0 if it started no others."""
    count = world_size()
    if count == 1:
        return 0
    place = _whole(name, 0)
    if place >= count:
        raise ValueError(f"{name} {place} must be less than WORLD_SIZE {count}")
    return place


def _whole(name: str, least: int) -> int:
    text = _text(name)
    if text and not (text.isdecimal() and int(text) >= least):
        raise ValueError(
            f"{name} {text!r} must be a whole number from {least}, as launchers set it"
        )
    return int(text) if text else least


def _text(name: str) -> str:
    """Return a variable; empty means unset."""
    return os.environ.get(name, "").strip()


def bound_spinning() -> None:
    """Let OpenMP's threads sleep after some microseconds of waiting, unless the user decides that.

    By default they spin for milliseconds: where another program has one of their cores, each
    parallel region of torch waits for it, and a clip takes many times as long.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS
