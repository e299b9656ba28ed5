"""diffusers folders: stock diffusers loads what we write, and we load what either wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastvideo import hub, schedulers, spec, weights
from fastvideo.formats import diffusers as layout
from fastvideo.model import Model, load

PARTS = {"dit": "transformer", "vae": "vae", "text": "text_encoder"}


def _same(a: Model, b: Model) -> bool:
    states = [(getattr(m, part).state_dict() for part in PARTS) for m in (a, b)]
    return all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        for x, y in zip(*states, strict=True)
    )


def _edit(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_what_diffusers_loaded_and_saved_again_loads_to_identical_tensors(
    tiny_folder: Path, tiny_diffusers_folder: Path
):
    ours, stock = (load(f, dtype="float32") for f in (tiny_folder, tiny_diffusers_folder))
    assert _same(ours, stock)
    for part in PARTS:
        assert getattr(ours, part).config == getattr(stock, part).config


def test_saving_what_was_loaded_changes_no_tensor_and_no_spec(tiny_folder: Path, tmp_path: Path):
    first = load(tiny_folder, dtype="float32")
    layout.save(first, tmp_path / "again")
    again = load(tmp_path / "again", dtype="float32")
    assert _same(first, again)
    dims = {"dit", "vae", "text"}
    assert first.spec.model_dump(exclude=dims) == again.spec.model_dump(exclude=dims)


def test_a_bfloat16_folder_keeps_the_sensitive_parts_in_float32(tiny_folder: Path, tmp_path: Path):
    layout.save(load(tiny_folder, dtype="float32"), tmp_path / "half", dtype=torch.bfloat16)
    checkpoint = weights.Checkpoint(tmp_path / "half" / "transformer")
    kinds = {name: checkpoint.dtype(name) for name in checkpoint}
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert kinds["blocks.0.scale_shift_table"] == torch.float32
    assert kinds["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path / "half", torch_dtype=torch.bfloat16)
    theirs, ours = pipe.transformer.state_dict(), load(tmp_path / "half", dtype="bfloat16").dit
    assert {k: v.dtype for k, v in theirs.items()} == {
        k: v.dtype for k, v in ours.state_dict().items()
    }


def test_shards_as_diffusers_writes_them_load_to_identical_tensors(
    tiny_folder: Path, tiny_copy: Path
):
    diffusers = pytest.importorskip("diffusers")
    whole = load(tiny_folder, dtype="float32")
    for name, kind in (("transformer", "WanTransformer3DModel"), ("vae", "AutoencoderKLWan")):
        network = getattr(diffusers, kind).from_pretrained(tiny_folder / name)
        (tiny_copy / name / "diffusion_pytorch_model.safetensors").unlink()
        network.save_pretrained(tiny_copy / name, max_shard_size="50KB")
        assert len(list((tiny_copy / name).glob("*-of-*.safetensors"))) > 1
    assert _same(load(tiny_copy, dtype="float32"), whole)


def test_a_derived_spec_tells_dims_scheduler_and_what_was_assumed(tiny_diffusers_folder: Path):
    derived, _ = hub.open_spec(tiny_diffusers_folder)
    assert derived.compression.spatial == 8
    assert derived.compression.temporal == 4
    assert derived.scheduler == spec.Scheduler(name="unipc", args={"shift": 3.0})
    assert derived.defaults == layout.WAN_DEFAULTS
    assert (derived.defaults.num_frames, derived.defaults.guidance_scale) == (81, 5.0)
    assert {line.partition(":")[0] for line in derived.derived} == {
        "networks", "compression", "scheduler", "attention", "defaults",
    }  # fmt: skip


def test_an_euler_scheduler_is_derived_with_its_shift(tiny_copy: Path):
    diffusers = pytest.importorskip("diffusers")
    (tiny_copy / spec.FILE_NAME).unlink()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.save_pretrained(tiny_copy / "scheduler")
    derived, _ = hub.open_spec(tiny_copy)
    assert derived.scheduler == spec.Scheduler(name="euler", args={"shift": 7.0})


def test_a_dmd_pipeline_is_derived_as_three_explicit_steps_without_guidance(tiny_copy: Path):
    (tiny_copy / spec.FILE_NAME).unlink()
    _edit(tiny_copy / "model_index.json", _class_name="WanDMDPipeline")
    derived, _ = hub.open_spec(tiny_copy)
    args = {"sigmas": [1.0, 0.756757, 0.521739], "timesteps": [1000.0, 757.0, 522.0]}
    assert derived.scheduler == spec.Scheduler(name="few_step", args=args)
    grid = schedulers.create(derived.scheduler.name, derived.scheduler.args).grid(3)
    assert grid.timesteps.tolist() == [1000, 757, 522]
    assert (derived.defaults.num_inference_steps, derived.defaults.guidance_scale) == (3, 1.0)
    assert any("assumed for a WanDMDPipeline" in line for line in derived.derived)


@pytest.mark.parametrize("name", ["unipc", "euler", "few_step"])
def test_every_scheduler_is_saved_as_one_that_diffusers_loads(
    tiny_folder: Path, tmp_path: Path, name: str
):
    diffusers = pytest.importorskip("diffusers")
    model = load(tiny_folder, dtype="float32")
    args = {"sigmas": [1.0]} if name == "few_step" else {"shift": 6.0}
    changed = model.spec.model_copy(update={"scheduler": spec.Scheduler(name=name, args=args)})
    networks = (model.dit, model.vae, model.text, model.tokenizer)
    layout.save(Model(changed, *networks, model.device, model.dtype), tmp_path / "x")
    config = diffusers.WanPipeline.from_pretrained(tmp_path / "x").scheduler.config
    assert config.get("flow_shift" if name == "unipc" else "shift") == args.get("shift", 1.0)


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "'DDIMScheduler' in"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "prediction_type 'eps"),
        ("scheduler/scheduler_config.json", {"solver_order": 3}, "solver_order 3 in .* must be 2"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas True"),
        ("model_index.json", {"_class_name": "LTXPipeline"}, "pipeline 'LTXPipeline' in"),
        ("model_index.json", {"boundary_ratio": 0.875}, "two transformers"),
        ("transformer/config.json", {"_class_name": "Other"}, "class 'Other' in .*transformer"),
    ],
)
def test_what_is_not_a_plain_wan_pipeline_is_refused(
    tiny_copy: Path, file: str, entries: dict, message: str
):
    (tiny_copy / spec.FILE_NAME).unlink()
    _edit(tiny_copy / file, **entries)
    with pytest.raises(ValueError, match=message):
        hub.open_spec(tiny_copy)


PLAIN, GATED = "diffusion_pytorch_model.safetensors", "vsa_gated_model.safetensors"


def _add_gates(folder: Path, count: int = 2, rows: int = 48) -> None:
    path = folder / "transformer" / PLAIN
    g = torch.Generator().manual_seed(0)
    sizes = {"weight": (rows, 48), "bias": (rows,)}
    gates = {
        f"blocks.{i}.to_gate_compress.{kind}": torch.randn(size, generator=g)
        for i in range(count)
        for kind, size in sizes.items()
    }
    weights.save(path, {**weights.Checkpoint(path), **gates})


def test_a_folder_laid_out_like_fastwan_is_sparse_in_three_steps_without_any_switch(
    tiny_copy: Path,
):
    (tiny_copy / spec.FILE_NAME).unlink()
    _edit(tiny_copy / "model_index.json", _class_name="WanDMDPipeline")
    _add_gates(tiny_copy)
    model = load(tiny_copy, dtype="float32")
    assert model.spec.attention == spec.Attention(
        pattern="vsa", args={"sparsity": 0.8, "tile": [4, 4, 4]}
    )
    assert model.spec.scheduler.args["timesteps"] == [1000.0, 757.0, 522.0]
    assert (model.spec.defaults.num_inference_steps, model.spec.defaults.guidance_scale) == (3, 1.0)
    gate = model.dit.blocks[1].to_gate_compress.weight
    stored = weights.Checkpoint(tiny_copy / "transformer").tensor(
        "blocks.1.to_gate_compress.weight"
    )
    assert torch.equal(gate, stored)
    assert any("vsa at sparsity 0.8" in line for line in model.spec.derived)


@pytest.mark.parametrize(("layers", "sparsity"), [(30, 0.8), (40, 0.9), (None, 0.9)])
def test_the_sparsity_of_a_gated_network_without_a_spec_is_that_of_its_size(
    tiny_copy: Path, layers: int | None, sparsity: float
):
    """40 layers, which a config that does not say has too, are FastWan's 14B."""
    (tiny_copy / spec.FILE_NAME).unlink()
    _add_gates(tiny_copy)
    config = tiny_copy / "transformer" / "config.json"
    dims = json.loads(config.read_text()) | {"num_layers": layers}
    config.write_text(json.dumps({k: v for k, v in dims.items() if v is not None}))
    derived, _ = hub.open_spec(tiny_copy)
    assert derived.attention.args == {"sparsity": sparsity, "tile": [4, 4, 4]}
    (line,) = [line for line in derived.derived if line.startswith("attention")]
    assert f"sparsity {sparsity}" in line and f"{layers or 40} layers" in line


