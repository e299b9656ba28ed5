"""DMD2's GAN term: its losses, whom it moves, that it survives a resume, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from distill_toys import BATCH, KEY
from dmd_by_hand import (
    GAN,
    critic_gan,
    critic_loss,
    direction,
    made,
    run,
    student_gan,
    student_input,
)
from fastvideo_train import loop
from fastvideo_train.export import load_run
from fastvideo_train.loop import Job, make_method
from rank_runs import losses, small
from tiny_recipes import finish, tiny

from fastvideo.parallel.degrees import ParallelConfig

OTHERS = ("method.args.gan_critic=9.0", "method.args.gan_layers=2")


def _equal(a, b):
    """Bit for bit, through nested states."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


@pytest.mark.parametrize("rollout", ["data", "simulated"])
def test_both_losses_with_the_term_are_the_hand_computed_ones(rollout, tmp_path):
    job = run(tmp_path, rollout, *GAN)
    student, critic = job.method.step(BATCH, job.roles, KEY)
    with torch.no_grad():
        mine, its = (
            made(job, *student_input(job, rollout, phase)) for phase in ("student", "critic")
        )
        fools, sorts = student_gan(job, mine), critic_gan(job, its)
        both = 0.5 * direction(job, mine, 4.0).square().mean() + 0.7 * fools
        wanted = critic_loss(job, its) + 0.3 * sorts
    assert student.roles == ("student",) and critic.roles == ("critic", "discriminator")
    assert float(student.loss.detach()) == pytest.approx(float(both), rel=1e-4)
    assert float(student.metrics["student/gan"]) == pytest.approx(float(fools), rel=1e-4)
    assert float(critic.loss.detach()) == pytest.approx(float(wanted), rel=1e-4)
    assert float(critic.metrics["critic/gan"]) == pytest.approx(float(sorts), rel=1e-4)


def test_a_weight_of_zero_leaves_every_bit_as_without_the_term(tmp_path):
    plain = finish(tiny("dmd"), tmp_path / "plain")
    zero = finish(tiny("dmd", "method.args.gan=0.0", *OTHERS), tmp_path / "zero")
    assert list(zero.roles) == ["student", "teacher", "critic", "text"]
    assert _equal(plain.strategy.state_dict(), zero.strategy.state_dict())


def test_a_new_discriminator_leaves_the_students_first_step_to_dmd(tmp_path):
    """It answers 0 to all: the critic and itself learn from that, the student does not."""
    steps = "run.steps=1", "method.args.student_every=1", "run.dtype=float32"
    plain = finish(tiny("dmd", *steps), tmp_path / "plain")
    with_it = finish(tiny("dmd", *steps, *GAN), tmp_path / "gan")
    students = [job.strategy.state_dict()["student"] for job in (plain, with_it)]
    assert _equal(*students)
    assert float(with_it.roles["discriminator"].net.logit.weight.detach().abs().max()) > 0


def test_each_phase_moves_its_own_networks_and_gives_no_other_a_gradient(tmp_path):
    job = run(tmp_path, "data", *GAN)
    for update in job.method.step(BATCH, job.roles, KEY):
        before = {n: [p.clone() for p in r.net.parameters()] for n, r in job.roles.items()}
        job.strategy.backward(update.roles, update.loss)
        for role in update.roles:
            assert all(g.abs().max() > 0 for g in job.strategy._trained[role].grads.values())
            job.strategy.update(role, step=KEY.step)
        for name, role in job.roles.items():
            same = map(torch.equal, before[name], role.net.parameters())
            assert not any(same) if name in update.roles else all(same), (update.roles, name)
            assert all(p.grad is None for p in role.net.parameters()), (update.roles, name)


def test_the_term_draws_nothing_that_dmd_drew_before(tmp_path):
    """Roles of the same weights make the same two terms of DMD with it and without."""
    with_it, plain = run(tmp_path / "gan", "data", *GAN), run(tmp_path / "plain", "data")
    for name, role in plain.roles.items():
        role.net.load_state_dict(with_it.roles[name].net.state_dict())
    terms = [
        (float(s.metrics["student/direction"]), float(s.loss.detach()), float(c.loss.detach()))
        for job in (with_it, plain)
        for s, c in [list(job.method.step(BATCH, job.roles, KEY))]
    ]
    (direction, student, critic), (wanted, *losses) = terms
    assert direction == wanted
    assert student > losses[0] and critic > losses[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_equals_one_without_interruption_bit_for_bit(dtype, tmp_path):
    recipe = tiny("dmd", *GAN, f"run.dtype={dtype}", "run.accumulate=2")
    straight = finish(recipe, tmp_path / "straight").strategy.state_dict()
    finish(recipe, tmp_path / "stopped", until=3)
    resumed = finish(recipe, tmp_path / "stopped").strategy.state_dict()
    assert list(resumed) == ["student", "critic", "discriminator"]
    assert resumed["discriminator"]["num_updates"] == 6
    assert resumed["discriminator"]["optimizer"]["adamw"]["state"]
    assert _equal(straight, resumed)
    assert "student" in load_run(tmp_path / "stopped").roles, "what an export reads"


@pytest.mark.parametrize("strategy", ["accelerate", "fsdp2"])
def test_two_processes_train_like_one(strategy, ranks, tmp_path):
    words = [*GAN, "method.args.student_every=1"]
    wanted = losses(0, 1, small("dmd", *words), tmp_path / "alone")
    recipe = small("dmd", *words, f"run.strategy={strategy}")
    got, other = ranks(2, losses, recipe, str(tmp_path / "two"))
    assert got == other and [one.keys() for one in got] == [one.keys() for one in wanted]
    for one, two in zip(wanted, got, strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_the_features_are_those_of_half_the_critics_layers_unless_given(tmp_path):
    half, first, both = (
        run(tmp_path / str(i), "data", *GAN, *words)
        for i, words in enumerate([(), ("method.args.gan_layers=1",), OTHERS[1:]])
    )
    terms = [
        float(next(job.method.step(BATCH, job.roles, KEY)).metrics["student/gan"])
        for job in (half, first, both)
    ]
    assert terms[0] == terms[1] != terms[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["method.args.gan_layers=3"],
            "gan_layers 3 is more than the critic's .*; nearest: 2",
        ),
        (["roles.discriminator.config.dim=32"], r"dim 32 is not the channels .*; nearest: 24"),
        (["roles.discriminator.config.heads=2"], "unknown config field 'heads'"),
        (["roles.discriminator.trainable=false"], r"discriminator\.trainable must be True"),
        (["method.args.gan=-1"], "gan -1 .*at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Job.open(tiny("dmd", *GAN, *words), tmp_path)


def test_the_term_needs_its_role_and_whole_sequences():
    with pytest.raises(ValueError, match=r"needs a \[roles.discriminator\] of kind"):
        loop.check(tiny("dmd", GAN[0]), ParallelConfig())
    with pytest.raises(ValueError, match=r"gan 0 needs no roles.discriminator; leave it out"):
        loop.check(tiny("dmd", *GAN, "method.args.gan=0"), ParallelConfig())
    with pytest.raises(ValueError, match="ulysses 2 must be 1; use data or shard"):
        loop.check(tiny("dmd", *GAN), ParallelConfig(ulysses=2))
    assert "discriminator" in make_method(tiny("dmd", *GAN)).wants
    assert "discriminator" not in make_method(tiny("dmd")).wants
