"""One process, one device: all weights of all roles in one place."""

from __future__ import annotations

from fastvideo.parallel.degrees import ParallelConfig
from fastvideo_train.recipe import Recipe
from fastvideo_train.strategies._masters import Masters


class Strategy(Masters):
    """Trains in this process alone."""

    @classmethod
    def check(cls, recipe: Recipe, degrees: ParallelConfig) -> None:
        """Refuse more processes than one."""
        super().check(recipe, degrees)
        if degrees.world_size > 1:
            raise ValueError(
                f"run.strategy 'single' trains in one process, not {degrees.world_size}; use"
                " accelerate (whole weights everywhere), fsdp2 or deepspeed (parts of them)"
            )
