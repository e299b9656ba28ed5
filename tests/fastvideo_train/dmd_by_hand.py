"""DMD2 by hand: its rollouts, direction, losses and logits in float64, apart from the method."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from distill_toys import BATCH, KEY, guided, in_float64, lively
from fastvideo_train.loop import Job
from fastvideo_train.methods import StepKey
from torch import Tensor

from fastvideo.attention import plain

SHAPE = (2, 4, 2, 8, 8)
SIGMAS = [1.0, 0.909091, 0.714286]
EVERY_5 = "method.args.student_every=5"
GAN = (
    "method.args.gan=0.7",
    "method.args.gan_critic=0.3",
    'roles.discriminator={kind="discriminator", family="tokens", config={dim=24, width=8}}',
)


def run(tmp_path: Path, rollout: str = "data", *sets: str) -> Job:
    return lively("dmd", tmp_path, EVERY_5, f"method.args.rollout={rollout}", *sets)


def key_with_exit(wanted: int) -> StepKey:
    """A student's turn in which a simulated rollout leaves at this step."""
    keys = (dataclasses.replace(KEY, step=step) for step in range(4, 1000, 5))
    return next(k for k in keys if int(k.shared("dmd/student/exit") * 3) == wanted)


def wide(sigma_B: Tensor) -> Tensor:
    return sigma_B.double()[:, None, None, None, None]


def noised(x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
    return (1 - wide(s)) * x0.double() + wide(s) * noise.double()


def score_times(key: StepKey, phase: str) -> Tensor:
    u = (key.uniform(f"dmd/{phase}/time", (2,)) * 1000).floor().double() / 1000
    return (5 * u / (1 + 4 * u)).clamp(0.02, 0.98)


def student_input(
    job: Job, rollout: str, phase: str, *, key: StepKey = KEY, renoise: bool = False
) -> tuple[Tensor, Tensor]:
    """What the student's last forward sees: x and sigma of each clip."""
    start = key.noise(f"dmd/{phase}/start", SHAPE).double()
    if rollout == "data":
        s = torch.tensor(SIGMAS)[(key.uniform(f"dmd/{phase}/step", (2,)) * 3).long()]
        return noised(BATCH["latents"], start, s), s
    last = int(key.shared(f"dmd/{phase}/exit") * 3)
    student, x = in_float64(job.roles["student"], job, BATCH["captions"]), start
    for i in range(last):
        v = student(x, torch.full((2,), SIGMAS[i])).detach()
        if renoise:
            fresh = key.noise(f"dmd/{phase}/renoise{i}", SHAPE).double()
            x = (1 - SIGMAS[i + 1]) * (x - SIGMAS[i] * v) + SIGMAS[i + 1] * fresh
        else:
            x = x + (SIGMAS[i + 1] - SIGMAS[i]) * v
    return x, torch.full((2,), SIGMAS[last])


def made(job: Job, x: Tensor, s: Tensor) -> Tensor:
    """x0 = x - s v of the student."""
    return x - wide(s) * in_float64(job.roles["student"], job, BATCH["captions"])(x, s)


def direction(job: Job, x0: Tensor, scale: float, *, key: StepKey = KEY) -> Tensor:
    """(f - r) / mean |x0 - r| per clip, r = ru + S (rc - ru)."""
    s = score_times(key, "student")
    x = noised(x0, key.noise("dmd/student/score", SHAPE), s)
    fake = x - wide(s) * in_float64(job.roles["critic"], job, BATCH["captions"])(x, s)
    real = x - wide(s) * guided(job, scale)(x, s)
    return (fake - real) / (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)


def critic_loss(job: Job, x0: Tensor, *, key: StepKey = KEY) -> Tensor:
    s, noise = score_times(key, "critic"), key.noise("dmd/critic/score", SHAPE).double()
    x = noised(x0, noise, s)
    v = in_float64(job.roles["critic"], job, BATCH["captions"])(x, s)
    return (v - (noise - x0)).square().mean()


def logit(job: Job, x0: Tensor, phase: str, which: str, *, key: StepKey = KEY) -> Tensor:
    """D of clips: the critic's tokens after the first of its two layers, then three layers."""
    critic, s = job.roles["critic"], score_times(key, f"{phase}/gan")
    net = copy.deepcopy(critic.net).double()
    states = job.method.encode(BATCH["captions"], job.roles["text"]).double()
    x = noised(x0, key.noise(f"gan/{phase}/{which}", SHAPE), s)
    tokens = net.embed(x, 1000 * s[:, None], critic.family.Conditioning(states))
    h = net.blocks[0](tokens, plain, tokens.cond.text_BLC).x_BLC
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    w = {n: p.detach().double() for n, p in job.roles["discriminator"].net.named_parameters()}
    h = h @ w["each.weight"].T + w["each.bias"]
    h = (h * h.sigmoid()).mean(1) @ w["mean.weight"].T + w["mean.bias"]
    return ((h * h.sigmoid()) @ w["logit.weight"].T + w["logit.bias"])[:, 0]


def student_gan(job: Job, x0: Tensor, *, key: StepKey = KEY) -> Tensor:
    """-log sigmoid(D) of the student's clips."""
    return -logit(job, x0, "student", "fake", key=key).sigmoid().log().mean()


def critic_gan(job: Job, x0: Tensor, *, key: StepKey = KEY) -> Tensor:
    """-log sigmoid(D) of real clips and -log(1 - sigmoid(D)) of the student's."""
    real = logit(job, BATCH["latents"], "critic", "real", key=key).sigmoid()
    fake = logit(job, x0, "critic", "fake", key=key).sigmoid()
    return -real.log().mean() - (1 - fake).log().mean()


def slopes(job: Job, role: str, loss: Tensor, value: Callable[[], Tensor]) -> tuple[float, float]:
    """A loss's derivative along a random direction of a role's weights: autograd, differences."""
    params = list(job.roles[role].net.parameters())
    generator = torch.Generator().manual_seed(3)
    along = [torch.randn(p.shape, generator=generator) for p in params]
    grads = torch.autograd.grad(loss, params, retain_graph=True)
    slope = float(sum((g * d).sum() for g, d in zip(grads, along, strict=True)))
    values = []
    with torch.no_grad():
        for move in (1e-4, -2e-4, 1e-4):
            for p, d in zip(params, along, strict=True):
                p += move * d
            values.append(float(value()))
    return slope, (values[0] - values[1]) / 2e-4
