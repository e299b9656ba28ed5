"""Distribution matching distillation, DMD2: few steps whose clips the teacher finds likely.

Yin et al. 2405.14867 on the flow path. The student moves against the difference of two scores of
its own noised clips: the guided teacher's, and that of a critic that learns the student's clips.

Every step trains the critic; every `student_every`-th (the 5th, 10th, ... of 5) the student first.

    student   0.5 |x0 - stop(x0 - g)|^2 + gan softplus(-D(x0_s))          g of `direction`
    critic    |F(x0_s) - (e - x0)|^2 + gan_critic (softplus(-D(z_s)) + softplus(D(x0_s)))

all means, z the batch's own clips; D, of `_gan.py`, there only if `gan` is not 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastvideo import flow
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.schedulers import few_step
from fastvideo.spec import Scheduler
from fastvideo_train.methods import Batch, StepKey, Update, Wants
from fastvideo_train.methods._distill import Clips, Distillation, StudentConfig, at, wide
from fastvideo_train.methods._gan import Gan
from fastvideo_train.recipe import Recipe
from fastvideo_train.roles import Role


class Config(StudentConfig):
    """How the student's clips come about, and where the scores are compared.

    rollout: `data` noises real latents to one of `sigmas` and takes one step (FastWan); `simulated`
        starts from noise and takes the sampler's own steps up to a drawn one (DMD2, section 4.5).
    renoise: the student is sampled, and simulated, with fresh noise between its steps.
    shift: of the times at which the scores are compared, which are then held within `times`.
    floor: least value of the normaliser, each clip's mean distance to the teacher's estimate.
    gan, gan_critic: weights of the GAN term in the student's and the critic's loss (those of DMD2's
        SDXL are 5e-3 and 1e-2); a `gan` of 0 has no such term, and no role `discriminator`.
    gan_layers: how many of the critic's layers make its features; half of them unless given.
    """

    rollout: Literal["data", "simulated"] = "data"
    renoise: bool = True
    student_every: int = Field(default=5, ge=1)
    times: tuple[float, float] = (0.02, 0.98)
    floor: float = Field(default=1e-5, gt=0)
    gan: float = Field(default=0.0, ge=0)
    gan_critic: float = Field(default=1e-2, gt=0)
    gan_layers: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _times_rise(self) -> Config:
        low, high = self.times
        if not 0 < low < high <= 1:
            raise ValueError(f"times {list(self.times)} must rise within (0, 1]")
        return self


class Method(Distillation[Config]):
    """Two phases: the student every `student_every`-th step, and the critic in each."""

    wants: Mapping[str, Wants] = {
        "student": Wants("dit", trainable=True),
        "teacher": Wants("dit", trainable=False),
        "critic": Wants("dit", trainable=True),
        "text": Wants("text", calls=(), trainable=False),
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gan = Gan(config.gan_layers) if config.gan else None
        if self.gan is not None:
            critic = Wants("dit", calls=("forward", "features"), trainable=True)
            judge = Wants("discriminator", trainable=True)
            self.wants = {**self.wants, "critic": critic, "discriminator": judge}

    def check(self, recipe: Recipe, degrees: ParallelConfig) -> None:
        """Refuse a run in which the student would never move, and a GAN term of cut sequences."""
        steps, every = recipe.run.steps, self.config.student_every
        if steps < every:
            raise ValueError(
                f"run.steps {steps} is less than method.args.student_every {every}, so the student"
                f" of {recipe.run.name} would never learn; nearest: {every}"
            )
        if self.gan is None and "discriminator" in recipe.roles:
            raise ValueError(
                "method.args.gan 0 needs no roles.discriminator; leave it out, or set gan, 5e-3 say"
            )
        if self.gan is not None and degrees.of("sequence") > 1:
            raise ValueError(
                f"method.args.gan {self.config.gan} reads whole sequences, so parallel.ring"
                f" {degrees.ring} and ulysses {degrees.ulysses} must be 1; use data or shard"
            )

    def initialise(self, roles: Mapping[str, Role]) -> None:
        """Keep the weights; refuse a tokenizer or a discriminator that does not fit."""
        super().initialise(roles)
        if self.gan is not None:
            self.gan.check(roles)

    @property
    def sampler(self) -> Scheduler:
        """The student's own steps."""
        return self.config.sampler(renoise=self.config.renoise)

    def step(self, batch: Batch, roles: Mapping[str, Role], key: StepKey) -> Iterator[Update]:
        """Yield the student's loss if it is its turn, then the critic's on a new rollout."""
        clips = self.clips(batch, roles, key)
        if (key.step + 1) % self.config.student_every == 0:
            x0 = self.rollout(clips, roles["student"], "student")  # B C T H W
            loss, numbers = self.student_loss(clips, roles, x0)
            if self.gan is not None:
                sigma_B = self.score_times(clips, "student/gan")
                term = self.gan.student_loss(clips, roles, x0, sigma_B)
                loss = loss + self.config.gan * term
                numbers["student/gan"] = term.detach()
            yield Update(("student",), loss, numbers)
        with torch.no_grad():
            x0 = self.rollout(clips, roles["student"], "critic")
        loss = self.critic_loss(clips, roles["critic"], x0)
        if self.gan is None:
            yield Update(("critic",), loss)
            return
        term = self.gan.critic_loss(clips, roles, x0, self.score_times(clips, "critic/gan"))
        loss = loss + self.config.gan_critic * term
        yield Update(("critic", "discriminator"), loss, {"critic/gan": term.detach()})

    def student_loss(
        self, clips: Clips, roles: Mapping[str, Role], x0: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss whose gradient by `x0` is the normalised difference of scores / size.

        A score that is not finite makes the loss so too, and the loop stops.
        """
        with torch.no_grad():
            g = self.direction(clips, roles, x0.detach())
        loss = 0.5 * (x0 - (x0.detach() - g)).square().mean()
        return loss, {"student/direction": g.abs().mean()}

    def direction(self, clips: Clips, roles: Mapping[str, Role], x0: Tensor) -> Tensor:
        """Return (fake - real) / mean |x0 - real| for each clip (2311.18828, eq. 7 and 8).

        fake, real: what critic and guided teacher make of noised x0, in float64.
        """
        sigma_B = self.score_times(clips, "student")
        x = flow.mix(x0, clips.noise("dmd/student/score"), wide(sigma_B))
        t = at(sigma_B, x)
        fake = _clean(x, clips.velocity(roles["critic"])(x, t), sigma_B)
        real = _clean(x, clips.guided(roles["teacher"], self.config.guidance)(x, t), sigma_B)
        size_B = (x0.double() - real).abs().flatten(1).mean(1)
        return ((fake - real) / wide(size_B.clamp_min(self.config.floor))).float()

    def critic_loss(self, clips: Clips, critic: Role, x0: Tensor) -> Tensor:
        """Return the critic's flow-matching loss on the student's clips."""
        sigma_B = self.score_times(clips, "critic")
        noise = clips.noise("dmd/critic/score")
        x = flow.mix(x0, noise, wide(sigma_B))
        v = clips.velocity(critic)(x, at(sigma_B, x))
        return (v - flow.velocity(x0, noise)).square().mean()

    def score_times(self, clips: Clips, phase: str) -> Tensor:
        """Draw sigmas (B,): an even 0..999 in 1000, shifted, then held within the limits."""
        drawn = clips.key.uniform(f"dmd/{phase}/time", (len(clips.clean),))
        u_B = (drawn * flow.NUM_TRAIN_TIMESTEPS).floor() / flow.NUM_TRAIN_TIMESTEPS
        return flow.shift(u_B, self.config.shift).clamp(*self.config.times).to(clips.clean.device)

    def rollout(self, clips: Clips, student: Role, phase: str) -> Tensor:
        """Return clips (B, C, T, H, W) of the student, with the gradient of its last forward."""
        if self.config.rollout == "simulated":
            return self._simulated(clips, student, f"dmd/{phase}")
        sigmas = torch.tensor(self.config.sigmas)
        drawn = clips.key.uniform(f"dmd/{phase}/step", (len(clips.clean),))
        sigma_B = sigmas[(drawn * len(sigmas)).long()].to(clips.clean.device)
        x = flow.mix(clips.clean, clips.noise(f"dmd/{phase}/start"), wide(sigma_B))
        return _clean(x, clips.velocity(student)(x, at(sigma_B, x)), sigma_B).float()

    def _simulated(self, clips: Clips, student: Role, purpose: str) -> Tensor:
        """Sample from noise up to a drawn step, and do no more; all lanes of a step draw the same.

        So ranks do equal work, and micro-batches add up to what one large batch would give.
        """
        scheduler = few_step.Scheduler(self.config.sigmas, renoise=self.config.renoise)
        last = int(clips.key.shared(f"{purpose}/exit") * len(self.config.sigmas))
        grid = scheduler.grid(len(self.config.sigmas))
        state, velocity = scheduler.init(grid), clips.velocity(student)
        x = clips.noise(f"{purpose}/start")
        for i, sigma in enumerate(self.config.sigmas[:last]):
            noise = clips.noise(f"{purpose}/renoise{i}") if self.config.renoise else None
            with torch.no_grad():
                state, x = scheduler.step(state, x, velocity(x, at(sigma, x)), i, noise=noise)
        sigma = self.config.sigmas[last]
        v = velocity(x, at(sigma, x))
        return _clean(x, v, torch.full((len(x),), sigma, device=x.device)).float()


def _clean(x: Tensor, v: Tensor, sigma_B: Tensor) -> Tensor:
    """Return x - sigma v in float64."""
    return flow.clean_from(x.double(), v.double(), wide(sigma_B.double()))
