"""Train a video VAE to reconstruct: L1, L2 and gradient L1 in pixels, and a light KL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor

from fastvideo.config import Strict
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo_train.methods import Batch, StepKey, Update, Wants
from fastvideo_train.recipe import Recipe
from fastvideo_train.roles import Role


class Config(Strict):
    """Weights of the losses, and whether the encoder learns.

    Without `train_encoder` stored latents stay valid while the decoder learns.
    """

    train_encoder: bool = True
    l1: float = Field(default=1.0, ge=0)
    l2: float = Field(default=0.5, ge=0)
    gradient: float = Field(default=0.3, ge=0)
    kl: float = Field(default=3e-4, ge=0)


class Method:
    """One phase: encode, draw a latent, decode, compare."""

    wants: Mapping[str, Wants] = {
        "vae": Wants("vae", calls=("encode_moments", "decode"), trainable=True)
    }

    def __init__(self, config: Config) -> None:
        self.config = config

    def check(self, recipe: Recipe, degrees: ParallelConfig) -> None:
        """Accept every recipe."""

    def initialise(self, roles: Mapping[str, Role]) -> None:
        """Start new latents with a small variance, and freeze what the config says."""
        vae = roles["vae"]
        if vae.is_new:
            vae.family.init_for_training(vae.net)
        if not self.config.train_encoder:
            for part in (vae.net.encoder, vae.net.quant_conv):
                part.requires_grad_(False)

    def step(self, batch: Batch, roles: Mapping[str, Role], key: StepKey) -> Iterator[Update]:
        """Yield the reconstruction loss. batch["pixels"]: uint8 (B, 3, T, H, W)."""
        vae = roles["vae"]
        device = next(vae.net.parameters()).device
        target = to_unit(batch["pixels"].to(device))  # B 3 T H W, float32 in [-1, 1]
        mean, logvar = vae.net.encode_moments(target.to(vae.dtype))  # B C T' H' W'
        mean, logvar = mean.float(), logvar.float()
        noise = key.noise("vae/posterior", tuple(mean.shape)).to(mean.device)
        z = mean + (0.5 * logvar).exp() * noise
        decoded = vae.net.decode(z.to(vae.dtype), clamp=False).float()  # B 3 T H W
        yield Update(("vae",), *self.loss(decoded - target, mean, logvar))

    def loss(self, error: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts; error: decoded minus true pixels, B 3 T H W."""
        c = self.config
        l1, l2 = error.abs().mean(), error.square().mean()
        edges = gradient_l1(error)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        total = c.l1 * l1 + c.l2 * l2 + c.gradient * edges + c.kl * kl
        with torch.no_grad():
            psnr = 10.0 * torch.log10(4.0 / l2.clamp_min(1e-10))
        return total, {"psnr": psnr, "l1": l1.detach(), "kl": kl.detach()}


def gradient_l1(error: Tensor) -> Tensor:
    """Return the summed mean absolute differences of neighbours along x, y and t.

    The gradient of the error is the difference of both clips' gradients. An axis of one is skipped.
    """
    axes = [dim for dim in (2, 3, 4) if error.shape[dim] > 1]
    parts = [error.diff(dim=dim).abs().mean() for dim in axes]
    return torch.stack(parts).sum() if parts else error.new_zeros(())


def to_unit(pixels: Tensor) -> Tensor:
    """Turn uint8 pixels into float32 in [-1, 1]; leave floats, which already are, as they are."""
    return pixels.float().div_(127.5).sub_(1.0) if pixels.dtype == torch.uint8 else pixels.float()
