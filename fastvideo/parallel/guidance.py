"""Classifier-free guidance on two halves of the devices: each runs one forward, both get both.

velocity = guide(denoiser, meshes.axis("guidance"), scale=5.0, cond=cond, uncond=uncond)

For inference: what comes from the other half carries no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvideo import flow
from fastvideo.parallel.axis import Axis
from fastvideo.parallel.collectives import gather

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_BCTHW, t_BT) -> v_BCTHW


def guide(
    denoiser: Callable[..., Tensor], axis: Axis, *, scale: float, cond: Any, uncond: Any
) -> Velocity:
    """Bind the conditioning; the first of the axis' two runs `uncond`, the second `cond`.

    Returns v_uncond + scale (v_cond - v_uncond) in float32 (2207.12598), bit for bit what one
    process makes of two forwards, and the same on both. Gradients must be off when it is called.
    """
    assert axis.size == 2, f"guidance has two forwards, and {axis.name} has size {axis.size}"
    own = (uncond, cond)[axis.rank]

    def velocity(x_BCTHW: Tensor, t_BT: Tensor) -> Tensor:
        assert not torch.is_grad_enabled(), "the other half's velocity would carry no gradient"
        v_BCTHW = denoiser(x_BCTHW, t_BT, own)
        v_uncond, v_cond = gather(v_BCTHW[None], axis, dim=0, sizes=(1, 1))
        return flow.guided(v_uncond, v_cond, scale)

    return velocity
