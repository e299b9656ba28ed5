"""Dense attention against every sparse backend, in turn in one run, over sizes and sparsities.

Every round times dense SDPA and each backend at each sparsity once, in rotated order. A speed-up is
paired: dense seconds over the backend's of the same round, median with the range of the rounds.
`overhead` is the share of the coarse branch, the selection and the sum of the branches in a call,
`issued` the pairs of query and key that are multiplied over those that have to be. One JSON line a
size is appended to `--out`.

    python inference/bench/attention.py --grids 21x8x8 8x32x32 --repeats 5 --plot speedup.svg
"""

from __future__ import annotations

import argparse
import html
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo import registry, timing
from fastvideo.attention import Dense, Layout, Sta, Vsa, plan, sparse
from fastvideo.attention.choice import PACKAGE, Need
from fastvideo.attention.layout import Lists, Tiles
from fastvideo.shapes import TokenGrid

DENSE = "dense sdpa"
Record = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One way through the attention of a layer; `rest` is the call without its fine branch."""

    call: Callable[[], object]
    pairs: float
    rest: Callable[[], object] | None = None
    issued: float = 1.0
    backend: str = "sdpa"
    sparsity: float = 0.0


def main() -> None:
    """Run the comparison at each size, print the tables, append the JSON lines, draw the plot."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    records = [measure(TokenGrid(*grid), args) for grid in args.grids]
    for record in records if args.out else []:
        timing.append(args.out, record)
    if args.plot:
        Path(args.plot).write_text(draw(records, args.sparsity), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""

    def grid(words: str) -> tuple[int, ...]:
        sizes = tuple(int(x) for x in words.split("x"))
        if len(sizes) != 3:
            raise argparse.ArgumentTypeError(
                f"{words!r} must be like 21x8x8: frames x rows x columns"
            )
        return sizes

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = [(21, 8, 8), (21, 16, 16), (8, 32, 32), (21, 30, 52)]
    parser.add_argument("--grids", type=grid, nargs="+", default=default, help="in tokens")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    parser.add_argument("--windows", type=grid, nargs="*", default=[], help="of STA, in tiles")
    parser.add_argument("--tile", type=grid, default=(4, 4, 4))
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--backends", nargs="*", help="all that serve the call by default")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--training", action="store_true", help="with the backward pass")
    parser.add_argument("--note", default="", help="kept in the record: what else was running")
    parser.add_argument("--out", default="", help="JSON lines file to append to")
    parser.add_argument("--plot", default="", help="SVG file of speed-ups to write")
    return parser.parse_args()


def measure(grid: TokenGrid, args: argparse.Namespace) -> Record:
    """Time all variants at one size and print their table."""
    variants = build(grid, args)
    for variant in variants.values():  # warm-up: compilation, allocator, oneDNN primitives
        variant.call()
    names, rounds = list(variants), []
    for i in range(args.repeats):
        turn = timing.in_turn(names, i)
        rounds.append({name: timed(variants[name], args.device) for name in turn})
    record = timing.record(
        settings={**vars(args), "grids": None, "grid": [grid.frames, grid.height, grid.width]},
        tokens=grid.num_tokens,
        variants={n: summary(v, n, rounds, args.head_dim) for n, v in variants.items()},
        compile_s=compile_s(variants),
    )
    report(record)
    return record


def build(grid: TokenGrid, args: argparse.Namespace) -> dict[str, Variant]:
    """Return dense SDPA and each backend at each sparsity on the same random inputs."""
    generator = torch.Generator().manual_seed(0)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    shape = (1, grid.num_tokens, args.heads, args.head_dim)
    q, k, v, gate = (
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(args.training)
        for _ in range(4)
    )
    sdpa = registry.module(PACKAGE, "sdpa")
    dense = plan(Dense(), grid, device)
    pairs = float(args.heads * grid.num_tokens**2)
    found = {DENSE: Variant(run(lambda: sdpa.attend(q, k, v, dense), (q, k, v)), pairs)}
    for pattern in patterns(args):
        layout = plan(pattern, grid, device)
        assert layout.tiles is not None, "sparse patterns have tiles"
        lists = layout.lists or selected(q, k, v, layout)
        heads = args.heads // math.prod(lists.index_BHNK.shape[:2])  # windows may stand for all
        needed = heads * sparse.work(layout.tiles, lists)[1]
        is_vsa = isinstance(pattern, Vsa)
        weight = gate if is_vsa else None
        need = Need(layout, dtype, device, args.training, grid.num_tokens, args.head_dim)
        label = f"{pattern.sparsity:g}" if isinstance(pattern, Vsa) else f"sta {words(pattern)}"
        for name in usable(args.backends, need):
            backend: Any = registry.module(PACKAGE, name)
            ratio = vars(backend)["issued"](layout.tiles, lists)
            found[f"{name} {label}"] = Variant(
                call=attended(backend.fine, backend, layout, q, k, v, weight),
                rest=attended(lambda q, *_: q, backend, layout, q, k, v, gate) if is_vsa else None,
                pairs=ratio * needed,
                issued=ratio,
                backend=name,
                sparsity=pattern.sparsity if isinstance(pattern, Vsa) else 1 - needed / pairs,
            )
    return found


