"""DMD2: both rollouts, the direction, the critic, and who is updated when."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from distill_toys import BATCH, KEY, Joined, lively, with_roles
from dmd_by_hand import (
    EVERY_5,
    GAN,
    SIGMAS,
    critic_gan,
    critic_loss,
    direction,
    key_with_exit,
    made,
    run,
    slopes,
    student_gan,
    student_input,
)
from fastvideo_train import logs, loop
from fastvideo_train.loop import DivergedError, Job, make_method, train
from tiny_recipes import finish, tiny
from torch import nn

from fastvideo import flow, schedulers
from fastvideo.sample import sample


@pytest.mark.parametrize("renoise", [True, False])
@pytest.mark.parametrize("rollout", ["data", "simulated"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_both_losses_are_the_hand_computed_ones(rollout, renoise, scale, tmp_path):
    words = [f"method.args.renoise={str(renoise).lower()}", f"method.args.guidance={scale}"]
    job = run(tmp_path, rollout, *words)
    student, critic = job.method.step(BATCH, job.roles, KEY)
    with torch.no_grad():
        mine, its = (
            made(job, *student_input(job, rollout, phase, renoise=renoise))
            for phase in ("student", "critic")
        )
        g, wanted = direction(job, mine, scale), critic_loss(job, its)
    assert student.roles == ("student",) and critic.roles == ("critic",)
    assert float(student.loss.detach()) == pytest.approx(float(0.5 * g.square().mean()), rel=1e-4)
    assert float(student.metrics["student/direction"]) == pytest.approx(float(g.abs().mean()), 1e-4)
    assert float(critic.loss.detach()) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("with_gan", [False, True])
@pytest.mark.parametrize("rollout", ["data", "simulated"])
def test_the_students_gradient_is_that_of_finite_differences(rollout, with_gan, tmp_path):
    """The target of the scores is fixed, and so are a simulated rollout's steps before the last."""
    job, key = run(tmp_path, rollout, *(GAN if with_gan else ())), key_with_exit(2)
    update = next(job.method.step(BATCH, job.roles, key))
    with torch.no_grad():
        x, s = student_input(job, rollout, "student", key=key)
        x0 = made(job, x, s)
        target = x0 - direction(job, x0, 4.0, key=key)

    def value():
        x0 = made(job, x, s)
        loss = 0.5 * (x0 - target).square().mean()
        return loss + 0.7 * student_gan(job, x0, key=key) if with_gan else loss

    slope, differences = slopes(job, "student", update.loss, value)
    assert slope == pytest.approx(differences, rel=1e-2) and abs(slope) > 1e-3


@pytest.mark.parametrize("with_gan", [False, True])
@pytest.mark.parametrize("rollout", ["data", "simulated"])
def test_the_critics_gradient_is_that_of_finite_differences(rollout, with_gan, tmp_path):
    job = run(tmp_path, rollout, *(GAN if with_gan else ()))
    _, update = job.method.step(BATCH, job.roles, KEY)
    with torch.no_grad():
        x0 = made(job, *student_input(job, rollout, "critic"))

    def value():
        loss = critic_loss(job, x0)
        return loss + 0.3 * critic_gan(job, x0) if with_gan else loss

    for role in update.roles:
        slope, differences = slopes(job, role, update.loss, value)
        assert slope == pytest.approx(differences, rel=1e-2) and abs(slope) > 1e-3


def test_a_simulated_rollout_stops_at_its_exit_and_learns_from_its_last_forward_alone(tmp_path):
    job = run(tmp_path, "simulated")
    calls: list[bool] = []
    net = job.roles["student"].net
    net.register_forward_pre_hook(lambda net, args: calls.append(torch.is_grad_enabled()))
    exits = set()
    for step in range(4, 60, 5):
        key = dataclasses.replace(KEY, step=step)
        last = int(key.shared("dmd/student/exit") * 3)
        exits.add(last)
        calls.clear()
        next(job.method.step(BATCH, job.roles, key))
        assert calls == [False] * last + [True], "no step after the exit, no gradient before"
    assert exits == {0, 1, 2}


