"""AdamW, Muon and their schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from fastvideo_train.optim import Muon, Optimizer, is_matrix, orthogonalise, rate
from fastvideo_train.recipe import MuonSpec, OptimSpec


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 8, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(x).float())
    assert values.min() > 0.4 and values.max() < 1.4


def test_orthogonalising_keeps_the_singular_directions():
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity
    got = orthogonalise(x[None])[0].float()
    assert cosine(got.flatten(), (u @ vh).flatten(), dim=0) > 0.95


def test_muon_steps_have_the_size_of_the_update_scale():
    weight = torch.nn.Parameter(torch.zeros(16, 4, 3, 3, 3))
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        Muon({"w": weight}, MuonSpec(lr=0.1)).step(0.5)
    values = torch.linalg.svdvals(weight.detach().reshape(16, -1))
    expected = 0.1 * 0.5 * 0.2 * 108**0.5
    torch.testing.assert_close(values.mean(), torch.tensor(expected), rtol=0.2, atol=0)


def test_muon_stacks_equal_shapes_without_mixing_them():
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(8, 12, generator=generator) for _ in range(3)]

    def stepped(chosen: list[int]) -> list[torch.Tensor]:
        params = {str(i): torch.nn.Parameter(torch.zeros(8, 12)) for i in chosen}
        for i in chosen:
            params[str(i)].grad = grads[i]
        with torch.no_grad():
            Muon(params, MuonSpec()).step(1.0)
        return [p.detach() for p in params.values()]

    together, alone = stepped([0, 1, 2]), [stepped([i])[0] for i in range(3)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-4)


def test_muon_leaves_first_last_embedding_and_one_dimensional_tensors_to_adamw():
    ends = {"first": "stem.weight", "last": "out.weight"}
    assert is_matrix("block.conv.weight", (8, 4, 3, 3, 3), **ends)
    for name, shape in [
        ("stem.weight", (8, 4)),
        ("out.weight", (8, 4)),
        ("shared.weight", (99, 8)),
        ("block.bias", (8,)),
        ("norm.gamma", (8, 1, 1, 1)),
        ("block.scale_shift_table", (1, 6, 8)),
    ]:
        assert not is_matrix(name, shape, **ends)


def test_the_schedule_warms_up_and_falls_to_its_floor():
    spec = OptimSpec(lr=1.0, warmup=4, floor=0.1)
    rates = [rate(spec, step, 104) for step in range(104)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[54] == pytest.approx(0.55)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rate(spec, 104, 104) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_role_of_every_fifth_step_falls_from_where_its_own_warm_up_ended(schedule):
    """30 updates, which end with step 150 of 500; then as a run of 350 steps without warm-up."""
    spec = OptimSpec(lr=1.0, warmup=30, schedule=schedule)
    turns = range(4, 500, 5)
    rates = [rate(spec, step, 500, num_updates=n) for n, step in enumerate(turns)]
    assert rates[:30] == [(n + 1) / 30 for n in range(30)] and rates[30] > 0.98
    rest = OptimSpec(lr=1.0, schedule=schedule)
    assert rates[30:] == [rate(rest, step - 150, 350) for step in turns[30:]]
    assert rates[29:] == sorted(rates[29:], reverse=True)
    steepest = max(a - b for a, b in itertools.pairwise(rates))
    assert steepest < 0.03, "no jump after the warm-up"
    assert rates[-1] == pytest.approx(spec.floor, abs=0.02)


@pytest.mark.parametrize("warmup", [0, 1, 7, 60])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_role_of_every_step_has_the_schedule_of_the_run_bit_for_bit(schedule, warmup):
    spec = OptimSpec(lr=1.0, warmup=warmup, schedule=schedule)
    for step in range(101):
        past = step - warmup
        done = min(1.0, max(0, past) / max(1, 100 - warmup))
        falls = {"cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "linear": 1.0 - done}
        wanted = (
            (step + 1) / warmup
            if past < 0
            else spec.floor + (1.0 - spec.floor) * falls[schedule]
            if schedule in falls
            else 1.0
        )
        assert rate(spec, step, 100) == rate(spec, step, 100, num_updates=step) == wanted


def test_a_constant_schedule_stays():
    spec = OptimSpec(lr=1.0, schedule="constant")
    assert {rate(spec, step, 10) for step in range(12)} == {1.0}


def _masters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"in.weight": (6, 5), "mid.weight": (6, 6), "mid.bias": (6,), "out.weight": (5, 6)}
    return {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def _run(optimizer: Optimizer, masters: dict[str, torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for master in masters.values():
            master.grad = torch.randn(master.shape, generator=generator)
        with torch.no_grad():
            optimizer.step(step, 10)


def test_a_restored_optimizer_continues_bit_for_bit():
    spec = OptimSpec(lr=0.1, weight_decay=0.1, muon=MuonSpec(lr=0.1))
    straight = _masters()
    _run(Optimizer(straight, spec), straight, range(6))

    first = _masters()
    before = Optimizer(first, spec)
    _run(before, first, range(3))
    second = {n: torch.nn.Parameter(p.detach().clone()) for n, p in first.items()}
    after = Optimizer(second, spec)
    after.load_state_dict(before.state_dict())
    _run(after, second, range(3, 6))

    assert after.num_updates == 6 and Optimizer(_masters(), spec).num_updates == 0
    assert after.muon_names == ["mid.weight"]
    for name in straight:
        assert torch.equal(straight[name], second[name]), name


def test_muon_state_of_other_matrices_is_refused():
    small = Muon({"w": torch.nn.Parameter(torch.zeros(2, 2))}, MuonSpec())
    large = Muon({"w": torch.nn.Parameter(torch.zeros(4, 4))}, MuonSpec())
    with pytest.raises(ValueError, match="other shapes"):
        small.load_state_dict(large.state_dict())
