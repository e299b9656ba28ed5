"""The denoising loop: guidance, dtypes, noise, cancellation and its bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import pytest
import torch
from torch import Tensor

from fastvideo import attention, rng
from fastvideo.errors import NotFiniteError
from fastvideo.models.dit import wan
from fastvideo.sample import guide, sample
from fastvideo.schedulers import euler, few_step, unipc
from fastvideo.shapes import TokenGrid


@dataclass(frozen=True)
class Target:
    """Conditioning of a toy family: the clean latents themselves, (B, 1, 1, 1, 1)."""

    clean: Tensor

    @classmethod
    def cat(cls, parts: Sequence[Target]) -> Target:
        return cls(torch.cat([p.clean for p in parts]))


class Toy:
    """A denoiser that knows the answer; it records what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Size, torch.dtype, Tensor]] = []

    def __call__(self, x_BCTHW: Tensor, t_BT: Tensor, cond: Target, cache: None = None) -> Tensor:
        self.calls.append((x_BCTHW.shape, x_BCTHW.dtype, t_BT))
        sigma = (t_BT / 1000).clamp(min=1e-3)[:, :, None, None, None]
        return ((x_BCTHW - cond.clean) / sigma).to(x_BCTHW.dtype)


def target(value: float, batch: int = 2) -> Target:
    return Target(torch.full((batch, 1, 1, 1, 1), value))


LATENTS = torch.randn(2, 3, 2, 4, 4, generator=torch.manual_seed(0))
COND, UNCOND = target(2.0), target(-1.0)


def test_guidance_runs_one_forward_of_twice_the_batch_or_two_forwards_alike():
    one, two = Toy(), Toy()
    t = torch.full((2, 1), 500.0)
    batched = guide(one, scale=3.0, cond=COND, uncond=UNCOND, batched=True)(LATENTS, t)
    apart = guide(two, scale=3.0, cond=COND, uncond=UNCOND)(LATENTS, t)
    torch.testing.assert_close(batched, apart)
    assert [shape[0] for shape, *_ in one.calls] == [4]
    assert [shape[0] for shape, *_ in two.calls] == [2, 2]


def test_guidance_goes_from_uncond_past_cond():
    toy, t = Toy(), torch.full((2, 1), 1000.0)
    v = guide(toy, scale=3.0, cond=COND, uncond=UNCOND)(LATENTS, t)
    torch.testing.assert_close(v, LATENTS - (-1.0 + 3.0 * (2.0 - -1.0)))


def test_scale_1_runs_the_conditional_forward_alone():
    toy, t = Toy(), torch.full((2, 1), 1000.0)
    v = guide(toy, scale=1, cond=COND, uncond=UNCOND)(LATENTS, t)
    torch.testing.assert_close(v, LATENTS - 2.0)
    assert len(toy.calls) == 1


def test_guidance_without_a_negative_is_refused():
    with pytest.raises(ValueError, match=r"guidance_scale 5\.0 needs a negative prompt"):
        guide(Toy(), scale=5.0, cond=COND)


