"""Data parallel by Hugging Face Accelerate: whole weights everywhere, gradients averaged.

Gradients are summed in float32 on each process, and averaged over all by `Accelerator.reduce` once
an update, so that a method may call its networks as often and in whatever order it likes.
"""

from __future__ import annotations

from typing import Any

from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.parallel.mesh import Meshes
from fastvideo_train.recipe import Recipe
from fastvideo_train.strategies._masters import Masters, Trained, change_flat


class Strategy(Masters):
    """Trains whole copies of all roles that stay equal."""

    def __init__(self, recipe: Recipe, meshes: Meshes | None = None) -> None:
        super().__init__(recipe, meshes)
        self.accelerator: Any = _accelerator(self.meshes)

    @classmethod
    def check(cls, recipe: Recipe, degrees: ParallelConfig) -> None:
        """Refuse weights in parts, and a missing package."""
        super().check(recipe, degrees)
        if degrees.shard > 1:
            raise ValueError(
                f"run.strategy 'accelerate' keeps whole weights, so parallel.shard {degrees.shard}"
                f" must be 1; use data = {degrees.data * degrees.shard}, or strategy fsdp2"
            )
        _package()

    def reduce(self, one: Trained) -> None:
        """Replace the sums of gradients by their means over all processes."""
        if self.accelerator.num_processes > 1:
            change_flat(
                list(one.grads.values()),
                lambda flat: self.accelerator.reduce(flat, reduction="mean"),
            )


def _package() -> Any:
    try:
        import accelerate
    except ModuleNotFoundError:
        raise ValueError(
            "run.strategy 'accelerate' needs the package accelerate; pip install -e '.[train]'"
        ) from None
    return accelerate


def _accelerator(meshes: Meshes) -> Any:
    accelerator = _package().Accelerator(cpu=meshes.device.type == "cpu")
    assert accelerator.num_processes == meshes.degrees.world_size, "one launcher started all"
    return accelerator
