"""Layers against the plainest form of their formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvideo.layers.norm import LayerNorm, RMSNorm, modulated_norm
from fastvideo.layers.rope import axis_sizes, rotate, turns
from fastvideo.layers.timestep import sinusoid
from fastvideo.shapes import TokenGrid

CPU = torch.device("cpu")


@pytest.mark.parametrize("head_dim", [24, 48, 64, 96, 128])
def test_turns_equal_those_of_diffusers_in_float32(head_dim):
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    cos, sin = wan.WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(torch.empty(1, 1, 21, 12, 20))
    ours = turns(TokenGrid(21, 6, 10), head_dim=head_dim, device=CPU)
    assert sum(axis_sizes(head_dim)) == head_dim
    torch.testing.assert_close(ours[..., 0], cos[0, :, 0, 0::2], atol=2e-7, rtol=0)
    torch.testing.assert_close(ours[..., 1], sin[0, :, 0, 0::2], atol=2e-7, rtol=0)


def test_frames_of_a_longer_clip_keep_its_positions():
    whole = turns(TokenGrid(6, 2, 3), head_dim=24, device=CPU)
    tail = turns(TokenGrid(4, 2, 3), head_dim=24, device=CPU, frame_T=torch.arange(2, 6))
    assert torch.equal(whole[12:], tail)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    q, k = torch.randn(2, 1, 1, 2, 24)
    turn = turns(TokenGrid(9, 1, 1), head_dim=24, device=CPU)
    q_L, k_L = (rotate(x.expand(1, 9, 2, 24), turn)[0] for x in (q, k))
    torch.testing.assert_close(q_L.norm(dim=-1), q[0].norm(dim=-1).expand(9, 2))
    scores = torch.einsum("lhd,shd->hls", q_L, k_L)
    torch.testing.assert_close(scores[:, 1:, 1:], scores[:, :-1, :-1], atol=1e-4, rtol=1e-4)


def test_compiled_rotation_equals_the_eager_one_forward_and_backward():
    x = torch.randn(2, 12, 2, 24, requires_grad=True)
    turn = turns(TokenGrid(3, 2, 2), head_dim=24, device=CPU)
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    weight = torch.randn(x.shape)
    results = []
    for f in (rotate, compiled):
        out = f(x, turn)
        results.append((out, *torch.autograd.grad((out * weight).sum(), x)))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_modulated_norm_is_a_norm_then_scale_and_shift(batch, tokens):
    x, (shift, scale) = torch.randn(batch, 5, 8), torch.randn(2, batch, tokens, 8)
    expected = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(modulated_norm(x, shift=shift, scale=scale, eps=1e-6), expected)


def test_a_layer_norm_with_float32_weights_serves_bfloat16():
    norm = LayerNorm(8, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 8)
    out = norm(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), norm(x), atol=0.1, rtol=0.05)


def test_an_rms_norm_equals_the_library_function():
    norm = RMSNorm(16, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-6))


def test_the_sinusoid_equals_that_of_diffusers():
    t = torch.tensor([0.0, 0.5, 437.25, 999.0, 1000.0])
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    expected = embeddings.get_timestep_embedding(
        t, 64, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    torch.testing.assert_close(sinusoid(t, 64), expected, atol=1e-6, rtol=0)
    assert torch.equal(sinusoid(t.view(5, 1), 64)[:, 0], sinusoid(t, 64))
