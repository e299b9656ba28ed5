"""Operations counted from shapes against those that PyTorch counts when they are executed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
from fastvideo_train import flops
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastvideo import attention, registry
from fastvideo.attention import Dense, Vsa, sparse
from fastvideo.models.dit import wan
from fastvideo.shapes import LatentShape

CONFIG = wan.Config(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    ffn_dim=56,
    in_channels=4,
    out_channels=6,
    text_dim=20,
    freq_dim=16,
)
DENSE = Dense()
CLIP, CLIPS, TEXT = LatentShape(3, 8, 12), 2, 7
TOKENS = 3 * 4 * 6


def network(config: wan.Config = CONFIG) -> wan.DiT:
    net = wan.DiT(config)
    for param in net.parameters():
        torch.nn.init.normal_(param, std=0.1)
    return net


def call(
    net: wan.DiT, *, pattern: attention.Pattern = DENSE, backend: str = "bmm"
) -> Callable[[], torch.Tensor]:
    bmm, own = (registry.module("fastvideo.attention.backends", n) for n in ("bmm", backend))
    layout = attention.plan(pattern, CLIP.tokens(CONFIG.patch_size))
    attend = attention.choice.Attention(own, bmm)
    x = torch.randn(CLIPS, CONFIG.in_channels, CLIP.frames, CLIP.height, CLIP.width)
    cond = wan.Conditioning(torch.randn(CLIPS, TEXT, CONFIG.text_dim))
    t_BT = torch.rand(CLIPS, 1) * 1000
    return lambda: net(x, t_BT, cond, attend=attend, layout=layout)


def executed(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_a_dense_forward_is_counted_to_the_last_operation():
    once = flops.forward(CONFIG, CLIP, Dense(), num_text_tokens=TEXT)
    assert CLIPS * once.total == executed(call(network()))


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_is_twice_forward_but_for_gradients_of_the_inputs(recompute):
    net = network()
    if recompute:
        for layer in net.blocks:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    run = call(net)
    once = flops.forward(CONFIG, CLIP, Dense(), num_text_tokens=TEXT)
    told = CLIPS * flops.learning(once, recompute=recompute)
    patch = TOKENS * CONFIG.dim * 4 * CONFIG.in_channels
    unneeded = 2 * CLIPS * CONFIG.dim * (CONFIG.freq_dim + TEXT * CONFIG.text_dim)
    unneeded += 2 * CLIPS * patch
    assert told - unneeded == executed(lambda: run().square().mean().backward())


def test_a_sparse_forward_is_counted_by_hand_and_by_what_is_executed():
    config = dataclasses.replace(CONFIG, gate_compress=True)
    pattern = Vsa(
        top_k=2, tile=(1, 2, 3)
    )  # twelve whole tiles of six tokens, of which two are seen
    c, f, layers, tiles = 24, 56, 2, 12
    linear = 2 * TOKENS * (4 + 2 + 1) * c * c + 2 * TOKENS * 2 * c * f + 2 * TEXT * 2 * c * c
    pairs = TOKENS * 2 * 6
    attends = 2 * 2 * pairs * c + 2 * 2 * tiles * tiles * c + 2 * 2 * TOKENS * TEXT * c
    outside = 2 * TOKENS * c * 4 * (4 + 6) + 2 * TEXT * (20 + c) * c + 2 * (16 + 7 * c) * c
    by_hand = layers * (linear + attends) + outside

    once = flops.forward(config, CLIP, pattern, num_text_tokens=TEXT)
    assert once.total == by_hand
    with torch.no_grad():
        run = call(network(config), pattern=pattern, backend="gather")
        assert CLIPS * by_hand == executed(run)


def test_uneven_tiles_are_counted_as_each_backend_multiplies_them():
    pattern, grid = Vsa(top_k=2, tile=(2, 4, 4)), CLIP.tokens(CONFIG.patch_size)
    layout = attention.plan(pattern, grid)
    assert layout.tiles is not None and not layout.tiles.is_uniform
    gather, masked = (
        sparse.pairs(layout, registry.module("fastvideo.attention.backends", name))
        for name in ("gather", "masked")
    )
    assert gather[1] == masked[1] == sparse.pairs(layout)[0] < gather[0] <= masked[0] == TOKENS**2
    assert flops.padded_pairs(pattern, grid) == 4 * 32 * 2 * 32


def test_diffusers_executes_as_many_operations():
    pytest.importorskip("diffusers")
    from step_time import peer_model

    with torch.device("meta"):
        net = peer_model(CONFIG)
        x = torch.empty(CLIPS, CONFIG.in_channels, CLIP.frames, CLIP.height, CLIP.width)
        inputs = (x, torch.empty(CLIPS), torch.empty(CLIPS, TEXT, CONFIG.text_dim))
        count = executed(lambda: net(*inputs, return_dict=False))
    once = flops.forward(CONFIG, CLIP, Dense(), num_text_tokens=TEXT)
    assert CLIPS * once.total == count
