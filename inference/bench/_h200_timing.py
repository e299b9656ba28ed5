"""How `h200.py` measures: warm-up and compilation checked, medians with ranges, kernels by name."""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from h200 import Case, Record

PEAK_TFLOPS = {"H100": 989, "H200": 989}  # dense bf16 by the datasheet; other devices get no MFU
NUM_KERNELS = 5

T = TypeVar("T")
Flop = tuple[int, int]
"""Operations that are executed, and those of the dense network."""


def checked(
    run: Callable[[], Tensor], compiled: Callable[[], object], case: Case, args: argparse.Namespace
) -> Record:
    """Warm up, and compile: return the seconds of the first calls, and how far the two are apart.

    Raises `ValueError` for results that are not numbers.
    """
    began = now(args)
    made = [run().float()]
    record: Record = {"first_s": round(now(args) - began, 2)}
    if case.mode == "compile":
        compiled()
        began = now(args)
        made.append(run().float())
        record["compile_s"] = round(now(args) - began, 2)
        record["error"] = apart(made[1], made[0])
    if not all(bool(x.isfinite().all()) for x in made):
        raise ValueError("the result holds numbers that are not finite")
    return record


def compile_each(blocks: Iterable[nn.Module], args: argparse.Namespace) -> None:
    """Have each layer compiled at its next call; all of a kind share one graph."""
    for block in blocks:
        block.compile(backend=args.compiler, dynamic=False)


def apart(result: Tensor, reference: Tensor) -> float:
    """Return the size of the difference over that of the reference."""
    wide = reference.float()
    return short(float((result.float() - wide).norm() / wide.norm()))


def short(value: float) -> float:
    """Return a number with five digits that tell."""
    return float(f"{value:.5g}")


def counted(run: Callable[[], object]) -> int:
    """Return the floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def now(args: argparse.Namespace) -> float:
    """Return the time in seconds when all that was asked of the device is done."""
    if torch.device(args.device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(run: Callable[[], object], args: argparse.Namespace, flop: Flop = (0, 0)) -> Record:
    """Return the seconds of a call, after one to warm up."""

    def once() -> float:
        began = now(args)
        run()
        return now(args) - began

    once()
    return summary(repeated(lambda _: once(), args), args, flop)


def repeated(run: Callable[[int], T], args: argparse.Namespace) -> list[T]:
    """Return what each repeat, told its number, returns; three will do if they take long."""
    rows: list[T] = []
    began = time.perf_counter()
    while len(rows) < args.repeats and (
        len(rows) < 3 or time.perf_counter() - began < args.stage_s
    ):
        rows.append(run(len(rows)))
    return rows


def summary(seconds: Sequence[float], args: argparse.Namespace, flop: Flop = (0, 0)) -> Record:
    """Return the median with its range, work, and rates of the executed work."""
    median = statistics.median(seconds)
    record: Record = {"s": round(median, 7), "n": len(seconds)}
    record["range"] = [round(f(seconds), 7) for f in (min, max)]
    if flop[0]:
        rate = flop[0] / median / 1e12
        record |= {"tflop": short(flop[0] / 1e12), "tflop_per_s": short(rate)}
        record["dense_tflop"] = short(flop[1] / 1e12)
        known = torch.cuda.get_device_name() if args.device != "cpu" else "CPU"
        peak = None if args.dtype == "float32" else peak_of(known)
        record["mfu"] = round(rate / peak, 3) if peak else None
    return record


def peak_of(device: str) -> float | None:
    """Return the dense bf16 TFLOP/s of a device by its datasheet; None where it is not known."""
    is_slower = "PCIe" in device or "NVL" in device
    return next((p for n, p in PEAK_TFLOPS.items() if n in device and not is_slower), None)


def estimated(
    measured: Record,
    scaled: Callable[[float], float],
    args: argparse.Namespace,
    flop: Flop = (0, 0),
) -> Record:
    """Return a row that was not run: a function of one that was."""
    low, high = measured["range"]
    seconds = [scaled(s) for s in (low, measured["s"], high)]
    return summary(seconds, args, flop) | {"n": measured["n"], "estimated": True}


def rows_of(
    seconds: Sequence[Mapping[str, float]], args: argparse.Namespace, flops: Mapping[str, Flop]
) -> dict[str, Record]:
    """Return the summary of each stage of some rounds."""
    names = seconds[0]
    return {n: summary([s[n] for s in seconds], args, flops.get(n, (0, 0))) for n in names}


def kernels(
    run: Callable[[], object], case: Case, args: argparse.Namespace, suffix: str = ""
) -> list[Record]:
    """Return the kernels that take most of a call's device time, with their share of it.

    On a CPU these are operators. With `--profile` the whole table is written to a file. Nothing
    that goes wrong here costs what was measured before.
    """
    is_short = args.device != "cpu" and not args.profile  # the host's side takes seconds to read
    activities = [torch.profiler.ProfilerActivity.CUDA] if is_short else None
    try:
        with torch.profiler.profile(activities=activities) as profiler:
            run()
            now(args)
        if args.profile:
            path = Path(args.profile) / f"{case.name.replace(' ', '-')}{suffix}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            key = "self_cuda_time_total" if args.device != "cpu" else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=key, row_limit=40)
            path.write_text(table, encoding="utf-8")
        return slowest(profiler.events() or [], is_cpu=args.device == "cpu")
    except (RuntimeError, OSError, AttributeError) as error:
        return [{"name": f"not profiled: {error}", "share": 0.0}]


def slowest(events: Iterable[Any], *, is_cpu: bool) -> list[Record]:
    """Add a profiler's events up by name, without the regions that programs mark in them."""
    total: Counter[str] = Counter()
    for event in events:
        if is_cpu and "::" in event.name:
            total[event.name] += event.self_cpu_time_total
        elif not is_cpu and event.device_type.name == "CUDA" and not event.is_user_annotation:
            total[event.name] += event.self_device_time_total
    whole = sum(total.values()) or 1
    top = total.most_common(NUM_KERNELS)
    return [{"name": name[:200], "share": round(us / whole, 4)} for name, us in top]


def forget_peak(args: argparse.Namespace) -> None:
    """Begin to measure the peak of memory anew."""
    gc.collect()
    if args.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # not every Linux lets it: then of the whole process
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_gib(args: argparse.Namespace) -> float:
    """Return the most memory that tensors took on the GPU, or this process on the CPU."""
    if args.device != "cpu":
        torch.cuda.synchronize()
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    status = Path("/proc/self/status").read_text(encoding="utf-8").split()
    return round(int(status[status.index("VmHWM:") + 1]) / 2**20, 2)
