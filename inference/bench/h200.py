"""Seconds and TFLOP/s of a clip's parts at Wan2.1's published shapes, random weights, on a GPU.

Speed does not depend on what weights say, so they are drawn on the device; zeros run up to 13 % too
fast. Cases run in a process of their own: one that fails is recorded with its reason, also if it
takes the process with it, and the others go on. Work is counted by PyTorch from shapes. Cases come
in the order of what they are worth, until the budget is spent.

    PYTHONPATH=. python inference/bench/h200.py --out results.jsonl
    PYTHONPATH=. python inference/bench/h200.py --models 14b --out results.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo import registry

KINDS = ("ceiling", "kernel", "clip", "peer", "denoise", "cold", "tiny", "decode", "text")
"""What is worth most first."""
COMPILED = ("text", "denoise", "clip", "peer")
MARK, GPU_LOST = "RECORD ", 3
LARGEST_ERROR = 0.1
"""Of a compiled network against itself uncompiled: bf16 rounding stays far below."""
SETTINGS = ("steps", "tokens", "dtype", "smoke")
FINE = ("ok", "not started", "not installed")
PEER_ATTENTION = ("_native_cudnn", "native")
"""diffusers' names of what torch brings along, the best on a GPU first; a CPU has no cuDNN."""
SMOKE: dict[str, Any] = {
    "device": "cpu",
    "models": ["1.3b", "14b"],
    "sizes": ["96x64x17"],
    "patterns": ["vsa(sparsity=0.8)", "dense"],
    "tokens": 16,
    "repeats": 2,
    "compiler": "aot_eager",
    "budget_s": 100.0,
}  # fmt: skip


Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What one line of results is about; what its kind does not have is empty."""

    kind: str
    mode: str = ""
    size: str = ""
    model: str = ""
    pattern: str = ""
    backend: str = ""
    chunk: str = ""
    extent: str = ""

    @property
    def name(self) -> str:
        """Its words, of which `--only` wants some."""
        words = (self.kind, self.model, self.size, self.pattern, self.backend, self.chunk)
        return " ".join(w for w in (*words, self.extent, self.mode) if w)


def main() -> None:
    """Run the cases and print the table; the exit code is 1 if any failed."""
    args = parse_arguments()
    wanted = args.only or [""]
    cases = [c for c in plan(args) if c.kind in args.cases and any(o in c.name for o in wanted)]
    if args.list:
        print(*(c.name for c in cases), sep="\n")
    elif args.child:
        for i in map(int, args.child.split(",")):
            record = run_case(cases[i], args)
            print(MARK + json.dumps(record), flush=True)
            if record["status"] == "GPU lost":
                raise SystemExit(GPU_LOST)
    else:
        records = list(run_apart(cases, args))
        report(records)
        raise SystemExit(any(r["status"] not in FINE for r in records))


def parse_arguments() -> argparse.Namespace:
    """Read the command line; `--smoke` changes defaults, not what is given."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--cases", nargs="+", choices=KINDS, default=KINDS, help="kinds to run")
    p.add_argument("--only", nargs="+", default=[], help="words of names; --list shows them")
    p.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    p.add_argument("--models", nargs="+", choices=["1.3b", "14b"], default=["1.3b"])
    p.add_argument("--full", nargs="+", choices=["14b"], default=[], help="not one block of it")
    p.add_argument("--sizes", nargs="+", default=["832x480x81"], help="FastWan's: 832x448x61")
    patterns = ["vsa(sparsity=0.8)", "dense", "vsa(sparsity=0.9)"]
    p.add_argument("--patterns", nargs="+", default=patterns, help="what matters most first")
    p.add_argument("--backends", nargs="+", default=["auto"], help="of attention: names or all")
    p.add_argument("--modes", nargs="+", choices=["eager", "compile"], default=["eager", "compile"])
    p.add_argument("--chunks", nargs="+", default=["auto"], help="latent frames, or whole")
    p.add_argument("--device", default="cuda")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    p.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    p.add_argument("--tokens", type=int, default=512, help="of the prompt, none of them padding")
    p.add_argument("--steps", type=int, help="3 of the 1.3B and 4 of the 14B, if not given")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--stage-s", type=float, default=20, help="after these, three repeats will do")
    p.add_argument("--case-s", type=float, default=300, help="after these, a case is given up")
    p.add_argument("--budget-s", type=float, default=170, help="after these, no case is started")
    p.add_argument("--spare-s", type=float, default=60, help="the last case may take so much more")
    p.add_argument("--compile-peer-vae", action="store_true", help="minutes more")
    p.add_argument("--profile", default="", help="folder for a profiler's table of each case")
    p.add_argument("--out", default="", help="JSON lines file to append to")
    p.add_argument(
        "--smoke", action="store_true", help="tiny networks on the CPU, in a minute or two"
    )
    p.add_argument("--child", default="", help=argparse.SUPPRESS)
    p.add_argument("--scratch", default=None, help=argparse.SUPPRESS)
    if p.parse_known_args()[0].smoke:
        p.set_defaults(**SMOKE)
    return p.parse_args()


