"""Seconds and TFLOP/s of a clip's parts at Wan2.1's published shapes, random weights, on a GPU.

Speed does not depend on what weights say, so they are drawn on the device; zeros run up to 13 % too
fast. Cases run in a process of their own: one that fails is recorded with its reason, also if it
takes the process with it, and the others go on. Work is counted by PyTorch from shapes.

    PYTHONPATH=. python inference/bench/h200.py --models 1.3b --out inference/bench/h200.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import itertools
import json
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo import registry

KINDS = ("ceiling", "text", "decode", "denoise", "clip")
MARK, GPU_LOST = "RECORD ", 3
LARGEST_ERROR = 0.1
"""Of a compiled network against itself uncompiled: bf16 rounding stays far below."""
SMOKE: dict[str, Any] = {
    "device": "cpu",
    "models": ["1.3b"],
    "sizes": ["96x64x17"],
    "patterns": ["dense", "vsa(sparsity=0.8)"],
    "tokens": 16,
    "repeats": 2,
    "compiler": "aot_eager",
    "budget_s": 45.0,
}  # fmt: skip


Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What one line of results is about; what its kind does not have is empty."""

    kind: str
    mode: str = "eager"
    size: str = ""
    model: str = ""
    pattern: str = ""
    backend: str = ""
    chunk: str = ""

    @property
    def name(self) -> str:
        """Its words, of which `--only` wants some."""
        words = (self.kind, self.model, self.size, self.pattern, self.backend, self.chunk)
        return " ".join(w for w in (*words, self.mode) if w)


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
        raise SystemExit(any(r["status"] not in ("ok", "not started") for r in records))


