"""DMD2: both rollouts, the direction, the critic, and who is updated when."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from distill_toys import BATCH, KEY, Joined, guided, in_float64, lively
from fastvideo_train import logs, loop
from fastvideo_train.loop import DivergedError, make_method, train
from fastvideo_train.methods import StepKey
from tiny_recipes import finish, tiny

from fastvideo import flow, schedulers
from fastvideo.sample import sample

SHAPE = (2, 4, 2, 8, 8)
SIGMAS = [1.0, 0.909091, 0.714286]
EVERY_5 = "method.args.student_every=5"


def _run(tmp_path, rollout="data", *sets):
    return lively("dmd", tmp_path, EVERY_5, f"method.args.rollout={rollout}", *sets)


def _wide(sigma_B):
    return sigma_B.double()[:, None, None, None, None]


def _score_times(key, phase):
    u = (key.uniform(f"dmd/{phase}/time", (2,)) * 1000).floor().double() / 1000
    return (5 * u / (1 + 4 * u)).clamp(0.02, 0.98)


def _data_rollout(job, phase, student=None):
    """x0 = x_s - s v at a drawn step of each clip, in float64."""
    drawn = (KEY.uniform(f"dmd/{phase}/step", (2,)) * 3).long()
    s = torch.tensor(SIGMAS)[drawn]
    noise = KEY.noise(f"dmd/{phase}/start", SHAPE).double()
    x = (1 - _wide(s)) * BATCH["latents"].double() + _wide(s) * noise
    student = student or in_float64(job.roles["student"], job, BATCH["captions"])
    return x - _wide(s) * student(x, s)


def _simulated_rollout(job, phase, *, renoise):
    last = int(KEY.uniform(f"dmd/{phase}/exit", (1,)) * 3)
    student = in_float64(job.roles["student"], job, BATCH["captions"])
    x = KEY.noise(f"dmd/{phase}/start", SHAPE).double()
    for i in range(last):
        v = student(x, torch.full((2,), SIGMAS[i])).detach()
        if renoise:
            fresh = KEY.noise(f"dmd/{phase}/renoise{i}", SHAPE).double()
            x = (1 - SIGMAS[i + 1]) * (x - SIGMAS[i] * v) + SIGMAS[i + 1] * fresh
        else:
            x = x + (SIGMAS[i + 1] - SIGMAS[i]) * v
    return x - SIGMAS[last] * student(x, torch.full((2,), SIGMAS[last]))


def _direction(job, x0, scale):
    """(f - r) / mean |x0 - r| per clip, r = ru + S (rc - ru)."""
    s = _score_times(KEY, "student")
    x = (1 - _wide(s)) * x0 + _wide(s) * KEY.noise("dmd/student/score", SHAPE).double()
    fake = x - _wide(s) * in_float64(job.roles["critic"], job, BATCH["captions"])(x, s)
    real = x - _wide(s) * guided(job, scale)(x, s)
    return (fake - real) / (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)


def _critic_loss(job, x0):
    s = _score_times(KEY, "critic")
    noise = KEY.noise("dmd/critic/score", SHAPE).double()
    x = (1 - _wide(s)) * x0 + _wide(s) * noise
    v = in_float64(job.roles["critic"], job, BATCH["captions"])(x, s)
    return (v - (noise - x0)).square().mean()


@pytest.mark.parametrize("renoise", ["true", "false"])
@pytest.mark.parametrize("rollout", ["data", "simulated"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_both_losses_are_the_hand_computed_ones(rollout, renoise, scale, tmp_path):
    words = [f"method.args.renoise={renoise}", f"method.args.guidance={scale}"]
    job = _run(tmp_path, rollout, *words)
    student, critic = job.method.step(BATCH, job.roles, KEY)
    with torch.no_grad():
        if rollout == "data":
            mine, its = (_data_rollout(job, phase) for phase in ("student", "critic"))
        else:
            is_renoised = renoise == "true"
            mine, its = (
                _simulated_rollout(job, phase, renoise=is_renoised)
                for phase in ("student", "critic")
            )
        g, wanted = _direction(job, mine, scale), _critic_loss(job, its)
    assert student.roles == ("student",) and critic.roles == ("critic",)
    assert float(student.loss.detach()) == pytest.approx(float(0.5 * g.square().mean()), rel=1e-4)
    assert float(student.metrics["student/direction"]) == pytest.approx(float(g.abs().mean()), 1e-4)
    assert float(critic.loss.detach()) == pytest.approx(float(wanted), rel=1e-4)


def _slope(job, role, loss, value):
    """A loss's derivative along a random direction of a role's weights: autograd, differences."""
    params = list(job.roles[role].net.parameters())
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator) for p in params]
    grads = torch.autograd.grad(loss, params)
    slope = float(sum((g * d).sum() for g, d in zip(grads, direction, strict=True)))
    values = []
    with torch.no_grad():
        for move in (1e-4, -2e-4):
            for p, d in zip(params, direction, strict=True):
                p += move * d
            values.append(float(value()))
    return slope, (values[0] - values[1]) / 2e-4


def test_the_students_gradient_is_that_of_finite_differences_with_a_fixed_target(tmp_path):
    job = _run(tmp_path)
    update = next(job.method.step(BATCH, job.roles, KEY))
    with torch.no_grad():
        x0 = _data_rollout(job, "student")
        target = x0 - _direction(job, x0, 4.0)
    slope, differences = _slope(
        job,
        "student",
        update.loss,
        lambda: 0.5 * (_data_rollout(job, "student") - target).square().mean(),
    )
    assert slope == pytest.approx(differences, rel=1e-2) and abs(slope) > 1e-3


def test_the_critics_gradient_is_that_of_finite_differences(tmp_path):
    job = _run(tmp_path)
    _, update = job.method.step(BATCH, job.roles, KEY)
    with torch.no_grad():
        x0 = _data_rollout(job, "critic")
    slope, differences = _slope(job, "critic", update.loss, lambda: _critic_loss(job, x0))
    assert slope == pytest.approx(differences, rel=1e-2) and abs(slope) > 1e-3


def test_a_simulated_rollout_stops_at_its_exit_and_learns_from_its_last_forward_alone(tmp_path):
    job = _run(tmp_path, "simulated")
    calls: list[bool] = []
    net = job.roles["student"].net
    net.register_forward_pre_hook(lambda net, args: calls.append(torch.is_grad_enabled()))
    exits = set()
    for step in range(4, 60, 5):
        key = dataclasses.replace(KEY, step=step)
        last = int(key.uniform("dmd/student/exit", (1,)) * 3)
        exits.add(last)
        calls.clear()
        next(job.method.step(BATCH, job.roles, key))
        assert calls == [False] * last + [True], "no step after the exit, no gradient before"
    assert exits == {0, 1, 2}


def test_all_lanes_of_a_step_leave_at_the_same_step_and_draw_other_noise(tmp_path):
    job = _run(tmp_path, "simulated")
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
    job = _run(tmp_path, "simulated", "method.args.renoise=false")
    clips, student = job.method.clips(BATCH, job.roles, _key_with_exit(2)), job.roles["student"]
    with torch.no_grad():
        x0 = job.method.rollout(clips, student, "student")
        named = job.method.sampler
        scheduler = schedulers.create(named.name, named.args)
        noise = clips.noise("dmd/student/start")
        *_, last = sample(clips.velocity(student), scheduler, latents=noise, num_steps=3)
    torch.testing.assert_close(x0, last.x, rtol=1e-5, atol=1e-5)


def _key_with_exit(wanted: int) -> StepKey:
    keys = (dataclasses.replace(KEY, step=step) for step in range(4, 1000, 5))
    return next(k for k in keys if int(k.uniform("dmd/student/exit", (1,)) * 3) == wanted)


def test_score_times_are_shifted_and_held_within_their_limits(tmp_path):
    job = _run(tmp_path)
    big = {**BATCH, "latents": torch.zeros(4000, 1, 1, 2, 2), "captions": ["a"] * 4000}
    clips = job.method.clips(big, job.roles, KEY)
    times = job.method.score_times(clips, "student")
    assert float(times.min()) == pytest.approx(0.02) and float(times.max()) == pytest.approx(0.98)
    assert float(times.median()) == pytest.approx(flow.shift(0.5, 5.0), abs=0.02)
    inner = flow.shift(times[(times > 0.021) & (times < 0.979)].double(), 1 / 5)
    torch.testing.assert_close(1000 * inner, (1000 * inner).round(), rtol=0, atol=1e-2)
    assert not torch.equal(times, job.method.score_times(clips, "critic"))


def test_the_critic_learns_from_a_rollout_of_its_own_by_the_updated_student(tmp_path):
    job = _run(tmp_path, "data")
    phases = job.method.step(BATCH, job.roles, KEY)
    next(phases)
    with torch.no_grad():
        for p in job.roles["student"].net.parameters():
            p.add_(0.05)
        wanted = _critic_loss(job, _data_rollout(job, "critic"))
    assert float(next(phases).loss.detach()) == pytest.approx(float(wanted), rel=1e-4)


def test_each_phase_reaches_its_own_network_alone(tmp_path):
    job = _run(tmp_path)
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


def test_a_score_that_is_not_finite_stops_the_run(tmp_path):
    job = lively("dmd", tmp_path, "method.args.student_every=1")
    with torch.no_grad():
        next(job.roles["teacher"].net.parameters()).fill_(math.nan)
    with pytest.raises(DivergedError, match="loss is nan at step 1"):
        list(train(job))


@pytest.mark.parametrize("rollout", ["data", "simulated"])
def test_two_micro_batches_make_the_step_of_one_large_one(rollout, tmp_path, monkeypatch):
    """Through the loop: both phases, so that the critic sees the student that the sum updated."""
    halves = [
        {**BATCH, **{k: BATCH[k][i : i + 1] for k in ("latents", "captions")}} for i in (0, 1)
    ]
    parts = _run(tmp_path / "parts", rollout, "run.accumulate=2")
    parts.step = KEY.step
    numbers = [loop._one_step(parts, halves)]
    monkeypatch.setattr(loop, "StepKey", Joined)  # one lane that draws what the two drew
    whole = _run(tmp_path / "whole", rollout)
    whole.step = KEY.step
    numbers.append(loop._one_step(whole, [BATCH]))
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3) and len(numbers[0]) == 8
    for name in ("student", "critic"):
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
        ("roles.critic.trainable=false", r"roles\.critic\.trainable must be True"),
    ],
)
def test_a_wrong_recipe_is_refused(word, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        finish(tiny("dmd", word), tmp_path)
