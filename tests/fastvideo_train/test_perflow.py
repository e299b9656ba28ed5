"""Piecewise distillation: windows, the teacher's jump, the loss and its gradient."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from distill_toys import BATCH, KEY, Joined, guided, in_float64, lively
from fastvideo_train import logs, loop
from fastvideo_train.loop import make_method, train
from fastvideo_train.methods._distill import THIRDS, Clips, at, between, solve
from tiny_recipes import finish, tiny

from fastvideo import flow


def test_windows_join_to_the_teachers_shifted_grid():
    ends = itertools.pairwise((*(flow.shift(u, 5.0) for u in (1.0, 2 / 3, 1 / 3)), 0.0))
    joined = [between(a, b, 4, shift=5.0)[:-1] for a, b in ends]
    whole = [flow.shift(1 - i / 12, 5.0) for i in range(12)]
    assert list(itertools.chain(*joined)) == pytest.approx(whole, abs=1e-12)
    thirds = [flow.shift(u, 5.0) for u in (1.0, 2 / 3, 1 / 3)]
    assert list(THIRDS) == pytest.approx(thirds, abs=1e-6)


def _field(x, t_BT):
    """x' = x cos(3 s) for sigma s, with x(b) = x(a) exp((sin 3b - sin 3a) / 3)."""
    return x * torch.cos(3 * t_BT / 1000).double()[..., None, None, None]


@pytest.mark.parametrize(("start", "stop"), [(1.0, 0.909091), (0.909091, 0.714286), (0.7, 0.2)])
@pytest.mark.parametrize(("solver", "factor"), [("unipc", 0.32), ("euler", 0.6)])
def test_a_solver_keeps_its_order_on_a_part_that_does_not_end_at_0(start, stop, solver, factor):
    x = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    first = min(start, 1 - 1e-6)  # where the part is said to begin

    def error(count: int) -> float:
        got = solve(_field, x, between(start, stop, count, shift=5.0), solver=solver)
        exact = torch.exp((torch.tensor([3 * stop]).sin() - torch.tensor([3 * first]).sin()) / 3)
        return float((got - exact.double()).abs())

    # float32 times limit the exact comparison, so that the steps stay coarse
    assert error(8) < factor * error(4) and error(16) < factor * error(8)


def test_few_unipc_steps_are_nearer_to_a_fine_solution_than_few_euler_steps():
    x = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    part = (0.909091, 0.714286)
    fine = solve(_field, x, between(*part, 4000, shift=5.0), solver="euler")
    unipc, euler = (
        float((solve(_field, x, between(*part, 8, shift=5.0), solver=s) - fine).abs())
        for s in ("unipc", "euler")
    )
    assert unipc < 0.2 * euler and unipc < 0.02 * float((fine - x).abs())


def _run(tmp_path, *sets):
    return lively("perflow", tmp_path, "method.args.teacher_steps=3", *sets)


def _hand_loss(job, window, student=None):
    """The loss by formulas in float64, with the teacher's Euler steps written out."""
    sigmas = [1.0, 0.909091, 0.714286, 0.0]
    start, stop = sigmas[window], sigmas[window + 1]
    u = [s / (5 - 4 * s) for s in (start, stop)]
    grid = [5 * w / (1 + 4 * w) for w in (u[0] + (u[1] - u[0]) * i / 3 for i in range(4))]
    noise = KEY.noise("perflow/noise", (2, 4, 2, 8, 8)).double()
    x0 = (1 - start) * BATCH["latents"].double() + start * noise
    teacher, x = guided(job, 4.0), x0
    with torch.no_grad():
        for a, b in itertools.pairwise(grid):
            x = x + (b - a) * teacher(x, torch.full((2,), a))
    target = (x0 - x) / (start - stop)
    student = student or in_float64(job.roles["student"], job, BATCH["captions"])
    return (student(x0, torch.full((2,), start)) - target).square().mean()


@pytest.mark.parametrize("window", [0, 1, 2])
def test_the_loss_is_the_hand_computed_one(window, tmp_path):
    job = _run(tmp_path, "method.args.solver=euler")
    key = dataclasses.replace(KEY, step=3 + window)
    # the draws of `KEY`, whatever the step says
    job.method.clips = lambda batch, roles, _: type(job.method).clips(job.method, batch, roles, KEY)
    (update,) = job.method.step(BATCH, job.roles, key)
    assert list(update.metrics) == [f"window{window}"] and update.roles == ("student",)
    assert float(update.loss.detach()) == pytest.approx(
        float(_hand_loss(job, window).detach()), rel=1e-4
    )


def test_the_gradient_is_that_of_finite_differences(tmp_path):
    job = _run(tmp_path, "method.args.solver=euler")
    net = job.roles["student"].net
    key = dataclasses.replace(KEY, step=4)  # window 1
    (update,) = job.method.step(BATCH, job.roles, key)
    params = list(net.parameters())
    grads = torch.autograd.grad(update.loss, params)
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator) for p in params]
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p += sign * 1e-4 * d
        values.append(float(_hand_loss(job, 1).detach()))
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p -= sign * 1e-4 * d
    assert float(slope) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-2)


