"""A whole training step, ours against a plain loop around diffusers' model: rates, MFU and memory.

Rows are steps of flow matching on one batch of random latents, with the same random text states and
first weights, none of them zero: forward, backward, clip, optimizer, average.

    diffusers    WanTransformer3DModel as its users write it: float32 weights under autocast to
                 bfloat16, torch's AdamW (fused), EMAModel, noise drawn where it computes
    ours         this package's loop, dense attention, AdamW alone: the row to compare
    ours, muon   with the recipe's Muon, if it has one
    ours, vsa    with the recipe's sparse attention and AdamW alone, if it has that

Before any timing each row takes three steps from the same noise. The first velocity has to be that
of diffusers, but for vsa, which sees fewer tokens; how far losses are apart is printed. Then rows
are timed in turn, and ratios are of the same round.

Operations are those of `fastvideo_train/flops.py`: a forward pass, twice that backward, and layers
once more under `run.recompute`, which the other loop then does too. Of VSA `executed` is what its
backend multiplies. MFU leaves out what is recomputed or filled up, over `--peak`. Tokens are those
of the latents, after patches. Memory is the peak of a step over what was there before the row: what
the allocator gave out on a GPU; all live tensors on a CPU, without what an operator holds inside.

    python train/bench/one_step.py --size 21 16 16 --batch 4 --out results-one-step.jsonl

On an H200, where it was not run yet; it needs accelerate and diffusers there:

    python train/bench/one_step.py configs/train/wan-1.3b/vsa.toml --device cuda --size 21 60 104 \
--batch 1 --threads 0 --warmup 2 --out results-one-step.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _one_step_rows import PEER, Case, Draws, Row
from alive import Alive
from fastvideo_train import recipe as recipes

from fastvideo import timing

RECIPE = "configs/train/nano/dit-image.toml"
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bf16, by the datasheets
FIRST_STEPS = 3
APART = {"bfloat16": 0.05, "float32": 1e-3}
"""How far first velocities may be apart, as a share of their size."""


def main() -> None:
    """Take the first steps, compare them, time the rows in turn; print the table, append a line."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    case = Case.of(recipes.load(args.recipe, sets=args.set, smoke=args.smoke), args)
    begun = {n: begin(make, case.draws, args.device) for n, make in case.rows(args.only).items()}
    apart = compared(begun, case.recipe.run.dtype)
    for one in begun.values():
        for _ in range(args.warmup):
            one.timed()
    names = list(begun)
    rounds = [{n: begun[n].timed() for n in timing.in_turn(names, i)} for i in range(args.repeats)]
    peak = peak_of(args)
    kept = ("recipe", "size", "batch", "device", "set", "smoke", "warmup")
    record = timing.record(
        settings={k: getattr(args, k) for k in kept} | case.facts(),
        peak=peak,
        rows={
            name: summary(name, one, rounds, case.num_tokens, peak["tflops"]) | apart.get(name, {})
            for name, one in begun.items()
        },
    )
    report(record)
    timing.append(args.out, record)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("recipe", nargs="?", default=RECIPE, help="of method flow_matching")
    p.add_argument("--size", type=int, nargs=3, default=[21, 16, 16], help="latent T H W")
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=2, help="0 leaves the number to torch")
    p.add_argument("--warmup", type=int, default=1, help=f"beside the {FIRST_STEPS} first steps")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--only", nargs="+", default=[], help="rows, such as diffusers ours")
    p.add_argument("--set", action="append", default=[], help="run.recompute=true; repeatable")
    p.add_argument("--smoke", action="store_true", help="the recipe's [smoke] table")
    p.add_argument("--peak", type=float, help="TFLOP/s; else the datasheet's, of a CPU measured")
    p.add_argument("--peak-side", type=int, default=4096, help="of the products that measure it")
    p.add_argument("--out", default="", help="JSON lines file to append to")
    return p.parse_args()


# First steps


@dataclass(frozen=True)
class Begun:
    """A row after its first steps: their losses, the first velocity, the peak of the others."""

    row: Row
    losses: list[float]
    velocity: np.ndarray
    peak_bytes: int

    def timed(self) -> float:
        """Return the seconds of a step, with all that it asked of its device."""
        return timing.timed(lambda: (self.row.step(), _wait()))


def begin(make: Callable[[], Row], draws: Draws, device: str) -> Begun:
    """Make a row and take its first steps, all with the same noise."""
    losses: list[float] = []
    seen: list[np.ndarray] = []

    def look(net: Any, inputs: Any, out: Any) -> None:
        v_BCTHW = out[0] if isinstance(out, tuple) else out
        seen.append(v_BCTHW.detach().float().cpu().numpy().copy())

    with OnHost() if device == "cpu" else OnGpu() as memory:
        row = make()
        hook = row.net.register_forward_hook(look)
        losses.append(row.step(draws))
        hook.remove()
        memory.forget()
        losses += [row.step(draws) for _ in range(FIRST_STEPS - 1)]
    return Begun(row, losses, seen[0], memory.peak)


