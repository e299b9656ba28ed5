"""Where parameters, gradients and optimizer states live, one file per way to place them.

A strategy module exports `Strategy`, built as `Strategy(recipe)`; `[run] strategy` names the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from fastvideo_train.roles import Role


class Strategy(Protocol):
    """Back-propagates, updates and saves the roles of a run."""

    def prepare(self, roles: Mapping[str, Role]) -> None:
        """Take over every learning role, once, before the first step."""

    def backward(self, roles: Sequence[str], loss: Tensor) -> None:
        """Add the gradients of `loss` / accumulate to the named roles, and to no other."""

    def update(self, role: str, *, step: int) -> dict[str, float]:
        """Clip, step and zero one role; return numbers with its `grad_norm` before the clip."""

    def gather(self, role: str, *, averaged: bool = True) -> dict[str, Tensor]:
        """Return a role's whole float32 weights, averaged if there is an average."""

    def averaged(self) -> AbstractContextManager[None]:
        """Let every learning network compute with its average inside the block."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything of the learning roles that the next step depends on."""

    def load_state_dict(self, state: Mapping[str, Any], *, source: str) -> None:
        """Restore `state_dict` bit for bit; raise `ValueError` if it belongs to other roles."""