def test_all_lanes_of_a_step_leave_at_the_same_step_and_draw_other_noise(tmp_path):
    job = run(tmp_path, "simulated")
    net = job.roles["student"].net
    calls: list[torch.Tensor] = []
    net.register_forward_pre_hook(lambda net, args: calls.append(args[0].clone()))
    seen = []
    for lane in range(4):
        calls.clear()
        next(job.method.step(BATCH, job.roles, dataclasses.replace(KEY, lane=lane)))
        seen.append((len(calls), float(calls[0].sum())))
    assert len({count for count, _ in seen}) == 1 and len({total for _, total in seen}) == 4


def test_a_deterministic_rollout_is_the_students_own_sampler(tmp_path):
    job = run(tmp_path, "simulated", "method.args.renoise=false")
    clips, student = job.method.clips(BATCH, job.roles, key_with_exit(2)), job.roles["student"]
    with torch.no_grad():
        x0 = job.method.rollout(clips, student, "student")
        named = job.method.sampler
        scheduler = schedulers.create(named.name, named.args)
        noise = clips.noise("dmd/student/start")
        *_, last = sample(clips.velocity(student), scheduler, latents=noise, num_steps=3)
    torch.testing.assert_close(x0, last.x, rtol=1e-5, atol=1e-5)


def test_score_times_are_shifted_and_held_within_their_limits(tmp_path):
    job = run(tmp_path)
    big = {**BATCH, "latents": torch.zeros(4000, 1, 1, 2, 2), "captions": ["a"] * 4000}
    clips = job.method.clips(big, job.roles, KEY)
    times = job.method.score_times(clips, "student")
    assert float(times.min()) == pytest.approx(0.02) and float(times.max()) == pytest.approx(0.98)
    assert float(times.median()) == pytest.approx(flow.shift(0.5, 5.0), abs=0.02)
    inner = flow.shift(times[(times > 0.021) & (times < 0.979)].double(), 1 / 5)
    torch.testing.assert_close(1000 * inner, (1000 * inner).round(), rtol=0, atol=1e-2)
    assert not torch.equal(times, job.method.score_times(clips, "critic"))


def test_the_critic_learns_from_a_rollout_of_its_own_by_the_updated_student(tmp_path):
    job = run(tmp_path, "data")
    phases = job.method.step(BATCH, job.roles, KEY)
    next(phases)
    with torch.no_grad():
        for p in job.roles["student"].net.parameters():
            p.add_(0.05)
        wanted = critic_loss(job, made(job, *student_input(job, "data", "critic")))
    assert float(next(phases).loss.detach()) == pytest.approx(float(wanted), rel=1e-4)


def test_each_phase_reaches_its_own_network_alone(tmp_path):
    job = run(tmp_path)
    for update in job.method.step(BATCH, job.roles, KEY):
        update.loss.backward()
        (mine,) = update.roles
        for name, role in job.roles.items():
            has = [p.grad is not None for p in role.net.parameters()]
            assert all(has) if name == mine else not any(has), (mine, name)
        job.roles[mine].net.zero_grad()


def test_the_student_moves_in_every_nth_step_and_its_average_and_warm_up_with_it(tmp_path):
    words = ["run.steps=9", "method.args.student_every=3", "optim.warmup=3", "optim.lr=1.0"]
    words += ["roles.student.optim={lr=3.0}", "optim.schedule=constant", "run.dtype=float32"]
    job = finish(tiny("dmd", *words), tmp_path)
    state = job.strategy.state_dict()
    counts = {name: (s["num_updates"], s["ema"]["num_updates"]) for name, s in state.items()}
    assert counts == {"student": (3, 3), "critic": (9, 9)}
    records = logs.read(job.folder)
    rates = [r.get("train/student/lr") for r in records]
    assert rates == [None, None, 1.0, None, None, 2.0, None, None, 3.0]
    critic = [r["train/critic/lr"] for r in records]
    assert critic == pytest.approx([1 / 3, 2 / 3, *[1.0] * 7], rel=1e-5)
    assert all(r["train/loss"] == r["train/critic/loss"] for r in records)
    assert all("train/student/loss" in r for r in records[2::3])


def test_a_run_in_which_the_student_never_moves_is_refused_before_weights_load(tmp_path):
    words = ["run.steps=4", EVERY_5, "roles.teacher.from=runs/nowhere"]
    with pytest.raises(ValueError, match="nano-dit-dmd would never learn; nearest: 5"):
        Job.open(tiny("dmd", *words), tmp_path)
    with pytest.raises(ValueError, match="runs/nowhere does not exist"):
        Job.open(tiny("dmd", *words, "run.steps=5"), tmp_path)