def plan(args: argparse.Namespace) -> list[Case]:
    """Return every case, those first that the published table needs most."""
    cases = [Case("ceiling"), *(Case("text", mode) for mode in args.modes)]
    for size, chunk in itertools.product(args.sizes, args.chunks):
        cases += [Case(kind, size=size, chunk=chunk) for kind in ("decode", "tiny")]
    is_all = "all" in args.backends  # one that does not serve a pattern says so in its record
    backends = registry.names("fastvideo.attention.backends") if is_all else args.backends
    for model, size in itertools.product(args.models, args.sizes):
        is_full = model != "14b" or model in args.full
        for pattern, backend in itertools.product(args.patterns, backends):
            words = {"size": size, "model": model, "pattern": pattern, "backend": backend}
            cases.append(Case("kernel", **words))
            part = "" if is_full else "one block"
            cases += [Case("denoise", mode, extent=part, **words) for mode in args.modes]
            cases += [Case("clip", mode, **words) for mode in args.modes if is_full]
        if is_full:
            cases += [*peers(size, model, args), Case("cold", size=size, model=model)]
    return sorted(cases, key=lambda case: worth(case, args))


def peers(size: str, model: str, args: argparse.Namespace) -> list[Case]:
    """Return the comparisons with diffusers, which is dense, at its settings."""
    names = [n for n in PEER_ATTENTION if args.device != "cpu" or "cudnn" not in n]
    pairs = [(name, mode) for name in names for mode in args.modes]
    if ("_native_cudnn", "compile") in pairs:  # the best, the plain, and what lies between
        pairs = [pair for pair in pairs if pair != ("_native_cudnn", "eager")]
    return [Case("peer", mode, size, model, "dense", name) for name, mode in pairs]


def worth(case: Case, args: argparse.Namespace) -> tuple[int, ...]:
    """Return a case's place: the best settings first, and what tells most of them."""
    best, second = (args.patterns * 2)[:2]
    is_late = case.mode == "eager" and "compile" in args.modes
    is_third = case.pattern not in ("", "dense", best, second)
    is_told = case.kind == "clip" and case.pattern != best  # by others, but for the sum
    model = args.models.index(case.model) if case.model else 0
    tuned = case.kind == "peer" and case.backend == "native"
    return (model, is_late, is_third, is_told or tuned, KINDS.index(case.kind))


# Processes


def run_apart(cases: list[Case], args: argparse.Namespace) -> Iterator[Record]:
    """Run cases in a process of their own, and in a new one after each that ended it."""
    left, deadline = deque(enumerate(cases)), time.monotonic() + args.budget_s
    while left and time.monotonic() < deadline:
        for record in one_process([i for i, _ in left], deadline, args):
            yield keep(record, left.popleft()[1], args)
    late: Record = {"status": "not started", "reason": f"{args.budget_s:g} s were spent"}
    yield from (keep(late, case, args) for _, case in left)


def one_process(left: Sequence[int], deadline: float, args: argparse.Namespace) -> Iterator[Record]:
    """Yield the record of one case after another, also of one that ends the process."""
    words = ["--child", ",".join(map(str, left))]
    with (
        tempfile.TemporaryDirectory() as scratch,
        child_of([*words, "--scratch", scratch]) as child,
    ):
        for _ in left:
            spare = max(0.0, deadline - time.monotonic()) + args.spare_s
            limit_s = min(args.case_s, spare)
            watch = threading.Timer(limit_s, end, [child])
            watch.start()
            assert child.stdout is not None, "it is a pipe"
            line = next((x for x in child.stdout if x.startswith(MARK)), "")
            watch.cancel()
            if line:
                yield json.loads(line.removeprefix(MARK))
            elif child.wait() == GPU_LOST:
                return
            else:
                how = child.returncode
                name = signal.Signals(-how).name if how < 0 else f"exit code {how}"
                reason = f"its process ended with {name}; after {limit_s:.3g} s it is killed"
                yield {"status": "failed", "reason": reason}
                return
            if time.monotonic() >= deadline:
                return


