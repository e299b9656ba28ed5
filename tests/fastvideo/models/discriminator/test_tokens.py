"""The discriminator of tokens: what it answers, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from fastvideo.models.discriminator.tokens import Config, Discriminator


def _net(**config):
    torch.manual_seed(0)
    net = Discriminator(Config.parse({"dim": 6, **config}))
    return net


def test_a_new_one_answers_zero_and_can_learn():
    net, x = _net(), torch.randn(3, 5, 6)
    answer = net(x)
    assert answer.shape == (3,) and bool((answer == 0).all())
    answer.sum().backward()
    assert float(net.logit.weight.grad.abs().max()) > 0


def test_a_clips_answer_depends_on_its_tokens_but_not_on_its_batch_or_their_order_or_size():
    net, x = _net(), torch.randn(3, 5, 6)
    torch.nn.init.normal_(net.logit.weight)
    answer = net(x)
    assert len({round(v, 4) for v in answer.tolist()}) == 3
    torch.testing.assert_close(net(x[1:2]), answer[1:2])
    torch.testing.assert_close(net(x.flip(1)), answer)
    torch.testing.assert_close(net(100 * x + 7), answer, rtol=1e-3, atol=1e-4)


def test_it_computes_in_its_own_dtype():
    assert _net().bfloat16()(torch.randn(1, 5, 6)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "needs dim"),
        ({"dim": 4, "wdith": 2}, "field 'wdith'; did you mean 'width'"),
        ({"dim": 0}, "dim 0 and width 128 must be at least 1"),
    ],
)
def test_a_wrong_config_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Config.parse(values)
