"""Draw training curves of runs as one SVG: a panel a run, from its `metrics.jsonl`, smoothed.

python train/bench/curves.py runs/nano-vae:psnr runs/nano-dit:loss -o curves.svg
"""

from __future__ import annotations

import argparse
import html
import json
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 260, 150, 34
INK, LINE = "#57606a", "#0969da"


def main() -> None:
    """Read the runs and write the SVG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="FOLDER:METRIC")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    panels = []
    for i, word in enumerate(args.runs):
        folder, _, metric = word.rpartition(":")
        points = smooth(read(Path(folder), metric))
        name = f"{Path(folder).name}: {metric}"
        panels.append(f'<g transform="translate({i * WIDTH},0)">{panel(name, points)}</g>')
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    font = 'font-family="sans-serif" font-size="10"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>{"".join(panels)}</svg>\n'
    args.output.write_text(svg, encoding="utf-8")


def read(folder: Path, metric: str) -> list[tuple[float, float]]:
    """Return (step, value) of the lines that have the metric."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    points = [(row["step"], row[metric]) for row in rows if metric in row]
    if not points:
        raise SystemExit(f"{folder}/metrics.jsonl has no {metric!r}; it has {sorted(rows[-1])}")
    return points


def smooth(points: list[tuple[float, float]], decay: float = 0.8) -> list[tuple[float, float]]:
    """Return running averages that start at the first value."""
    out, average = [], points[0][1]
    for step, value in points:
        average = decay * average + (1 - decay) * value
        out.append((step, average))
    return out


def panel(name: str, points: list[tuple[float, float]]) -> str:
    """Return one framed curve with its extremes written at the axes."""
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    w, h = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def place(step: float, value: float) -> str:
        x = MARGIN + w * (step - steps[0]) / max(1, steps[-1] - steps[0])
        y = MARGIN + h * (high - value) / max(1e-9, high - low)
        return f"{x:.1f},{y:.1f}"

    def text(x: float, y: float, words: str, anchor: str) -> str:
        return f'<text x="{x}" y="{y}" fill="{INK}" text-anchor="{anchor}">{words}</text>'

    path = " ".join(place(*p) for p in points)
    return (
        text(MARGIN, MARGIN - 10, html.escape(name), "start")
        + f'<rect x="{MARGIN}" y="{MARGIN}" width="{w}" height="{h}" fill="none" stroke="{INK}"/>'
        + f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.5"/>'
        + text(MARGIN - 3, MARGIN + 8, f"{high:.3g}", "end")
        + text(MARGIN - 3, MARGIN + h, f"{low:.3g}", "end")
        + text(MARGIN, MARGIN + h + 12, f"{steps[0]:g}", "start")
        + text(MARGIN + w, MARGIN + h + 12, f"step {steps[-1]:g}", "end")
    )


if __name__ == "__main__":
    main()
