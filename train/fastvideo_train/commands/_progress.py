"""How far a long command is: a bar on a terminal, a line for every tenth elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft

Report = Callable[[int, int], None]


@contextmanager
def progress(verb: str) -> Iterator[Report]:
    """Yield `report(done, total)`; both forms say how much time is left."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeLeft())
    if not console.is_terminal:
        yield _Lines(console, verb)
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(verb)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Prints a line whenever another tenth is done."""

    def __init__(self, console: Console, verb: str) -> None:
        self.console, self.verb = console, verb
        self.due, self.first, self.began = 1, 0, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Note that `done` of `total` are done; the first call may follow a resume."""
        self.first = self.first or done
        if 10 * done < self.due * total:
            return
        self.due = 10 * done // total + 1
        took, made = time.monotonic() - self.began, done - self.first + 1
        left = timedelta(seconds=round(took / made * (total - done)))
        self.console.print(f"{self.verb}: {done} of {total}, {left} left", soft_wrap=True)