def parse_arguments() -> argparse.Namespace:
    """Read the command line; `--smoke` changes defaults, not what is given."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--cases", nargs="+", choices=KINDS, default=KINDS, help="kinds to run")
    p.add_argument("--only", nargs="+", default=[], help="words of names; --list shows them")
    p.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    p.add_argument("--models", nargs="+", choices=["1.3b", "14b"], default=["1.3b", "14b"])
    p.add_argument("--sizes", nargs="+", default=["832x480x81"], help="FastWan's: 832x448x61")
    patterns = ["dense", "vsa(sparsity=0.8)", "vsa(sparsity=0.9)"]
    p.add_argument("--patterns", nargs="+", default=patterns)
    p.add_argument("--backends", nargs="+", default=["auto"], help="of attention: names or all")
    p.add_argument("--modes", nargs="+", choices=["eager", "compile"], default=["eager", "compile"])
    p.add_argument("--chunks", nargs="+", default=["auto"], help="latent frames, or whole")
    p.add_argument("--device", default="cuda")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    p.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    p.add_argument("--tokens", type=int, default=512, help="of the prompt, none of them padding")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--stage-s", type=float, default=20, help="after these, three repeats will do")
    p.add_argument("--case-s", type=float, default=300, help="after these, a case is given up")
    p.add_argument("--budget-s", type=float, default=540, help="after these, no case is started")
    p.add_argument("--profile", default="", help="folder for a profiler's table of each case")
    p.add_argument("--out", default="", help="JSON lines file to append to")
    p.add_argument("--smoke", action="store_true", help="tiny networks on the CPU, in a minute")
    p.add_argument("--child", default="", help=argparse.SUPPRESS)
    if p.parse_known_args()[0].smoke:
        p.set_defaults(**SMOKE)
    return p.parse_args()


def plan(args: argparse.Namespace) -> Iterator[Case]:
    """Yield every case, cheap ones first."""
    yield Case("ceiling")
    yield from (Case("text", mode) for mode in args.modes)
    for size, chunk in itertools.product(args.sizes, args.chunks):
        yield Case("decode", size=size, chunk=chunk)
    is_all = "all" in args.backends  # one that does not serve a pattern says so in its record
    backends = registry.names("fastvideo.attention.backends") if is_all else args.backends
    for model, kind in itertools.product(args.models, ("denoise", "clip")):
        for rest in itertools.product(args.sizes, args.patterns, backends, args.modes):
            size, pattern, backend, mode = rest
            yield Case(kind, mode, size, model, pattern, backend)


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
    command = [sys.executable, *sys.argv, "--child", ",".join(map(str, left))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for _ in left:
            watch = threading.Timer(args.case_s, child.kill)
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
                reason = f"its process ended with {name}; after {args.case_s:g} s it is killed"
                yield {"status": "failed", "reason": reason}
                return
            if time.monotonic() >= deadline:
                child.kill()
                return


def keep(record: Record, case: Case, args: argparse.Namespace) -> Record:
    """Complete a record, append it to the file, tell that it is there."""
    whole = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "case": case.name,
        **record,
        "settings": vars(case) | {k: vars(args)[k] for k in ("steps", "tokens", "dtype", "smoke")},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    if args.out:
        with Path(args.out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole) + "\n")
    sys.stderr.write(f"{case.name}: {whole['status']} {whole.get('reason', '')}\n")
    return whole


def report(records: list[Record]) -> None:
    """Print a table in Markdown, a row for each stage."""
    print("| case | stage | s | range | compile s | TFLOP | dense | TFLOP/s | MFU | GiB | error |")
    print("|---" * 11 + "|")
    for r in records:
        for name, s in r.get("stages", {}).items():
            low_high = " - ".join(f"{x:.4g}" for x in s.get("range", []))
            row = [r["case"], name, f"{s['s']:.4g}", low_high, r.get("compile_s")]
            row += [s.get(k) for k in ("tflop", "dense_tflop", "tflop_per_s", "mfu")]
            row += [r["peak_gib"], r.get("error")]
            print("| " + " | ".join("" if x is None else str(x) for x in row) + " |")
        if r["status"] != "ok":
            print(f"| {r['case']} | {r['status']}: {r['reason']} |" + " |" * 9)


# One case


def run_case(case: Case, args: argparse.Namespace) -> Record:
    """Return what was measured, or why nothing was."""
    import torch  # late: the process that only waits needs none of it
    from _h200_cases import MEASURES
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    record: Record = {"status": "ok"}
    try:
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it goes on uncompiled
        forget_peak(args)
        with torch.no_grad():
            record |= MEASURES[case.kind](case, args)
        if record.get("error", 0) > LARGEST_ERROR:
            record |= {"status": "wrong", "reason": "compiled it differs from eager"}
    except Exception as error:  # whatever it is, the other cases go on
        words = str(error).strip() or "no message"
        record = {"status": "failed", "reason": f"{type(error).__name__}: {words.splitlines()[0]}"}
    gc.collect()
    try:
        record |= {"peak_gib": peak_gib(args), "machine": machine(args)}
    except RuntimeError as error:  # an illegal access poisons the whole context
        why = record.get("reason") or str(error).splitlines()[0]
        record = {"status": "GPU lost", "reason": why}
    if case.mode == "compile":
        breaks = {k.splitlines()[0]: n for k, n in counters["graph_break"].items()}
        record["compiler"] = {"name": args.compiler, **counters["stats"], "graph_breaks": breaks}
    return record


def forget_peak(args: argparse.Namespace) -> None:
    """Begin to measure the peak of memory anew."""
    import torch

    if args.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # not every Linux lets it: then of the whole process
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_gib(args: argparse.Namespace) -> float:
    """Return the most memory that tensors took on the GPU, or this process on the CPU."""
    import torch

    if args.device != "cpu":
        torch.cuda.synchronize()
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    status = Path("/proc/self/status").read_text(encoding="utf-8").split()
    return round(int(status[status.index("VmHWM:") + 1]) / 2**20, 2)


def machine(args: argparse.Namespace) -> Record:
    """Return the device as it is after the case, and the versions that matter."""
    import torch

    found: Record = {"python": platform.python_version(), "torch": torch.__version__}
    if args.device == "cpu":
        return found | {"device": platform.processor() or platform.machine()}
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    if shutil.which("nvidia-smi"):
        found[query] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    found |= {"cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda}
    return found | {
        "device": torch.cuda.get_device_name(),
        "triton": importlib.metadata.version("triton"),
    }


if __name__ == "__main__":
    main()
