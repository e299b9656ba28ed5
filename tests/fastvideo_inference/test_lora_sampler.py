"""LoRAs that were distilled: no clip by another sampler, and a merged folder that brings theirs."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from tiny_loras import pairs, write_as

from fastvideo import VideoPipeline, cli, hub, sampler_note, weights
from fastvideo import model as models
from fastvideo import spec as specs
from fastvideo.formats import wan
from fastvideo.lora.file import LowRank, save
from fastvideo.resolve import resolve
from fastvideo.sampling import GenerateRequest
from fastvideo.spec import Attention, Sampler, Scheduler

PROMPT = "a red ball moving left"
VSA = Attention(pattern="vsa", args={"sparsity": 0.5, "tile": [1, 2, 2]})
THREE = Sampler(
    scheduler=Scheduler(name="few_step", args={"sigmas": [1.0, 0.9, 0.7], "renoise": False}),
    num_inference_steps=3,
    guidance_scale=1.0,
    attention=VSA,
)
TWO = THREE.model_copy(update={"guidance_scale": 2.0})
MERGE = "fastvideo lora merge"
PARTS = ("attn", "ffn", "to_gate_compress")


def distilled(folder: Path, path: Path, wanted: Sampler = THREE, *, seed: int = 0) -> Path:
    net = models.load(folder, dtype="float32", parts=("dit",)).dit
    maps = {name: LowRank(*pair) for name, pair in pairs(net, seed=seed, only=PARTS).items()}
    return save(path, maps, notes=sampler_note.header(wanted))


@pytest.fixture(scope="module")
def lora(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distilled(tiny_folder, tmp_path_factory.mktemp("loras") / "three.safetensors")


@pytest.fixture(scope="module")
def style(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = models.load(tiny_folder, dtype="float32", parts=("dit",)).dit
    return write_as("comfy", tmp_path_factory.mktemp("loras"), pairs(net, seed=5))


def merge(model: Path, *loras: object, to: Path) -> int:
    return cli.main(["lora", "merge", str(model), *map(str, loras), "-o", str(to)])


def test_generate_refuses_it_in_one_line_that_names_the_merge(
    tiny_folder: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "a.mp4"
    words = ["generate", PROMPT, "--model", str(tiny_folder), "--frames", "5", "-o", str(out)]
    assert cli.main([*words, "--lora", str(lora), "--steps", "3"]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "error" in one]
    assert f"lora {lora} is not sampled as tiny is: scheduler few_step" in line
    assert MERGE in line and "(from --lora)" in line and "num_inference_steps" not in line
    assert not out.exists()


def test_a_pipeline_refuses_to_load_it_and_keeps_its_weights(tiny_folder: Path, lora: Path):
    pipe = VideoPipeline.from_pretrained(tiny_folder, dtype="float32")
    before = {name: tensor.clone() for name, tensor in pipe.model.dit.state_dict().items()}
    with pytest.raises(ValueError, match=MERGE):
        pipe.load_lora(lora)
    with pytest.raises(ValueError, match=MERGE):
        pipe(PROMPT, num_frames=5, lora=[str(lora)], output="latents")
    pipe.load_lora(lora, strength=0)  # it is in no weight
    with pytest.raises(ValueError, match=MERGE):
        pipe.set_lora("three", strength=1)
    assert all(torch.equal(before[n], w) for n, w in pipe.model.dit.state_dict().items())


def test_a_request_may_decide_steps_guidance_and_attention_itself(tiny_folder: Path, tmp_path):
    wanted = Sampler(attention=VSA, guidance_scale=1.0)
    path = distilled(tiny_folder, tmp_path / "sparse.safetensors", wanted)
    spec, _ = hub.open_spec(tiny_folder)
    asked = GenerateRequest.model_validate({"prompt": PROMPT, "lora": [str(path)]})
    with pytest.raises(ValueError, match=r"attention vsa.* \(from the request\)"):
        resolve(asked.model_copy(update={"guidance_scale": 2.0}), spec)
    own = {"guidance_scale": 2.0, "attention": "vsa(sparsity=0.5, tile=[1, 2, 2])"}
    assert resolve(asked.model_copy(update=own), spec).guidance_scale == 2


def test_a_merged_folder_is_sampled_as_the_lora_was_distilled(
    tiny_folder: Path, lora: Path, style: Path, tmp_path: Path
):
    out = tmp_path / "merged"
    assert merge(tiny_folder, lora, f"{style}:0.5", to=out) == 0
    made, base = hub.open_spec(out)[0], hub.open_spec(tiny_folder)[0]
    assert sampler_note.of(made) == THREE
    kept = {"num_inference_steps", "guidance_scale"}
    assert made.defaults.model_dump(exclude=kept) == base.defaults.model_dump(exclude=kept)
    params = resolve(GenerateRequest(prompt=PROMPT), made)
    assert (params.num_inference_steps, params.guidance_scale) == (3, 1)
    assert params.attention == "vsa(sparsity=0.5, tile=[1, 2, 2])"

    pipe = VideoPipeline.from_pretrained(tiny_folder, dtype="float32")
    sampled = made.model_copy(update={"dit": base.dit})
    pipe.model = dataclasses.replace(pipe.model, spec=sampled)
    pipe.load_lora(lora)
    pipe.load_lora(style, strength=0.5)
    clips = [
        one(PROMPT, seed=3, num_frames=5, output="latents").latents
        for one in (VideoPipeline.from_pretrained(out, dtype="float32"), pipe)
    ]
    assert torch.equal(*clips), "that of the merged folder is base + LoRAs by the LoRA's sampler"


def test_stock_diffusers_takes_the_same_steps_from_a_merged_folder(
    tiny_folder: Path, lora: Path, tmp_path: Path
):
    diffusers = pytest.importorskip("diffusers")
    assert merge(tiny_folder, lora, to=tmp_path / "merged") == 0
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path / "merged")
    pipe.scheduler.set_timesteps(3)
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.9, 0.7, 0.0], abs=1e-6)
    kinds = (type(pipe.tokenizer), type(pipe.scheduler).__name__)
    stock = diffusers.WanPipeline.from_pretrained(tiny_folder)
    assert kinds == (type(stock.tokenizer), "FlowMatchEulerDiscreteScheduler")
    assert type(stock.scheduler).__name__ == "UniPCMultistepScheduler"


def test_a_folder_without_a_spec_gets_one_with_what_was_guessed_less_what_is_known(
    tiny_diffusers_folder: Path, lora: Path, tmp_path: Path
):
    out = tmp_path / "merged"
    index = "model_index.json"
    assert merge(tiny_diffusers_folder, lora, to=out) == 0
    made = specs.read(out)
    assert made is not None and sampler_note.of(made) == THREE
    assert [line.partition(":")[0] for line in made.derived] == [
        "networks",
        "compression",
        "defaults",
    ]
    old, new = ((f / index).read_text() for f in (tiny_diffusers_folder, out))
    assert new.count("FlowMatchEulerDiscreteScheduler") == 1
    assert old.count("Tokenizer") == new.count("Tokenizer")


def test_two_that_differ_are_refused_and_two_alike_are_merged(
    tiny_folder: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = distilled(tiny_folder, tmp_path / "two.safetensors", TWO, seed=1)
    alike = distilled(tiny_folder, tmp_path / "alike.safetensors", seed=2)
    assert merge(tiny_folder, lora, other, to=tmp_path / "a") == 1
    assert "are not sampled alike: guidance_scale 1 and 2" in capsys.readouterr().err
    assert merge(tiny_folder, lora, alike, to=tmp_path / "b") == 0
    assert merge(tiny_folder, lora, f"{other}:0", to=tmp_path / "c") == 0
    for name in "bc":
        assert sampler_note.of(hub.open_spec(tmp_path / name)[0]) == THREE
    assert not (tmp_path / "a").exists()


def test_a_lora_of_another_tool_leaves_a_models_sampler_as_it_is(
    tiny_folder: Path, style: Path, tmp_path: Path
):
    assert merge(tiny_folder, style, to=tmp_path / "merged") == 0
    made, base = hub.open_spec(tmp_path / "merged")[0], hub.open_spec(tiny_folder)[0]
    assert sampler_note.of(made) == sampler_note.of(base)
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        digests = [
            hashlib.sha256((f / name).read_bytes()) for f in (tiny_folder, tmp_path / "merged")
        ]
        assert digests[0].hexdigest() == digests[1].hexdigest()


def test_one_that_a_model_holds_only_in_part_is_refused(
    tiny_folder: Path, gated_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    gated = distilled(gated_folder, tmp_path / "gated.safetensors")
    assert merge(gated_folder, gated, to=tmp_path / "whole") == 0
    assert merge(tiny_folder, gated, to=tmp_path / "part") == 1
    err = capsys.readouterr().err
    assert "was distilled with blocks.0.to_gate_compress, blocks.1" in err and "--merge-lora" in err
    assert not (tmp_path / "part").exists()


def test_a_folder_of_the_original_wan_cannot_say_it_and_is_refused(
    tiny_folder: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = tmp_path / "Wan2.1-tiny"
    ours = dict(weights.Checkpoint(tiny_folder / "transformer"))
    theirs = {wan.names("dit").to_original(name): tensor for name, tensor in ours.items()}
    weights.save(source / "diffusion_pytorch_model.safetensors", theirs)
    (source / "Wan2.1_VAE.pth").write_bytes(b"kept as it is")
    (source / "config.json").write_text(
        '{"_class_name": "WanModel", "model_type": "t2v", "dim": 48, "num_heads": 2,'
        ' "num_layers": 2, "ffn_dim": 64, "freq_dim": 32, "in_dim": 4, "out_dim": 4,'
        ' "text_len": 16, "text_dim": 32}'
    )
    assert merge(source, lora, to=tmp_path / "out") == 1
    assert "cannot say how it is sampled" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
