"""Train a text-to-video denoiser by flow matching, and its text encoder with it if that one learns.

Lipman et al. 2210.02747 with the logit-normal times of Esser et al. 2403.03206: draw a time, mix
clean latents with noise, regress the path's velocity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor

from fastvideo import flow
from fastvideo.shapes import LatentShape
from fastvideo_train.methods import Batch, StepKey, Update, Wants
from fastvideo_train.methods._text import Prompted, TextConfig
from fastvideo_train.roles import Role


class Config(TextConfig):
    """Times and text; dropped prompts become the negative one."""

    text_dropout: float = Field(default=0.1, ge=0, le=1)
    shift: float = Field(default=1.0, gt=0, description="above 1 draws noisier times")
    logit_mean: float = 0.0
    logit_std: float = Field(default=1.0, gt=0)


class Method(Prompted[Config]):
    """One phase: the velocity's squared error, for `student` and, if it learns, `text`."""

    wants: Mapping[str, Wants] = {
        "student": Wants("dit", trainable=True),
        "text": Wants("text", calls=()),
    }

    def step(self, batch: Batch, roles: Mapping[str, Role], key: StepKey) -> Iterator[Update]:
        """Yield the velocity loss of normalised latents (B, C, T, H, W) and their captions."""
        student = roles["student"]
        device = next(student.net.parameters()).device
        clean = batch["latents"].to(device)  # B C T H W
        noise = key.noise("flow/noise", tuple(clean.shape)).to(device)
        sigma_B1 = self.sigmas(key, clean.shape[0]).to(device)
        x = flow.mix(clean, noise, flow.per_frame(sigma_B1))
        text_BLC = self.encode(self.drop(batch["captions"], key), roles["text"])
        v = student.denoise(
            x.to(student.dtype),
            flow.timestep(sigma_B1),
            student.family.Conditioning(text_BLC.to(student.dtype)),
            **student.attend(
                LatentShape(*clean.shape[2:]),
                num_text_tokens=self.config.max_text_tokens,
                step=key.step,
            ),
            frame_T=batch["frame_T"].to(device),
        )
        error_B = (v.float() - flow.velocity(clean, noise)).square().flatten(1).mean(1)
        learning = tuple(name for name in ("student", "text") if roles[name].trainable)
        yield Update(learning, error_B.mean(), _by_noise(error_B.detach(), sigma_B1[:, 0]))

    def sigmas(self, key: StepKey, count: int) -> Tensor:
        """Draw times (count, 1): a logistic of a normal number, shifted towards noise."""
        c = self.config
        normal = key.noise("flow/time", (count, 1))
        return flow.shift(torch.sigmoid(c.logit_mean + c.logit_std * normal), c.shift)

    def drop(self, captions: list[str], key: StepKey) -> list[str]:
        """Replace a share of the captions by the negative prompt (Ho and Salimans 2207.12598)."""
        drawn = key.uniform("flow/dropout", (len(captions),)).tolist()
        negative, share = self.config.negative_prompt, self.config.text_dropout
        return [negative if u < share else c for c, u in zip(captions, drawn, strict=True)]


def _by_noise(error_B: Tensor, sigma_B: Tensor) -> dict[str, Tensor]:
    """Return the mean error of the clean and of the noisy half of the path, where there are any."""
    noisy = sigma_B > 0.5
    parts = {"mse_noisy": error_B[noisy], "mse_clean": error_B[~noisy]}
    return {name: part.mean() for name, part in parts.items() if part.numel()}
