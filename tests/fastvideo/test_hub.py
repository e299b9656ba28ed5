"""From a name to a folder and its spec."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvideo import hub, spec


@pytest.fixture
def zoo(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo with one model, `wan-test`."""
    root = tmp_path / "zoo"
    root.mkdir()
    (root / "wan-test").symlink_to(tiny_folder)
    monkeypatch.setattr(hub, "ZOO", root)
    return root


def test_a_bundled_name_a_folder_and_a_text_path_open_the_same_spec(zoo: Path, tiny_folder: Path):
    found = [hub.open_spec(n)[0] for n in ("wan-test", tiny_folder, str(tiny_folder))]
    assert found[0] == found[1] == found[2]
    assert hub.bundled() == ["wan-test"]
    (zoo / "a-classifier").mkdir()
    (zoo / "a-classifier" / "config.json").write_text("{}")
    assert hub.bundled() == ["wan-test"], "a single network is no model"


def test_a_spec_carries_the_dims_of_its_networks_and_nothing_is_derived(tiny_folder: Path):
    found, folder = hub.open_spec(tiny_folder)
    assert folder == tiny_folder
    assert found.dit.config["num_attention_heads"] == 2
    assert found.vae.config["latents_mean"] == [0.1, -0.2, 0.3, 0.0]
    assert found.text.config["d_model"] == 32
    assert found.derived == ()


def test_opening_a_spec_imports_no_torch(tiny_folder: Path):
    code = (
        "import sys; from fastvideo.hub import open_spec; "
        f"open_spec({str(tiny_folder)!r}); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


def test_an_unknown_name_lists_bundled_models_and_suggests_one(zoo: Path):
    with pytest.raises(ValueError) as caught:
        hub.open_spec("wan-tset")
    text = str(caught.value)
    assert "'wan-tset' is neither bundled (wan-test), nor a folder, nor a hub name" in text
    assert text.endswith("did you mean 'wan-test'?")


def test_a_folder_without_spec_or_configs_says_what_was_looked_for(tmp_path: Path):
    with pytest.raises(ValueError, match=r"looked for fastvideo\.json, or model_index\.json.*Wan"):
        hub.open_spec(tmp_path)


def test_a_file_is_not_a_model(tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        hub.open_spec(tmp_path / "x.safetensors")


def test_a_hub_name_offline_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set and it is not in the cache"):
        hub.open_spec("nobody/nothing-at-all")


def test_a_lora_of_other_content_but_the_same_size_and_time_has_another_hash(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"one")
    before, stat = hub.lora_hash(path), path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hub.lora_hash(path) == hashlib.sha256(b"two").hexdigest() != before


def test_a_hub_snapshot_is_named_by_its_repository(
    tmp_path: Path, tiny_diffusers_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.parent.mkdir()
    snapshot.symlink_to(tiny_diffusers_folder)
    asked = []

    def fake(name: str, *, allow_patterns: list[str], local_files_only: bool, **commit: str) -> str:
        asked.append((name, allow_patterns, commit))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.chdir(tmp_path)
    assert hub.open_spec("owner/model")[0].name == "owner/model"
    assert not any("safetensors" in pattern for pattern in asked[0][1]), "a spec needs no weights"
    assert hub.open_model("owner/model", weights=True).has_weights
    _, _, (_, patterns, commit) = asked
    assert "*.safetensors" in patterns and commit == {"revision": "0123abc"}, "of the same commit"


def test_hub_trouble_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ValueError, match=r"cannot be fetched from the hub: no route$"):
        hub.open_spec("owner/model")


def test_a_spec_that_contradicts_the_dims_is_refused(tiny_copy: Path):
    path = tiny_copy / spec.FILE_NAME
    values = json.loads(path.read_text())
    values["compression"]["spatial"] = 16
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="contradicts the dims"):
        hub.open_spec(tiny_copy)


def test_a_missing_or_broken_config_is_named(tiny_copy: Path):
    (tiny_copy / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"vae/config\.json is not readable JSON"):
        hub.open_spec(tiny_copy)
    (tiny_copy / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"vae/config\.json does not exist"):
        hub.open_spec(tiny_copy)
