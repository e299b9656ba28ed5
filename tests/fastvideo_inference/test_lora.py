"""LoRAs as a user meets them: flags, requests, the pipeline's calls, and a merged folder."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from fastvideo_inference import recipe
from tiny_loras import ALPHA, RANK, pairs, spelled, write, write_as

from fastvideo import VideoPipeline, cli, hub, stages, weights
from fastvideo import model as models
from fastvideo.formats import wan
from fastvideo.lora import Loras
from fastvideo.packing import pack, unpack
from fastvideo.sampling import GenerateRequest, LoraUse
from fastvideo.stages import Progress

PROMPT = "a red ball moving left"


@pytest.fixture(scope="module")
def lora(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = models.load(tiny_folder, dtype="float32", parts=("dit",)).dit
    return write_as("comfy", tmp_path_factory.mktemp("loras"), pairs(net))


@pytest.fixture
def pipe(tiny_folder: Path) -> VideoPipeline:
    return VideoPipeline.from_pretrained(tiny_folder, dtype="float32")


def latents(pipe: VideoPipeline, **fields: object) -> torch.Tensor:
    video = pipe(PROMPT, seed=3, num_frames=5, guidance_scale=2.0, output="latents", **fields)
    assert video.latents is not None
    return video.latents


def bits(pipe: VideoPipeline) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.model.dit.state_dict().items()}


def test_load_set_and_unload_change_the_clip_and_the_weights_return_exactly(
    pipe: VideoPipeline, lora: Path
):
    before, plain = bits(pipe), latents(pipe)
    assert pipe.load_lora(lora, strength=0.5) == "comfy"
    half = latents(pipe)
    assert not torch.equal(half, plain)
    pipe.set_lora("comfy", strength=1.0)
    assert not torch.equal(latents(pipe), half)
    pipe.set_lora("comfy", strength=0.5)
    assert torch.equal(latents(pipe), half)
    pipe.set_lora("comfy", strength=0)
    assert torch.equal(latents(pipe), plain)
    pipe.unload_lora()
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(pipe).items())
    assert pipe.loras == {} and torch.equal(latents(pipe), plain)


def test_a_request_names_its_own_loras_instead_of_the_loaded_ones(pipe: VideoPipeline, lora: Path):
    plain = latents(pipe)
    own = latents(pipe, lora=[f"{lora}:0.5"])
    pipe.load_lora(lora, strength=-2.0, name="loaded")
    loaded = latents(pipe)
    assert torch.equal(latents(pipe, lora=[f"{lora}:0.5"]), own)
    assert torch.equal(latents(pipe, lora=[]), plain)
    assert torch.equal(latents(pipe), loaded)
    video = pipe(PROMPT, seed=3, num_frames=5, output="latents")
    (used,) = video.recipe["request"]["lora"]
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert used == {"path": str(lora), "strength": -2.0, "hash": digest}


def test_clips_of_other_loras_in_two_threads_are_those_of_one(pipe: VideoPipeline, lora: Path):
    before, texts = bits(pipe), [f"{lora}:0.5", f"{lora}:-1"]
    alone = [latents(pipe, lora=[text]) for text in texts]
    with ThreadPoolExecutor(2) as threads:
        found = [*threads.map(lambda text: latents(pipe, lora=[text]), texts * 4)]
    assert all(torch.equal(a, b) for a, b in zip(found, alone * 4, strict=True))
    pipe.unload_lora()
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(pipe).items())


def test_clips_of_equal_loras_take_turns_and_in_one_thread_others_are_refused(
    pipe: VideoPipeline, lora: Path
):
    pipe.load_lora(lora, strength=0.5)
    alone = [pipe(PROMPT, seed=seed, num_frames=5).frames for seed in range(2)]
    streams = [pipe.stream(PROMPT, seed=seed, num_frames=5) for seed in range(2)]
    frames = [next(zip(*streams, strict=True))]
    changes = (
        lambda: pipe.set_lora("comfy", strength=1),
        lambda: pipe.load_lora(lora, name="other"),
        pipe.unload_lora,
        lambda: next(pipe.stream(PROMPT, lora=[])),
    )
    for change in changes:
        with pytest.raises(ValueError, match=r"differ from \(comfy.safetensors:0.5\)"):
            change()
    frames += zip(*streams, strict=True)
    for made, expected in zip(zip(*frames, strict=True), alone, strict=True):
        assert (np.stack(made) == expected).all()
    for change in changes:
        change()


def test_loras_that_threads_load_during_a_clip_wait_for_it_and_all_are_loaded(
    pipe: VideoPipeline, lora: Path
):
    stream = pipe.stream(PROMPT, num_frames=5)
    next(stream)
    with ThreadPoolExecutor(2) as threads:
        loading = [threads.submit(pipe.load_lora, lora, name=name) for name in "ab"]
        deadline = time.monotonic() + 60
        while [f.f_code for f in sys._current_frames().values()].count(Loras.claim.__code__) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        stream.close()
    assert {thread.result() for thread in loading} == pipe.loras.keys() == {"a", "b"}
    pipe.unload_lora("a")
    assert pipe.loras.keys() == {"b"}


def test_a_state_stored_half_way_goes_on_with_its_lora_in_another_process(
    pipe: VideoPipeline, tiny_folder: Path, lora: Path
):
    request = GenerateRequest(prompt=PROMPT, seed=3, num_frames=5, lora=(LoraUse(path=str(lora)),))
    events = list(pipe.events(request, output="latents"))
    (half,) = [e.state for e in events if isinstance(e, Progress) and e.state and e.state.step == 1]
    other = VideoPipeline.from_pretrained(tiny_folder, dtype="float32")
    *_, done = stages.run(("denoise",), other.model, unpack(*pack(half)))
    assert torch.equal(done.state.latents, events[-1].state.latents)


# The command


@pytest.fixture
def generate(tiny_folder: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    """Run `fastvideo generate` in an empty folder; return exit code and error lines."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*words: str) -> tuple[int, list[str]]:
        size = ["--frames", "5", "--dtype", "float32"]
        code = cli.main(["generate", "--model", str(tiny_folder), *size, *words])
        return code, capsys.readouterr().err.splitlines()

    return run


