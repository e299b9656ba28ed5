"""A cold start for `h200.py`: files of random weights, and a process that loads them and runs.

Run as a script it is that process. Nothing but Python's own modules is imported before it looks at
the clock, and the files were just written: the disk is not measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h200 import Case, Record

SPARE_GIB = 1.0
PARTS = {"text": ("umt5", "TextEncoder"), "dit": ("wan", "DiT"), "vae": ("wan", "Vae")}
"""Family and class of each network."""
STAGES = ("python", "imports", "device", "load", "first forward", "cold start")


def cold(case: Case, args: argparse.Namespace) -> Record:
    """Measure processes that load text encoder, denoiser and autoencoder, and run one forward.

    Raises `OSError` if the files do not fit on the disk.
    """
    from _h200_timing import repeated, rows_of, short

    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        job, gib = prepared(Path(folder), case, args)
        rows = repeated(lambda _: one_start(job), args)
    stages = rows_of(rows, args, {})
    stages["load"] |= {"gib": short(gib), "gib_per_s": short(gib / stages["load"]["s"])}
    says = "files just written, all of bfloat16; the first forward is eager and dense"
    return {"stages": stages, "cold": says}


def prepared(folder: Path, case: Case, args: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """Write the files; return what the process is told, and their GiB."""
    import torch
    from _h200_parts import dims, fill

    from fastvideo import weights

    config = {p: dims(case.model if p == "dit" else p, args) for p in PARTS}
    nets = {part: built(part, values) for part, values in config.items()}
    num = sum(p.numel() for net in nets.values() for p in net.parameters())
    gib, free = num * torch.bfloat16.itemsize / 2**30, shutil.disk_usage(folder).free / 2**30
    if free < gib + SPARE_GIB:
        raise OSError(f"{free:.1f} GiB are free for files of {gib:.1f} GiB")
    how = argparse.Namespace(device=args.device, dtype="bfloat16")
    while nets:
        part, net = nets.popitem()
        weights.save(folder / f"{part}.safetensors", fill(net, how).state_dict())
    job = {"folder": str(folder), "config": config, "device": args.device, "dtype": args.dtype}
    return job | {"size": case.size, "tokens": args.tokens}, gib


def one_start(job: dict[str, Any]) -> dict[str, float]:
    """Start a process and return the seconds of its stages."""
    told = json.dumps(job | {"began": time.time()})
    command = [sys.executable, __file__, told]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"the process ended with {done.returncode}: {lines[-1]}")
    marks = json.loads(done.stdout.splitlines()[-1])
    seconds = [b - a for a, b in pairwise(marks)]
    return dict(zip(STAGES, [*seconds, marks[-1] - marks[0]], strict=True))


# The process


def main() -> None:
    """Load and run; print the times at which each stage ended."""
    job, marks = json.loads(sys.argv[1]), [time.time()]
    import torch
    from _h200_parts import bundle, inputs

    from fastvideo.attention import Dense
    from fastvideo.stages.denoise import with_attention

    args: Any = argparse.Namespace(**job)
    marks.append(time.time())
    torch.empty(1, device=args.device)
    marks.append(now(args))
    nets = {part: loaded(part, args) for part in PARTS}
    marks.append(now(args))
    with torch.no_grad():
        x_BCTHW, t_BT, cond = inputs(nets["dit"], args, args)
        model = bundle(args, dit=nets["dit"])
        forward = with_attention(model, x_BCTHW, pattern=Dense())
        is_finite = bool(forward(x_BCTHW, t_BT, cond).isfinite().all())
    marks.append(now(args))
    assert is_finite, "numbers"
    sys.stdout.write(json.dumps([args.began, *marks]) + "\n")


def loaded(part: str, args: argparse.Namespace) -> Any:
    """Load a network as the library does, from its file to the device."""
    from fastvideo import weights
    from fastvideo.models.dit import wan

    net, path = built(part, args.config[part]), Path(args.folder) / f"{part}.safetensors"
    weights.load_into(
        net,
        weights.Checkpoint(path),
        source=path,
        dtype=dtype_of(args),
        device=args.device,
        keep_float32=wan.KEEP_FLOAT32 if part == "dit" else (),
    )
    return net.eval().requires_grad_(False)


def built(part: str, values: dict[str, Any]) -> Any:
    """Build a network on the meta device."""
    from fastvideo import registry, weights

    family, name = PARTS[part]
    package = f"fastvideo.models.{part}"
    config = registry.load(package, family, "Config").parse(values)
    kind = registry.load(package, family, name)
    return weights.build(lambda: kind(config))


def dtype_of(args: argparse.Namespace) -> Any:
    """Return the type in which networks run."""
    import torch

    return getattr(torch, args.dtype)


def now(args: argparse.Namespace) -> float:
    """Return the time of day when all that was asked of the device is done."""
    import torch

    if args.device != "cpu":
        torch.cuda.synchronize()
    return time.time()


if __name__ == "__main__":
    main()
