"""Flow-matching arithmetic: the straight path from clean latents z (sigma 0) to noise e (sigma 1).

x = (1 - sigma) z + sigma e and v = e - z (Lipman et al. 2210.02747; rectified flow 2209.03003).
Sigmas are plain numbers or tensors that broadcast against x; `per_frame` makes such a tensor.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000

Sigma = TypeVar("Sigma", float, Tensor)


def mix(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the point at `sigma` on the path: (1 - sigma) clean + sigma noise."""
    return (1 - sigma) * clean + sigma * noise


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """Return the path's constant velocity, the training target."""
    return noise - clean


def clean_from(x: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the clean end that x and its velocity point to: x - sigma v."""
    return x - sigma * v


def guided(v_uncond: Tensor, v_cond: Tensor, scale: float) -> Tensor:
    """Return v_uncond + scale (v_cond - v_uncond) in float32 (guidance, 2207.12598)."""
    base = v_uncond.float()
    return base + scale * (v_cond.float() - base)


def shift(u: Sigma, k: float) -> Sigma:
    """Shift a time u in [0, 1] towards noise: k u / (1 + (k - 1) u) (2403.03206, eq. 23)."""
    return k * u / (1 + (k - 1) * u)


def timestep(sigma: Sigma) -> Sigma:
    """Return the time that networks are given: 1000 sigma."""
    return NUM_TRAIN_TIMESTEPS * sigma


def per_frame(sigma_BT: Tensor) -> Tensor:
    """View sigmas (B, T) or (B, 1) so that they broadcast against latents (B, C, T, H, W)."""
    return sigma_BT[:, None, :, None, None]
