"""How `generate` tells what it does: a progress bar on a terminal, or JSON lines on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastvideo.stages import Event, Notice, Progress


class Report:
    """A listener to one batch; this one reports nothing: another process does."""

    def start(self, *, index: int, total: int, prompt: str, seed: int) -> None:
        """A clip begins."""

    def event(self, event: Event) -> None:
        """A stage said something."""

    def saved(self, path: str, *, seed: int, timings: dict[str, float]) -> None:
        """A clip is on disk."""

    def failed(self, prompt: str, message: str) -> None:
        """A clip went wrong: the next one follows, or the error of an only one is raised."""


class JsonReport(Report):
    """One JSON object a line on stdout."""

    def start(self, *, index: int, total: int, prompt: str, seed: int) -> None:
        self._line("start", index=index, total=total, prompt=prompt, seed=seed)

    def event(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._line("progress", stage=event.stage, index=event.index, total=event.total)
        if isinstance(event, Notice):
            self._line("notice", stage=event.stage, text=event.text)

    def saved(self, path: str, *, seed: int, timings: dict[str, float]) -> None:
        self._line("saved", path=path, seed=seed, timings=timings)

    def failed(self, prompt: str, message: str) -> None:
        self._line("failed", prompt=prompt, error=message)

    def _line(self, name: str, **values: Any) -> None:
        print(json.dumps({"event": name, **values}), flush=True)


class TextReport(Report):
    """Paths on stdout; on stderr a line a clip and, on a terminal, a bar for each stage."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}
        self._label = ""

    def start(self, *, index: int, total: int, prompt: str, seed: int) -> None:
        for task in self._tasks.values():
            self._progress.remove_task(task)
        self._tasks = {}
        self._label = f"[{index + 1}/{total}] " if total > 1 else ""

    def event(self, event: Event) -> None:
        if not isinstance(event, Progress):
            return
        if event.stage not in self._tasks:
            name = f"{self._label}{event.stage.replace('_', ' ')}"
            self._tasks[event.stage] = self._progress.add_task(name, total=event.total)
        self._progress.update(self._tasks[event.stage], completed=event.index)

    def saved(self, path: str, *, seed: int, timings: dict[str, float]) -> None:
        parts = ", ".join(f"{name.replace('_', ' ')} {s:.2f}" for name, s in timings.items())
        print(path, flush=True)
        self._say(f"seed {seed}, {sum(timings.values()):.2f} s ({parts})")

    def failed(self, prompt: str, message: str) -> None:
        if self._label:  # the error of a single clip is raised, and printed where that ends
            self._say(f"error: {prompt!r}: {message}")

    def _say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def reporting(*, as_json: bool, is_silent: bool = False) -> Iterator[Report]:
    """Open the listener that the user asked for; a silent one for a process that only follows."""
    if is_silent:
        yield Report()
        return
    if as_json:
        yield JsonReport()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    progress = Progress(
        *columns,
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        # Rich lifts prints above the bars; a path that goes to a pipe must stay on stdout.
        redirect_stdout=sys.stdout.isatty(),
    )
    with progress:
        yield TextReport(progress)
