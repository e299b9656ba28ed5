"""The Wan transformer against diffusers in float32, and the properties that its callers rely on."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch

from fastvideo.attention import Attention, Dense, Layout, Vsa, choose, plan, select
from fastvideo.models.dit.wan import KEEP_FLOAT32, Tokens, WanConditioning, WanConfig, WanDiT
from fastvideo.shapes import TokenGrid
from tests.drawn import drawn

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "ffn_dim": 128,
    "num_layers": 2,
    "text_dim": 64,
    "freq_dim": 64,
}


def pair(**changes) -> tuple[Any, WanDiT]:
    diffusers = pytest.importorskip("diffusers")
    ref = diffusers.WanTransformer3DModel(**{**TINY, **changes}).eval()
    drawn(ref)
    ours = WanDiT(WanConfig.parse(dict(ref.config))).eval()
    ours.load_state_dict(ref.state_dict(), strict=True)
    return ref, ours


def inputs(batch: int = 2, shape=(3, 6, 4), text_dim: int = 64, text_len: int = 9, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 16, *shape, generator=g)
    t = torch.rand(batch, 1, generator=g) * 1000
    return x, t, torch.randn(batch, text_len, text_dim, generator=g)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


CONFIGS = [
    (2, 24, 2, (1, 6, 10), 1, True),
    (3, 48, 3, (5, 10, 6), 3, True),
    (5, 96, 1, (21, 6, 4), 1, True),
    (2, 48, 4, (5, 2, 14), 3, True),
    (3, 96, 2, (21, 2, 6), 1, False),
    (5, 24, 3, (1, 18, 10), 3, True),
    (2, 96, 1, (5, 6, 6), 1, False),
]


@pytest.mark.parametrize("heads, head_dim, layers, shape, batch, cross_norm", CONFIGS)
def test_float32_forward_and_gradients_equal_diffusers(
    heads, head_dim, layers, shape, batch, cross_norm
):
    ref, ours = pair(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        cross_attn_norm=cross_norm,
    )
    x, t, text = inputs(batch, shape)
    expected = ref(x, t[:, 0], text, return_dict=False)[0]
    actual = ours(x, t, WanConditioning(text))
    assert relative(actual, expected) <= 1e-5

    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    expected.mul(direction).sum().backward()
    actual.mul(direction).sum().backward()
    theirs = dict(ref.named_parameters())
    for name, p in ours.named_parameters():
        assert relative(p.grad, theirs[name].grad) <= 1e-4, name


@pytest.mark.parametrize("t", [0.0, 1.0, 437.5, 999.0, 1000.0])
def test_float32_forward_equals_diffusers_at_any_time(t):
    ref, ours = pair()
    x, _, text = inputs(1)
    with torch.no_grad():
        expected = ref(x, torch.tensor([t]), text, return_dict=False)[0]
        assert relative(ours(x, torch.tensor([[t]]), WanConditioning(text)), expected) <= 1e-5


def test_per_frame_times_equal_diffusers_per_token_times():
    ref, ours = pair()
    x, _, text = inputs(2, (3, 4, 6))
    t_BT = torch.tensor([[0.0, 500.0, 1000.0], [900.0, 20.0, 321.0]])
    with torch.no_grad():
        expected = ref(x, t_BT.repeat_interleave(6, dim=1), text, return_dict=False)[0]
        assert relative(ours(x, t_BT, WanConditioning(text)), expected) <= 1e-5


@pytest.mark.parametrize("pattern", [Dense(), Vsa(top_k=1, tile=(1, 2, 2))])
def test_features_are_what_the_first_layers_hand_on_in_grid_order(pattern):
    _, ours = pair(num_layers=3)
    x, t, text = inputs(2, (2, 8, 8))
    layout = plan(pattern, TokenGrid(2, 4, 4))
    attend = select(
        "auto",
        layout=layout,
        num_text_tokens=9,
        dtype=torch.float32,
        device=torch.device("cpu"),
        needs_grad=False,
        head_dim=24,
    )
    told = {"attend": attend, "layout": layout}
    with torch.no_grad():
        tokens = ours.embed(x, t, WanConditioning(text), layout=layout)
        for num, block in enumerate(ours.blocks, start=1):
            tokens = block(tokens, attend, tokens.cond.text_BLC)
            got = ours.features(x, t, WanConditioning(text), num_layers=num, **told)
            assert torch.equal(got, layout.restore(tokens.x_BLC, 1))
        prepared = ours.features(x, t, ours.prepare(WanConditioning(text)), num_layers=3, **told)
        torch.testing.assert_close(prepared, got)


def test_equal_per_frame_times_equal_one_time_per_clip():
    _, ours = pair()
    x, t, text = inputs()
    with torch.no_grad():
        one, many = (ours(x, times, WanConditioning(text)) for times in (t, t.expand(-1, 3)))
    assert relative(many, one) <= 1e-5


def test_modulation_of_one_time_is_not_spread_over_tokens():
    _, ours = pair()
    x, t, text = inputs()
    tokens = ours.embed(x, t, WanConditioning(text))
    assert tokens.modulation_BT6C.shape == (2, 1, 6, 48)
    assert tokens.per_token(tokens.time_BTC).shape == (2, 1, 48)


def test_a_layer_is_handed_the_keys_and_values_of_its_own_alone():
    ours, (x, t, text) = pair(num_layers=3)[1], inputs()
    seen = []
    for block in ours.blocks:
        block.register_forward_pre_hook(lambda _, given: seen.append(given))
    with torch.no_grad():
        cond = ours.prepare(WanConditioning(text))
        ours(x, t, cond)
    assert [given[2] for given in seen] == list(cond.keys_values)
    assert [given[0].cond.keys_values for given in seen] == [()] * 3


def test_prepared_text_gives_the_same_velocity_bit_for_bit():
    _, ours = pair()
    x, t, text = inputs()
    with torch.no_grad():
        prepared = ours.prepare(WanConditioning(text))
        assert torch.equal(ours(x, t, prepared), ours(x, t, WanConditioning(text)))


def test_joined_conditionings_equal_separate_calls():
    _, ours = pair()
    x, t, text = inputs()
    parts = [WanConditioning(text[:1]), WanConditioning(text[1:])]
    with torch.no_grad():
        apart = torch.cat([ours(x[i : i + 1], t[i : i + 1], p) for i, p in enumerate(parts)])
        plain = ours(x, t, WanConditioning.cat(parts))
        prepared = ours(x, t, WanConditioning.cat([ours.prepare(p) for p in parts]))
        half = ours(x, t, WanConditioning.cat([ours.prepare(parts[0]), parts[1]]))
    for joined in (plain, prepared, half):
        assert relative(joined, apart) <= 1e-5


def test_the_order_of_tokens_is_data():
    _, ours = pair()
    x, _, text = inputs(2, (3, 4, 6))
    t_BT = torch.tensor([[0.0, 500.0, 1000.0], [900.0, 20.0, 321.0]])
    grid = TokenGrid(3, 2, 3)
    shuffled = Layout(Dense(), grid, torch.randperm(18, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for times in (t_BT, t_BT[:, :1]):
            expected = ours(x, times, WanConditioning(text))
            actual = ours(x, times, WanConditioning(text), layout=shuffled)
            assert relative(actual, expected) <= 1e-5


def test_a_chosen_backend_serves_self_and_cross_attention():
    _, ours = pair()
    x, t, text = inputs()
    calls = []

    def attend(q, k, v, *, layout=None, gate_BLHD=None):
        assert gate_BLHD is None, "dense attention has no gates"
        calls.append((k.shape[1], layout is None))
        return backend.attend(q, k, v, layout)

    layout = plan(Dense(), TokenGrid(3, 3, 2))
    backend = choose(
        "bmm", layout=layout, dtype=torch.float32, device="cpu", needs_grad=False, head_dim=24
    )
    with torch.no_grad():
        actual = ours(x, t, WanConditioning(text), attend=attend, layout=layout)
        expected = ours(x, t, WanConditioning(text))
    assert relative(actual, expected) <= 1e-5
    assert calls == [(18, False), (9, True)] * 2


def cast(module: torch.nn.Module) -> torch.nn.Module:
    module = copy.deepcopy(module)
    for name, p in module.named_parameters():
        if not any(fragment in name for fragment in KEEP_FLOAT32):
            p.data = p.data.bfloat16()
    return module


def test_bfloat16_error_is_not_above_that_of_diffusers():
    ref, ours = pair(num_attention_heads=3, attention_head_dim=48, num_layers=4)
    half_ref, half = cast(ref), cast(ours)
    theirs, mine = 0.0, 0.0
    with torch.no_grad():
        for seed in range(4):
            x, t, text = inputs(2, (3, 6, 8), seed=seed)
            oracle = ref(x, t[:, 0], text, return_dict=False)[0]
            low, low_text = x.bfloat16(), text.bfloat16()
            theirs += (half_ref(low, t[:, 0], low_text, return_dict=False)[0] - oracle).norm() ** 2
            mine += (half(low, t, WanConditioning(low_text)).float() - oracle).norm() ** 2
    assert mine**0.5 <= 1.5 * theirs**0.5


def test_velocity_has_the_dtype_of_the_latents():
    _, ours = pair()
    half = cast(ours)
    x, t, text = inputs()
    with torch.no_grad():
        assert half(x, t, WanConditioning(text)).dtype == torch.float32
        assert half(x.bfloat16(), t, WanConditioning(text)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "dims, parameters, tensors",
    [
        ({"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}, 1_418_996_800, 825),
        ({}, 14_288_491_584, 1095),
    ],
    ids=["1.3B", "14B"],
)
def test_published_sizes_have_the_published_counts(dims, parameters, tensors):
    with torch.device("meta"):
        model = WanDiT(WanConfig(**dims))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_fresh_weights_predict_zero_and_follow_their_generator():
    model = WanDiT(WanConfig.parse(TINY))
    model.init_weights(torch.Generator().manual_seed(5))
    first = copy.deepcopy(model.state_dict())
    model.init_weights(torch.Generator().manual_seed(5))
    assert all(torch.equal(v, first[k]) for k, v in model.state_dict().items())
    model.init_weights(torch.Generator().manual_seed(6))
    assert not torch.equal(model.state_dict()["scale_shift_table"], first["scale_shift_table"])
    x, t, text = inputs()
    assert model(x, t, WanConditioning(text)).abs().max() == 0


def test_init_weights_leaves_no_parameter_as_it_found_it():
    model = WanDiT(WanConfig.parse(TINY))
    for p in model.parameters():
        p.data.fill_(float("nan"))
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())


def test_compiles_without_a_graph_break():
    _, ours = pair()
    x, t, text = inputs(1)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    out = compiled(x, t, WanConditioning(text))
    out.square().sum().backward()
    with torch.no_grad():
        assert relative(out, ours(x, t, WanConditioning(text))) <= 1e-5
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("key", ["image_dim", "added_kv_proj_dim", "pos_embed_seq_len"])
def test_image_conditioning_is_refused_by_name(key):
    with pytest.raises(ValueError, match=rf"{key} 1280.*only text-to-video"):
        WanConfig.parse({**TINY, key: 1280})


def test_an_unknown_key_is_refused_with_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"'num_layer'.*did you mean 'num_layers'"):
        WanConfig.parse({**TINY, "num_layer": 2})


def test_a_config_survives_its_dictionary():
    config = WanConfig.parse(
        {**TINY, "_class_name": "WanTransformer3DModel", "window_size": [-1, -1]}
    )
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert WanConfig.parse(values) == config
    diffusers = pytest.importorskip("diffusers")
    stock = {k for k in diffusers.WanTransformer3DModel(**TINY).config if not k.startswith("_")}
    assert values.keys() == stock | {"gate_compress"}


@pytest.mark.parametrize(
    "key, value", [("attention_head_dim", 25), ("freq_dim", 63), ("qk_norm", "x")]
)
def test_illegal_dims_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        WanConfig.parse({**TINY, key: value})


def test_a_grid_beyond_the_position_table_is_refused():
    _, ours = pair(rope_max_seq_len=4)
    x, t, text = inputs(1, (5, 2, 2))
    with pytest.raises(ValueError, match="rope_max_seq_len"):
        ours(x, t, WanConditioning(text))


def test_tokens_carry_their_frame():
    _, ours = pair()
    x, t, text = inputs(1, (3, 4, 2))
    tokens = ours.embed(x, t, WanConditioning(text))
    assert isinstance(tokens, Tokens)
    assert tokens.frame_L.tolist() == [0, 0, 1, 1, 2, 2]


def test_frames_of_a_longer_clip_know_how_far_apart_they_stand():
    net = pair()[1]
    x, t, text = inputs(shape=(3, 6, 4))
    cond = WanConditioning(text)

    def velocity(*frames: int) -> torch.Tensor:
        return net(x, t, cond, frame_T=torch.tensor(frames))

    first = net(x, t, cond)
    assert torch.equal(velocity(0, 1, 2), first)
    torch.testing.assert_close(velocity(7, 8, 9), first, atol=1e-5, rtol=1e-4)
    assert relative(velocity(0, 4, 8), first) > 1e-3


def gated(ours: WanDiT, std: float) -> WanDiT:
    """The same network with gates, whose weights are drawn with this standard deviation."""
    net = WanDiT(dataclasses.replace(ours.config, gate_compress=True))
    net.load_state_dict(ours.state_dict(), strict=False)
    for name, parameter in net.named_parameters():
        if "to_gate_compress" in name:
            torch.nn.init.normal_(parameter, std=std)
    return net.eval()


def vsa(**changes) -> Layout:
    return plan(Vsa(**{"tile": (2, 2, 2), **changes}), TokenGrid(3, 3, 2))


def test_without_sparsity_and_with_gates_of_zero_vsa_is_dense():
    _, ours = pair()
    x, t, text = inputs()
    cond, attend = WanConditioning(text), reference_attention(vsa(sparsity=0.0))
    with torch.no_grad():
        expected = ours(x, t, cond)
        for net in (ours, gated(ours, std=0.0)):  # no gates, or gates that are born zero
            actual = net(x, t, cond, attend=attend, layout=vsa(sparsity=0.0))
            assert relative(actual, expected) <= 1e-5


def test_gates_add_the_coarse_branch_and_learn():
    _, ours = pair()
    x, t, text = inputs()
    net, layout = gated(ours, std=0.1), vsa(sparsity=0.5)
    attend = reference_attention(layout)
    v = net(x, t, WanConditioning(text), attend=attend, layout=layout)
    plain_v = gated(ours, std=0.0)(x, t, WanConditioning(text), attend=attend, layout=layout)
    assert relative(v, plain_v) > 1e-3
    v.square().mean().backward()
    for block in net.blocks:
        assert block.to_gate_compress.weight.grad.abs().max() > 0


def test_a_network_with_gates_is_never_run_without_a_layout():
    net = gated(pair()[1], std=0.0)
    x, t, text = inputs()
    with pytest.raises(AssertionError, match="given its layout"):
        net(x, t, WanConditioning(text))


def reference_attention(layout: Layout) -> Attention:
    return select(
        "reference",
        layout=layout,
        num_text_tokens=9,
        dtype=torch.float32,
        device="cpu",
        needs_grad=True,
        head_dim=24,
    )