class OnHost(Alive):
    """Bytes of the tensors that were made in the block and are alive."""

    def forget(self) -> None:
        """Begin to look for the peak."""
        self.peak = self.now


class OnGpu:
    """Bytes that the allocator gave out beyond those of before the block."""

    def __enter__(self) -> OnGpu:
        _wait()
        self._before = torch.cuda.memory_allocated()
        return self

    def forget(self) -> None:
        """Begin to look for the peak."""
        _wait()
        torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *_: object) -> None:
        _wait()
        self.peak = torch.cuda.max_memory_allocated() - self._before


def compared(begun: Mapping[str, Begun], dtype: str) -> dict[str, dict[str, float]]:
    """Return how far velocities and losses of dense rows are from diffusers'.

    Ends the run if they did not compute the same.
    """
    if PEER not in begun:
        return {}
    peer, found = begun[PEER], {}
    size = float(np.linalg.norm(peer.velocity))
    for name, one in begun.items():
        if name == PEER or not one.row.is_dense:
            continue
        off = float(np.linalg.norm(one.velocity - peer.velocity)) / size
        found[name] = {
            "velocity_apart": off,
            "first_loss_apart": abs(one.losses[0] / peer.losses[0] - 1),
        }
        if one.row.is_paired:
            pairs = zip(one.losses, peer.losses, strict=True)
            found[name]["losses_apart"] = max(abs(a / b - 1) for a, b in pairs)
        if not off <= APART[dtype]:
            raise SystemExit(f"{name} and diffusers do not compute the same: {found[name]}")
    return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Results


def peak_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the TFLOP/s that the device can do in bfloat16, and who says so."""
    if args.peak:
        return {"tflops": args.peak, "source": "--peak"}
    if args.device != "cpu":
        name = torch.cuda.get_device_name()
        known = next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)
        return {"tflops": known, "source": f"datasheet of {name}" if known else "unknown"}
    side = args.peak_side
    a, b = (torch.randn(side, side).bfloat16() for _ in range(2))
    best = min(timing.timed(lambda: a @ b) for _ in range(4))
    source = f"measured here, the best of four bfloat16 products of {side} x {side}"
    return {"tflops": _short(2 * side**3 / best / 1e12), "source": source}


def summary(
    name: str,
    one: Begun,
    rounds: Sequence[timing.Seconds],
    num_tokens: int,
    peak: float | None,
) -> dict[str, Any]:
    """Return a row's seconds, rates and memory, and diffusers' seconds over its own by round."""
    seconds, work, estimate = [r[name] for r in rounds], one.row.work, one.row.estimate
    median = statistics.median(seconds)
    result: dict[str, Any] = {
        "says": one.row.says,
        **timing.middle(seconds),
        "tokens_per_s": round(num_tokens / median, 1),
        "executed_tflop": _short(work.executed / 1e12),
        "executed_tflop_per_s": _short(work.executed / median / 1e12),
        "model_tflop": _short(work.model / 1e12),
        "mfu": _short(work.model / median / 1e12 / peak) if peak else None,
        "peak_mib": round(one.peak_bytes / 2**20, 1),
        "estimated_mib": None if estimate is None else round(estimate / 2**20, 1),
        "first_losses": one.losses,
    }
    if PEER in rounds[0]:
        result["diffusers_over_this"] = timing.ratio(rounds, PEER, over=name)
    return result


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def report(record: Mapping[str, Any]) -> None:
    """Print a record as a table in Markdown."""
    s, peak = record["settings"], record["peak"]
    print(
        f"\n{s['recipe']}: {s['batch']} clips of {s['tokens'] // s['batch']} tokens, {s['dtype']}"
    )
    print(f"peak {peak['tflops']} TFLOP/s: {peak['source']}")
    heads = ("row", "", "s a step", "tokens/s", "executed TFLOP/s", "MFU", "MiB", "estimated")
    print("| " + " | ".join([*heads, "diffusers over it", "velocity"]) + " |")
    print("|---" * 10 + "|")
    for name, r in record["rows"].items():
        low, high = r["range"]
        mfu = "" if r["mfu"] is None else f"{r['mfu']:.1%}"
        words = [name, r["says"], f"{r['s']:.3f} ({low:.3f} - {high:.3f})"]
        words += [f"{r['tokens_per_s']:.0f}", f"{r['executed_tflop_per_s']:.3g}", mfu]
        estimate, off = r["estimated_mib"], r.get("velocity_apart")
        words += [f"{r['peak_mib']:.0f}", "" if estimate is None else f"{estimate:.0f}"]
        words += [_ratio(r.get("diffusers_over_this")), "" if off is None else f"{off:.1e} apart"]
        print("| " + " | ".join(words) + " |")
    for name, r in record["rows"].items():
        losses = ", ".join(f"{loss:.5f}" for loss in r["first_losses"])
        apart = f"; {r['losses_apart']:.1e} apart" if "losses_apart" in r else ""
        print(f"first losses of {name}: {losses}{apart}")


def _ratio(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = found["range"]
    return f"{found['ratio']:.2f} ({low:.2f} - {high:.2f})"


if __name__ == "__main__":
    main()
