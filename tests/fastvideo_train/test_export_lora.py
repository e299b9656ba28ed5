"""A learned LoRA's file where it is read: by stock diffusers and PEFT, by ours with its sampler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fastvideo_train import lora
from fastvideo_train.bundle import distilled
from fastvideo_train.export import export, load_run
from safetensors.torch import save_file
from tiny_recipes import finish, tiny

from fastvideo import cli, hub, sampler_note
from fastvideo import model as models
from fastvideo.lora import Loras, Use
from fastvideo.models.dit.wan import Conditioning
from fastvideo.spec import Attention, Sampler, Scheduler
from fastvideo.weights import Checkpoint

RANK, ALPHA = 4, 6.0
LORA = (f"roles.student.lora.rank={RANK}", f"roles.student.lora.alpha={ALPHA}", "optim.lr=5e-2")
VSA = '{pattern="vsa", args={sparsity=0.5, tile=[1, 2, 2]}, anneal_every=2, anneal_by=0.25}'


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def base_run(root: Path) -> Path:
    """A finished run whose student is no longer all zero at its output."""
    finish(tiny("flow_matching", "run.dtype=float32"), root / "base")
    return root / "base"


@pytest.fixture(scope="module")
def base(base_run: Path, root: Path) -> Path:
    """The model folder of that run."""
    finish(tiny("vae", "run.steps=2"), root / "vae")
    clips = {"count": 2, "num_frames": 5, "height": 64, "width": 64}
    vae = export(root / "vae", root / "vae" / "export", changes={"clips": clips}).folder
    defaults = {"num_frames": 5, "height": 64, "width": 64, "num_inference_steps": 10}
    changes = {"name": "base", "vae": str(vae), "dtype": "float32", "defaults": defaults}
    return export(base_run, root / "model", changes=changes).folder


def learn(method: str, base_run: Path, folder: Path, *sets: str) -> Path:
    """Learn a LoRA on a run and return its file."""
    names = ("student", "text") if method == "flow_matching" else ("student", "teacher", "text")
    words = [f"roles.{name}.from={base_run}" for name in names]
    own = tiny(method, "run.dtype=float32", *words, *LORA, "roles.text.trainable=false", *sets)
    finish(own, folder / "run")
    return export(folder / "run", folder / "lora.safetensors").folder


@pytest.fixture(scope="module")
def style(base_run: Path, root: Path) -> Path:
    return learn("flow_matching", base_run, root / "style")


@pytest.fixture(scope="module")
def few_steps(base_run: Path, root: Path) -> Path:
    sparse = f"roles.student.attention={VSA}"
    return learn("perflow", base_run, root / "few", sparse, "run.steps=3")


# Stock diffusers, which hands the file to PEFT


@pytest.mark.parametrize("has_header", [True, False])
def test_stock_diffusers_with_the_file_gives_our_merged_velocity(
    has_header: bool, base: Path, style: Path, tmp_path: Path
):
    """Without the header nothing tells alpha, and PEFT takes the rank for it."""
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    file = style
    if not has_header:
        file = tmp_path / "bare.safetensors"
        save_file({name: t.clone() for name, t in Checkpoint(style).items()}, file)
    pipe = diffusers.WanPipeline.from_pretrained(base)
    net = models.load(base, dtype="float32", parts=("dit",)).dit
    x, text = _inputs(net)

    def stock() -> torch.Tensor:
        with torch.no_grad():
            (v,) = pipe.transformer(x, torch.full((1,), 400.0), text, return_dict=False)
        return v.double()

    before = stock()
    pipe.load_lora_weights(file)
    Loras().use(net, [Use(style)])
    with torch.no_grad():
        ours = net(x, torch.full((1, 1), 400.0), Conditioning(text)).double()
    theirs, size = stock(), ours.abs().max()
    assert (theirs - ours).abs().max() < 1e-5 * size
    assert (before - ours).abs().max() > 0.01 * size, "else it proves nothing"


def _inputs(net: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, net.config.in_channels, 2, 4, 4, generator=draw)
    return x, torch.randn(1, 8, net.config.text_dim, generator=draw)


# Its sampler


def test_the_header_says_how_a_distilled_lora_is_sampled_and_of_a_style_nothing(
    few_steps: Path, style: Path
):
    sparsity = 0.25  # of the last of three steps, on its way to a half
    assert sampler_note.read(few_steps) == Sampler(
        scheduler=Scheduler(
            name="few_step", args={"sigmas": [1.0, 0.909091, 0.714286], "renoise": False}
        ),
        num_inference_steps=3,
        guidance_scale=1.0,
        attention=Attention(pattern="vsa", args={"sparsity": sparsity, "tile": [1, 2, 2]}),
    )
    assert sampler_note.read(style) is None


def test_a_style_that_was_learned_sparse_says_so_and_no_more(base_run: Path, tmp_path: Path):
    sparse = 'roles.student.attention={pattern="vsa", args={sparsity=0.5, tile=[1, 2, 2]}}'
    file = learn("flow_matching", base_run, tmp_path, sparse, "run.steps=2")
    args = {"sparsity": 0.5, "tile": [1, 2, 2]}
    assert sampler_note.read(file) == Sampler(attention=Attention(pattern="vsa", args=args))


@pytest.mark.parametrize("method", ["perflow", "dmd", "consistency"])
def test_every_distillation_says_how_it_is_sampled_and_other_methods_do_not(method: str):
    recipe = tiny(method)
    wanted = distilled(recipe)
    assert wanted is not None and wanted.scheduler is not None
    own = load_method(method).sampler
    assert wanted.scheduler == own and wanted.num_inference_steps == len(own.args["sigmas"])
    assert wanted.guidance_scale == 1 and distilled(tiny("flow_matching")) is None


def load_method(name: str):
    from fastvideo_train.loop import make_method

    return make_method(tiny(name))


def test_merging_the_file_makes_the_folder_that_the_run_would_export(
    base: Path, few_steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The whole chain of a user, which ended in ten guided steps of a three-step student."""
    out, clip = tmp_path / "merged", str(tmp_path / "a.mp4")
    words = ["generate", "a red ball", "-o", clip, "--model"]
    assert cli.main([*words, str(base), "--lora", str(few_steps)]) == 2
    assert "fastvideo lora merge" in capsys.readouterr().err
    assert cli.main(["lora", "merge", str(base), str(few_steps), "-o", str(out)]) == 0
    assert cli.main([*words, str(out)]) == 0
    made = hub.open_spec(out)[0]
    assert sampler_note.of(made) == sampler_note.read(few_steps)
    net = models.load(out, dtype="float32", parts=("dit",)).dit
    run = load_run(few_steps.parent / "run").roles["student"].net.state_dict()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, run[name], rtol=1e-6, atol=1e-7)


# One merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_have_the_bits_of_base_plus_scale_times_b_a(dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(6, 5, generator=draw).to(dtype), "b": torch.ones(2)}
    down, up = torch.randn(3, 5, generator=draw), torch.randn(6, 3, generator=draw)
    up[0] = 0.0  # a change of -0.0, which a sum with 0.0 would lose
    maps = {
        f"{module}{end}": tensor
        for module in "ac"
        for end, tensor in ((lora.DOWN, down), (lora.UP, up))
    }
    merged = lora.merge(base, maps, -1.7)
    change = -1.7 * (up @ down)
    for got, true in (
        (merged["a.weight"], base["a.weight"].float() + change),
        (merged["c.weight"], change),
    ):
        assert got.dtype == torch.float32
        assert torch.equal(got.view(torch.int32), true.view(torch.int32))
    assert merged["b"] is base["b"]
