"""Configs of other libraries: what their releases write, and keys that no release has yet."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo import VideoPipeline, foreign, hub, model, spec, weights
from fastvideo.lora import file as lora_file

OLDEST = json.loads(Path(__file__).with_name("foreign_oldest.json").read_text())
"""As the oldest supported transformers, diffusers and PEFT write them; `versions` says which."""
TEXT, TOKENIZER = "text_encoder/config.json", "tokenizer/tokenizer_config.json"
SCHEDULER = "scheduler/scheduler_config.json"


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def stock(tiny_diffusers_folder: Path, tmp_path: Path) -> Path:
    """A copy of a folder that the installed diffusers and transformers wrote."""
    return Path(shutil.copytree(tiny_diffusers_folder, tmp_path / "stock"))


def test_a_folder_of_the_installed_releases_has_no_unknown_key(stock: Path):
    assert hub.open_spec(stock)[0].unknown_keys == ()


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_a_folder_of_the_oldest_releases_is_read(stock: Path, scheduler: str):
    dims = {k: json.loads((stock / TEXT).read_text())[k] for k in ("vocab_size", "d_model", "d_ff")}
    (stock / TEXT).write_text(json.dumps({**OLDEST[TEXT], **dims}))
    (stock / TOKENIZER).write_text(json.dumps(OLDEST[TOKENIZER]))
    (stock / SCHEDULER).write_text(json.dumps(OLDEST[scheduler]))
    found, _ = hub.open_spec(stock)
    assert found.unknown_keys == ()
    assert (found.scheduler.name, found.scheduler.args) == (scheduler, {"shift": 3.0})
    assert found.text.config["d_kv"] == 8


@pytest.mark.parametrize("name", [TEXT, TOKENIZER, SCHEDULER])
def test_an_unknown_key_is_warned_of_once_and_noted_in_the_recipe(
    stock: Path, caplog: pytest.LogCaptureFixture, name: str
):
    _edit(stock / name, soft_cap=30.5, new_switch=False, new_table={}, new_value=None)
    with caplog.at_level(logging.INFO, "fastvideo"):
        pipe = VideoPipeline.from_pretrained(stock, dtype="float32")
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [w for w in warnings if "soft_cap" in w] == warnings
    assert len(warnings) == 1
    told = " ".join(r.getMessage() for r in caplog.records if r.levelno == logging.INFO)
    assert all(f"{key} in" in told for key in ("new_switch", "new_table", "new_value"))
    video = pipe("a red ball", num_frames=5, height=32, width=32, num_inference_steps=1, seed=1)
    assert video.recipe["unknown_keys"] == [f"{name}: soft_cap = 30.5"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (TEXT, {"feed_forward_proj": "gated-silu"}),
        (TEXT, {"is_gated_act": 1}),
        (TOKENIZER, {"padding_side": "left"}),
        (TOKENIZER, {"split_special_tokens": True}),
        (SCHEDULER, {"prediction_type": "epsilon"}),
        (SCHEDULER, {"shift_terminal": 0.1}),
    ],
)
def test_a_value_of_other_arithmetic_is_refused_from_the_spec(
    stock: Path, name: str, change: dict[str, Any]
):
    _edit(stock / name, **change)
    with pytest.raises(ValueError, match=f"{next(iter(change))} .* in .*{name} must be"):
        hub.open_spec(stock)


def test_a_key_that_a_scheduler_omits_has_the_value_of_its_library(stock: Path):
    values = json.loads((stock / SCHEDULER).read_text())
    del values["use_flow_sigmas"]
    (stock / SCHEDULER).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"use_flow_sigmas False .* must be True"):
        hub.open_spec(stock)


def test_the_scheduler_beside_a_spec_is_not_read(tiny_copy: Path):
    _edit(tiny_copy / SCHEDULER, prediction_type="epsilon", soft_cap=3)
    assert hub.open_spec(tiny_copy)[0].unknown_keys == ()


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_an_unknown_key_of_a_dit_or_vae_is_refused(stock: Path, part: str):
    _edit(stock / part / "config.json", soft_cap=False)
    with pytest.raises(ValueError, match="soft_cap"):
        model.load(stock)


def test_unknown_keys_are_not_stored_in_a_spec(stock: Path, tmp_path: Path):
    _edit(stock / TEXT, soft_cap=30)
    written = spec.write(hub.open_spec(stock)[0], tmp_path)
    assert "unknown_keys" not in json.loads(written.read_text())


def _lora(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({**OLDEST["adapter_config.json"], **config})
    )
    pair = {"to_q.lora_A.weight": torch.ones(2, 3), "to_q.lora_B.weight": torch.ones(3, 2)}
    return weights.save(folder / "adapter_model.safetensors", pair)


def test_the_config_that_peft_writes_is_read(tmp_path: Path):
    peft = pytest.importorskip("peft")
    newest = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"])
    path = _lora(tmp_path)
    assert lora_file.read(path).modules["to_q"].scale == 4.0
    newest.save_pretrained(tmp_path)
    assert (lora_file.read(path).unknown_keys, lora_file.read(path).modules["to_q"].scale) == (
        (),
        4,
    )


def test_unknown_keys_of_a_lora_are_kept_and_those_of_a_text_encoder_are_not(tmp_path: Path):
    path = _lora(tmp_path, soft_cap=3, off=None, **{"text_encoder.soft_cap": 4})
    assert lora_file.read(path).unknown_keys == ("soft_cap = 3",)
    assert lora_file.unknown_keys(path) == ("soft_cap = 3",)


@pytest.mark.parametrize(
    "change", [{"init_lora_weights": "pissa"}, {"use_qalora": True}, {"peft_type": "LOHA"}]
)
def test_a_lora_of_other_arithmetic_is_refused(tmp_path: Path, change: dict[str, Any]):
    with pytest.raises(ValueError, match=f"{next(iter(change))} .* must be"):
        lora_file.read(_lora(tmp_path, **change))


def test_numbers_and_switches_are_compared_as_json_does():
    known = foreign.Keys(read="", fixed={"count": 1, "on": True}, idle="")
    foreign.check({"count": 1.0, "on": True}, known, source="x")
    for values in ({"count": True}, {"on": 1}):
        with pytest.raises(ValueError, match="must be"):
            foreign.check(values, known, source="x")
