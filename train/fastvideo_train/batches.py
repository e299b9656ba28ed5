"""From the recipe's `[data]` to the stream of micro-batches of a run."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, cast

from fastvideo_train.data import WHOLE, Part
from fastvideo_train.methods import Batch
from fastvideo_train.recipe import ClipsSpec, LatentsSpec, Recipe

Endless = Generator[Batch, None, None]


@contextmanager
def stream(recipe: Recipe, *, start: int, part: Part = WHOLE) -> Iterator[Iterator[Batch]]:
    """Yield an endless iterator over micro-batches `start`, `start + 1`, ...; then end its workers.

    Micro-batch i is the same in every life of the run, however many processes hold a `part` of it.
    Raises `ValueError` for illegal data.
    """
    batches = _open(recipe, start, part)
    is_on_cpu = recipe.run.device.partition(":")[0] == "cpu"
    with closing(batches if is_on_cpu else ahead(batches)) as chosen:
        yield chosen


def ahead(batches: Endless) -> Endless:
    """Make the next batch in a thread, while a GPU works on the last one.

    The source is closed with it, after the batch that is being made.
    """
    with closing(batches), ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches)
        while True:
            batch = coming.result()
            coming = thread.submit(next, batches)
            yield batch


def check(recipe: Recipe) -> None:
    """Raise `ValueError` for stored data that is unfinished or stale; no network is loaded."""
    if isinstance(recipe.data, LatentsSpec):
        from fastvideo_train.data.check import check as check_stored

        check_stored(recipe)


def _open(recipe: Recipe, start: int, part: Part) -> Endless:
    spec, run = recipe.data, recipe.run
    common: dict[str, Any] = {"seed": run.seed, "batch": run.batch, "start_step": start}
    common["part"] = part
    values: dict[str, Any] = spec.model_dump(exclude={"name", "text"})
    if isinstance(spec, ClipsSpec):
        from fastvideo_train.data.clips import ClipBatches

        return cast(Endless, ClipBatches(**values, **common).prefetch())
    if isinstance(spec, LatentsSpec):
        from fastvideo_train.data.latents import LatentBatches

        return cast(Endless, LatentBatches(**values, **common).prefetch())
    from fastvideo_train.data.synthetic import SyntheticBatches

    return cast(Endless, SyntheticBatches(**values, **common).prefetch())
