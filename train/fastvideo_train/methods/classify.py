"""Train a classifier of a world's clips: cross-entropy on every attribute, and a sketch to redraw.

The clips are gently blurred and made noisy, because what the classifier will look at has passed
through a VAE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fastvideo.config import Strict
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo_train.methods import Batch, StepKey, Update, Wants
from fastvideo_train.recipe import Recipe
from fastvideo_train.roles import Role


class Config(Strict):
    """The weight of the sketch beside the labels, and the strongest disturbances of a clip."""

    sketch: float = Field(default=1.0, ge=0)
    blur: float = Field(default=0.5, ge=0, le=1, description="share of a 3x3 mean at most")
    noise: float = Field(default=0.03, ge=0, description="standard deviation at most, of [-1, 1]")


class Method:
    """One phase: disturb, judge, compare with the truth."""

    wants: Mapping[str, Wants] = {"classifier": Wants("classifier", trainable=True)}

    def __init__(self, config: Config) -> None:
        self.config = config

    def check(self, recipe: Recipe, degrees: ParallelConfig) -> None:
        """Accept every recipe."""

    def initialise(self, roles: Mapping[str, Role]) -> None:
        """Leave fresh weights as torch draws them."""

    def step(self, batch: Batch, roles: Mapping[str, Role], key: StepKey) -> Iterator[Update]:
        """Yield the loss. batch: "pixels" uint8 (B, 3, T, H, W), and "truths" of the clips."""
        role = roles["classifier"]
        device = next(role.net.parameters()).device
        clean = role.net.resample(batch["pixels"].to(device))  # B 3 T S S
        judged = role.net(self.disturb(clean, key).to(role.dtype))
        targets = role.net.targets(batch["truths"])
        yield Update(("classifier",), *self.loss(judged, targets, role.net.target(clean)))

    def disturb(self, clean_BCTHW: Tensor, key: StepKey) -> Tensor:
        """Blur each clip and add noise to it, each by a share drawn for the clip."""
        x, count = clean_BCTHW, len(clean_BCTHW)
        share = key.uniform("classify/disturb", (count, 2, 1, 1, 1, 1))
        blur, noise = share.to(x.device).unbind(1)
        soft = F.avg_pool3d(x, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
        grain = key.noise("classify/noise", tuple(x.shape)).to(x.device)
        disturbed: Tensor = (
            x.lerp(soft, self.config.blur * blur) + self.config.noise * noise * grain
        )
        return disturbed

    def loss(
        self, judged: Any, targets: Mapping[str, Tensor], sketch_BCTHW: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and how many labels were right."""
        parts, right = [], {}
        for name, logits in judged.logits.items():
            target = targets[name].to(logits.device)
            parts.append(F.cross_entropy(logits.float(), target))
            right[f"right/{name}"] = (logits.argmax(1) == target).float().mean()
        sketch = F.mse_loss(judged.sketch_BCTHW.float(), sketch_BCTHW)
        total = torch.stack(parts).mean() + self.config.sketch * sketch
        return total, {"sketch": sketch.detach(), **right}
