"""The denoising loop: from noise to clean latents, one yielded step at a time.

velocity = guide(dit, scale=5.0, cond=cond, uncond=uncond)
for step in sample(velocity, scheduler, latents=noise, num_steps=50, seed=0, dtype=dit_dtype):
    ...  # show step.clean; stop iterating to cancel; keep step.state and step.x to resume
latents = step.x

Nothing here touches gradients or devices: callers that only render wrap it in `torch.no_grad`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from fastvideo import flow, rng
from fastvideo.errors import NotFiniteError
from fastvideo.schedulers import Grid, Scheduler

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_BCTHW, t_BT in 0..1000) -> v_BCTHW


class Conditioning(Protocol):
    """What a family's encoder stage makes and only its DiT opens."""

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join along the batch."""
        ...


C = TypeVar("C", bound=Conditioning)
C_contra = TypeVar("C_contra", contravariant=True)


class Denoiser(Protocol[C_contra]):
    """A model of the flow's velocity; every DiT is one, and so is whatever wraps it."""

    def __call__(
        self, x_BCTHW: Tensor, t_BT: Tensor, cond: C_contra, cache: Any = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Step:
    """What is known after evaluation `index` of `total`: float32 latents, all that a run needs.

    `x` is the latents at the next noise level (the result, after the last step), `clean` the
    model's estimate of the clean ones at this step, for previews. To resume, pass `latents=x`,
    `state=state` and `start=index + 1`.
    """

    index: int
    total: int
    x: Tensor
    clean: Tensor
    state: Any


def guide(
    denoiser: Denoiser[C], *, scale: float, cond: C, uncond: C | None = None, batched: bool = False
) -> Velocity:
    """Bind the conditioning, with classifier-free guidance unless `scale` is 1 (2207.12598).

    v = v_uncond + scale (v_cond - v_uncond), in float32. `batched` runs one forward of batch 2B,
    else two of batch B: the same result, more memory against fewer launches. Raises `ValueError`
    if `scale` needs an `uncond` that is not there.
    """
    if scale == 1:
        return lambda x, t: denoiser(x, t, cond)
    if uncond is None:
        raise ValueError(
            f"guidance_scale {scale} needs a negative prompt's conditioning; nearest: 1"
        )

    if not batched:
        return lambda x, t: flow.guided(denoiser(x, t, uncond), denoiser(x, t, cond), scale)
    both = cond.cat([uncond, cond])

    def twice(x: Tensor, t: Tensor) -> Tensor:
        v = denoiser(torch.cat([x, x]), torch.cat([t, t]), both)  # (2B, C, T, H, W)
        v_uncond, v_cond = v.chunk(2)
        return flow.guided(v_uncond, v_cond, scale)

    return twice


def sample(
    velocity: Velocity,
    scheduler: Scheduler[Any],
    *,
    latents: Tensor,
    num_steps: int,
    seed: int | Sequence[int] = 0,
    dtype: torch.dtype = torch.float32,
    start: int = 0,
    state: Any = None,
) -> Iterator[Step]:
    """Return an iterator over the steps `start`..`num_steps`-1; the last one's `x` is the result.

    `velocity` sees x (B, C, T, H, W) in `dtype` and t (B, 1) in float32; the scheduler's arithmetic
    is float32. `seed` is of use to schedulers that add noise: one for the batch (clip b gets seed +
    b) or one for each clip, so that a clip does not depend on its neighbours. Raises `ValueError`
    for a number of steps that the scheduler or `start` does not allow, before any evaluation, and
    `NotFiniteError` at the first step whose latents are not finite (on a GPU, one step later).
    """
    grid = scheduler.grid(num_steps)
    if not 0 <= start < num_steps:
        raise ValueError(f"start {start} must be a step of 0..{num_steps - 1}")
    state = scheduler.init(grid) if state is None else state
    seeds = rng.clip_seeds(seed, len(latents))
    return _steps(velocity, scheduler, grid, latents.float(), seeds, dtype, start, state)


def _steps(
    velocity: Velocity,
    scheduler: Scheduler[Any],
    grid: Grid,
    x: Tensor,
    seeds: tuple[int, ...],
    dtype: torch.dtype,
    start: int,
    state: Any,
) -> Iterator[Step]:
    sigmas, times = grid.sigmas.tolist(), _handed_over(grid.timesteps, x.device)
    flags: deque[tuple[int, Callable[[], bool]]] = deque()
    for i in range(start, grid.num_steps):
        t_BT = times[i].expand(len(x), 1)
        v = velocity(x.to(dtype), t_BT).to(x.dtype)  # (B, C, T, H, W)
        clean = flow.clean_from(x, v, sigmas[i])
        noise = None
        if scheduler.renoise and i + 1 < grid.num_steps:
            noise = rng.clip_noise(tuple(x.shape[1:]), seeds=seeds, purpose="renoise", step=i)
            noise = _handed_over(noise, x.device)
        state, x = scheduler.step(state, x, v, i, noise=noise)
        flags.append((i, _finite(x)))
        may_wait = not x.is_cuda or i + 1 == grid.num_steps
        while len(flags) > (0 if may_wait else 1):  # a GPU works on this step while we read
            index, is_finite = flags.popleft()
            if not is_finite():
                raise NotFiniteError(
                    f"latents are not finite after denoising step {index + 1} of {grid.num_steps}"
                )
        yield Step(i, grid.num_steps, x, clean, state)


def _finite(x: Tensor) -> Callable[[], bool]:
    """Ask whether all of x is finite; the answer waits for x alone, not for later work."""
    flag = x.isfinite().all()
    if not x.is_cuda:
        return lambda: flag.is_meta or bool(flag)
    on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
    on_host.copy_(flag, non_blocking=True)
    copied = torch.cuda.current_stream(x.device).record_event()

    def read() -> bool:
        copied.synchronize()
        return bool(on_host)

    return read


def _handed_over(x: Tensor, device: torch.device) -> Tensor:
    """Copy from the host without waiting for what a GPU is still doing."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)  # from other memory, the host would wait