def test_stock_diffusers_never_reads_a_saved_network_without_its_gates(
    tiny_copy: Path, tmp_path: Path
):
    diffusers = pytest.importorskip("diffusers")
    _add_gates(tiny_copy)
    _edit(tiny_copy / spec.FILE_NAME, attention={"pattern": "vsa", "args": {"sparsity": 0.5}})
    saved = layout.save(load(tiny_copy, dtype="float32"), tmp_path / "saved")
    config = json.loads((saved / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "WanVsaTransformer3DModel"
    assert sorted(p.name for p in (saved / "transformer").iterdir()) == ["config.json", GATED]
    for place in (saved / "transformer", tiny_copy / "transformer"):
        assert "blocks.1.to_gate_compress.weight" in weights.Checkpoint(place).names()
    assert _same(load(saved, dtype="float32"), load(tiny_copy, dtype="float32"))
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        diffusers.WanTransformer3DModel.from_pretrained(saved / "transformer")
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        diffusers.WanTransformer3DModel.from_pretrained(saved, subfolder="transformer")
    with pytest.raises(ValueError, match="WanVsaTransformer3DModel"):
        diffusers.AutoModel.from_pretrained(saved / "transformer")
    with pytest.raises(ValueError, match="fastvideo"):
        diffusers.WanPipeline.from_pretrained(saved)


def test_gates_that_are_missing_or_of_another_shape_are_refused_by_name(tiny_copy: Path):
    _edit(tiny_copy / spec.FILE_NAME, attention={"pattern": "vsa", "args": {"sparsity": 0.5}})
    _add_gates(tiny_copy, count=1)
    one_less = weights.Checkpoint(tiny_copy / "transformer")
    weights.save(
        tiny_copy / "transformer" / "diffusion_pytorch_model.safetensors",
        {n: one_less.tensor(n).clone() for n in one_less if "blocks.1.to_gate" not in n},
    )
    with pytest.raises(ValueError, match=r"blocks\.1\.to_gate_compress"):
        load(tiny_copy)
    _add_gates(tiny_copy, rows=40)
    with pytest.raises(ValueError, match=r"to_gate_compress.*\(40, 48\)"):
        load(tiny_copy)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1", b"\xff" * 64])
def test_a_file_that_holds_no_weights_does_not_hinder_reading_the_spec(tiny_copy: Path, content):
    (tiny_copy / spec.FILE_NAME).unlink()
    (tiny_copy / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    derived, _ = hub.open_spec(tiny_copy)
    assert derived.attention == spec.Attention()
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors"):
        load(tiny_copy)


def test_saving_never_overwrites_unless_told(tiny_folder: Path, tiny_copy: Path):
    model = load(tiny_folder, dtype="float32")
    (tiny_copy / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"tiny exists; choose another folder"):
        layout.save(model, tiny_copy)
    assert (tiny_copy / "note.txt").exists()
    layout.save(model, tiny_copy, overwrite=True)
    assert not (tiny_copy / "note.txt").exists()
    assert _same(load(tiny_copy, dtype="float32"), model)


def test_a_save_that_fails_half_way_leaves_nothing(tiny_folder: Path, tmp_path: Path, monkeypatch):
    model = load(tiny_folder, dtype="float32")

    def broken(path: object, *args: object) -> None:
        raise ValueError("cannot write")

    monkeypatch.setattr(weights, "save", broken)
    with pytest.raises(ValueError, match="cannot write"):
        layout.save(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
