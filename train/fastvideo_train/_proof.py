"""Forwards by which an export compares what it read back with the live networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo import weights
from fastvideo.model import Model
from fastvideo.resolve import resolve
from fastvideo.sampling import GenerateRequest
from fastvideo.stages import encode_text, prepare_latents
from fastvideo.stages.denoise import with_attention


def rounded(live: Any, dtype: torch.dtype, keep: tuple[str, ...] = ()) -> Any:
    """Return a float32 copy of a network with the weights that storing it in `dtype` leaves."""
    other = copy.deepcopy(live)
    cast = weights.cast(other.state_dict(), dtype=dtype, keep_float32=keep)
    other.load_state_dict({name: tensor.float() for name, tensor in cast.items()})
    return other


def errors(
    forward: Callable[[Any], Tensor],
    live: nn.Module,
    stored: nn.Module,
    dtype: torch.dtype,
    keep: tuple[str, ...],
) -> tuple[float, float]:
    """Return the largest errors of the stored network: to the live one rounded, and as it is."""
    near = rounded(live, dtype, keep)
    with torch.no_grad():
        got, same, exact = (forward(net).double() for net in (stored, near, live))
    size = exact.abs().max().clamp_min(1e-12)
    return float((got - same).abs().max() / size), float((got - exact).abs().max() / size)


def text_forward(live: Model, net: nn.Module) -> Tensor:
    """Return a text encoder's states (1, L, C) of one prompt."""
    assert live.tokenizer is not None, "a bundle has one"
    ids_BL, mask_BL = live.tokenizer(["a prompt to compare"], live.spec.defaults.max_text_tokens)
    states: Tensor = net(ids_BL, mask_BL)
    return states


def dit_forward(live: Model, net: nn.Module) -> Tensor:
    """Return a denoiser's velocity (1, C, T, H, W) under the model's own attention.

    5x8x8 tokens are several tiles of a sparse pattern.
    """
    c = live.spec.compression
    height, width = c.pixel_multiple
    request = GenerateRequest(
        prompt="a prompt to compare",
        num_frames=1 + 4 * c.temporal,
        height=8 * height,
        width=8 * width,
    )
    noise = prepare_latents.draw(live, resolve(request, live.spec), seeds=[0])
    cond = encode_text.encode(live, [request.prompt])
    denoiser = with_attention(replace(live, dit=net), noise)
    return denoiser(noise, torch.full((1, 1), 500.0), cond)


def judge_forward(net: Any) -> Tensor:
    """Return a classifier's features (1, F) of a ramp."""
    count, side = net.config.frames, net.config.side
    ramp = torch.linspace(-1, 1, 3 * count * side * side)
    features: Tensor = net(ramp.reshape(1, 3, count, side, side)).features_BF
    return features


def decoder_forward(net: Any) -> Tensor:
    """Return a small decoder's pixels of a ramp."""
    z = torch.linspace(-2, 2, net.config.z_dim * 3 * 8 * 8)
    pixels: Tensor = net.decode(z.reshape(1, -1, 3, 8, 8))
    return pixels


def vae_forward(net: Any) -> Tensor:
    """Return a VAE's latents of a ramp and their pixels, joined."""
    c = net.config
    side = 8 * c.spatial_stride
    ramp = torch.linspace(-1, 1, 3 * (1 + c.temporal_stride) * side * side)
    z: Tensor = net.encode(ramp.reshape(1, 3, -1, side, side))
    pixels: Tensor = net.decode(z)
    return torch.cat([z.flatten(), pixels.flatten()])
