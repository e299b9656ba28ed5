"""Learning a LoRA: only the maps move, exactly resumed, and the file is the live student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fastvideo_train import logs, lora
from fastvideo_train.export import TOLERANCE, export, load_run
from fastvideo_train.loop import Job
from fastvideo_train.recipe import LoraSpec, Recipe
from safetensors import safe_open
from tiny_recipes import finish, tiny

from fastvideo import cli
from fastvideo import model as models
from fastvideo.formats import diffusers as layout
from fastvideo.lora import Loras, Use
from fastvideo.weights import Checkpoint

RANK, ALPHA = 4, 6.0
WORDS = (
    f"roles.student.lora.rank={RANK}",
    f"roles.student.lora.alpha={ALPHA}",
    "roles.text.trainable=false",
)


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose student is no longer all zero at its output."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    finish(tiny("flow_matching", "run.dtype=float32"), folder)
    return folder


def recipe(base: Path, *sets: str) -> Recipe:
    starts = [f"roles.student.from={base}", f"roles.text.from={base}"]
    return tiny("flow_matching", "run.dtype=float32", *starts, *WORDS, *sets)


@pytest.fixture(scope="module")
def lora_run(base_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    finish(recipe(base_run, "optim.lr=5e-2"), folder)
    return folder


def state(job: Job) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in job.roles["student"].net.state_dict().items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_moves_the_maps_alone(dtype: str, base_run: Path, tmp_path: Path):
    words = [f"run.dtype={dtype}", "optim.lr=1e-2"]
    fresh = state(Job.open(recipe(base_run, *words), tmp_path / "fresh"))
    job = finish(recipe(base_run, *words), tmp_path / "run")
    trained = state(job)
    maps = {name for name in trained if name.endswith((lora.DOWN, lora.UP))}
    changed = {name for name in trained if not torch.equal(trained[name], fresh[name])}
    layers = {name.rpartition(".")[0] for name in maps}
    assert changed == maps and len(maps) == 2 * len(layers)
    assert all(any(part in name for part in ("attn1", "attn2", "ffn")) for name in layers)
    assert set(job.strategy.gather("student")) == maps
    assert all(tensor.dtype == torch.float32 for tensor in job.strategy.gather("student").values())
    base = load_run(base_run).roles["student"].net.state_dict()
    for name, tensor in base.items():
        assert torch.equal(trained[name], tensor.to(trained[name].dtype))


def test_a_fresh_lora_changes_no_output(base_run: Path, tmp_path: Path):
    plain = Job.open(
        tiny("flow_matching", "run.dtype=float32", f"roles.student.from={base_run}"), tmp_path / "a"
    )
    adapted = Job.open(recipe(base_run), tmp_path / "b")
    a, b = (_velocity(job.roles["student"].net) for job in (plain, adapted))
    assert torch.equal(a, b) and a.abs().max() > 0


def test_training_a_lora_lowers_the_loss(base_run: Path, tmp_path: Path):
    words = ["run.steps=60", "run.batch=4", "optim.lr=3e-2", "method.args.logit_mean=3.0"]
    targets = 'roles.student.lora.targets=["attn1", "attn2", "ffn", "proj_out"]'
    job = finish(recipe(base_run, *words, targets, "roles.student.lora.rank=16"), tmp_path)
    losses = [record["train/loss"] for record in logs.read(job.folder)]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_equals_one_without_interruption(dtype: str, base_run: Path, tmp_path: Path):
    own = recipe(base_run, f"run.dtype={dtype}", "run.accumulate=2")
    straight = finish(own, tmp_path / "straight")
    assert finish(own, tmp_path / "stopped", until=3).step == 3
    resumed = finish(own, tmp_path / "stopped")
    for averaged in (False, True):
        a, b = (job.strategy.gather("student", averaged=averaged) for job in (straight, resumed))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    a, b = state(straight), state(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_holds_the_maps_and_not_the_base(lora_run: Path):
    job = Job.open(load_run_recipe(lora_run), lora_run)
    latest = job.checkpoints.latest()
    assert latest is not None
    saved = job.checkpoints.read_state(latest)["student"]
    assert saved["frozen"] == {} and saved["base"] == job.roles["student"].base != ""
    assert all(name.endswith((lora.DOWN, lora.UP)) for name in saved["masters"])


def load_run_recipe(run: Path) -> Recipe:
    """Return the recipe that a run was made by."""
    from fastvideo_train.origins import learned

    return learned(run, "student")[0]


def test_another_base_is_refused_on_resume_and_on_export(base_run: Path, tmp_path: Path):
    base = tmp_path / "base"
    net = load_run(base_run).roles["student"].net
    layout.save_part(net, base / "transformer", part="dit", family="wan")
    own = recipe(base_run, f"roles.student.from={base}")
    finish(own, tmp_path / "run", until=2)
    with torch.no_grad():
        net.blocks[0].ffn.net[2].weight[-1, -1] += 1
    layout.save_part(net, base / "transformer", part="dit", family="wan")
    with pytest.raises(ValueError, match="the model under the LoRA of 'student' is another now"):
        Job.open(own, tmp_path / "run")
    with pytest.raises(ValueError, match="learned a LoRA on other weights"):
        export(tmp_path / "run", tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_lora_on_its_base_is_the_live_student(
    dtype: str, base_run: Path, lora_run: Path, tmp_path: Path
):
    path = tmp_path / "style.safetensors"
    done = export(lora_run, path, changes={"dtype": dtype})
    assert done.folder == path and done.error <= TOLERANCE
    assert done.rounding <= (TOLERANCE if dtype == "float32" else 0.02)
    job = Job.open(load_run_recipe(lora_run), lora_run)
    net = load_run(base_run).roles["student"].net
    plain = _velocity(net)
    Loras().use(net, [Use(path)])
    with job.strategy.averaged():
        live = _velocity(job.roles["student"].net)
    size = live.abs().max()
    error = float((_velocity(net) - live).abs().max() / size)
    assert error < (1e-5 if dtype == "float32" else 0.02)
    assert float((plain - live).abs().max() / size) > 0.01, "else it proves nothing"


def test_the_file_has_diffusers_names_alpha_equal_to_rank_and_says_what_it_is(
    base_run: Path, lora_run: Path, tmp_path: Path
):
    path = tmp_path / "style.safetensors"
    export(lora_run, path)
    with safe_open(path, "pt") as file:
        header, names = file.metadata(), list(file.keys())
    layers = {name.rpartition(".lora_")[0] for name in names}
    assert {name.removeprefix(layer) for layer in layers for name in names if layer in name} >= {
        ".lora_A.weight",
        ".lora_B.weight",
    }
    assert all(name.startswith("transformer.blocks.") for name in names)
    config = json.loads(header["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (RANK, RANK)
    assert header["base_model"] == str(base_run)
    said = json.loads(header["provenance"])
    assert set(said) == {"recipe", "data", "parents"} and said["parents"]
    assert (header["trained_rank"], header["trained_alpha"]) == ("4", "6")
    learned = Job.open(load_run_recipe(lora_run), lora_run).strategy.gather("student")
    (up,) = (learned[f"blocks.0.attn1.to_q{lora.UP}"],)
    stored = Checkpoint(path).tensor("transformer.blocks.0.attn1.to_q.lora_B.weight")
    torch.testing.assert_close(stored, up * ALPHA / RANK)


def test_a_run_on_top_of_a_lora_run_starts_from_the_merged_weights(
    base_run: Path, lora_run: Path, tmp_path: Path
):
    job = Job.open(
        tiny("flow_matching", "run.dtype=float32", f"roles.student.from={lora_run}"), tmp_path
    )
    base = load_run(base_run).roles["student"].net.state_dict()
    learned = Job.open(load_run_recipe(lora_run), lora_run).strategy.gather("student")
    name = "blocks.0.ffn.net.2"
    a, b = learned[name + lora.DOWN].double(), learned[name + lora.UP].double()
    true = base[f"{name}.weight"].double() + ALPHA / RANK * (b @ a)
    got = job.roles["student"].net.state_dict()[f"{name}.weight"].double()
    torch.testing.assert_close(got, true, rtol=1e-6, atol=1e-7)


def test_merge_lora_writes_a_model_folder_that_loads_and_the_file_gives_the_same(
    base_run: Path, lora_run: Path, vae_folder: Path, tmp_path: Path, capsys
):
    defaults = {"num_frames": 5, "height": 64, "width": 64, "num_inference_steps": 2}
    changes = {"name": "base", "vae": str(vae_folder), "dtype": "float32", "defaults": defaults}
    export(base_run, tmp_path / "base", changes=changes)
    sets = ["name=merged", f"vae={vae_folder}", "dtype=float32"]
    sets += [f"defaults.{key}={value}" for key, value in defaults.items()]
    words = [word for one in sets for word in ("--set", one)]
    merged, file = tmp_path / "merged", tmp_path / "style.safetensors"
    assert cli.main(["export", str(lora_run), "-o", str(merged), "--merge-lora", *words]) == 0
    assert cli.main(["export", str(lora_run), "-o", str(file)]) == 0
    assert f"{file}: read back" in capsys.readouterr().out
    whole = models.load(merged, dtype="float32").dit
    base = models.load(tmp_path / "base", dtype="float32").dit
    Loras().use(base, [Use(file)])
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(base.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "vae"
    finish(tiny("vae", "run.steps=2"), folder)
    clips = {"count": 2, "num_frames": 5, "height": 64, "width": 64}
    return export(folder, folder / "export", changes={"clips": clips}).folder


# Refusals


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["roles.student.lora.rank=0"], "rank 0 in test: must be at least 1"),
        (["roles.student.lora.ranks=4"], "lora.ranks in test is unknown; did you mean 'rank'"),
        (["roles.student.from="], "a lora needs `from`"),
        (["roles.student.trainable=false", "roles.text.trainable=true"], "that is trainable"),
        (["roles.text.trainable=true", "roles.text.lora.rank=4"], "of kind 'dit'"),
    ],
)
def test_a_recipe_that_cannot_learn_a_lora_is_refused(
    words: list[str], text: str, base_run: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=text):
        recipe(base_run, *words)


def test_a_target_without_a_layer_is_refused_by_name(base_run: Path, tmp_path: Path):
    own = recipe(base_run, 'roles.student.lora.targets=["attn1", "attn3"]')
    with pytest.raises(ValueError, match=r"lora.targets 'attn3' names no .*attn1, attn2"):
        Job.open(own, tmp_path)


def test_targets_are_whole_parts_of_names(base_run: Path, tmp_path: Path):
    own = recipe(base_run, 'roles.student.lora.targets=["attn2.to_v", "blocks.1"]')
    maps = Job.open(own, tmp_path).strategy.gather("student")
    layers = {name.rpartition(".")[0] for name in maps}
    assert "blocks.0.attn2.to_v" in layers and "blocks.1.ffn.net.2" in layers
    assert all("blocks.1." in name or name.endswith("attn2.to_v") for name in layers)


def test_an_output_that_is_no_file_of_tensors_and_a_merge_without_lora_are_refused(
    base_run: Path, lora_run: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        export(lora_run, tmp_path / "folder")
    with pytest.raises(ValueError, match="learned no LoRA"):
        export(base_run, tmp_path / "folder", merge_lora=True)
    assert list(tmp_path.iterdir()) == []


def test_the_maps_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    frozen = torch.nn.Linear(5, 3).double()
    spec = LoraSpec(rank=2, alpha=3.0)
    layer = lora.LoraLinear(frozen, spec, torch.Generator().manual_seed(1)).double()
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    whole = frozen.weight + 1.5 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ whole.T + frozen.bias)
    assert torch.autograd.gradcheck(
        lambda a, b: torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,)),
        (layer.lora_A, layer.lora_B),
    )


def _velocity(net: torch.nn.Module) -> torch.Tensor:
    c = net.config
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, c.in_channels, 2, 4, 4, generator=generator)
    text = torch.randn(1, 8, c.text_dim, generator=generator)
    from fastvideo.models.dit.wan import Conditioning

    with torch.no_grad():
        v: torch.Tensor = net(x, torch.full((1, 1), 400.0), Conditioning(text))
    return v.double()


@pytest.mark.parametrize(
    ("method", "roles"), [("perflow", ["student"]), ("dmd", ["student", "critic"])]
)
def test_distillation_learns_loras_too_and_resumes_exactly(
    method: str, roles: list[str], base_run: Path, tmp_path: Path
):
    sets = ["run.dtype=float32", "run.steps=3", f"roles.text.from={base_run}"]
    for role in ("teacher", *roles):
        sets.append(f"roles.{role}.from={base_run}")
    sets += [f"roles.{role}.lora.rank=2" for role in roles]
    own = tiny(method, *sets)
    straight = finish(own, tmp_path / "straight")
    finish(own, tmp_path / "stopped", until=2)
    resumed = finish(own, tmp_path / "stopped")
    for role in roles:
        a, b = (job.strategy.gather(role, averaged=False) for job in (straight, resumed))
        assert all(name.endswith((lora.DOWN, lora.UP)) for name in a)
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert any(a[name].any() for name in a if name.endswith(lora.UP)), "it moved"
