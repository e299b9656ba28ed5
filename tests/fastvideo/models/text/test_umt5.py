"""The UMT5 encoder against transformers."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fastvideo import weights
from fastvideo.models.text.umt5 import ALIASES, Umt5Config, Umt5Encoder

CONFIGS = [
    Umt5Config(300, 16, 8, 24, 1, 2),
    Umt5Config(300, 24, 16, 40, 2, 3),
    Umt5Config(99, 40, 4, 24, 4, 5, relative_attention_num_buckets=16),
    Umt5Config(99, 32, 8, 64, 3, 6, relative_attention_max_distance=40),
    Umt5Config(512, 48, 32, 16, 2, 2, layer_norm_epsilon=1e-3),
    Umt5Config(64, 8, 2, 8, 3, 1, relative_attention_num_buckets=8),
]


def _oracle(config: Umt5Config) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    values = {**dataclasses.asdict(config), "feed_forward_proj": "gated-gelu"}
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**values)).eval()


@pytest.mark.parametrize("length", [1, 7, 300])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.num_layers}x{c.num_heads}x{c.d_kv}")
def test_states_equal_transformers_under_random_weights_and_masks(config: Umt5Config, length: int):
    generator = torch.Generator().manual_seed(length)
    oracle = _oracle(config)
    state = {
        k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in oracle.state_dict().items()
    }
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    oracle.load_state_dict(state)
    ours = weights.build(lambda: Umt5Encoder(config))
    weights.load_into(ours, state, source="transformers", aliases=ALIASES)

    ids = torch.randint(0, config.vocab_size, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, (length + 1) // 2 :] = 0
    mask[2, 1:] = 0
    with torch.no_grad():
        expected, got = oracle(ids, mask).last_hidden_state, ours(ids, mask)
    told = mask.bool()
    assert (got - expected)[told].abs().max() <= 1e-5 * expected[told].abs().max()


def test_names_and_shapes_are_those_that_transformers_saves():
    config = CONFIGS[1]
    ours = {k: v.shape for k, v in Umt5Encoder(config).state_dict().items()}
    theirs = {k: v.shape for k, v in _oracle(config).state_dict().items() if k not in ALIASES}
    assert ours == theirs


def test_the_published_size_has_its_published_number_of_parameters():
    encoder = weights.build(lambda: Umt5Encoder(Umt5Config()))
    assert sum(p.numel() for p in encoder.parameters()) == 5_680_910_336
    assert len(encoder.state_dict()) == 242


def test_padding_changes_no_state_of_a_token():
    encoder = Umt5Encoder(CONFIGS[0])
    ids = torch.randint(0, 300, (1, 40))
    mask = (torch.arange(40) < 9).long()[None]
    with torch.no_grad():
        short, padded = encoder(ids[:, :9], mask[:, :9]), encoder(ids, mask)
    torch.testing.assert_close(padded[:, :9], short, rtol=1e-5, atol=1e-6)


def test_fresh_weights_tell_prompts_apart_and_pass_gradients_to_every_tensor():
    encoder = Umt5Encoder(Umt5Config(276, 192, 32, 512, 3, 6))
    encoder.init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(0, 276, (4, 24))
    states = encoder(ids, torch.ones_like(ids))
    assert (states[0] - states[1]).square().mean() > 0.5
    (states * torch.randn(states.shape)).sum().backward()
    assert not [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]


def test_fresh_weights_are_a_function_of_the_generator():
    one, two = (Umt5Encoder(CONFIGS[0]) for _ in range(2))
    for encoder in (one, two):
        encoder.init_weights(torch.Generator().manual_seed(5))
    assert all(map(torch.equal, one.parameters(), two.parameters()))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"d_mode": 3}, "field 'd_mode'; did you mean 'd_model'"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj 'relu' .* must be 'gated-gelu'"),
    ],
)
def test_a_config_of_another_network_is_refused(entry: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Umt5Config.parse(entry)


def test_a_config_as_transformers_writes_it_is_read():
    transformers = pytest.importorskip("transformers")
    saved = json.loads(
        transformers.UMT5Config(vocab_size=77, d_model=24, num_heads=3).to_json_string()
    )
    assert Umt5Config.parse(saved) == Umt5Config(77, 24, 64, 1024, 8, 3)
