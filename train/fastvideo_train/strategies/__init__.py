"""Where parameters, gradients and optimizer states live, one file per way to place them.

A strategy module exports `Strategy`, built as `Strategy(recipe, meshes)`; `[run] strategy` names
the file. What it refuses it refuses in `check`, before a weight is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from fastvideo import registry
from fastvideo.parallel.degrees import ParallelConfig

if TYPE_CHECKING:
    from fastvideo_train.recipe import Recipe
    from fastvideo_train.roles import Role


class Strategy(Protocol):
    """Back-propagates, updates and saves the roles of a run, on all its processes alike."""

    @classmethod
    def check(cls, recipe: Recipe, degrees: ParallelConfig) -> None:
        """Raise `ValueError` for a recipe, or a number of processes, that this way cannot serve."""

    @property
    def first_device(self) -> str:
        """Where networks are built, before `prepare` moves them to where they compute.

        On "meta" it reads what they start from (`Role.unread`) itself.
        """

    def prepare(self, roles: Mapping[str, Role]) -> None:
        """Take over every role, once, before the first step."""

    def backward(self, roles: Sequence[str], loss: Tensor) -> None:
        """Add the gradients of `loss` / accumulate to the named roles, and to no other.

        loss: the mean over this process's part of a micro-batch.
        """

    def update(self, role: str, *, step: int) -> dict[str, float]:
        """Clip, step and zero one role; return numbers with its `grad_norm` before the clip."""

    def gather(self, role: str, *, averaged: bool = True) -> dict[str, Tensor]:
        """Return a role's whole float32 weights, averaged if there is an average."""

    def averaged(self) -> AbstractContextManager[Mapping[str, Role]]:
        """Yield the roles with whole networks whose learning ones compute with their average.

        Only the first process may call these networks.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return everything of the learning roles that the next step depends on."""

    def load_state_dict(self, state: Mapping[str, Any], *, source: str) -> None:
        """Restore `state_dict` bit for bit; raise `ValueError` if it belongs to other roles."""

    def save_more(self, folder: Path) -> None:
        """Write what `state_dict` does not hold, all processes together."""

    def load_more(self, folder: Path) -> None:
        """Restore what `save_more` wrote, after `load_state_dict`."""

    def close(self) -> None:
        """Drop the references to process groups that a package keeps, before processes part."""


def find(recipe: Recipe) -> Any:
    """Return the class that `[run] strategy` names; `ValueError` for an unknown name."""
    return registry.load("fastvideo_train.strategies", recipe.run.strategy, "Strategy")
