"""Discrete consistency distillation: every point of the teacher's path leads to the same clip.

Song et al. 2303.01469 (algorithm 2) on the flow path: go one step of the guided teacher's grid, and
regress the student's clean estimate before it on its own estimate after it. The target is the
student itself without gradient, not an average (2310.14189, section 3.2), so that nothing beside
the student has to be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field

from fastvideo import flow
from fastvideo.spec import Scheduler
from fastvideo_train.methods import Batch, StepKey, Update
from fastvideo_train.methods._distill import Distillation, StudentConfig, at, between, wide
from fastvideo_train.roles import Role


class Config(StudentConfig):
    """`grid`: steps from noise to clean that neighbours are drawn from, even in the shifted time.

    `sigmas` are for sampling alone: a student of this kind may be asked at any point.
    """

    grid: int = Field(default=48, ge=2)


class Method(Distillation[Config]):
    """One phase: the squared difference of neighbours' clean estimates, the cleaner one fixed."""

    @property
    def sampler(self) -> Scheduler:
        """Each step leads to a clean clip, which is noised afresh for the next."""
        return self.config.sampler(renoise=True)

    def step(self, batch: Batch, roles: Mapping[str, Role], key: StepKey) -> Iterator[Update]:
        """Yield the loss of normalised latents (B, C, T, H, W) and their captions."""
        c, clips = self.config, self.clips(batch, roles, key)
        sigmas = torch.tensor(between(1.0, 0.0, c.grid, shift=c.shift), device=clips.clean.device)
        index_B = (key.uniform("consistency/time", (len(clips.clean),)) * c.grid).long()
        before_B, after_B = (sigmas[(index_B + i).to(sigmas.device)] for i in (0, 1))
        x = flow.mix(clips.clean, clips.noise("consistency/noise"), wide(before_B))  # B C T H W
        student = clips.velocity(roles["student"])
        with torch.no_grad():
            v = clips.guided(roles["teacher"], c.guidance)(x, at(before_B, x))
            y = x + wide(after_B - before_B) * v
            target = flow.clean_from(y, student(y, at(after_B, y)), wide(after_B))
        clean = flow.clean_from(x, student(x, at(before_B, x)), wide(before_B))
        yield Update(("student",), (clean - target).square().mean())
