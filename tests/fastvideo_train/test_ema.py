"""The moving average of weights."""

from __future__ import annotations

import torch
from fastvideo_train.ema import Ema


def test_a_constant_weight_is_its_own_average():
    masters = {"w": torch.full((3,), 2.0)}
    ema = Ema(masters, 0.99)
    for _ in range(5):
        ema.update(masters)
    assert torch.equal(ema.weights["w"], masters["w"])


def test_early_averages_follow_closely_and_late_ones_with_the_decay():
    masters = {"w": torch.zeros(1)}
    ema = Ema(masters, 0.9)
    masters["w"].fill_(1.0)
    ema.update(masters)
    assert ema.weights["w"].item() == torch.tensor(0.9).item()  # first decay is 1 / 10
    for _ in range(200):
        ema.update(masters)
    masters["w"].fill_(0.0)
    before = ema.weights["w"].item()
    ema.update(masters)
    torch.testing.assert_close(ema.weights["w"].item(), 0.9 * before)


def test_a_restored_average_continues_bit_for_bit():
    masters = {"w": torch.arange(4.0)}
    one, two = Ema(masters, 0.99), Ema({"w": torch.zeros(4)}, 0.99)
    masters["w"].add_(1.0)
    one.update(masters)
    two.load_state_dict(one.state_dict())
    masters["w"].mul_(3.0)
    one.update(masters)
    two.update(masters)
    assert torch.equal(one.weights["w"], two.weights["w"])


def test_the_average_is_no_alias_of_the_weights():
    masters = {"w": torch.zeros(2)}
    ema = Ema(masters, 0.5)
    masters["w"].fill_(7.0)
    assert torch.equal(ema.weights["w"], torch.zeros(2))
