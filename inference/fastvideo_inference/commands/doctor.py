"""`fastvideo doctor`: what this machine has, and what of it is usable."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from typer import Option

import fastvideo
from fastvideo import hub, media

PACKAGES = (
    ("core", ("torch", "numpy", "safetensors", "tokenizers", "pydantic", "imageio", "av")),
    (
        "optional",
        ("gradio", "flash-attn", "tensorboard", "accelerate", "diffusers", "transformers"),
    ),
)
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")


def doctor(
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Check this machine: devices, attention backends, codecs, disk.

    The exit code is 1 if something that every clip needs does not work.
    """
    checks: dict[str, Callable[[], Any]] = {
        "fastvideo": lambda: fastvideo.__version__,
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform,
        "packages": packages,
        "cpu": cpu,
        "devices": devices,
        "attention": attention,
        "video": video,
        "disk": disk,
        "models": models,
    }
    facts: dict[str, Any] = {}
    problems: list[str] = []
    for name, check in checks.items():
        try:
            facts[name] = check()
        except Exception as error:  # a doctor reports what is broken and continues
            facts[name] = f"FAILED: {type(error).__name__}: {error}"
            problems.append(name)
    facts["problems"] = problems
    print(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))
    return 1 if problems else 0


def packages() -> dict[str, str]:
    """Return installed versions; a missing core package is a problem."""
    found = {}
    for kind, names in PACKAGES:
        for name in names:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                if kind == "core":
                    raise
                found[name] = "not installed (optional)"
    return found


def cpu() -> dict[str, Any]:
    """Return cores, torch's threads and the instruction sets that decide CPU speed."""
    import torch

    info = Path("/proc/cpuinfo")
    words = set(info.read_text(encoding="utf-8").split()) if info.is_file() else set()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": platform.processor() or platform.machine(),
        "usable_cores": usable,
        "torch_threads": torch.get_num_threads(),
        "features": [flag for flag in CPU_FLAGS if flag in words],
    }


def devices() -> dict[str, str]:
    """Return each accelerator with its memory in GiB."""
    import torch

    found = {"cpu": "usable"}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found[f"cuda:{index}"] = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return found


def attention() -> dict[str, dict[str, str]]:
    """Return what each backend says of an ordinary clip, for each kind of device and pattern."""
    import torch

    from fastvideo.attention import Dense, Pattern, Vsa, table

    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    patterns: dict[str, Pattern] = {"dense": Dense(), "vsa": Vsa(sparsity=0.8)}
    return {
        f"{name} on {kind}": dict(table(pattern, device=kind))
        for kind in kinds
        for name, pattern in patterns.items()
    }


def video() -> str:
    """Write a clip of two frames and read it back."""
    import numpy as np

    frames = np.zeros((2, 32, 32, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = media.write_video(
            Path(folder) / "a.mp4", frames, fps=16, metadata={"comment": "ours"}
        )
        facts, tags = media.read_facts(path), media.read_metadata(path)
    if tags.get("comment") != "ours" or facts.num_frames != len(frames):
        raise ValueError(f"a written clip reads back as {facts}, {tags}")
    return f"{facts.codec} {facts.pixel_format}, tags read back"


def disk() -> dict[str, str]:
    """Return free space where clips and models from the hub go."""
    places = {
        "here": Path.cwd(),
        "hub cache": hub.cache_dir(),
        "temporary": Path(tempfile.gettempdir()),
    }
    return {name: _space(path) for name, path in places.items()}


def models() -> dict[str, str]:
    """Return the bundled models; each must have a spec that reads."""
    return {name: str(hub.open_spec(name)[1]) for name in hub.bundled()}


def _space(path: Path) -> str:
    real = next(p for p in (path, *path.parents) if p.exists())
    writable = "writable" if os.access(real, os.W_OK) else "NOT writable"
    return f"{path}: {shutil.disk_usage(real).free / 2**30:.1f} GiB free, {writable}"


def _lines(facts: dict[str, Any], indent: int = 0) -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += ["  " * indent + key, *_lines(value, indent + 1)]
        else:
            text = ", ".join(value) or "none" if isinstance(value, list) else value
            lines.append("  " * indent + f"{key}  {text}")
    return lines
