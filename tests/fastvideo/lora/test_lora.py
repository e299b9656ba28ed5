"""LoRAs: one result from every spelling, exact sums, exact removal, and refusals by name."""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_loras import ALPHA, KINDS, RANK, original, pairs, spelled, write, write_as
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastvideo import model as models
from fastvideo.lora import Loras, Use, fit
from fastvideo.lora.file import LowRank, read, save
from fastvideo.models.dit.wan import WanDiT


@pytest.fixture
def net(tiny_folder: Path) -> WanDiT:
    loaded: WanDiT = models.load(tiny_folder, dtype="float32", parts=("dit",)).dit
    return loaded


def weights_of(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Tell whether weights are equal bit for bit, which `torch.equal` says of -0.0 and 0.0 too."""
    return a.keys() == b.keys() and all(
        torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a
    )


def one(path: Path, strength: float = 1.0) -> list[Use]:
    return [Use(path, strength)]


def test_every_spelling_gives_the_same_weights(net: WanDiT, tmp_path: Path):
    maps, results = pairs(net), {}
    for kind in KINDS:
        loras = Loras()
        loras.use(net, one(write_as(kind, tmp_path, maps), 0.7))
        results[kind] = weights_of(net)
        loras.use(net, [])
    first = results.pop("diffusers")
    assert all(same(first, other) for other in results.values())
    changed = {
        n.removesuffix(".weight") for n, w in net.state_dict().items() if (w != first[n]).any()
    }
    assert changed == set(maps)


@pytest.mark.parametrize(
    "module",
    [
        *("transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.attn1.to_q"),
        "lora_transformer_transformer_blocks_0_attn1_to_q",
    ],
)
def test_blocks_of_another_architecture_are_not_taken_for_ours(
    net: WanDiT, tmp_path: Path, module: str
):
    down, up = (torch.ones(2, net.config.dim), torch.ones(net.config.dim, 2))
    file = tmp_path / "other.safetensors"
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, file)
    with pytest.raises(ValueError, match="other"):
        Loras().use(net, one(file))


@pytest.mark.parametrize("kind", ["comfy", "kohya"])
def test_diffusers_own_conversion_means_the_same_modules_and_products(
    kind: str, net: WanDiT, tmp_path: Path
):
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    convert = {
        "comfy": utils._convert_non_diffusers_wan_lora_to_diffusers,
        "kohya": utils._convert_musubi_wan_lora_to_diffusers,
    }[kind]
    maps = pairs(net)
    given = {name: tensor.clone() for name, tensor in spelled(kind, maps)[0].items()}
    theirs = convert(given)  # in place, some of it
    path = write(tmp_path / "theirs.safetensors", theirs)
    loras, weights = Loras(), []
    for file in (path, write_as(kind, tmp_path, maps)):
        loras.use(net, one(file))
        weights.append(weights_of(net))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-5, atol=1e-6)
    module = "blocks.1.ffn.net.2"
    a, b = (theirs[f"transformer.{module}.lora_{x}.weight"].double() for x in "AB")
    loras.use(net, [])
    true = net.state_dict()[f"{module}.weight"].double() + b @ a
    torch.testing.assert_close(weights[1][f"{module}.weight"].double(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", [1.0, -0.4, 2.5])
def test_a_strength_adds_that_much_of_alpha_over_rank_times_b_a(
    strength: float, net: WanDiT, tmp_path: Path
):
    maps, before = pairs(net), weights_of(net)
    Loras().use(net, one(write_as("comfy", tmp_path, maps), strength))
    after = net.state_dict()
    for name, (a, b) in maps.items():
        change = strength * ALPHA / RANK * (b.double() @ a.double())
        true = before[f"{name}.weight"].double() + change
        error = (after[f"{name}.weight"].double() - true).abs().max()
        assert error < 1e-6 * true.abs().max()
        assert (after[f"{name}.weight"].double() - before[f"{name}.weight"]).abs().max() > 1e-3


def test_in_bfloat16_the_sum_is_rounded_once(tiny_folder: Path, net: WanDiT, tmp_path: Path):
    low = models.load(tiny_folder, dtype="bfloat16", parts=("dit",)).dit
    base, maps = weights_of(low), pairs(net)
    loras = Loras()
    loras.use(low, one(write_as("diffusers", tmp_path, maps), 0.5))
    for name, (a, b) in maps.items():
        true = base[f"{name}.weight"].double() + 0.5 * ALPHA / RANK * (b.double() @ a.double())
        got = low.state_dict()[f"{name}.weight"]
        assert got.dtype == torch.bfloat16
        near = torch.nextafter(
            true.bfloat16(), got
        )  # a tie within float32's error may go either way
        assert bool(((got == true.bfloat16()) | (got == near)).all())
        assert (got == true.bfloat16()).double().mean() > 0.999
    loras.use(low, [])
    assert same(base, low.state_dict())


def test_strength_zero_changes_no_bit(net: WanDiT, tmp_path: Path):
    with torch.no_grad():
        net.blocks[0].attn1.to_q.weight[0, 0] = -0.0
    before = weights_of(net)
    Loras().use(net, one(write_as("diffusers", tmp_path, pairs(net)), 0.0))
    assert same(before, net.state_dict())


def test_loading_unloading_and_loading_again_is_exact(net: WanDiT, tmp_path: Path):
    before, loras = weights_of(net), Loras()
    use = one(write_as("kohya", tmp_path, pairs(net)), 0.3)
    loras.use(net, use)
    loaded = weights_of(net)
    assert not same(before, loaded)
    loras.use(net, [])
    assert same(before, net.state_dict())
    loras.use(net, use)
    assert same(loaded, net.state_dict())
    loras.use(net, one(use[0].path, 0.9))
    loras.use(net, use)
    assert same(loaded, net.state_dict()), "another strength starts from the weights without any"


def test_two_loras_add_and_each_can_go_alone(net: WanDiT, tmp_path: Path):
    before, loras = weights_of(net), Loras()
    maps = [pairs(net, seed=1), pairs(net, seed=2, only=("attn2",))]
    files = [write_as("diffusers", tmp_path / str(i), m) for i, m in enumerate(maps)]
    both = [Use(files[0], 0.5), Use(files[1], -2.0)]
    loras.use(net, both)
    after = net.state_dict()
    for name in maps[0]:
        true = before[f"{name}.weight"].double()
        for use, own in zip(both, maps, strict=True):
            if name in own:
                a, b = own[name]
                true = true + use.strength * ALPHA / RANK * (b.double() @ a.double())
        torch.testing.assert_close(after[f"{name}.weight"].double(), true, rtol=1e-5, atol=1e-6)
    loras.use(net, both[:1])
    alone = weights_of(net)
    loras.use(net, [])
    Loras().use(net, both[:1])
    assert same(alone, net.state_dict())


def test_whole_changes_of_weight_bias_norm_and_modulation_are_added(net: WanDiT, tmp_path: Path):
    before = weights_of(net)
    aims = {
        "diffusion_model.head.head.diff": "proj_out.weight",
        "diffusion_model.blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "diffusion_model.blocks.1.self_attn.norm_k.diff": "blocks.1.attn1.norm_k.weight",
        "diffusion_model.blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "diffusion_model.blocks.1.diff_m": "blocks.1.scale_shift_table",
        "diffusion_model.head.diff_m": "scale_shift_table",
        "diffusion_model.blocks.0.modulation.diff": "blocks.0.scale_shift_table",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
    }
    tensors = {key: torch.randn(before[name].shape) for key, name in aims.items()}
    Loras().use(net, one(write(tmp_path / "a.safetensors", tensors), 0.5))
    after = net.state_dict()
    for key, name in aims.items():
        torch.testing.assert_close(after[name], before[name] + 0.5 * tensors[key])
    for name in before.keys() - aims.values():
        assert torch.equal(after[name], before[name])


def test_a_bias_of_lora_b_is_scaled_and_a_convolution_has_low_rank_too(net: WanDiT, tmp_path: Path):
    before = weights_of(net)
    weight = before["patch_embedding.weight"]
    down, up = torch.randn(2, *weight.shape[1:]), torch.randn(len(weight), 2, 1, 1, 1)
    (a, b), bias = pairs(net)["blocks.0.ffn.net.2"], torch.randn(net.config.dim)
    tensors = {
        "diffusion_model.patch_embedding.lora_down.weight": down,
        "diffusion_model.patch_embedding.lora_up.weight": up,
        "diffusion_model.blocks.0.ffn.2.lora_A.weight": a,
        "diffusion_model.blocks.0.ffn.2.lora_B.weight": b,
        "diffusion_model.blocks.0.ffn.2.lora_B.bias": bias,
        "diffusion_model.blocks.0.ffn.2.alpha": torch.tensor(ALPHA),
    }
    Loras().use(net, one(write(tmp_path / "a.safetensors", tensors)))
    after = net.state_dict()
    true = weight + torch.einsum("or,rithw->oithw", up.flatten(1), down)
    torch.testing.assert_close(after["patch_embedding.weight"], true)
    name = "blocks.0.ffn.net.2.bias"
    torch.testing.assert_close(after[name], before[name] + ALPHA / RANK * bias)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"ffn.net.2": 2}}, 2.0),
    ],
)
def test_alpha_comes_from_the_config_in_the_header(config: dict, scale: float, tmp_path: Path):
    name = "transformer.blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 3), f"{name}.lora_B.weight": torch.ones(5, 4)}
    inner = {f"transformer.{key}": value for key, value in config.items()}
    header = {"lora_adapter_metadata": json.dumps(inner)} if config else {}
    file = read(write(tmp_path / "a.safetensors", tensors, header))
    assert file.modules["blocks.0.attn1.to_q"].scale == scale


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lora_alpha": "16"}, "alpha of lora_alpha must be a finite number, not '16'"),
        ({"lora_alpha": 4, "alpha_pattern": {"to_q": [2]}}, "alpha of to_q must be"),
        ({"lora_alpha": float("nan")}, "must be a finite number, not nan"),
        ({"alpha_pattern": {"to_q(": 2}}, r"alpha_pattern 'to_q\('"),
        ({"alpha_pattern": ["to_q"]}, "alpha_pattern must be an object"),
    ],
)
def test_an_alpha_that_is_no_number_is_named(config: dict, words: str, tmp_path: Path):
    header = {"lora_adapter_metadata": json.dumps(config)}
    with pytest.raises(ValueError, match=words):
        read(write(tmp_path / "a.safetensors", _pair(), header))


def test_a_saved_lora_has_alpha_equal_to_its_rank_and_reads_back(net: WanDiT, tmp_path: Path):
    maps = pairs(net)
    low = {name: LowRank(a, b, ALPHA / RANK) for name, (a, b) in maps.items()}
    path = save(tmp_path / "ours.safetensors", low, notes={"base_model": "tiny"})
    weights = []
    for file in (path, write_as("diffusers", tmp_path, maps)):
        Loras().use(copy := _copy(net), one(file, 0.6))
        weights.append(copy.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-6, atol=1e-7)
    assert all(entry.scale == 1.0 for entry in read(path).modules.values())
    assert all(name.startswith("transformer.blocks.") for name in _keys(path))


def test_stock_diffusers_computes_the_same_velocity_from_merged_weights(
    tiny_folder: Path, net: WanDiT, tmp_path: Path
):
    diffusers = pytest.importorskip("diffusers")
    stock = diffusers.WanTransformer3DModel.from_pretrained(tiny_folder, subfolder="transformer")
    maps = pairs(net)
    with torch.no_grad():
        for name, (a, b) in maps.items():
            stock.get_submodule(name).weight += 0.8 * ALPHA / RANK * (b @ a)
    Loras().use(net, one(write_as("bare", tmp_path, maps), 0.8))
    x = torch.randn(1, net.config.in_channels, 2, 4, 4)
    text, t = torch.randn(1, 7, net.config.text_dim), torch.tensor([[300.0]])
    from fastvideo.models.dit.wan import Conditioning

    with torch.no_grad():
        ours = net(x, t, Conditioning(text))
        theirs = stock(x, t[:, 0], text).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# Refusals


def test_no_matched_module_is_an_error_that_names_some(net: WanDiT, tmp_path: Path):
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 3), f"{name}.lora_B.weight": torch.ones(5, 4)}
    file = read(write(tmp_path / "flux.safetensors", tensors))
    with pytest.raises(
        ValueError, match=r"flux.safetensors does not fit: none of its 1 modules .*img_attn\.proj"
    ):
        fit(file, net)


def test_a_partial_match_names_what_was_left_and_applies_the_rest(
    net: WanDiT, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    maps, before = pairs(net, only=("blocks.0.attn1",)), weights_of(net)
    tensors, _ = spelled("comfy", maps)
    for name in ("blocks.39.self_attn.q", "blocks.0.cross_attn.k_img"):
        tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.ones(2, 48)
        tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.ones(48, 2)
    tensors["lora_te_text_model_layers_0_q.lora_down.weight"] = torch.ones(2, 8)
    tensors["lora_te_text_model_layers_0_q.lora_up.weight"] = torch.ones(8, 2)
    path = write(tmp_path / "a.safetensors", tensors)
    found = fit(read(path), net)
    assert set(found.matched) == {original(name) for name in maps}
    assert set(found.unmatched) == {"blocks.39.self_attn.q", "blocks.0.cross_attn.k_img"}
    with caplog.at_level("WARNING", logger="fastvideo"):
        Loras().use(net, one(path))
    (line,) = [r.message for r in caplog.records]
    assert "4 of 6 modules of a.safetensors are applied" in line
    assert "blocks.39.self_attn.q" in line and "blocks.0.cross_attn.k_img" in line
    assert "1 modules of a text encoder are not applied" in line
    after = net.state_dict()
    assert {n for n in after if (after[n] != before[n]).any()} == {f"{n}.weight" for n in maps}


def test_a_lora_of_the_text_encoder_alone_is_refused(net: WanDiT, tmp_path: Path):
    name = "text_encoder.encoder.block.0.q"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 3), f"{name}.lora_B.weight": torch.ones(5, 4)}
    with pytest.raises(ValueError, match=r"changes a text encoder \(1 modules\)"):
        fit(read(write(tmp_path / "a.safetensors", tensors)), net)


def _pair(rank: int = 4, other: int = 4) -> dict[str, Tensor]:
    name = "blocks.0.self_attn.q"
    return {
        f"{name}.lora_A.weight": torch.ones(rank, 48),
        f"{name}.lora_B.weight": torch.ones(48, other),
    }


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (_pair(4, 8), r"maps of blocks.0.self_attn.q have shapes \(4, 48\) and \(48, 8\)"),
        (_pair(0, 0), "maps of blocks.0.self_attn.q have rank 0"),
        ({"a.lora_A.weight": torch.ones(4, 4)}, "a has a down map without its up map"),
        ({"a.lora_B.weight": torch.ones(4, 4)}, "a has a up map without its down map"),
        ({**_pair(), "a.dora_scale": torch.ones(4)}, "is DoRA, which is not supported: a.dora"),
        ({**_pair(), "a.lora_magnitude_vector": torch.ones(4)}, "is DoRA"),
        ({"a.hada_w1_a": torch.ones(4, 4)}, "is LoHa"),
        ({"a.lokr_w1": torch.ones(4, 4)}, "is LoKr"),
        ({"a.lora_mid.weight": torch.ones(4, 4)}, "is LoRA with a middle map"),
        (
            {"blocks.0.self_attn.q.weight": torch.ones(4, 4)},
            "1 tensors are not LoRA weights: blocks.0",
        ),
        ({**_pair(), "blocks.0.self_attn.q.alpha": torch.ones(2)}, "alpha of blocks.0"),
        ({"a.diff": torch.full((2,), float("nan"))}, "diff of a must hold finite"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(
    tensors: dict[str, Tensor], text: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=text) as caught:
        read(write(tmp_path / "a.safetensors", tensors))
    assert "\n" not in str(caught.value) and "a.safetensors" in str(caught.value)


def test_a_lora_of_another_size_is_refused_before_any_weight_changes(net: WanDiT, tmp_path: Path):
    good = write_as("diffusers", tmp_path, pairs(net))
    name = "blocks.0.self_attn.q"
    wide = {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.ones(64, 4)}
    bad = write(tmp_path / "wide.safetensors", wide)
    before, loras = weights_of(net), Loras()
    with pytest.raises(ValueError, match=r"wide.safetensors does not fit .* \(64, 64\) to"):
        loras.use(net, [Use(good), Use(bad)])
    assert same(before, net.state_dict()) and loras.active == ()


def test_a_truncated_file_is_one_line(net: WanDiT, tmp_path: Path):
    path = write_as("diffusers", tmp_path, pairs(net))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"is truncated: .* bytes"):
        read(path)


def test_one_module_under_two_names_is_refused(net: WanDiT, tmp_path: Path):
    maps = pairs(net, only=("blocks.0.attn1.to_q",))
    tensors = {**spelled("bare", maps)[0], **spelled("peft", maps)[0]}
    with pytest.raises(ValueError, match=r"has blocks\.0\.\w+\.\w+ twice, also as"):
        fit(read(write(tmp_path / "a.safetensors", tensors)), net)


# Failures and threads


class Failing(TorchFunctionMode):
    """Fails the operation of a number; `again` all after it too, as by a second ^C."""

    def __init__(self, at: int, error: type[BaseException], again: bool) -> None:
        super().__init__()
        self.left, self.error, self.again = at, error, again

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._C._set_grad_enabled:  # or the tests after this one had no gradients
            return func(*args, **(kwargs or {}))
        self.left -= 1
        if self.left == 0 or (self.left < 0 and self.again):
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("error", "again"),
    [(torch.OutOfMemoryError, False), (KeyboardInterrupt, False), (KeyboardInterrupt, True)],
)
def test_wherever_merging_fails_the_weights_return_exactly(
    error: type[BaseException], again: bool, net: WanDiT, tmp_path: Path
):
    first = one(write_as("bare", tmp_path / "1", pairs(net, only=("attn2.to_q", "attn2.to_k"))))
    second = one(write_as("bare", tmp_path / "2", pairs(net, only=("attn2.to_k", "ffn.net.2"))))
    loras, found = Loras(), {(): weights_of(net)}
    for use in (second, first):
        loras.use(net, use)
        found[loras.active] = weights_of(net)
    for at in range(1, 1000):
        try:
            with Failing(at, error, again):
                loras.use(net, second)
        except error:
            if not again:  # nothing was changed, or all is undone
                assert loras.active in ((), tuple(first))
                assert same(found[loras.active], net.state_dict())
        else:
            break
        for use in ([], first) if at % 2 else (first, [], first):
            loras.use(net, use)
            assert same(found[tuple(use)], net.state_dict())
    assert at > 100 and same(found[tuple(second)], net.state_dict())


@pytest.fixture
def uses(net: WanDiT, tmp_path: Path) -> list[list[Use]]:
    return [one(write_as("bare", tmp_path / str(i), pairs(net, seed=i))) for i in range(2)]


def items(fails: bool = False) -> Iterator[int]:
    yield from range(4)
    if fails:
        raise RuntimeError("in the middle")


def during(loras: Loras, net: WanDiT, use: list[Use], given: Iterator) -> Iterator:
    """Compute items as the row of stages computes its events."""
    loras.check(net, use)

    def turns() -> Iterator:
        claim = loras.claim(net, use)
        try:
            while True:
                try:
                    with loras.turn(claim):
                        item = next(given)
                except StopIteration:
                    return
                yield item
        finally:
            del claim

    return turns()


def opened(loras: Loras, net: WanDiT, use: list[Use], given: Iterator) -> Iterator:
    iterator = during(loras, net, use, given)
    next(iterator)
    return iterator


def fail(iterator: Iterator) -> object:
    with pytest.raises(RuntimeError, match="in the middle") as error:
        list(iterator)
    return error


def lose(iterator: Iterator) -> None:
    cycle = [iterator]
    cycle.append(cycle)


ENDS = {"finish": list, "close": lambda x: x.close(), "drop": id, "lose": lose, "fail": fail}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("is_moved", [False, True])
def test_the_thread_of_an_open_iterator_is_refused_other_loras_until_its_end(
    end: str, is_moved: bool, net: WanDiT, uses: list[list[Use]]
):
    loras = Loras()
    with ThreadPoolExecutor(1) as other:
        begin = (lambda *a: other.submit(opened, *a).result()) if is_moved else opened
        iterator = begin(loras, net, uses[0], items(end == "fail"))
    next(iterator)  # from here on it is this thread's, whoever began it
    loras.use(net, uses[0])
    with pytest.raises(ValueError, match=r"\(none\) .* open iterator of this thread") as refusal:
        loras.use(net, [])
    kept = ENDS[end](iterator)  # an error, whose traceback has the iterator's frame
    del iterator
    gc.collect()
    loras.use(net, [])
    assert loras.active == () and "\n" not in str(refusal.value)
    del kept


def test_an_iterator_opens_at_its_first_item_and_its_files_are_checked_before(
    net: WanDiT, uses: list[list[Use]], tmp_path: Path
):
    loras = Loras()
    first, second = (during(loras, net, use, items()) for use in uses)
    assert loras.active == () and next(second) == 0 and loras.active == tuple(uses[1])
    with pytest.raises(ValueError, match="open iterator of this thread"):
        next(first)
    bad = write(tmp_path / "bad.safetensors", {"blocks.0.self_attn.q.diff": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"bad.safetensors does not fit"):
        during(loras, net, one(bad), items())
    assert list(second) == [1, 2, 3]


@pytest.mark.parametrize("end", ENDS)
def test_other_threads_wait_until_its_end(end: str, net: WanDiT, uses: list[list[Use]]):
    loras, found = Loras(), []
    iterator = opened(loras, net, uses[0], items(end == "fail"))
    with ThreadPoolExecutor(2) as threads:
        for _ in range(2):
            threads.submit(lambda: found.extend(during(loras, net, uses[1], items())))
        wait_for_claims(2)
        assert loras.active == tuple(uses[0]) and not found
        ENDS[end](iterator)
        del iterator
        gc.collect()
    assert sorted(found) == [0, 0, 1, 1, 2, 2, 3, 3]


def wait_for_claims(count: int) -> None:
    """Return when that many threads stand in front of open iterators."""
    deadline = time.monotonic() + 60
    while [f.f_code for f in sys._current_frames().values()].count(Loras.claim.__code__) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_iterator_may_be_collected_while_the_lock_is_held(
    elsewhere: bool, net: WanDiT, uses: list[list[Use]]
):
    def collecting() -> Iterator[int]:
        with ThreadPoolExecutor(1) as other:
            yield other.submit(gc.collect).result() if elsewhere else gc.collect()

    loras = Loras()
    lose(opened(loras, net, uses[0], items()))
    assert list(during(loras, net, uses[0], collecting())) != [0]
    loras.use(net, [])


def test_iterators_of_equal_loras_take_turns_in_two_threads(net: WanDiT, uses: list[list[Use]]):
    loras, meeting, inside = Loras(), threading.Barrier(2, timeout=60), []

    def alone() -> Iterator[int]:
        for i in items():
            inside.append(i)
            time.sleep(0.001)
            assert inside == [i]
            yield inside.pop()

    def run(use: list[Use]) -> list[int]:
        return [meeting.wait() * 0 + i for i in during(loras, net, use, alone())]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, [uses[0]] * 2)) == [[0, 1, 2, 3]] * 2


def _copy(net: WanDiT) -> WanDiT:
    other = WanDiT(net.config)
    other.load_state_dict(net.state_dict())
    return other.requires_grad_(False)


def _keys(path: Path) -> list[str]:
    from fastvideo.weights import Checkpoint

    return Checkpoint(path).names()