class _Certain(nn.Module):
    """Sees the same clean clip c behind everything: v = (x - c) / sigma."""

    def __init__(self, clean):
        super().__init__()
        self.clean = nn.Parameter(torch.tensor(clean))

    def forward(self, x, t_BT, cond, **told):
        return (x - self.clean) / (t_BT / 1000)[:, None, :, None, None]


def test_where_the_teacher_agrees_with_the_clip_the_floor_is_the_normaliser(tmp_path):
    """|x0 - r| = 0: without a floor g would be infinite, or 0 / 0 where the critic agrees too."""
    nets = {"student": _Certain(0.0), "teacher": _Certain(0.0), "critic": _Certain(0.25)}
    words = ["run.dtype=float32", "method.args.floor=0.1", "method.args.student_every=1"]
    job = with_roles(tiny("dmd", *words), tmp_path, nets)
    clips = job.method.clips(BATCH, job.roles, KEY)
    x0 = torch.zeros_like(clips.clean)
    g = job.method.direction(clips, job.roles, x0).detach()
    torch.testing.assert_close(g, torch.full_like(g, 0.25 / 0.1), rtol=1e-4, atol=0)
    update = next(job.method.step(BATCH, job.roles, KEY))
    assert float(update.loss.detach()) == pytest.approx(0.5 * 2.5**2, rel=1e-4)
    with torch.no_grad():
        nets["critic"].clean.zero_()
    assert float(job.method.direction(clips, job.roles, x0).detach().abs().max()) < 1e-4


def test_a_score_that_is_not_finite_stops_the_run(tmp_path):
    job = lively("dmd", tmp_path, "method.args.student_every=1")
    with torch.no_grad():
        next(job.roles["teacher"].net.parameters()).fill_(math.nan)
    with pytest.raises(DivergedError, match="loss is nan at step 1"):
        list(train(job))


@pytest.mark.parametrize("gan", [(), GAN])
@pytest.mark.parametrize("rollout", ["data", "simulated"])
def test_two_micro_batches_make_the_step_of_one_large_one(rollout, gan, tmp_path, monkeypatch):
    """Through the loop: both phases, so that the critic sees the student that the sum updated."""
    halves = [
        {**BATCH, **{k: BATCH[k][i : i + 1] for k in ("latents", "captions")}} for i in (0, 1)
    ]
    parts = run(tmp_path / "parts", rollout, "run.accumulate=2", *gan)
    parts.step = KEY.step
    numbers = [loop._one_step(parts, halves)]
    monkeypatch.setattr(loop, "StepKey", Joined)  # one lane that draws what the two drew
    whole = run(tmp_path / "whole", rollout, *gan)
    whole.step = KEY.step
    numbers.append(loop._one_step(whole, [BATCH]))
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)
    assert len(numbers[0]) == (12 if gan else 8)
    for name in whole.strategy.state_dict():
        summed, grads = (job.strategy._trained[name].grads for job in (parts, whole))
        size = max(float(g.abs().max()) for g in grads.values())
        for key, grad in grads.items():
            torch.testing.assert_close(summed[key], grad, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("renoise", [True, False])
def test_the_student_is_sampled_as_it_was_simulated(renoise):
    sampler = make_method(tiny("dmd", f"method.args.renoise={str(renoise).lower()}")).sampler
    assert sampler.args == {"sigmas": SIGMAS, "renoise": renoise}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("method.args.times=[0.9, 0.1]", r"must rise within \(0, 1\]"),
        ("method.args.rollout=real", "rollout .*'data' or 'simulated'"),
        ("method.args.w=3.0", "w in method.args .* is unknown"),
        ("method.args.student_every=0", "student_every 0 .* at least 1"),
        ("method.args.student_every=7", "steps 6 is less than .*student_every 7, .*; nearest: 7"),
        ("roles.critic.trainable=false", r"roles\.critic\.trainable must be True"),
    ],
)
def test_a_wrong_recipe_is_refused(word, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        finish(tiny("dmd", word), tmp_path)
