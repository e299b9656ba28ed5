"""DMD reaches a distribution whose score is known in closed form, without data and without luck.

Positions of a clip are independent draws; the student begins near N(0, 1) in every channel. What
the errors below allow was measured at about half of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distill_toys import Mixture, Pointwise, with_roles
from fastvideo_train.loop import Job, _one_step
from fastvideo_train.methods import StepKey
from fastvideo_train.recipe import Recipe
from tiny_recipes import tiny
from torch import Tensor, nn

GAUSSIAN = ([1.0], [[1.0, -0.5]], [0.4])
TWO = ([0.3, 0.7], [[-0.8, 0.3], [0.6, -0.3]], [0.5, 0.4])
SPARSE = (
    "roles.student.config.gate_compress=true",
    'roles.student.attention={pattern="vsa", args={sparsity=0.5, tile=[2, 2, 2]}}',
)


def _recipe(rate: float, *sets: str) -> Recipe:
    """One step from noise, guidance off, so that the teacher's distribution is the target."""
    dims = ("in_channels=2", "out_channels=2", "num_layers=1")
    words = [f"roles.{r}.config.{d}" for r in ("student", "teacher", "critic") for d in dims]
    words += ["method.args.sigmas=[1.0]", "method.args.guidance=1.0", "method.args.shift=1.0"]
    words += ["run.dtype=float32", "optim.betas=[0.5, 0.99]", "optim.schedule=cosine"]
    words += [f"optim.lr={rate}", f"roles.student.optim={{lr={rate}}}", "ema.decay=0.95"]
    recipe = tiny("dmd", *words, *sets)
    return recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"muon": None})})


def _clips(count: int, frames: int, side: int) -> dict[str, object]:
    return {
        "latents": torch.full((count, 2, frames, side, side), torch.nan),  # simulated: no data
        "frame_T": torch.arange(frames),
        "captions": ["a ball"] * count,
        "ids": [""] * count,
    }


def _train(job: Job, batch: dict[str, object]) -> None:
    while job.step < job.recipe.run.steps:
        _one_step(job, [batch])
        job.step += 1


@torch.no_grad()
def _drawn(job: Job, batch: dict[str, object]) -> Tensor:
    """Positions (N, C) that the averaged student makes of new noise."""
    with job.strategy.averaged():
        clips = job.method.clips(batch, job.roles, StepKey(seed=7, step=0, num_steps=1))
        x0 = job.method.rollout(clips, job.roles["student"], "student")
    return x0.movedim(1, -1).flatten(0, -2)


def _pointwise(tmp_path: Path, target: tuple[list[float], ...]) -> tuple[Tensor, Tensor]:
    """The positions before and after."""
    nets: dict[str, nn.Module] = {
        "student": Pointwise(2, seed=1),
        "critic": Pointwise(2, seed=2),
        "teacher": Mixture(*target),
    }
    sets = ("run.steps=400", "method.args.student_every=2")
    whole_cells = [
        f"roles.{r}.config.patch_size=[1, 1, 1]" for r in ("student", "teacher", "critic")
    ]
    job = with_roles(_recipe(6e-3, *sets, *whole_cells), tmp_path, nets)
    big = _clips(8, 1, 32)
    before = _drawn(job, big)
    _train(job, _clips(2, 1, 16))
    return before, _drawn(job, big)


def test_the_student_reaches_a_gaussian(tmp_path):
    """Means within 0.04, covariance within 20 % of its diagonal."""
    before, after = _pointwise(tmp_path, GAUSSIAN)
    assert float((before.mean(0) - torch.tensor([1.0, -0.5])).abs().max()) > 0.3
    torch.testing.assert_close(after.mean(0), torch.tensor([1.0, -0.5]), rtol=0, atol=0.04)
    torch.testing.assert_close(after.T.cov(), 0.16 * torch.eye(2), rtol=0, atol=0.032)


def test_the_student_reaches_both_parts_of_a_mixture(tmp_path):
    """Mean within 0.05, covariance within 20 % of its largest entry, the left share within 0.1.

    The student's map is smooth, so that it cannot cut noise in two: it gives the smaller part less
    than its share, 0.17 instead of 0.22 left of -0.5, as does a longer run.
    """
    _, after = _pointwise(tmp_path, TWO)
    weights, means = torch.tensor(TWO[0]), torch.tensor(TWO[1])
    mean = weights @ means
    spread = torch.diag_embed(torch.tensor(TWO[2]).square()[:, None].expand(2, 2))
    off = means - mean
    cov = (weights[:, None, None] * (off[:, :, None] * off[:, None] + spread)).sum(0)
    torch.testing.assert_close(after.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(after.T.cov(), cov, rtol=0, atol=0.2 * float(cov.max()))
    share = float((after[:, 0] < -0.5).float().mean())
    assert share == pytest.approx(0.22, abs=0.1) and share > 0.1


def test_a_sparse_student_reaches_a_dense_teachers_gaussian(tmp_path):
    """A Wan denoiser under VSA at half its tiles, with a dense critic: means within 0.06,
    deviations within 12 %.
    """
    sets = (*SPARSE, "run.steps=160", "method.args.student_every=1")
    job = with_roles(_recipe(8e-3, *sets), tmp_path, {"teacher": Mixture(*GAUSSIAN)})
    _train(job, _clips(4, 2, 8))
    after = _drawn(job, _clips(64, 2, 8))
    torch.testing.assert_close(after.mean(0), torch.tensor([1.0, -0.5]), rtol=0, atol=0.06)
    torch.testing.assert_close(after.std(0), torch.full((2,), 0.4), rtol=0.12, atol=0)
    gates = {n: w for n, w in job.strategy.gather("student").items() if "to_gate_compress" in n}
    assert gates and all(w.abs().max() > 1e-3 for w in gates.values()), "both branches learned"
    patterns = {n: {type(p).__name__ for p, _ in r._attends} for n, r in job.roles.items()}
    assert patterns == {
        "student": {"Vsa"},
        "teacher": {"Dense"},
        "critic": {"Dense"},
        "text": set(),
    }
