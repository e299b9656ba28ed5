"""A small discriminator of tokens: one number for a clip, positive where it looks real.

    logit_B = net(features_BLC)

Each token is normalised and passes one layer, their mean two more. A new one answers 0 to
everything, so that nobody moves by its word before it has learned some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvideo.models import config_fields


@dataclass(frozen=True)
class TokensConfig:
    """`dim`: channels of the tokens; `width`: of the layers."""

    dim: int
    width: int = 128

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Read a config strictly; `ValueError` for unknown keys and illegal dims."""
        if "dim" not in values:
            raise ValueError("a discriminator of tokens needs dim, the channels of a token")
        made: Self = config_fields.read(cls, values)
        if min(made.dim, made.width) < 1:
            raise ValueError(f"dim {made.dim} and width {made.width} must be at least 1")
        return made


class TokenDiscriminator(nn.Module):
    """See the module; about 42,000 parameters for tokens of 192 channels."""

    def __init__(self, config: TokensConfig) -> None:
        super().__init__()
        self.config = config
        self.each = nn.Linear(config.dim, config.width)
        self.mean = nn.Linear(config.width, config.width)
        self.logit = nn.Linear(config.width, 1)
        with torch.no_grad():
            self.logit.weight.zero_()
            self.logit.bias.zero_()

    def forward(self, features_BLC: Tensor) -> Tensor:
        """Return a logit for each clip, (B,), in the weights' dtype."""
        x = F.layer_norm(features_BLC.float(), features_BLC.shape[-1:])  # B L C
        h = F.silu(self.each(x.to(self.each.weight.dtype)))  # B L W
        h = F.silu(self.mean(h.mean(1)))  # B W
        logit_B: Tensor = self.logit(h).squeeze(-1)  # B
        return logit_B


Config = TokensConfig
Discriminator = TokenDiscriminator
