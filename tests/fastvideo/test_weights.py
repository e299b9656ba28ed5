"""Weight files: strictness, atomicity, and one line for every kind of damage."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastvideo import files, footage, formats, media, weights
from fastvideo.models.text.tokenizer import Tokenizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(3)
        self.linear = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))


@pytest.fixture
def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    full = {k: torch.randn(v.shape, generator=generator) for k, v in Net().state_dict().items()}
    return {**full, "count": torch.tensor([3, 4])}


def test_saved_tensors_come_back_bit_for_bit_with_types_and_metadata(tmp_path: Path):
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4).bfloat16(), "c": torch.arange(3)}
    path = weights.save(tmp_path / "x.safetensors", tensors, {"maker": "us"})
    checkpoint = weights.Checkpoint(path)
    assert set(checkpoint) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint[name].dtype == tensor.dtype
        assert torch.equal(checkpoint[name], tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
    assert weights.read_metadata(path) == {"maker": "us", "format": "pt"}


def test_views_and_tied_tensors_are_saved_whole(tmp_path: Path):
    base = torch.arange(12.0).view(3, 4)
    path = weights.save(
        tmp_path / "x.safetensors", {"a": base, "b": base, "c": base.T, "d": base[1]}
    )
    back = load_file(path)
    assert torch.equal(back["a"], back["b"])
    assert torch.equal(back["c"], base.T)
    assert torch.equal(back["d"], base[1])


def test_a_header_is_read_without_any_data(tmp_path: Path):
    header = {"w": {"dtype": "BF16", "shape": [5120, 5120], "data_offsets": [0, 52428800]}}
    raw = json.dumps(header).encode()
    path = tmp_path / "head.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    assert weights.read_header(path) == {
        "w": weights.TensorInfo(torch.bfloat16, (5120, 5120), 52428800)
    }


def test_load_into_fills_a_meta_module_exactly(values: dict[str, torch.Tensor]):
    net = weights.build(Net)
    assert all(p.is_meta for p in net.parameters())
    weights.load_into(net, values, source="here")
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, values[name])
    assert isinstance(net.linear.weight, nn.Parameter)
    assert net.linear.weight.requires_grad


def test_dtype_is_cast_except_for_kept_parts_and_integers(values: dict[str, torch.Tensor]):
    net = weights.build(Net)
    halves = {k: v.bfloat16() if v.is_floating_point() else v for k, v in values.items()}
    weights.load_into(net, halves, source="x", dtype=torch.float16, keep_float32=("norm1",))
    assert net.linear.weight.dtype == torch.float16
    assert net.norm1.weight.dtype == torch.float32
    assert net.count.dtype == torch.int64


def test_one_error_names_every_missing_unexpected_and_misshaped_tensor(values):
    del values["norm1.bias"], values["count"]
    values |= {"extra": torch.zeros(1), "linear.weight": torch.zeros(3, 2)}
    net = weights.build(Net)
    with pytest.raises(ValueError) as caught:
        weights.load_into(net, values, source="some/file")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("some/file does not fit")
    assert "2 missing: count, norm1.bias" in text
    assert "1 unexpected: extra" in text
    assert "1 mis-shaped: linear.weight (3, 2) instead of (2, 3)" in text
    assert all(p.is_meta for p in net.parameters()), "nothing may be loaded partially"


def test_a_real_module_is_untouched_by_a_failed_load(values: dict[str, torch.Tensor]):
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 missing: linear\.bias"):
        weights.load_into(net, {k: v for k, v in values.items() if k != "linear.bias"}, source="x")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_long_lists_are_cut_at_eight_with_a_count():
    many = {f"t{i}": torch.zeros(1) for i in range(11)}
    with pytest.raises(ValueError, match=r"11 unexpected: t0, .*t7 and 3 more"):
        weights.load_into(nn.Module(), many, source="x")


def test_an_alias_is_allowed_and_stands_in_for_its_name(values: dict[str, torch.Tensor]):
    values["tied"] = values.pop("linear.weight")
    net = weights.build(Net)
    weights.load_into(net, values, source="x", aliases={"tied": "linear.weight"})
    assert torch.equal(net.linear.weight, values["tied"])


def test_a_loaded_network_does_not_change_with_its_file(tmp_path: Path, values):
    path = weights.save(tmp_path / "x.safetensors", values)
    net = weights.build(Net)
    weights.load_into(net, weights.Checkpoint(path), source=path)
    with path.open("r+b") as file:  # in place, through the same pages that were mapped
        file.seek(-64, os.SEEK_END)
        file.write(b"\x7f" * 64)
    assert all(torch.equal(v, values[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_file_is_one_line_naming_it(tmp_path: Path, values, keep: int):
    path = weights.save(tmp_path / "cut.safetensors", values)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.safetensors is (truncated|not a whole)") as caught:
        weights.Checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        3,
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": 8},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
    ],
)
def test_a_header_of_impossible_entries_is_one_line_naming_the_file(tmp_path: Path, entry: object):
    raw = json.dumps({"a": entry}).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(ValueError, match=r"bad\.safetensors is corrupt") as caught:
        weights.Checkpoint(path).tensor("a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"\xff" * 40, struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 2) + b"[]"]
)
def test_garbage_is_one_line_naming_it(tmp_path: Path, content: bytes):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.safetensors is not a whole safetensors file"):
        weights.Checkpoint(path)


def test_a_missing_file_and_an_empty_folder_say_so(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no\.safetensors does not exist"):
        weights.Checkpoint(tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match=r"holds no weights; looked for model\.safetensors"):
        weights.Checkpoint(tmp_path, stem="model")


def _shard(folder: Path, values: dict[str, torch.Tensor]) -> None:
    names = list(values)
    parts = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for file, own in parts.items():
        save_file({n: values[n] for n in own}, folder / file)
    places = {n: file for file, own in parts.items() for n in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_a_sharded_folder_reads_as_one(tmp_path: Path, values: dict[str, torch.Tensor]):
    _shard(tmp_path, values)
    checkpoint = weights.Checkpoint(tmp_path)
    assert {n: t.tolist() for n, t in checkpoint.items()} == {
        n: t.tolist() for n, t in values.items()
    }


def test_a_missing_shard_and_a_lying_index_are_named(tmp_path: Path, values):
    _shard(tmp_path, values)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["ghost"] = "model-2.safetensors"
    index.write_text(json.dumps(places))
    with pytest.raises(ValueError, match=r"model-2\.safetensors lacks ghost"):
        weights.Checkpoint(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-1\.safetensors, named by model"):
        weights.Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "places",
    [
        ["model-1.safetensors"],
        7,
        None,
        {},
        {"linear.bias": 3},
        {"linear.bias": ""},
        {"linear.bias": "../other/model-1.safetensors"},
        {"linear.bias": "sub/../../other/model-1.safetensors"},
        {"linear.bias": "{absolute}"},
    ],
)
def test_an_index_that_is_no_map_of_its_folder_s_files_is_refused(tmp_path: Path, values, places):
    other, folder = tmp_path / "other", tmp_path / "model"
    other.mkdir()
    folder.mkdir()
    _shard(other, values)
    index = folder / "model.safetensors.index.json"
    text = json.dumps({"weight_map": places}).replace(
        "{absolute}", str(other / "model-1.safetensors")
    )
    index.write_text(text)
    for read in (weights.Checkpoint, lambda folder: formats.tensor_names(folder, "model")):
        with pytest.raises(ValueError, match=r"index\.json is not a shard index: ") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_an_index_in_the_hub_s_cache_reads_its_links_to_blobs_and_its_subfolders(tmp_path, values):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "transformer"
    blobs.mkdir()
    (snapshot / "sub").mkdir(parents=True)
    _shard(blobs, values)
    for file in sorted(blobs.iterdir()):
        (snapshot / file.name).symlink_to(Path("../../../blobs") / file.name)
    (snapshot / "model-2.safetensors").rename(snapshot / "sub" / "two.safetensors")
    (snapshot / "sub" / "two.safetensors").unlink()
    (snapshot / "sub" / "two.safetensors").symlink_to("../../../../blobs/model-2.safetensors")
    index = snapshot / "model.safetensors.index.json"
    text = index.read_text().replace("model-2.safetensors", "./sub/two.safetensors")
    index.unlink()
    index.write_text(text)
    assert set(weights.Checkpoint(snapshot)) == set(values)
    (snapshot / "sub" / "two.safetensors").unlink()
    (blobs / "model-2.safetensors").rename(blobs / "123.incomplete")
    with pytest.raises(
        ValueError, match=r"lacks .*two\.safetensors.*; 123\.incomplete is a download"
    ):
        weights.Checkpoint(snapshot)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [(POINTER, "a Git LFS pointer; git lfs pull"), (b"\n<!DOCTYPE html><p>404", "a web page")],
)
def test_what_stands_in_for_a_file_is_called_what_it_is(tmp_path: Path, content, words):
    for name in ("model.safetensors", "x.pth", "a.json", "p.txt", "v.mp4", "tokenizer.json"):
        (tmp_path / name).write_bytes(content)
    calls = [
        lambda: weights.Checkpoint(tmp_path),
        lambda: weights.Checkpoint(tmp_path / "x.pth"),
        lambda: formats.read_json(tmp_path / "a.json"),
        lambda: files.read_text(tmp_path / "p.txt"),
        lambda: footage.probe(tmp_path / "v.mp4"),
        lambda: media.read_facts(tmp_path / "v.mp4"),
        lambda: Tokenizer.load(tmp_path),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call()


def test_a_name_that_is_not_utf8_is_no_corruption(tmp_path: Path, values):
    path = weights.save(tmp_path / os.fsdecode(b"a\xff.safetensors"), values)
    with pytest.raises(ValueError, match="has a name that is not UTF-8: rename it"):
        weights.Checkpoint(path)


def test_a_download_that_did_not_finish_is_called_so(tmp_path: Path, values):
    path = weights.save(tmp_path / "model.safetensors", values)
    for name in ("model.safetensors.part", "a.incomplete"):
        (tmp_path / name).write_bytes(path.read_bytes()[:-8])
        with pytest.raises(ValueError, match="a download that did not finish; fetch it again"):
            weights.Checkpoint(tmp_path / name)
    assert set(weights.Checkpoint(tmp_path)) == set(values)
    (tmp_path / "model.safetensors.aria2").touch()  # beside a file that has its whole size
    with pytest.raises(ValueError, match=r"model\.safetensors .*a download that did not finish"):
        weights.Checkpoint(tmp_path)
    path.unlink()
    (tmp_path / "vae").mkdir()
    cache = tmp_path / ".cache" / "huggingface" / "download" / "vae"
    cache.mkdir(parents=True)
    (cache / "x.incomplete").touch()
    with pytest.raises(
        ValueError, match=r"vae holds no weights.*; x\.incomplete is a download that"
    ):
        weights.Checkpoint(tmp_path / "vae")
    (cache / "x.incomplete").unlink()
    with pytest.raises(ValueError, match=r"holds no weights.*; a\.incomplete is a download that"):
        weights.Checkpoint(tmp_path)


def test_pth_files_are_read_and_code_in_them_is_refused(tmp_path: Path, values):
    torch.save(values, tmp_path / "ok.pth")
    assert torch.equal(
        weights.Checkpoint(tmp_path / "ok.pth")["linear.bias"], values["linear.bias"]
    )
    torch.save({"w": Net()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth is not a readable torch checkpoint") as caught:
        weights.Checkpoint(tmp_path / "code.pth")
    assert "\n" not in str(caught.value)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "ok.pth").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cut\.pth is not a readable"):
        weights.Checkpoint(tmp_path / "cut.pth")
    torch.save({"nested": values}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match=r"nested\.pth is not a flat dictionary"):
        weights.Checkpoint(tmp_path / "nested.pth")


def test_a_failed_save_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch):
    path = weights.save(tmp_path / "x.safetensors", {"a": torch.ones(3)})

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left on device"):
        weights.save(path, {"a": torch.zeros(3)})
    assert torch.equal(load_file(path)["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_place_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="cannot write") as caught:
        weights.save(tmp_path / "file" / "x.safetensors", {"a": torch.ones(1)})
    assert "\n" not in str(caught.value)
