"""Distil a small decoder from a frozen VAE: L1, L2 and gradient L1 against true or decoded pixels.

True pixels are the better target: the VAE's own decode holds its errors, and costs a decode more.
They are there when clips are rendered while training; stored latents have the VAE's decode alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastvideo.config import Strict
from fastvideo.models.decoder import check_fits
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.shapes import Compression
from fastvideo_train.methods import Batch, StepKey, Update, Wants
from fastvideo_train.methods.vae import gradient_l1, to_unit
from fastvideo_train.recipe import Recipe
from fastvideo_train.roles import Role


class Config(Strict):
    """Weights of the two targets, and of the losses against each."""

    pixels: float = Field(default=1.0, ge=0, description="the clips themselves")
    teacher: float = Field(default=0.0, ge=0, description="what the VAE makes of the same latents")
    l1: float = Field(default=1.0, ge=0)
    l2: float = Field(default=0.5, ge=0)
    gradient: float = Field(default=0.3, ge=0)

    @model_validator(mode="after")
    def _has_a_target(self) -> Config:
        if not self.pixels and not self.teacher:
            raise ValueError("pixels and teacher are both 0; one of them must be the target")
        return self


class Method:
    """One phase: encode (or take) latents, decode them, compare."""

    wants: Mapping[str, Wants] = {
        "decoder": Wants("decoder", calls=("decode",), trainable=True),
        "vae": Wants("vae", calls=("encode", "decode"), trainable=False),
    }

    def __init__(self, config: Config) -> None:
        self.config = config

    def check(self, recipe: Recipe, degrees: ParallelConfig) -> None:
        """Accept every recipe."""

    def initialise(self, roles: Mapping[str, Role]) -> None:
        """Refuse a decoder that does not fit the VAE's latents; start a new one from grey."""
        vae, decoder = roles["vae"].net.config, roles["decoder"]
        strides = Compression(vae.temporal_stride, vae.spatial_stride)
        source = "of roles.decoder"
        check_fits(decoder.net.config, source=source, compression=strides, vae=asdict(vae))
        if decoder.is_new:
            decoder.family.init_for_training(decoder.net)

    def step(self, batch: Batch, roles: Mapping[str, Role], key: StepKey) -> Iterator[Update]:
        """Yield the loss. batch: "pixels" uint8 (B, 3, T, H, W), or normalised "latents"."""
        decoder = roles["decoder"]
        device = next(decoder.net.parameters()).device
        z, targets = self.targets(batch, roles["vae"], device)  # B C T' H' W'
        made = decoder.net.decode(z.to(decoder.dtype), clamp=False).float()  # B 3 T H W
        yield Update(("decoder",), *self.loss(made, targets))

    @torch.no_grad()
    def targets(
        self, batch: Batch, vae: Role, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return normalised latents, and the pixels to make of them: "pixels", "teacher" or both.

        Raises `ValueError` if the batch has no true pixels and they are asked for.
        """
        c, found = self.config, {}
        if "pixels" in batch:
            true = to_unit(batch["pixels"].to(device))
            raw = vae.net.encode(true.to(vae.dtype)).float()
            z = vae.net.normalize(raw)
            found["pixels"] = true
        else:
            z = batch["latents"].to(device)
            raw = vae.net.denormalize(z)
        if c.pixels and "pixels" not in found:
            raise ValueError(
                "stored latents have no true pixels; set method.args.pixels = 0 and"
                " method.args.teacher = 1, or data.name = 'clips'"
            )
        if c.teacher:
            found["teacher"] = vae.net.decode(raw.to(vae.dtype)).float()
        return z, {name: found[name] for name in found if getattr(c, name)}

    def loss(self, made: Tensor, targets: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss against the targets, and the PSNR to each in dB; all B 3 T H W."""
        c, total, numbers = self.config, made.new_zeros(()), dict[str, Tensor]()
        for name, target in targets.items():
            error = made - target
            l2 = error.square().mean()
            one = c.l1 * error.abs().mean() + c.l2 * l2 + c.gradient * gradient_l1(error)
            total = total + getattr(c, name) * one
            numbers[f"psnr/{name}"] = 10.0 * torch.log10(4.0 / l2.detach().clamp_min(1e-10))
        return total, numbers