def test_model_sees_its_own_dtype_and_one_time_for_each_clip():
    toy = Toy()
    scheduler = euler.Scheduler(shift=5.0)
    steps = sample(
        guide(toy, scale=1, cond=COND), scheduler, latents=LATENTS, num_steps=4,
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert all(s.x.dtype == s.clean.dtype == torch.float32 for s in steps)
    grid = scheduler.grid(4)
    for (_, dtype, t_BT), expected in zip(toy.calls, grid.timesteps, strict=True):
        assert dtype == torch.bfloat16
        assert t_BT.shape == (2, 1)
        assert (t_BT == expected).all()


def test_every_step_carries_its_index_and_the_estimate_of_the_clean_latents():
    velocity = guide(Toy(), scale=1, cond=COND)
    steps = list(sample(velocity, euler.Scheduler(), latents=LATENTS, num_steps=5))
    assert [(s.index, s.total) for s in steps] == [(i, 5) for i in range(5)]
    for step in steps:
        torch.testing.assert_close(step.clean, torch.full_like(LATENTS, 2.0))
    assert torch.equal(steps[-1].x, steps[-1].clean)


def test_a_consumer_that_stops_iterating_stops_the_model():
    toy = Toy()
    steps = sample(guide(toy, scale=1, cond=COND), unipc.Scheduler(), latents=LATENTS, num_steps=50)
    assert len(list(islice(steps, 3))) == 3
    assert len(toy.calls) == 3


@pytest.mark.parametrize("start", [-1, 4, 5])
def test_start_outside_the_run_is_refused_before_the_model_runs(start):
    toy = Toy()
    with pytest.raises(ValueError, match=r"must be a step of 0\.\.3"):
        sample(toy, euler.Scheduler(), latents=LATENTS, num_steps=4, start=start)
    assert not toy.calls


def test_number_of_steps_that_the_scheduler_lacks_is_refused_before_the_model_runs():
    with pytest.raises(ValueError, match="nearest: 3"):
        sample(Toy(), few_step.Scheduler(), latents=LATENTS, num_steps=4)


def _renoised(latents: Tensor, seed: int | Sequence[int]) -> Tensor:
    def shrink(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x

    *_, last = sample(shrink, few_step.Scheduler(), latents=latents, num_steps=3, seed=seed)
    return last.x


def test_a_clip_in_a_batch_gets_the_noise_that_it_gets_alone():
    both = _renoised(LATENTS, (7, 40))
    for b, seed in enumerate((7, 40)):
        assert torch.equal(both[b : b + 1], _renoised(LATENTS[b : b + 1], seed))


def test_one_seed_for_a_batch_counts_up():
    assert torch.equal(_renoised(LATENTS, 7), _renoised(LATENTS, (7, 8)))


def test_renoising_draws_from_the_documented_stream():
    x, *_ = few_step.Scheduler().grid(3).sigmas.tolist(), None
    first = next(iter(sample(
        lambda x, t: 0.5 * x, few_step.Scheduler(), latents=LATENTS[:1], num_steps=3, seed=7
    )))  # fmt: skip
    noise = rng.noise((1, 3, 2, 4, 4), seed=7, purpose="renoise", step=0)
    torch.testing.assert_close(first.x, (1 - x[1]) * first.clean + x[1] * noise)


def test_gradients_flow_through_the_loop_when_the_caller_wants_them():
    weight = torch.ones((), requires_grad=True)
    *_, last = sample(lambda x, t: weight * x, euler.Scheduler(), latents=LATENTS, num_steps=2)
    last.x.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad != 0


def test_noise_is_frozen():
    noise = rng.noise((4,), seed=0, purpose="latents")
    expected = torch.tensor([0.029582, -0.180560, 0.664307, -1.260425])
    torch.testing.assert_close(noise, expected, rtol=0, atol=1e-6)


def _loop(module, device: str, pattern: attention.Pattern) -> Callable[[], list[Tensor]]:
    """Return three steps of a small Wan network, which return what each step left."""
    has_gates = isinstance(pattern, attention.Vsa)
    dims = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "num_layers": 2}
    net = wan.DiT(wan.Config(**dims, text_dim=32, gate_compress=has_gates)).to(device)
    layout = attention.plan(pattern, TokenGrid(3, 8, 8), device)
    need = {"dtype": torch.float32, "device": device, "needs_grad": False, "head_dim": 24}
    attend = attention.select(layout=layout, num_text_tokens=4, **need)
    cond = net.prepare(wan.Conditioning(torch.randn(1, 4, 32).to(device)))
    latents = torch.randn(1, 16, 3, 16, 16).to(device)

    @torch.no_grad()
    def run() -> list[Tensor]:
        velocity = guide(partial(net, attend=attend, layout=layout), scale=1, cond=cond)
        steps = sample(velocity, module.Scheduler(), latents=latents, num_steps=3)
        return [step.x for step in steps]

    return run


MODULES = pytest.mark.parametrize("module", [euler, few_step, unipc])


@MODULES
def test_the_loop_reads_nothing_back_from_its_device(module):
    # tensors on meta hold no numbers: whatever asked for one would raise
    made = _loop(module, "meta", attention.Dense())()
    assert [(x.device.type, x.shape) for x in made] == [("meta", (1, 16, 3, 16, 16))] * 3


@pytest.mark.gpu
@MODULES
@pytest.mark.parametrize("pattern", [attention.Dense(), attention.Vsa(sparsity=0.5)])
def test_the_loop_never_waits_for_a_gpu(module, pattern):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    run = _loop(module, "cuda", pattern)
    wanted = run()  # the first run tunes, and reads the layout
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("scheduler", "first"), [(unipc, 1), (euler, 0), (few_step, 2)])
def test_the_loop_stops_at_the_first_step_whose_latents_are_not_finite(scheduler, first, bad):
    calls = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        v = torch.zeros_like(x)
        v[1, 0, 0, 0, 0] = bad if len(calls) > first else 0.0
        return v

    steps = sample(velocity, scheduler.Scheduler(), latents=LATENTS, num_steps=3)
    done = []
    with pytest.raises(NotFiniteError, match=f"after denoising step {first + 1} of 3"):
        for step in steps:
            done.append(step.index)
    assert (done, len(calls)) == (list(range(first)), first + 1)


@pytest.mark.gpu
def test_on_a_gpu_the_flag_of_a_step_is_read_one_step_late_and_that_of_the_last_in_time():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for first, computed in ((0, 2), (2, 3)):
        calls = []

        def velocity(x: Tensor, t: Tensor, calls=calls, first=first) -> Tensor:
            calls.append(t)
            return torch.full_like(x, float("nan") if len(calls) > first else 0.0)

        steps = sample(velocity, euler.Scheduler(), latents=LATENTS.cuda(), num_steps=3)
        with pytest.raises(NotFiniteError, match=f"after denoising step {first + 1} of 3"):
            list(steps)
        assert len(calls) == computed