def words(pattern: Sta) -> str:
    """Name a window, in tiles."""
    return "x".join(map(str, pattern.windows[0]))


def patterns(args: argparse.Namespace) -> list[Vsa | Sta]:
    """Return the sparse patterns that are asked for."""
    windows = [Sta((window,), args.tile) for window in args.windows]
    return [*(Vsa(sparsity=p, tile=args.tile) for p in args.sparsity), *windows]


def usable(names: Sequence[str] | None, need: Need) -> list[str]:
    """Return the block-sparse backends that serve the call, of `names` if any; print why not."""
    every = [n for n in registry.names(PACKAGE) if has(registry.module(PACKAGE, n), "fine")]
    asked = names or [n for n in every if n != "reference" and not is_interpreted(n, need)]
    reasons = {n: registry.module(PACKAGE, n).unsupported(need) for n in asked}
    for name, reason in reasons.items():
        if reason:
            print(f"not {name}: {reason}")
    return [n for n in asked if not reasons[n]]


def has(module: Any, name: str) -> bool:
    """Tell whether a module defines `name`."""
    return name in vars(module)


def is_interpreted(name: str, need: Need) -> bool:
    """Tell whether a backend would run in an interpreter, which only tests want."""
    return name == "triton" and need.device.type != "cuda"


def selected(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Lists:
    """Return the lists that VSA selects for these tokens."""
    kept: list[Lists] = []

    def keep(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, tiles: Tiles, lists: Lists) -> Tensor:
        kept.append(lists)
        return q_BLHD

    with torch.no_grad():
        sparse.attend(keep, q, k, v, layout)
    return kept[0]


def attended(
    fine: Any, backend: Any, layout: Layout, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None
) -> Callable[[], object]:
    """Return a call of sparse attention with `fine` in it, and the backend's own means."""
    means = {"means": backend.means} if has(backend, "means") else {}
    leaves = (q, k, v) if gate is None else (q, k, v, gate)
    return run(lambda: sparse.attend(fine, q, k, v, layout, gate, **means), leaves)


def run(forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], object]:
    """Return the forward pass, with the backward pass after it if the leaves want gradients."""
    if not leaves[0].requires_grad:
        return torch.inference_mode()(forward)

    def both() -> object:
        out = forward()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return both


def timed(variant: Variant, device: str) -> tuple[float, float]:
    """Return the seconds of a call, and of the same without its fine branch."""

    def seconds(f: Callable[[], object]) -> float:
        settle(device)
        return timing.timed(lambda: settled(f, device))

    return seconds(variant.call), seconds(variant.rest) if variant.rest else 0.0


def settled(f: Callable[[], object], device: str) -> None:
    """Call and wait for the result."""
    f()
    settle(device)


