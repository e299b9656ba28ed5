"""Distil a guided teacher into straight pieces: one jump of the student for each window of times.

After PeRFlow (Yan et al. 2405.07510): noise real latents to the start of a window, let the teacher
go to its end in several guided steps, and regress the student's one velocity on that jump.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastvideo import flow
from fastvideo.spec import Scheduler
from fastvideo_train.methods import Batch, StepKey, Update
from fastvideo_train.methods._distill import (
    Clips,
    Distillation,
    StudentConfig,
    at,
    between,
    solve,
)
from fastvideo_train.roles import Role


class Config(StudentConfig):
    """`sigmas` are where the windows start; the last one ends at 0.

    The teacher's steps are even in the time that `shift` shifts, so that the windows together are
    the teacher's own grid.
    """

    teacher_steps: int = Field(default=4, ge=1, description="of the teacher in each window")
    solver: Literal["unipc", "euler"] = "unipc"


class Method(Distillation[Config]):
    """One phase: the squared error of the student's velocity against the teacher's jump."""

    @property
    def sampler(self) -> Scheduler:
        """The student's own points, each jump from where the one before ended."""
        return self.config.sampler(renoise=False)

    def step(self, batch: Batch, roles: Mapping[str, Role], key: StepKey) -> Iterator[Update]:
        """Yield the jump's loss of normalised latents (B, C, T, H, W) and their captions."""
        student = roles["student"]
        clips = self.clips(batch, roles, key)
        index = (key.step + key.lane) % len(self.config.sigmas)
        start, stop = (*self.config.sigmas, 0.0)[index : index + 2]
        x = flow.mix(clips.clean, clips.noise("perflow/noise"), start)  # B C T H W
        with torch.no_grad():
            jump = (x - self.teach(clips, roles["teacher"], x, start, stop)) / (start - stop)
        v = clips.velocity(student)(x, at(start, x))
        loss = (v - jump).square().mean()
        yield Update(("student",), loss, {f"window{index}": loss.detach()})

    def teach(self, clips: Clips, teacher: Role, x: Tensor, start: float, stop: float) -> Tensor:
        """Return where the guided teacher takes x, from sigma `start` to `stop`."""
        c = self.config
        sigmas = between(start, stop, c.teacher_steps, shift=c.shift)
        return solve(clips.guided(teacher, c.guidance), x, sigmas, solver=c.solver)
