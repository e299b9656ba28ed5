"""A whole original Wan2.1 folder, from `load` to frames.

Such a folder states the dims of its DiT only; those of its VAE and text encoder are constants of
`formats/wan.py`, which the tests with weights set to tiny values. Everything else runs as it is.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo import VideoPipeline, hub, weights
from fastvideo.formats import diffusers as layout
from fastvideo.formats import wan
from fastvideo.model import Model, build_part, load
from fastvideo.models.vae.wan import WanVae, WanVaeConfig

PUBLISHED_PARAMS = {"dit": 1_418_996_800, "vae": 126_892_531, "text": 5_680_910_336}
# The layout of the names fixes the VAE's depth, never its widths.
TINY_VAE = {"base_dim": 4, "z_dim": 4, "latents_mean": [0.1] * 4, "latents_std": [1.2] * 4}


@pytest.fixture
def tiny_original(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Model]:
    """An original folder (DiT in two shards), and the model that was written into it."""
    base = load(tiny_folder, dtype="float32")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        vae = WanVae(WanVaeConfig.parse(TINY_VAE)).eval()
    monkeypatch.setattr(wan, "_VAE_CONFIG", TINY_VAE)
    monkeypatch.setattr(wan, "_TEXT_CONFIG", base.spec.text.config)

    folder = tmp_path / "Wan2.1-T2V-tiny"
    folder.mkdir()
    dims = base.dit.config
    config = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "model_type": "t2v",
        "dim": dims.num_attention_heads * dims.attention_head_dim,
        "num_heads": dims.num_attention_heads,
        "num_layers": dims.num_layers,
        "ffn_dim": dims.ffn_dim,
        "freq_dim": dims.freq_dim,
        "text_dim": dims.text_dim,
        "in_dim": dims.in_channels,
        "out_dim": dims.out_channels,
        "eps": dims.eps,
        "text_len": 512,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _save_shards(_original("dit", base.dit), folder)
    torch.save(_original("vae", vae), folder / wan.VAE_FILE)
    torch.save(_original("text", base.text), folder / wan.TEXT_FILE)
    shutil.copytree(tiny_folder / "tokenizer", folder / wan.TOKENIZER)

    spec, _ = hub.open_spec(folder)
    return folder, Model(
        spec, base.dit, vae, base.text, base.tokenizer, torch.device("cpu"), torch.float32
    )


def _original(part: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = {wan.names(part).to_original(k): v for k, v in module.state_dict().items()}
    assert None not in named
    return {str(name): tensor for name, tensor in named.items()}


def _save_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write two shards and their index, as the 14B is published."""
    places = {}
    for i in range(2):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors"
        shard = dict(list(tensors.items())[i::2])
        weights.save(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_an_original_folder_loads_to_the_tensors_and_configs_it_was_written_from(
    tiny_original: tuple[Path, Model],
):
    folder, written = tiny_original
    read = load(folder, dtype="float32")
    for part in ("dit", "vae", "text"):
        ours, theirs = getattr(read, part), getattr(written, part)
        assert ours.config == theirs.config
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def test_an_original_folder_and_a_diffusers_folder_of_one_model_make_the_same_frames(
    tiny_original: tuple[Path, Model], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder, written = tiny_original
    with caplog.at_level(logging.INFO):
        original = VideoPipeline.from_pretrained(folder, dtype="float32")
    assert "vae, text: the published Wan2.1 dims, assumed" in caplog.text
    other = layout.save(written, tmp_path / "other")
    request: dict[str, Any] = {"num_frames": 5, "height": 16, "width": 32, "seed": 3}
    request |= {"num_inference_steps": 3, "negative_prompt": "a blue square"}
    stock = VideoPipeline.from_pretrained(other, dtype="float32")
    clips = [pipe("a red ball", **request).frames for pipe in (original, stock)]
    assert clips[0] is not None
    assert clips[1] is not None
    assert clips[0].std() > 1
    assert (clips[0] == clips[1]).all()


def test_a_vae_of_other_dims_is_refused_by_the_name_of_its_tensors(
    tiny_original: tuple[Path, Model], monkeypatch: pytest.MonkeyPatch
):
    folder, _ = tiny_original
    monkeypatch.setattr(wan, "_VAE_CONFIG", {**TINY_VAE, "base_dim": 8})
    with pytest.raises(ValueError, match=r"vae in .*does not fit the network; .*mis-shaped: enc"):
        load(folder, dtype="float32", parts=["vae"])


@pytest.mark.parametrize(
    ("missing", "part"),
    [
        (wan.VAE_FILE, "vae"),
        (wan.TEXT_FILE, "text"),
        ("diffusion_pytorch_model-00002-of-00002.safetensors", "dit"),
        (str(wan.TOKENIZER / "tokenizer.json"), "text"),
    ],
)
def test_a_file_that_an_original_folder_lacks_is_named(
    tiny_original: tuple[Path, Model], missing: str, part: str
):
    folder, _ = tiny_original
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=Path(missing).name) as caught:
        load(folder, dtype="float32", parts=[part])
    assert "\n" not in str(caught.value)


def test_the_spec_of_a_published_folder_builds_its_three_networks_without_weights(tmp_path: Path):
    config = {"_class_name": "WanModel", "dim": 1536, "ffn_dim": 8960, "num_heads": 12}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_layers": 30}))
    spec, _ = hub.open_spec(tmp_path)
    parts = {part: build_part(spec, part) for part in PUBLISHED_PARAMS}
    counts = {part: sum(p.numel() for p in m.parameters()) for part, m in parts.items()}
    assert counts == PUBLISHED_PARAMS
    for part, module in parts.items():
        names = {wan.names(part).to_original(name) for name in module.state_dict()}
        assert None not in names
        assert len(names) == len(module.state_dict())
