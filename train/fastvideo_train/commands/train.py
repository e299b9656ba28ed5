"""`fastvideo train RECIPE`: run a recipe to its last step, or until somebody says stop."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from fastvideo import env
from fastvideo.errors import INTERRUPTED, OK, refusing
from fastvideo_train import recipe as recipes
from fastvideo_train.commands._plan import plan
from fastvideo_train.lock import locked

if TYPE_CHECKING:
    from fastvideo.parallel.degrees import ParallelConfig
    from fastvideo_train.loop import Event, Job
    from fastvideo_train.recipe import Recipe
    from fastvideo_train.world import World

Show = Callable[["Event"], None]
_SHOWN_ANYWAY = ("loss", "samples_per_s", "elapsed_s")


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as configs/train/nano/vae.toml.")],
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Change one key: run.steps=100. Repeatable.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run lives; default runs/<name>.")
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--fresh",
            help="Demand a checkpoint, or set an old run aside. Default: continue if there is one.",
        ),
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Tiny networks and three steps: the [smoke] table.")
    ] = False,
    max_minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop with a checkpoint after this long.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, in how much memory, and stop.")
    ] = False,
) -> int:
    """Train a model from a recipe (TOML); Ctrl-C saves a checkpoint first."""
    with refusing():
        words = [*(sets or []), *([f"run.threads={threads}"] if threads else [])]
        parsed = recipes.load(recipe, sets=words, smoke=smoke)
        folder = run_dir or Path("runs") / (parsed.run.name + ("-smoke" if smoke else ""))
        if dry_run:
            plan(_placed(parsed) if parsed.run.device == "auto" else parsed, folder)
            return OK
        degrees = parsed.degrees(env.world_size())
        parsed = _placed(parsed)
    limit = math.inf if max_minutes is None else 60 * max_minutes
    with _joined(parsed, degrees) as world:
        with refusing():
            world.on_first(lambda: _settle(folder, resume))
        return _run(parsed, folder, world, max_seconds=limit)


def _placed(recipe: Recipe) -> Recipe:
    """Return the recipe with its device, of which "auto" is one; `ValueError` if it is not here."""
    from fastvideo.model import pick_device

    if env.world_size() > 1 and recipe.run.device != "auto":
        return recipe  # to try the first device here would cost each process a context on it
    run = recipe.run.model_copy(update={"device": str(pick_device(recipe.run.device))})
    return recipe.model_copy(update={"run": run})


@contextmanager
def _joined(recipe: Recipe, degrees: ParallelConfig) -> Iterator[World]:
    """Join the other processes of the run for the time of a block."""
    import torch

    from fastvideo.launched import init_distributed
    from fastvideo.parallel import mesh
    from fastvideo_train import strategies
    from fastvideo_train.world import World

    with ExitStack() as stack:
        with refusing():  # more processes than devices
            strategies.find(recipe)  # a package may keep the group that is there on its import
            own = stack.enter_context(init_distributed(torch.device(recipe.run.device)))
        yield World(mesh.build(degrees, own))


def _open(recipe: Recipe, folder: Path, world: World) -> Job:
    from fastvideo_train import budget, export, loop
    from fastvideo_train.validate import validator

    loop.check(recipe, world.meshes.degrees)
    budget.check(recipe, world.meshes.degrees)
    export.check(recipe)
    return loop.Job.open(recipe, folder, validate=validator(recipe, folder), world=world)


def _run(recipe: Recipe, folder: Path, world: World, *, max_seconds: float) -> int:
    """Open the job and train it; its networks are gone before the processes part."""
    with _lock(folder, world), _stop_signals(world.size) as stopped:
        with refusing():
            job = _open(recipe, folder, world)
        return _train(job, stopped, max_seconds=max_seconds)


def _train(job: Job, stopped: Callable[[], bool], *, max_seconds: float) -> int:
    from fastvideo_train.loop import train as run

    is_first = job.world.is_first
    if is_first:
        print(f"{job.folder}: step {job.step} of {job.recipe.run.steps}")
    with _display(job) if is_first else nullcontext(_ignore) as show:
        for event in run(job, stop=stopped, max_seconds=max_seconds):
            show(event)
    if job.step < job.recipe.run.steps and is_first:
        print(f"stopped at step {job.step}; the same command resumes there")
    (is_stopped,) = job.world.any(stopped())
    job.strategy.close()
    return INTERRUPTED if is_stopped else OK


def _settle(folder: Path, resume: bool | None) -> None:
    """Check what `--resume` demands; for `--fresh` set an old run aside under another name."""
    has_run = (folder / "checkpoints" / "latest").is_file()
    if resume and not has_run:
        raise ValueError(f"{folder} has no checkpoint to resume; leave --resume out to start there")
    if resume is False and folder.exists():
        with _locked(folder):
            pass  # nobody trains in it
        names = (folder.with_name(f"{folder.name}.old-{i}") for i in range(1, 10_000))
        aside = next(path for path in names if not path.exists())
        folder.rename(aside)
        print(f"the old run is now {aside}")
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _lock(folder: Path, world: World) -> Iterator[None]:
    """Refuse a folder that another run trains in, to all processes of this one."""
    with ExitStack() as stack:
        with refusing():
            world.on_first(lambda: stack.enter_context(_locked(folder)))
        yield


def _locked(folder: Path) -> AbstractContextManager[None]:
    """Refuse a folder that another process trains in; the lock ends with the process."""
    return locked(folder, "trains in", hint="stop it or use --run-dir")


@contextmanager
def _stop_signals(num_processes: int) -> Iterator[Callable[[], bool]]:
    """Let a first SIGINT or SIGTERM ask for a stop after the step; a second one ends at once.

    Of several processes, a second one comes from their launcher, which passes on what all got.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked and num_processes == 1:
            raise KeyboardInterrupt
        if not asked and env.rank() == 0:
            hint = " (once more to stop now)" if num_processes == 1 else ""
            sys.stderr.write(f"stopping after this step{hint}\n")
        asked.append(number)

    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _display(job: Job) -> Iterator[Show]:
    """Show a live line on a terminal, and a plain line every `log_every` steps elsewhere."""
    if not sys.stderr.isatty():
        yield _print_event
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True, highlight=False)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=job.recipe.run.steps, completed=job.step)

        def show(event: Event) -> None:
            from fastvideo_train.loop import StepDone

            if isinstance(event, StepDone):
                progress.update(
                    task, completed=event.step, description=_words(replace(event, metrics={}))
                )
            else:
                console.print(_words(event))

        yield show


def _ignore(event: Event) -> None:
    """Show nothing: the first process does."""


def _print_event(event: Event) -> None:
    from fastvideo_train.loop import StepDone

    if not isinstance(event, StepDone) or event.metrics:
        print(_words(event), flush=True)


def _words(event: Event) -> str:
    """Return one line about an event."""
    from fastvideo_train.loop import Saved, Validated

    if isinstance(event, Saved):
        return f"step {event.step}: saved {event.path}"
    if isinstance(event, Validated):
        return f"step {event.step}: validated, {_numbers(event.metrics) or 'without numbers'}"
    left = timedelta(seconds=round(event.seconds_left))
    extra = {k: v for k, v in event.metrics.items() if k not in _SHOWN_ANYWAY}
    speed = f"{event.samples_per_s:.2f} samples/s"
    line = f"step {event.step}: loss {event.loss:.4f}, {speed}, {left} left"
    return f"{line}, {_numbers(extra)}" if extra else line


def _numbers(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