def test_generate_takes_loras_and_from_repeats_them(generate, lora: Path):
    assert generate(PROMPT, "--seed", "1", "-o", "plain.mp4")[0] == 0
    flags = ["--lora", f"{lora}:0.5", "--lora", str(lora)]
    assert generate(PROMPT, "--seed", "1", *flags, "-o", "a.mp4")[0] == 0
    assert generate("--from", "a.mp4", "-o", "b.mp4")[0] == 0
    sides = [json.loads(Path(f"{name}.json").read_text()) for name in ("plain", "a", "b")]
    used = [side["recipe"]["request"]["lora"] for side in sides]
    assert used[0] == [] and used[1] == used[2]
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert [(use["strength"], use["hash"]) for use in used[1]] == [(0.5, digest), (1.0, digest)]
    assert recipe.read_recipe("a.mp4") == recipe.read_recipe("b.mp4")
    frames = [_pixels(name) for name in ("plain.mp4", "a.mp4", "b.mp4")]
    assert np.abs(frames[1] - frames[2]).mean() < 0.5 < np.abs(frames[0] - frames[1]).mean()


def test_a_config_may_name_loras_and_a_flag_replaces_them(generate, lora: Path):
    Path("c.toml").write_text(f'lora = [{{ path = "{lora}", strength = 0.25 }}]\n')
    assert generate(PROMPT, "--config", "c.toml", "-o", "a.mp4")[0] == 0
    assert [u.strength for u in recipe.read_recipe("a.mp4").request.lora] == [0.25]
    generate(PROMPT, "--config", "c.toml", "--lora", f"{lora}:2", "-o", "b.mp4")
    assert [u.strength for u in recipe.read_recipe("b.mp4").request.lora] == [2.0]


