"""What benchmarks share: calls timed in turn, paired ratios with their spread, and the machine.

names = ["ours", "peer"]
rounds = [{n: timed(calls[n]) for n in in_turn(names, i)} for i in range(5)]
ratio(rounds, "peer", over="ours")   # {"ratio": 1.57, "range": [1.44, 1.6]}
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Seconds = Mapping[str, float]


def timed(call: Callable[[], object]) -> float:
    """Return the wall seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def in_turn(names: Sequence[str], index: int) -> list[str]:
    """Return the order of round `index`: rotated, so that none always finds what another warmed."""
    first = index % len(names)
    return [*names[first:], *names[:first]]


def middle(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Return the median in seconds, and the range."""
    return {
        "s": round(statistics.median(values), digits),
        "range": [round(min(values), digits), round(max(values), digits)],
    }


def ratio(rounds: Sequence[Seconds], name: str, *, over: str, digits: int = 2) -> dict[str, Any]:
    """Return seconds of `name` over those of another in the same round: median and range."""
    ratios = [seconds[name] / seconds[over] for seconds in rounds]
    return {
        "ratio": round(statistics.median(ratios), digits),
        "range": [round(min(ratios), digits), round(max(ratios), digits)],
    }


def machine() -> dict[str, Any]:
    """Return processor, threads, GPU, and the versions that matter; what is absent is None."""
    import torch

    from fastvideo import cpu

    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": cpu.has_amx(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
    }


def place() -> dict[str, Any]:
    """Return what tells this machine's seconds from others', without torch: cores, versions."""
    is_linux = sys.platform == "linux"
    cores = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count()
    return {"cpu": _processor(), "cores": cores, "torch": _version("torch")}


def record(**results: Any) -> dict[str, Any]:
    """Return results beside the day, the command and the machine."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": machine(),
        **results,
    }


def append(path: str | Path, line: Mapping[str, Any]) -> None:
    """Append one line of JSON to a file; an empty path is none."""
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
