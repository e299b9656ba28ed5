"""What the distillation methods share: calls of a role, the guided teacher, the student's sampler.

Guidance is stated one way only: v = v_uncond + S (v_cond - v_uncond), as in `sample.guide`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fastvideo import flow, sampling, schedulers
from fastvideo.sample import Denoiser, Velocity, guide
from fastvideo.schedulers import few_step
from fastvideo.shapes import LatentShape
from fastvideo.spec import Scheduler
from fastvideo_train.methods import Batch, StepKey, Wants
from fastvideo_train.methods._text import Prompted, TextConfig
from fastvideo_train.roles import Role

# Thirds of the teacher's grid under its shift of 5.
THIRDS = (1.0, 0.909091, 0.714286)


class StudentConfig(TextConfig):
    """The points that the student is made for, and the teacher's guidance and shift."""

    sigmas: tuple[float, ...] = THIRDS
    guidance: sampling.GuidanceScale = Field(
        default=4.0, description="S of vu + S (vc - vu); 1 is none"
    )
    shift: float = Field(
        default=5.0, gt=0, allow_inf_nan=False, description="the teacher's own, towards noise"
    )

    @field_validator("sigmas")
    @classmethod
    def _fall_from_noise(cls, sigmas: tuple[float, ...]) -> tuple[float, ...]:
        few_step.Scheduler(sigmas=sigmas)
        if sigmas[0] != 1.0:
            raise ValueError(f"sigmas {list(sigmas)} must begin at 1.0, where a clip is pure noise")
        return sigmas

    def sampler(self, *, renoise: bool) -> Scheduler:
        """Return the scheduler that a student of these points is sampled with."""
        return Scheduler(name="few_step", args={"sigmas": list(self.sigmas), "renoise": renoise})


@dataclass(frozen=True)
class Clips:
    """A micro-batch as the roles see it: its text, and keyword arguments of the denoiser.

    `frame_T` says which frames of a longer clip these are.
    """

    clean: Tensor  # B C T H W, normalised latents
    text_BLC: Tensor
    negative_BLC: Tensor
    frame_T: Tensor
    key: StepKey

    def noise(self, purpose: str) -> Tensor:
        """Draw noise shaped like the clips."""
        return self.key.noise(purpose, tuple(self.clean.shape)).to(self.clean.device)

    def velocity(self, role: Role) -> Velocity:
        """Return the role's float32 velocity under the captions alone."""
        return _float32(guide(self._denoiser(role), scale=1, cond=self._cond(role, self.text_BLC)))

    def guided(self, role: Role, scale: float) -> Velocity:
        """Return the role's float32 velocity with guidance, in one forward of twice the batch."""
        return _float32(
            guide(
                self._denoiser(role),
                scale=scale,
                cond=self._cond(role, self.text_BLC),
                uncond=self._cond(role, self.negative_BLC),
                batched=True,
            )
        )

    def features(self, role: Role, num_layers: int) -> Velocity:
        """Return what makes tokens (B, L, C) of latents and times: the role's first layers."""
        model_kwargs, cond = self._model_kwargs(role), self._cond(role, self.text_BLC)

        def call(x_BCTHW: Tensor, t_BT: Tensor) -> Tensor:
            x = x_BCTHW.to(role.dtype)
            out: Tensor = role.net.features(x, t_BT, cond, num_layers=num_layers, **model_kwargs)
            return out

        return call

    def _cond(self, role: Role, states_BLC: Tensor) -> Any:
        return role.family.Conditioning(states_BLC.to(role.dtype))

    def _model_kwargs(self, role: Role) -> dict[str, Any]:
        attend = role.attend(
            LatentShape(*self.clean.shape[2:]),
            num_text_tokens=self.text_BLC.shape[1],
            step=self.key.step,
        )
        return {**attend, "frame_T": self.frame_T}

    def _denoiser(self, role: Role) -> Denoiser[Any]:
        model_kwargs = self._model_kwargs(role)

        def call(x_BCTHW: Tensor, t_BT: Tensor, cond: Any, cache: Any = None) -> Tensor:
            x = x_BCTHW.to(role.dtype)
            out: Tensor = role.denoise(x, t_BT, cond, **model_kwargs)
            return out

        return call


S = TypeVar("S", bound=StudentConfig)


class Distillation(Prompted[S]):
    """The part of a method that knows batches of latents and captions."""

    wants: Mapping[str, Wants] = {
        "student": Wants("dit", trainable=True),
        "teacher": Wants("dit", trainable=False),
        "text": Wants("text", calls=(), trainable=False),
    }

    def initialise(self, roles: Mapping[str, Role]) -> None:
        """Refuse denoisers that do not see the same latents and text states."""
        super().initialise(roles)
        width = roles["text"].net.config.d_model
        first = roles["student"].net.config.in_channels
        for role in (r for r in roles.values() if r.kind == "dit"):
            c = role.net.config
            if {c.in_channels, c.out_channels} != {first}:
                raise ValueError(
                    f"roles.{role.name} has {c.in_channels} channels in and {c.out_channels} out;"
                    f" the latents of roles.student have {first}"
                )
            if c.text_dim != width:
                raise ValueError(
                    f"roles.{role.name} has text_dim {c.text_dim}; the states of roles.text have"
                    f" {width} channels"
                )

    def clips(self, batch: Batch, roles: Mapping[str, Role], key: StepKey) -> Clips:
        """Encode the captions once for all roles of a micro-batch."""
        text, captions = roles["text"], batch["captions"]
        negative_1LC = self.encode([self.config.negative_prompt], text)
        device = negative_1LC.device
        return Clips(
            clean=batch["latents"].to(device),
            text_BLC=self.encode(captions, text),
            negative_BLC=negative_1LC.expand(len(captions), -1, -1),
            frame_T=batch["frame_T"].to(device),
            key=key,
        )


def _float32(velocity: Velocity) -> Velocity:
    return lambda x_BCTHW, t_BT: velocity(x_BCTHW, t_BT).float()


def at(sigma: float | Tensor, like_BCTHW: Tensor) -> Tensor:
    """Return the timesteps (B, 1), 1000 sigma, for one sigma or one a clip."""
    sigma_B = torch.as_tensor(sigma, dtype=torch.float32, device=like_BCTHW.device)
    return flow.timestep(sigma_B.expand(len(like_BCTHW))[:, None])


def wide(value_B: Tensor) -> Tensor:
    """View numbers of clips so that they broadcast against latents (B, C, T, H, W)."""
    return flow.per_frame(value_B[:, None])


def solve(velocity: Velocity, x_BCTHW: Tensor, sigmas: Sequence[float], *, solver: str) -> Tensor:
    """Carry x along a velocity from the first to the last of falling sigmas.

    solver: a scheduler's name; its step is taken on these sigmas instead of its own grid.
    """
    scheduler = schedulers.create(solver, {})
    grid = schedulers.part_grid(sigmas)
    state, x = scheduler.init(grid), x_BCTHW
    for i, sigma in enumerate(grid.sigmas[:-1].tolist()):
        state, x = scheduler.step(state, x, velocity(x, at(sigma, x)), i)
    return x


def between(start: float, stop: float, count: int, *, shift: float) -> list[float]:
    """Return `count` + 1 sigmas from `start` to `stop`, even in the time that `shift` shifts."""
    first, last = (flow.shift(sigma, 1 / shift) for sigma in (start, stop))
    inner = [flow.shift(first + (last - first) * i / count, shift) for i in range(1, count)]
    return [start, *inner, stop]