def test_a_lora_that_changed_since_is_refused_by_from(generate, lora: Path):
    own = Path("own.safetensors")
    own.write_bytes(lora.read_bytes())
    generate(PROMPT, "--lora", str(own), "-o", "a.mp4")
    tensors = dict(weights.Checkpoint(lora))
    first = next(name for name in tensors if name.endswith("lora_up.weight"))
    write(own, {**tensors, first: tensors[first] + 1})
    code, err = generate("--from", "a.mp4", "-o", "b.mp4")
    assert code == 2 and "lora own.safetensors has hash" in err[0] and "from a.mp4" in err[0]


@pytest.mark.parametrize(
    ("flag", "code", "text"),
    [
        ("missing.safetensors", 2, "LoRA 'missing.safetensors' is neither a file"),
        ("here/missing.safetensors:0.5", 2, "LoRA 'here/missing.safetensors' is neither a file"),
        ("lora.safetensors:nan", 2, "strength NaN in --lora: must be a finite number"),
        ("other.safetensors", 1, "none of its 1 modules is in the network"),
        ("cut.safetensors", 1, "cut.safetensors is truncated"),
    ],
)
def test_a_lora_that_will_not_do_is_refused_in_one_line(
    generate, lora: Path, flag: str, code: int, text: str
):
    Path("here").mkdir()
    Path("lora.safetensors").write_bytes(lora.read_bytes())
    Path("cut.safetensors").write_bytes(lora.read_bytes()[:-9])
    name = "blocks.0.img_attn"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 3), f"{name}.lora_B.weight": torch.ones(5, 4)}
    write(Path("other.safetensors"), tensors)
    found, err = generate(PROMPT, "--lora", flag, "-o", "a.mp4")
    assert found == code and text in err[-1]
    assert sum("error" in line for line in err) == 1 and not Path("a.mp4").exists()


def test_unknown_names_are_refused_with_a_suggestion(pipe: VideoPipeline, lora: Path):
    pipe.load_lora(lora, name="style")
    with pytest.raises(ValueError, match=r"'stile' is not loaded; did you mean 'style'\?"):
        pipe.set_lora("stile", strength=1)
    with pytest.raises(ValueError, match="'other' is not loaded"):
        pipe.unload_lora("other")
    with pytest.raises(ValueError, match=r"strength Infinity in the LoRA"):
        pipe.load_lora(lora, strength=float("inf"))
    assert list(pipe.loras) == ["style"]


# Finding files


