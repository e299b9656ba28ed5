"""Loading a whole model."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvideo import model as models
from fastvideo import registry, stages, weights
from fastvideo.model import load, pick_device, pick_dtype
from fastvideo.models.dit.wan import KEEP_FLOAT32
from fastvideo.models.text.tokenizer import build_word_tokenizer
from fastvideo.stages import State
from tests import clips


def test_a_loaded_model_is_real_in_evaluation_mode_and_without_gradients(tiny_folder: Path):
    model = load(tiny_folder, device="cpu", dtype="float32")
    for module in (model.dit, model.vae, model.text):
        assert not module.training
        assert not any(p.requires_grad or p.is_meta for p in module.parameters())
    assert model.spec.name == "tiny"
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


def test_bfloat16_reaches_dit_and_vae_but_not_sensitive_parts_or_a_small_text_encoder(
    tiny_folder: Path,
):
    model = load(tiny_folder, dtype="bfloat16")
    for name, parameter in model.dit.named_parameters():
        kept = any(part in name for part in KEEP_FLOAT32)
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert {p.dtype for p in model.vae.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.text.parameters()} == {torch.float32}


def test_parts_not_asked_for_are_refused_when_used(tiny_folder: Path):
    model = load(tiny_folder, parts=["vae"])
    with pytest.raises(AssertionError, match="the dit was not loaded"):
        model.dit(torch.zeros(1))
    with pytest.raises(AssertionError, match="the text was not loaded"):
        model.text.parameters()
    with pytest.raises(AssertionError, match="the tokenizer was not loaded"):
        model.tokenizer(["a"], 3)


@pytest.mark.parametrize("subfolder", ["transformer", "vae", "text_encoder"])
def test_truncated_weights_are_one_line_naming_the_file(tiny_copy: Path, subfolder: str):
    (path,) = (tiny_copy / subfolder).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{subfolder}/.*\.safetensors is truncated") as caught:
        load(tiny_copy)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_and_a_wrong_shape_are_named_with_the_folder(tiny_copy: Path):
    path = tiny_copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = dict(weights.Checkpoint(path))
    del tensors["proj_out.bias"]
    tensors["proj_out.weight"] = torch.zeros(3, 3)
    weights.save(path, tensors)
    message = (
        r"dit in .*tiny does not fit the network; 1 missing: proj_out\.bias; "
        r"1 mis-shaped: proj_out\.weight"
    )
    with pytest.raises(ValueError, match=message):
        load(tiny_copy)


def test_a_tokenizer_with_more_ids_than_the_encoder_is_refused(tiny_copy: Path):
    build_word_tokenizer([f"word{i}" for i in range(99)], tiny_copy / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer in .*tiny has 359 ids, its text encoder 27\d"):
        load(tiny_copy)


def test_auto_dtype_follows_what_the_processor_computes(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    for ability, expected in (("avx512_bf16", torch.bfloat16), ("avx512_f", torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda a=ability: {a: True})
        assert pick_dtype("auto", cpu) == expected
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("older", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_auto_dtype_is_the_same_under_a_torch_without_capabilities(
    monkeypatch: pytest.MonkeyPatch, older: str
):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cpu, older, lambda: True)
    assert pick_dtype("auto", torch.device("cpu")) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_decisions_are_logged(tiny_folder: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="fastvideo"):
        load(tiny_folder)
    text = caplog.text
    assert "dtype torch." in text
    assert "device " in text
    assert all(f"{part} tiny" in text for part in ("dit", "vae", "text"))


def test_unknown_dtype_and_device_are_refused():
    with pytest.raises(ValueError, match="'bfloat' is unknown; did you mean 'bfloat16'"):
        pick_dtype("bfloat", torch.device("cpu"))
    with pytest.raises(ValueError, match="device 'gpu' is unknown; use auto, cpu, cuda"):
        pick_device("gpu")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        pick_device("cuda:0")
    with pytest.raises(ValueError, match=r"device xpu cannot be used here: .*XPU"):
        pick_device("xpu")
    assert pick_device("auto") == torch.device("cpu")


def test_loading_does_not_import_torchs_compiler(tiny_folder: Path):
    code = f"""
import sys
from fastvideo import model, stages
from fastvideo.resolve import resolve
from fastvideo.sampling import GenerateRequest
loaded = model.load({str(tiny_folder)!r}, device="cpu")
asked = GenerateRequest(prompt="a ball", num_inference_steps=1, num_frames=5, height=32, width=32)
stages.make(loaded, [resolve(asked, loaded.spec)])
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_each_part_alone_runs_its_stages_for_the_frames_of_the_whole_model(tiny_folder: Path):
    whole = load(tiny_folder, device="cpu", dtype="float32")
    state = State((clips.params(whole),), previews=True)
    *_, expected = stages.run(whole.spec.stages, whole, state)
    for name in whole.spec.stages:
        parts = registry.module("fastvideo.stages", name).PARTS
        alone = load(tiny_folder, device="cpu", dtype="float32", parts=parts)
        *_, last = stages.run((name,), alone, state)
        state = last.state
    assert (state.frames == expected.state.frames).all()
