"""Original Wan2.1 files: the table of names, against diffusers' converter and by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from fastvideo import hub, weights
from fastvideo.formats import wan
from fastvideo.model import build_part
from fastvideo.models.text.umt5 import Umt5Config, Umt5Encoder
from fastvideo.models.vae.wan import WanVae, WanVaeConfig

# The published T2V sizes, in the words of their own config.json.
SIZES = {
    "1.3B": ({"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}, 825, 1_418_996_800),
    "14B": (
        {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
        1095,
        14_288_491_584,
    ),
}

DIT_BLOCK = {
    "modulation": "scale_shift_table",
    "self_attn.q.weight": "attn1.to_q.weight",
    "self_attn.o.bias": "attn1.to_out.0.bias",
    "self_attn.norm_k.weight": "attn1.norm_k.weight",
    "cross_attn.v.weight": "attn2.to_v.weight",
    "cross_attn.norm_q.weight": "attn2.norm_q.weight",
    "norm3.weight": "norm2.weight",
    "norm3.bias": "norm2.bias",
    "ffn.0.weight": "ffn.net.0.proj.weight",
    "ffn.2.bias": "ffn.net.2.bias",
}
T5_BLOCK = {
    "attn.q": "layer.0.SelfAttention.q",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def _original_config(dims: dict[str, int]) -> dict[str, object]:
    fixed = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v"}
    return {
        **fixed,
        **dims,
        "eps": 1e-6,
        "freq_dim": 256,
        "in_dim": 16,
        "out_dim": 16,
        "text_len": 512,
    }


def _random(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = module.state_dict()
    return {k: torch.randn(v.shape, generator=generator) for k, v in state.items()}


def _to_original(state: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    renamed = {wan.names(part).to_original(name): tensor for name, tensor in state.items()}
    assert None not in renamed
    assert len(renamed) == len(state)
    return renamed


@pytest.fixture
def original_folder(tmp_path: Path) -> Path:
    """The header of a 1.3B in an original folder; no data."""
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_original_config(SIZES["1.3B"][0])))
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_a_header_of_the_published_size_names_exactly_the_tensors_of_our_network(
    tmp_path: Path, size: str
):
    diffusers = pytest.importorskip("diffusers")
    dims, num_tensors, num_params = SIZES[size]
    config = {
        "num_attention_heads": dims["num_heads"],
        "ffn_dim": dims["ffn_dim"],
        "num_layers": dims["num_layers"],
    }
    with torch.device("meta"):
        oracle = diffusers.WanTransformer3DModel(**config).state_dict()
    assert len(oracle) == num_tensors
    _write_header(tmp_path / "diffusion_pytorch_model.safetensors", _to_original(oracle, "dit"))
    (tmp_path / "config.json").write_text(json.dumps(_original_config(dims)))

    spec, folder = hub.open_spec(tmp_path)
    ours = build_part(spec, "dit")
    header = weights.read_header(folder / "diffusion_pytorch_model.safetensors")
    found = {wan.names("dit").to_ours(name): info.shape for name, info in header.items()}
    assert found == {k: tuple(v.shape) for k, v in ours.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == num_params


def test_transformer_names_are_those_of_diffusers_converter(tiny_folder: Path):
    convert = pytest.importorskip("diffusers.loaders.single_file_utils")
    state = dict(weights.Checkpoint(tiny_folder / "transformer"))
    original = _to_original(state, "dit")
    assert "blocks.0.self_attn.norm_q.weight" in original
    converted = convert.convert_wan_transformer_to_diffusers(dict(original))
    assert converted.keys() == state.keys()
    assert all(converted[name] is state[name] for name in state)


def test_vae_names_are_those_of_diffusers_converter():
    convert = pytest.importorskip("diffusers.loaders.single_file_utils")
    state = _random(WanVae(WanVaeConfig(base_dim=4)))
    original = _to_original(state, "vae")
    converted = convert.convert_wan_vae_to_diffusers(dict(original))
    assert converted.keys() == state.keys()
    assert all(converted[name] is state[name] for name in state)


@pytest.mark.parametrize("theirs", DIT_BLOCK)
def test_transformer_block_names_by_hand(theirs: str):
    ours = f"blocks.17.{DIT_BLOCK[theirs]}"
    assert wan.names("dit").to_ours(f"blocks.17.{theirs}") == ours
    assert wan.names("dit").to_original(ours) == f"blocks.17.{theirs}"


@pytest.mark.parametrize("theirs", T5_BLOCK)
def test_text_encoder_block_names_by_hand(theirs: str):
    ours = f"encoder.block.23.{T5_BLOCK[theirs]}.weight"
    assert wan.names("text").to_ours(f"blocks.23.{theirs}.weight") == ours
    assert wan.names("text").to_original(ours) == f"blocks.23.{theirs}.weight"


@pytest.mark.parametrize("part", ["dit", "vae", "text"])
def test_one_model_under_both_kinds_of_names_loads_to_identical_tensors(
    tmp_path: Path, tiny_folder: Path, part: str
):
    if part == "dit":
        state = dict(weights.Checkpoint(tiny_folder / "transformer"))
    elif part == "vae":
        state = _random(WanVae(WanVaeConfig(base_dim=4)))
    else:
        state = _random(Umt5Encoder(Umt5Config(50, 16, 8, 24, 2, 2)))
    ours = weights.Checkpoint(weights.save(tmp_path / "ours.safetensors", state))
    theirs = tmp_path / "theirs.pth"
    torch.save(_to_original(state, part), theirs)
    renamed = wan.rename(weights.Checkpoint(theirs), part)
    assert renamed.keys() == ours.keys()
    assert all(torch.equal(renamed[name], ours[name]) for name in ours)


def test_a_whole_original_folder_gives_the_tensors_of_each_part(tmp_path: Path, tiny_folder: Path):
    dit = dict(weights.Checkpoint(tiny_folder / "transformer"))
    text = dict(weights.Checkpoint(tiny_folder / "text_encoder"))
    vae = _random(WanVae(WanVaeConfig(base_dim=4)))
    weights.save(tmp_path / "diffusion_pytorch_model.safetensors", _to_original(dit, "dit"))
    torch.save(_to_original(vae, "vae"), tmp_path / "Wan2.1_VAE.pth")
    torch.save(_to_original(text, "text"), tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    for part, state in (("dit", dit), ("vae", vae), ("text", text)):
        found = wan.tensors(tmp_path, part)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)


def test_names_outside_the_table_are_refused_by_name(tmp_path: Path):
    torch.save({"blocks.0.norm2.weight": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds 1 tensors .*blocks\.0\.norm2\.weight"):
        wan.rename(weights.Checkpoint(tmp_path / "x.pth"), "dit")


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ("blocks.0.self_attn.to_gate_compress.weight", "VSA.*; convert it"),
        ("blocks.0.self_attn.attn_op.local_attn.proj_l.weight", "SLA"),
        ("blocks.0.cross_attn.k_img.weight", "image-to-video"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path: Path, extra: str, kind: str):
    torch.save({extra: torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"{extra}.*{kind}"):
        wan.rename(weights.Checkpoint(tmp_path / "x.pth"), "dit")


def test_the_spec_says_what_was_assumed(original_folder: Path):
    spec, _ = hub.open_spec(original_folder)
    assert spec.name == "Wan2.1-T2V-1.3B"
    assert spec.dit.config["attention_head_dim"] == 128
    assert spec.scheduler.args == {"shift": 5.0, "start": 0.999, "stop": 0.0}
    assert spec.latent_shape(frames=81, height=480, width=832).tokens((1, 2, 2)).num_tokens == 32760
    assert any("vae" in line and "assumed" in line for line in spec.derived)


def test_the_number_of_text_tokens_is_the_configs(original_folder: Path):
    path = original_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "text_len": 64}))
    assert hub.open_spec(original_folder)[0].defaults.max_text_tokens == 64


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"model_type": "i2v"}, "model_type 'i2v' in .*config.json must be 't2v'"),
        ({"window_size": [5, 5]}, r"window_size \[5, 5\] in .*config.json must be \[-1, -1\]"),
        ({"num_heads": 7}, "dim 1536 in .*config.json must be a multiple of num_heads 7"),
        ({"num_head": 3}, "num_head in .*config.json is unknown; did you mean 'num_heads'"),
    ],
)
def test_a_config_of_another_model_is_refused(original_folder: Path, entry: dict, message: str):
    path = original_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    with pytest.raises(ValueError, match=message):
        hub.open_spec(original_folder)


def _write_header(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = 2 * tensor.numel()
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
