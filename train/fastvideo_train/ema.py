"""Exponential moving average of float32 weights, with a warm-up that forgets the first steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """An average of a role's masters; `decay` is reached after about 10 / (1 - decay) updates.

    The n-th update uses min(decay, (1 + n) / (10 + n)), so that early averages follow closely.
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.weights = {name: w.detach().clone() for name, w in masters.items()}

    def update(self, masters: Mapping[str, Tensor]) -> None:
        """Move the average towards `masters`."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        now = [masters[name].detach() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), now, 1.0 - decay)
        self.num_updates += 1

    def state_dict(self) -> dict[str, object]:
        """Return the average and its age."""
        return {"num_updates": self.num_updates, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Copy an average in, bit for bit."""
        weights, num_updates = state["weights"], state["num_updates"]
        assert isinstance(weights, Mapping) and isinstance(num_updates, int), (
            "written by state_dict"
        )
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])
        self.num_updates = num_updates