def settle(device: str) -> None:
    """Wait for a GPU."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def summary(
    variant: Variant, name: str, rounds: Sequence[Mapping[str, tuple[float, float]]], head_dim: int
) -> Record:
    """Return a variant's medians, and its speed-up over dense, paired by round."""
    seconds = [r[name][0] for r in rounds]
    ratios = [r[DENSE][0] / r[name][0] for r in rounds]
    median = statistics.median(seconds)
    return {
        "backend": variant.backend,
        "sparsity": variant.sparsity,
        "seconds": round(median, 6),
        "seconds_range": [round(min(seconds), 6), round(max(seconds), 6)],
        "forward_tflops": round(4e-12 * variant.pairs * head_dim / median, 3),
        "overhead": round(statistics.median(r[name][1] / r[name][0] for r in rounds), 4),
        "issued": round(variant.issued, 4),
        "speedup": round(statistics.median(ratios), 3),
        "speedup_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def compile_s(variants: Mapping[str, Variant]) -> dict[str, float]:
    """Return the seconds that backends with a compiler needed for it."""
    modules = {v.backend: registry.module(PACKAGE, v.backend) for v in variants.values()}
    return {n: round(vars(m)["compile_s"](), 1) for n, m in modules.items() if has(m, "compile_s")}


def report(record: Record) -> None:
    """Print a record as a table in Markdown."""
    s = record["settings"]
    where = f"{s['threads']} threads" if s["device"] == "cpu" else record["machine"]["gpu"]
    what = "forward and backward" if s["training"] else "forward"
    print(
        f"\n{record['tokens']} tokens ({'x'.join(map(str, s['grid']))}), {s['heads']} heads of"
        f" {s['head_dim']}, tile {'x'.join(map(str, s['tile']))}, {s['dtype']}, {what}, {where};"
        f" compiled in {record['compile_s'] or 'no'} seconds\n"
    )
    print("| | seconds | range | speed-up | range | TFLOP/s | overhead | issued |")
    print("|---|---|---|---|---|---|---|---|")
    for name, v in record["variants"].items():
        (low, high), (worst, best) = v["seconds_range"], v["speedup_range"]
        rate = "" if s["training"] else f"{v['forward_tflops']:.2f}"
        print(
            f"| {name} | {v['seconds']:.4f} | {low:.4f} - {high:.4f} | {v['speedup']:.2f} |"
            f" {worst:.2f} - {best:.2f} | {rate} | {v['overhead']:.1%} | {v['issued']:.2f} |",
            flush=True,
        )


WIDTH, HEIGHT, MARGIN = 370, 220, 40
INK = "#57606a"
COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#8250df")


def draw(records: Sequence[Record], sparsities: Sequence[float]) -> str:
    """Return an SVG: a panel a sparsity, speed-up over dense by tokens, both axes logarithmic."""
    speedups = [v["speedup"] for record in records for v in record["variants"].values()]
    low, top = 2 ** math.floor(math.log2(min(speedups))), 2 ** math.ceil(math.log2(max(speedups)))
    panels = []
    for i, sparsity in enumerate(sparsities):
        lines: dict[str, list[tuple[int, float]]] = {}
        for record in sorted(records, key=lambda r: r["tokens"]):
            for v in record["variants"].values():
                if v["sparsity"] == sparsity and v["backend"] != "sdpa":
                    lines.setdefault(v["backend"], []).append((record["tokens"], v["speedup"]))
        inner = panel(sparsity, lines, low=low, top=max(top, 2 * low))
        panels.append(f'<g transform="translate({i * WIDTH},0)">{inner}</g>')
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    font = 'font-family="sans-serif" font-size="10"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>{"".join(panels)}</svg>\n'


def panel(
    sparsity: float, lines: Mapping[str, Sequence[tuple[int, float]]], *, low: float, top: float
) -> str:
    """Return one framed panel with a line a backend, for speed-ups of `low` to `top`."""
    tokens = sorted({x for points in lines.values() for x, _ in points})
    w, h = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    span = math.log(tokens[-1] / tokens[0]) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = MARGIN + w * math.log(x / tokens[0]) / span
        return across, MARGIN + h * math.log(top / y) / math.log(top / low)

    def text(x: float, y: float, words: str, anchor: str, colour: str = INK) -> str:
        words = html.escape(words)
        return (
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{words}</text>'
        )

    out = [text(MARGIN, MARGIN - 10, f"sparsity {sparsity:g}: speed-up over dense SDPA", "start")]
    out.append(
        f'<rect x="{MARGIN}" y="{MARGIN}" width="{w}" height="{h}" fill="none" stroke="{INK}"/>'
    )
    marks = [m for m in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if low <= m <= top]
    for mark in marks:
        y = place(tokens[0], mark)[1]
        dash = "" if mark == 1 else ' stroke-dasharray="2 3"'
        out.append(f'<path d="M{MARGIN} {y:.1f}h{w}" stroke="{INK}" stroke-width="0.5"{dash}/>')
        out.append(text(MARGIN - 3, y + 3, f"{mark:g}x", "end"))
    for count in tokens:
        out.append(text(place(count, low)[0], MARGIN + h + 12, f"{count:,}", "middle"))
    out.append(text(MARGIN + w / 2, MARGIN + h + 26, "tokens", "middle"))
    for i, ((name, points), colour) in enumerate(zip(lines.items(), COLOURS, strict=False)):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        out.append(text(MARGIN + 6, MARGIN + 14 + 12 * i, name, "start", colour))
    return "".join(out)


if __name__ == "__main__":
    main()
