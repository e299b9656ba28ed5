"""Small distillation runs: real roles with lively weights, and a teacher in closed form."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fastvideo_train.loop import Job
from fastvideo_train.methods import StepKey
from fastvideo_train.recipe import Recipe
from fastvideo_train.roles import Role
from fastvideo_train.strategies.single import Strategy
from tiny_recipes import tiny
from torch import Tensor, nn

KEY = StepKey(seed=0, step=4, num_steps=10)  # the student's turn, where every fifth step is
BATCH = {
    "latents": torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
    "frame_T": torch.arange(2),
    "captions": ["a red ball", "a big blue star at sea"],
    "ids": ["one", "two"],
}


def lively(method: str, folder: Path, *sets: str) -> Job:
    """A tiny float32 run whose networks differ and whose output layers are not zero."""
    job = Job.open(tiny(method, "run.dtype=float32", *sets), folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for role in job.roles.values():
            for param in role.net.parameters():
                param += 0.1 * torch.randn(param.shape, generator=generator)
    return job


def in_float64(role: Role, job: Job, prompts: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
    """v(x, sigma of each clip) of a role's weights in float64, for formulas written by hand."""
    net = copy.deepcopy(role.net).double()
    states = job.method.encode(prompts, job.roles["text"]).double()
    cond = role.family.Conditioning(states)
    return lambda x, sigma_B: net(x.double(), 1000 * sigma_B.double()[:, None], cond)


def guided(job: Job, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The teacher's v in float64: vu + S (vc - vu)."""
    with_text = in_float64(job.roles["teacher"], job, BATCH["captions"])
    without = in_float64(job.roles["teacher"], job, ["", ""])
    return lambda x, s: without(x, s) + scale * (with_text(x, s) - without(x, s))


@dataclasses.dataclass(frozen=True)
class Joined(StepKey):
    """The draws of several lanes as one large micro-batch makes them."""

    lanes: int = 2

    def noise(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        part = (shape[0] // self.lanes, *shape[1:])
        return torch.cat([self._lane(i).noise(purpose, part) for i in range(self.lanes)])

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        part = (max(1, shape[0] // self.lanes), *shape[1:])
        return torch.cat([self._lane(i).uniform(purpose, part) for i in range(self.lanes)])

    def _lane(self, lane: int) -> StepKey:
        return StepKey(self.seed, self.step, self.num_steps, lane)


def with_roles(recipe: Recipe, folder: Path, nets: Mapping[str, nn.Module]) -> Job:
    """A run of this recipe in which some roles have other networks."""
    job = Job.open(recipe, folder)
    roles = {n: dataclasses.replace(r, net=nets.get(n, r.net)) for n, r in job.roles.items()}
    for role in roles.values():
        role.net.requires_grad_(role.trainable)
    strategy = Strategy(recipe)
    strategy.prepare(roles)
    return dataclasses.replace(job, roles=roles, strategy=strategy)


class Mixture(nn.Module):
    """The exact velocity of latents whose every position (C) is drawn from a Gaussian mixture.

    E[z | x] is a mean over the parts' posterior means, weighted by how likely each made x.
    """

    def __init__(self, weights: list[float], means: list[list[float]], stds: list[float]) -> None:
        super().__init__()
        self.log_weights_K = nn.Parameter(torch.tensor(weights).double().log())
        self.means_KC = nn.Parameter(torch.tensor(means).double())
        self.stds_K = nn.Parameter(torch.tensor(stds).double())

    def forward(self, x_BCTHW: Tensor, t_BT: Tensor, cond: Any, **told: Any) -> Tensor:
        x = x_BCTHW.double().movedim(1, -1)[..., None, :]  # B T H W 1 C
        s = (t_BT.double() / 1000)[:, :, None, None, None, None]
        a, var = 1 - s, self.stds_K.square()[:, None]
        off = x - a * self.means_KC  # B T H W K C
        total = a.square() * var + s.square()  # B 1 1 1 K 1
        clean = self.means_KC + a * var / total * off
        log = -0.5 * (off.square() / total + total.log()).sum(-1) + self.log_weights_K
        estimate = (log.softmax(-1)[..., None] * clean).sum(-2)
        v = (x[..., 0, :] - estimate) / s[..., 0, :]
        return v.movedim(-1, 1).to(x_BCTHW.dtype)


class Pointwise(nn.Module):
    """A small network that treats every position alike: (x, sigma) -> v."""

    def __init__(self, channels: int, *, width: int = 48, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(channels + 3, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, channels),
            )

    def forward(self, x_BCTHW: Tensor, t_BT: Tensor, cond: Any, **told: Any) -> Tensor:
        return self.net(self._seen(x_BCTHW, t_BT)).movedim(-1, 1)

    def features(self, x_BCTHW: Tensor, t_BT: Tensor, cond: Any, **told: Any) -> Tensor:
        """What its last layer sees of each position, (B, L, width)."""
        return self.net[:-1](self._seen(x_BCTHW, t_BT)).flatten(1, 3)

    def _seen(self, x_BCTHW: Tensor, t_BT: Tensor) -> Tensor:
        x = x_BCTHW.movedim(1, -1)  # B T H W C
        s = (t_BT / 1000)[:, :, None, None, None].expand(*x.shape[:-1], 1)
        return torch.cat([x, s, s.square(), s.sqrt()], -1)


class IdealGaussian(nn.Module):
    """The few-step sampler of N(mean, std^2) in every channel; these numbers are all it learns.

    On its own path x = (1 - s) x0 + s e, each step's x0 has that distribution whatever they are: e
    is fresh noise if the sampler renoises; if not, the one draw of which x0 = mean + std e is made.
    """

    def __init__(self, channels: int, *, renoise: bool) -> None:
        super().__init__()
        self.mean_C = nn.Parameter(torch.zeros(channels))
        self.log_std_C = nn.Parameter(torch.zeros(channels))
        self.renoise = renoise

    def forward(self, x_BCTHW: Tensor, t_BT: Tensor, cond: Any, **told: Any) -> Tensor:
        s = (t_BT / 1000)[:, None, :, None, None]
        mean, std = (p[:, None, None, None] for p in (self.mean_C, self.log_std_C.exp()))
        size = torch.hypot((1 - s) * std, s) if self.renoise else (1 - s) * std + s
        clean = mean + std * (x_BCTHW - (1 - s) * mean) / size
        return (x_BCTHW - clean) / s