@contextlib.contextmanager
def child_of(words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Start this script again; what it started itself ends with it."""
    command = [sys.executable, *sys.argv, *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, text=True, start_new_session=True) as child:
        try:
            yield child
        finally:
            end(child)


def end(child: subprocess.Popen[str]) -> None:
    """Kill a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(child.pid, signal.SIGKILL)


def keep(record: Record, case: Case, args: argparse.Namespace) -> Record:
    """Complete a record, append it to the file, tell that it is there."""
    whole = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "case": case.name,
        **record,
        "settings": vars(case) | {k: vars(args)[k] for k in SETTINGS},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    if args.out:
        with Path(args.out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole) + "\n")
    sys.stderr.write(f"{case.name}: {whole['status']} {whole.get('reason', '')}\n")
    return whole


def report(records: list[Record]) -> None:
    """Print a table in Markdown, a row for each stage."""
    heads = ("case", "stage", "s", "range", "compile s", "TFLOP", "dense", "TFLOP/s", "MFU", "GiB")
    print("| " + " | ".join([*heads, "error", "over ours"]) + " |")
    print("|---" * 12 + "|")
    for r in records:
        for name, s in r.get("stages", {}).items():
            low_high = " - ".join(f"{x:.4g}" for x in s.get("range", []))
            row = [r["case"], name, f"{s['s']:.4g}", low_high, r.get("compile_s")]
            row += [s.get(k) for k in ("tflop", "dense_tflop", "tflop_per_s", "mfu")]
            row += [r.get("peak_gib"), r.get("error"), s.get("over_ours")]
            print("| " + " | ".join("" if x is None else str(x) for x in row) + " |")
        if r["status"] != "ok":
            print(f"| {r['case']} | {r['status']}: {r['reason']} |" + " |" * 10)


# One case


def run_case(case: Case, args: argparse.Namespace) -> Record:
    """Return what was measured, or why nothing was."""
    import torch  # late: the process that only waits needs none of it
    from _h200_cases import MEASURES
    from _h200_timing import forget_peak, peak_gib
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    record: Record = {"status": "ok"}
    try:
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it goes on uncompiled
        forget_peak(args)
        record["clocks_before"] = clocks(args)
        with torch.no_grad():
            record |= MEASURES[case.kind](case, args)
        if record.get("error", 0) > LARGEST_ERROR:
            record |= {"status": "wrong", "reason": "compiled it differs from eager"}
    except Exception as error:  # whatever it is, the other cases go on
        words = str(error).strip() or "no message"
        is_absent = case.kind == "peer" and isinstance(error, ImportError)
        why = f"{type(error).__name__}: {words.splitlines()[0]}"
        record |= {"status": "not installed" if is_absent else "failed", "reason": why}
    gc.collect()
    try:
        record["clocks_after"] = clocks(args)
        record |= {"peak_gib": peak_gib(args), "machine": machine(args)}
    except RuntimeError as error:  # an illegal access poisons the whole context
        why = record.get("reason") or str(error).splitlines()[0]
        record |= {"status": "GPU lost", "reason": why}
    if case.mode == "compile":
        breaks = {k.splitlines()[0]: n for k, n in counters["graph_break"].items()}
        record["compiler"] = {"name": args.compiler, **counters["stats"], "graph_breaks": breaks}
    return record


def clocks(args: argparse.Namespace) -> Record:
    """Return what the driver says of clocks, power and heat, or the kernel of a CPU's MHz."""
    if args.device == "cpu":
        with contextlib.suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            return {"cpu.mhz": [float(x.split(":")[1]) for x in lines if x.startswith("cpu MHz")]}
        return {}
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    if not shutil.which("nvidia-smi"):
        return {"nvidia-smi": "not there"}
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return {query: found.stdout.strip() or found.stderr.strip()}


def machine(args: argparse.Namespace) -> Record:
    """Return the device, and the versions that matter."""
    import torch

    found: Record = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "diffusers", "transformers", "av"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if args.device == "cpu":
        return found | {"device": platform.processor() or platform.machine()}
    found |= {"cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda}
    return found | {"device": torch.cuda.get_device_name()}


if __name__ == "__main__":
    main()