def test_no_gradient_reaches_teacher_or_text(tmp_path):
    job = _run(tmp_path)
    (update,) = job.method.step(BATCH, job.roles, KEY)
    update.loss.backward()
    assert all(p.grad is None for n in ("teacher", "text") for p in job.roles[n].net.parameters())
    assert all(p.grad is not None for p in job.roles["student"].net.parameters())


def test_every_window_comes_equally_often_in_every_lane(tmp_path):
    job = _run(tmp_path)
    seen = [
        next(iter(next(job.method.step(BATCH, job.roles, key)).metrics))
        for key in (
            dataclasses.replace(KEY, step=i, lane=lane) for lane in (0, 1) for i in (0, 1, 2)
        )
    ]
    assert sorted(seen[:3]) == sorted(seen[3:]) == ["window0", "window1", "window2"]
    assert seen[0] != seen[3], "micro-batches of a step look at different windows"


def test_guidance_1_asks_the_teacher_once_and_without_the_negative_prompt(tmp_path):
    job = _run(tmp_path, "method.args.guidance=1.0")
    sizes: list[int] = []
    job.roles["teacher"].net.register_forward_pre_hook(lambda net, args: sizes.append(len(args[0])))
    next(job.method.step(BATCH, job.roles, KEY))
    assert sizes == [2, 2, 2]
    sizes.clear()
    guided_job = _run(tmp_path / "guided")
    net = guided_job.roles["teacher"].net
    net.register_forward_pre_hook(lambda net, args: sizes.append(len(args[0])))
    next(guided_job.method.step(BATCH, guided_job.roles, KEY))
    assert sizes == [4, 4, 4], "one forward of twice the batch for each of the teacher's steps"


def test_two_micro_batches_make_the_step_of_one_large_one(tmp_path, monkeypatch):
    halves = [
        {**BATCH, **{k: BATCH[k][i : i + 1] for k in ("latents", "captions")}} for i in (0, 1)
    ]
    one_window = "method.args.sigmas=[1.0]"
    parts = _run(tmp_path / "parts", one_window, "run.accumulate=2")
    numbers = [loop._one_step(parts, halves)]
    monkeypatch.setattr(loop, "StepKey", Joined)  # one lane that draws what the two drew
    whole = _run(tmp_path / "whole", one_window)
    numbers.append(loop._one_step(whole, [BATCH]))
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)
    summed, grads = (job.strategy._trained["student"].grads for job in (parts, whole))
    size = max(float(g.abs().max()) for g in grads.values())
    for key, grad in grads.items():
        torch.testing.assert_close(summed[key], grad, rtol=1e-3, atol=1e-5 * size)


def test_a_step_whose_micro_batches_have_other_windows_logs_each_at_its_own_value(tmp_path):
    job = _run(tmp_path, "run.accumulate=2")
    numbers = loop._one_step(job, [BATCH, BATCH])
    assert {"window0", "window1"} <= set(numbers) and "window2" not in numbers
    assert numbers["loss"] == pytest.approx((numbers["window0"] + numbers["window1"]) / 2)


def test_training_brings_the_student_to_the_teachers_jumps(tmp_path):
    """Teacher and student are drawn apart; one window, so that losses of steps compare."""
    sets = ("run.steps=60", "run.batch=4", "optim.lr=5e-3", "method.args.sigmas=[1.0]")
    job = lively("perflow", tmp_path, *sets, "method.args.teacher_steps=2")
    for _ in train(job):
        pass
    losses = [record["train/window0"] for record in logs.read(job.folder)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_student_is_sampled_at_its_windows_without_new_noise():
    sampler = make_method(tiny("perflow")).sampler
    assert sampler.name == "few_step"
    assert sampler.args == {"sigmas": list(THIRDS), "renoise": False}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("method.args.sigmas=[0.9, 0.5]", r"must begin at 1\.0"),
        ("method.args.sigmas=[1.0, 1.0]", "must fall strictly"),
        ("method.args.solver=heun", r"solver .*'unipc' or 'euler'"),
        ("method.args.text_dropout=0.1", "text_dropout in method.args .* is unknown"),
        ("roles.teacher.trainable=true", r"roles\.teacher\.trainable must be False"),
        ("roles.text.trainable=true", r"roles\.text\.trainable must be False"),
        ("method.args.guidance=inf", "guidance .* finite"),
        ("roles.teacher.config.text_dim=24", r"roles\.teacher has text_dim 24; .* 16 channels"),
        ("roles.teacher.config.in_channels=8", r"roles\.teacher has 8 channels in and 4 out"),
    ],
)
def test_a_wrong_recipe_is_refused(word, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        finish(tiny("perflow", word), tmp_path)


def test_a_micro_batch_is_told_which_frames_it_has(tmp_path):
    job = _run(tmp_path)
    late = {**BATCH, "frame_T": torch.tensor([3, 9])}
    x = torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(5))
    one, two = (job.method.clips(b, job.roles, KEY) for b in (BATCH, late))
    assert isinstance(one, Clips)
    va, vb = (c.velocity(job.roles["student"])(x, at(0.5, x)) for c in (one, two))
    assert not torch.allclose(va, vb)
