"""A stage is a module with `NEEDS`, `GIVES` and `run(model, state)`; its name is its file's.

`run` is a generator of events that ends in `Done(state)`. Stages know each other only through
the fields of `State` that they name, so any of them may run in another process.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastvideo import registry

if TYPE_CHECKING:
    from fastvideo.model import Model
    from fastvideo_inference.events import Event
    from fastvideo_inference.state import State

PRESETS = {
    "text_to_video": ("encode_text", "prepare_latents", "denoise", "decode"),
    "text_to_latents": ("encode_text", "prepare_latents", "denoise"),
}
# What a fresh state holds.
INITIAL = ("plan",)


def check(stages: Sequence[str], *, initial: Sequence[str] = INITIAL) -> tuple[str, ...]:
    """Return the fields that a row of stages fills; `ValueError` tells where the wiring breaks."""
    have = list(initial)
    for name in stages:
        stage: Any = registry.module(__name__, name)
        missing = [field for field in stage.NEEDS if field not in have]
        if missing:
            row = " -> ".join(stages)
            raise ValueError(
                f"stage {name!r} needs {', '.join(missing)}, not given before it in {row}"
            )
        have += stage.GIVES
    return tuple(dict.fromkeys(have))


def run(stages: Sequence[str], model: Model, state: State) -> Iterator[Event]:
    """Run stages in a row; each `Done` carries the state so far, and the seconds it took."""
    from fastvideo_inference.events import Done

    for name in stages:
        stage: Any = registry.module(__name__, name)
        events = stage.run(model, state)
        seconds = 0.0
        while True:  # only the stage's own time counts, not what the consumer does between events
            started = time.perf_counter()
            event = next(events)
            if isinstance(event, Done):
                _finish(model)  # kernels that are still queued belong to this stage
            seconds += time.perf_counter() - started
            if isinstance(event, Done):
                break
            yield event
        state = dataclasses.replace(event.state, timings={**event.state.timings, name: seconds})
        yield Done(name, state)


def _finish(model: Model) -> None:
    if model.device.type == "cuda":
        import torch  # here, since this module is read before a request is known to be legal

        torch.cuda.synchronize(model.device)
