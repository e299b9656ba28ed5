"""Attainment as one SVG: against the rate, and against the SLO scale."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT, _MARGIN = 340, 220, 40
_INK = "#57606a"
_COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#cf222e", "#57606a")
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)

Lines = Mapping[str, Sequence[tuple[float, float]]]


def svg(panels: Mapping[str, Lines], *, target: float) -> str:
    """Return panels side by side, each named by its x axis, with a dashed line at the target.

    Lines are named sequences of (x, share); a name has one colour in all panels.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    drawn = [
        f'<g transform="translate({i * _WIDTH},0)">{_panel(axis, lines, colours, target)}</g>'
        for i, (axis, lines) in enumerate(panels.items())
    ]
    legend = [
        _text(_MARGIN, _HEIGHT + 14 * i, name, "start", colours[name])
        for i, name in enumerate(names)
    ]
    height = _HEIGHT + 14 * len(names)
    size = f'width="{_WIDTH * len(panels)}" height="{height}"'
    font = 'font-family="sans-serif" font-size="11"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>'
    return f"{head}{''.join(drawn)}{''.join(legend)}</svg>\n"


def _panel(axis: str, lines: Lines, colours: Mapping[str, str], target: float) -> str:
    most = max((x for points in lines.values() for x, _ in points), default=0.0) or 1.0
    w, h = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN

    def place(x: float, share: float) -> tuple[float, float]:
        return _MARGIN + w * x / most, _MARGIN + h * (1 - share)

    out = [
        f'<rect x="{_MARGIN}" y="{_MARGIN}" width="{w}" height="{h}" fill="none" stroke="{_INK}"/>'
    ]
    for share in _TICKS:
        out.append(_text(_MARGIN - 4, place(0, share)[1] + 4, f"{share:.0%}", "end"))
    for x in (0.0, most / 2, most):
        out.append(_text(place(x, 0)[0], _HEIGHT - _MARGIN + 14, f"{x:.3g}", "middle"))
    y = place(0, target)[1]
    out.append(f'<path d="M{_MARGIN} {y:.1f}h{w}" stroke="{_INK}" stroke-dasharray="3 3"/>')
    for name, points in lines.items():
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in sorted(points)))
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="1.5"/>'
        )
    out.append(_text(_MARGIN + w / 2, _MARGIN - 10, f"attainment against {axis}", "middle"))
    return "".join(out)


def _text(x: float, y: float, words: str, anchor: str, colour: str = _INK) -> str:
    words = html.escape(words)
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{words}</text>'
