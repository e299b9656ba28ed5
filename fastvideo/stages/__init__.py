"""The row of stages from prompts to frames; generation, evaluation, validation and servers run it.

state = State((params,))
for event in run(spec.stages, model, state): ...   # Progress, Notice, Preview, Chunk, Done

A stage is a module with `NEEDS`, `GIVES`, the `PARTS` of the model that it runs (a small decoder
runs in place of the VAE) and `run(model, state)`, an iterator of events that ends in `Done`; its
name is its file's. Stages know each other only through the fields of `State`, so any
of them may run in another process. Progress bars, streaming and cancellation are what the consumer
does with the iterator.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from fastvideo import registry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from fastvideo.model import Model
    from fastvideo.sampling import SamplingParams

    Frames = npt.NDArray[np.uint8]

_OWN = ("prompt", "negative_prompt", "seed")
"""What the requests of one state may differ in."""


@dataclass(frozen=True)
class State:
    """One or several requests on their way to frames; clip b is what request b gives alone.

    `cond` and `uncond` are the family's conditioning (`uncond` None without guidance), `noise` and
    `latents` float32 B C T H W normalised; `step` counts denoising steps that are done and `solver`
    is the scheduler's state after them; `frames` B T H W 3 uint8; `timings` seconds by stage;
    `previews` asks for a `Preview` after each step; `backends` names what computed "self" and
    "cross" attention; `notices` say in a line each what was asked for and is not done.
    """

    requests: tuple[SamplingParams, ...]
    cond: Any = None
    uncond: Any = None
    noise: Tensor | None = None
    latents: Tensor | None = None
    step: int = 0
    solver: Any = None
    frames: Frames | None = None
    timings: dict[str, float] = field(default_factory=dict)
    previews: bool = False
    backends: dict[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse requests that cannot share a batch."""
        first, *others = self.requests
        for other in others:
            own = {name: getattr(first, name) for name in _OWN}
            assert other.model_copy(update=own) == first, "the requests of a batch are alike"

    @property
    def params(self) -> SamplingParams:
        """The parameters that all requests share: all but prompt, negative prompt and seed."""
        return self.requests[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each clip."""
        return tuple(request.seed for request in self.requests)


@dataclass(frozen=True)
class Progress:
    """`index` of `total` units of a stage are done; a stage begins at 0 and ends at `total`.

    `state`, where there is one, is all that is needed to resume from here later or elsewhere.
    """

    stage: str
    index: int
    total: int
    state: State | None = None


@dataclass(frozen=True)
class Notice:
    """A line about something that was asked for and is not done, such as a prompt that was cut."""

    stage: str
    text: str


@dataclass(frozen=True)
class Preview:
    """What the clips look like so far: RGB of the clean estimate after step `index`.

    `frames` are B T h w 3 uint8 of at most 256 pixels a side, one for each latent frame.
    """

    stage: str
    index: int
    frames: Frames


@dataclass(frozen=True)
class Chunk:
    """Finished frames of clip `clip`, T H W 3 uint8; `start` is the index of the first."""

    stage: str
    start: int
    frames: Frames
    clip: int = 0


@dataclass(frozen=True)
class Done:
    """The end of a stage: its state, with what the stage gives filled in."""

    stage: str
    state: State


Event: TypeAlias = Progress | Notice | Preview | Chunk | Done


def check(stages: Sequence[str], *, initial: Sequence[str] = ("requests",)) -> tuple[str, ...]:
    """Return the fields that a row of stages fills; `ValueError` names a field that is missing."""
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


def run(stages: Sequence[str], model: Model, state: State) -> Generator[Event, None, None]:
    """Run stages in a row; each `Done` carries the state so far, and the seconds it took.

    From its first event to its end its LoRAs stay in the weights, if a stage runs the denoiser;
    others wait (`Loras.claim`).
    """
    from fastvideo.lora import uses_of  # late: this module is read before a request is legal

    denoises = any("dit" in registry.module(__name__, name).PARTS for name in stages)
    claim = model.loras.claim(model.dit, uses_of(state.params.lora if denoises else ()))
    try:
        yield from (Notice("request", text) for text in state.notices)
        for name in stages:
            stage: Any = registry.module(__name__, name)
            events = stage.run(model, state)
            seconds, notices = 0.0, list(state.notices)
            while True:
                started = time.perf_counter()  # a stage's own time, not its consumer's
                with model.loras.turn(claim):
                    event = next(events)
                if isinstance(event, Done):
                    _finish(model)  # kernels that are still queued belong to this stage
                seconds += time.perf_counter() - started
                if isinstance(event, Done):
                    break
                if isinstance(event, Notice):
                    notices.append(event.text)
                yield event
            timings = {**event.state.timings, name: seconds}
            state = dataclasses.replace(event.state, timings=timings, notices=tuple(notices))
            yield Done(name, state)
    finally:
        del claim  # a traceback would keep it with this frame


def make(model: Model, requests: Sequence[SamplingParams]) -> State:
    """Run the model's whole row for requests of one shape, and return the last state."""
    events = run(model.spec.stages, model, State(tuple(requests)))
    last = deque(events, maxlen=1).pop()  # a list would keep every step's state
    assert isinstance(last, Done), "stages end in Done"
    return last.state


def _finish(model: Model) -> None:
    if model.device.type == "cuda":
        import torch  # here, since this module is read before a request is known to be legal

        torch.cuda.synchronize(model.device)