def test_a_folder_with_one_lora_stands_for_it_and_several_are_named(lora: Path, tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(lora.read_bytes())
    assert hub.find_lora(tmp_path) == tmp_path / "a.safetensors"
    (tmp_path / "b.safetensors").write_bytes(lora.read_bytes())
    with pytest.raises(ValueError, match=r"must name one file.*it has: a.safetensors, b.safe"):
        hub.find_lora(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(lora.read_bytes())
    assert hub.find_lora(tmp_path).name == "pytorch_lora_weights.safetensors"


def test_a_lora_on_the_hub_comes_from_the_cache_and_offline_says_so(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub

    seen = []

    def snapshot(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        seen.append((name, allow_patterns, local_files_only))
        folder = tmp_path / "cache" / name
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        for file in ("pytorch_lora_weights.safetensors", "sub/style.safetensors"):
            (folder / file).write_bytes(lora.read_bytes())
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"LoRA 'nobody/none' .*HF_HUB_OFFLINE is set"):
        hub.find_lora("nobody/none")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.find_lora("owner/name").name == "pytorch_lora_weights.safetensors"
    assert hub.find_lora("owner/name/sub/style.safetensors").name == "style.safetensors"
    assert hub.find_lora("owner/name").exists() and len(seen) == 2, "asked once for each"
    assert all(only for _, _, only in seen) and seen[1][1][0] == "sub/style.safetensors"
    with pytest.raises(ValueError, match=r"has no file sub/other\.safetensors"):
        hub.find_lora("owner/name/sub/other.safetensors")


@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_recipe_notes_what_of_a_lora_was_not_applied(
    pipe: VideoPipeline, lora: Path, tmp_path: Path, is_loaded: bool
):
    tensors = dict(weights.Checkpoint(lora))
    for side, shape in (("A", (2, 48)), ("B", (48, 2))):
        tensors[f"transformer.blocks.39.attn1.to_q.lora_{side}.weight"] = torch.ones(shape)
    part = weights.save(tmp_path / "part.safetensors", tensors)
    if is_loaded:
        pipe.load_lora(part)
    size = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 1}
    made = pipe(PROMPT, **size, lora=None if is_loaded else [f"{part}:0.5"])
    assert made.recipe["not_applied"] == [f"{part}: blocks.39.attn1.to_q"]
    whole = pipe(PROMPT, **size, lora=[f"{lora}:0.5"])
    assert "not_applied" not in whole.recipe, "which earlier releases would refuse"
    told = recipe.renamed(
        recipe.Recipe.model_validate(made.recipe), recipe.Names("m", lora=("style",))
    )
    assert told.not_applied == ("style: blocks.39.attn1.to_q",)


# A merged folder


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_a_merged_folder_makes_the_clips_of_model_and_lora(
    pipe: VideoPipeline, tiny_folder: Path, lora: Path, tmp_path: Path, strength: float, capsys
):
    out = tmp_path / "merged"
    assert cli.main(["lora", "merge", str(tiny_folder), f"{lora}:{strength}", "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 1 LoRAs merged\n"
    merged = VideoPipeline.from_pretrained(out, dtype="float32")
    pipe.load_lora(lora, strength=strength)
    assert torch.equal(latents(merged), latents(pipe))
    spec, _ = hub.open_spec(out)
    assert spec.name == "merged" and f"at {strength:g}" in spec.provenance.notes
    assert spec.provenance.parents == {"tiny": "not stated", lora.name: "not stated"}
    assert not spec.provenance.title and not spec.provenance.licence
    for part in ("vae", "text_encoder", "tokenizer"):
        for file in (tiny_folder / part).iterdir():
            assert (out / part / file.name).read_bytes() == file.read_bytes()


def test_a_folder_of_the_original_wan_is_merged_under_its_own_names(
    tiny_folder: Path, lora: Path, tmp_path: Path
):
    source = tmp_path / "Wan2.1-tiny"
    ours = dict(weights.Checkpoint(tiny_folder / "transformer"))
    theirs = {wan.names("dit").to_original(name): tensor for name, tensor in ours.items()}
    weights.save(source / "diffusion_pytorch_model.safetensors", theirs)
    (source / "Wan2.1_VAE.pth").write_bytes(b"kept as it is")
    config = {
        "_class_name": "WanModel", "model_type": "t2v", "dim": 48, "num_heads": 2, "num_layers": 2,
        "ffn_dim": 64, "freq_dim": 32, "in_dim": 4, "out_dim": 4, "text_len": 16,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps({**config, "text_dim": 32}))
    out = tmp_path / "out"
    assert cli.main(["lora", "merge", str(source), str(lora), "-o", str(out)]) == 0
    merged = weights.Checkpoint(out / "diffusion_pytorch_model.safetensors")
    assert set(merged.names()) == set(theirs)
    net = models.load(tiny_folder, dtype="float32", parts=("dit",)).dit
    (a, b) = pairs(net)["blocks.1.attn2.to_v"]
    true = ours["blocks.1.attn2.to_v.weight"].double() + ALPHA / RANK * (b.double() @ a.double())
    got = merged.tensor("blocks.1.cross_attn.v.weight").double()
    torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-6)
    assert (out / "Wan2.1_VAE.pth").read_bytes() == b"kept as it is"


def test_a_merge_that_fails_leaves_nothing_and_an_old_folder_stays(
    tiny_folder: Path, lora: Path, tmp_path: Path, capsys
):
    tensors, _ = spelled("bare", {})
    tensors["blocks.0.x.lora_A.weight"] = torch.ones(2, 4)
    tensors["blocks.0.x.lora_B.weight"] = torch.ones(4, 2)
    bad = write(tmp_path / "bad.safetensors", tensors)
    words = ["lora", "merge", str(tiny_folder)]
    assert cli.main([*words, str(bad), "-o", str(tmp_path / "out")]) == 1
    assert cli.main([*words, str(lora), "-o", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["bad.safetensors"]


def _pixels(path: str) -> np.ndarray:
    from fastvideo import media

    return media.read_video(path)[0].astype(int)
