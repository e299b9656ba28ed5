"""Distilling a small decoder: its targets and loss, that it learns, and the folder it becomes."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from fastvideo_train import origins
from fastvideo_train.batches import stream
from fastvideo_train.bundle import load_vae
from fastvideo_train.data.latents import LatentBatches, encode_world, statistics
from fastvideo_train.export import TOLERANCE, check, export, load_run
from fastvideo_train.loop import Job, make_method
from fastvideo_train.methods import StepKey
from fastvideo_train.methods import decoder as decoder_method
from fastvideo_train.recipe import LatentsSpec, Recipe, RoleSpec
from fastvideo_train.validate import validator
from safetensors.torch import save_file
from tiny_recipes import finish, tiny

from fastvideo import measure, weights
from fastvideo.formats import diffusers as layout
from fastvideo.models import decoder as decoders
from fastvideo.models.decoder.taehv import Decoder

KEY = StepKey(seed=0, step=0, num_steps=1)
SIZES = {"num_frames": 5, "height": 64, "width": 64}
FLOAT = "run.dtype=float32"


def method(*sets: str) -> decoder_method.Method:
    made = make_method(tiny("decoder", *sets))
    assert isinstance(made, decoder_method.Method)
    return made


def against(vae_folder: Path, *sets: str) -> Recipe:
    """The tiny recipe with the VAE of a folder, whose dims the recipe leaves to it."""
    recipe = tiny("decoder", *sets)
    vae = recipe.roles["vae"].model_copy(update={"from_": str(vae_folder), "config": {}})
    return recipe.model_copy(update={"roles": {**recipe.roles, "vae": vae}})


def pixels(batch: int = 2) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, 5, 16, 16), dtype=torch.uint8, generator=draw)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VAE whose statistics are not the neutral ones."""
    root = tmp_path_factory.mktemp("vae")
    vae = Job.open(tiny("decoder", FLOAT), root / "job").roles["vae"].net
    vae.set_statistics((0.1, -0.2, 0.3, 0.0), (1.1, 0.9, 1.3, 0.7))
    layout.save_part(vae, root / "vae", part="vae", family="wan")
    return root


@pytest.fixture(scope="module")
def latents(vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    vae, how = load_vae(vae_folder), {**SIZES, "shard_size": 4, "batch": 2}
    encode_world(vae, "shapes", folder, num_clips=4, seed=0, **how)
    return folder


@pytest.fixture(scope="module")
def run(vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "decoder"
    finish(against(vae_folder), folder)
    return folder


def test_the_loss_is_what_the_config_weighs(tmp_path: Path):
    m = method("method.args.l1=2", "method.args.l2=3", "method.args.gradient=0")
    target = torch.zeros(1, 3, 5, 8, 8)
    loss, numbers = m.loss(target + 0.5, {"pixels": target})
    assert loss.item() == pytest.approx(2 * 0.5 + 3 * 0.25)
    assert numbers["psnr/pixels"].item() == pytest.approx(10 * math.log10(4 / 0.25))
    both = method("method.args.pixels=0.25", "method.args.teacher=4", "method.args.gradient=0")
    loss, numbers = both.loss(target, {"pixels": target + 1, "teacher": target})
    assert loss.item() == pytest.approx(0.25 * 1.5) and set(numbers) == {
        "psnr/pixels",
        "psnr/teacher",
    }


def test_a_gradient_error_counts_as_well():
    target = torch.zeros(1, 3, 5, 8, 8)
    edge = target.clone()
    edge[..., 4:] = 1.0
    flat, sharp = (method(f"method.args.gradient={g}") for g in (0, 1))
    a, b = (m.loss(edge, {"pixels": target})[0].item() for m in (flat, sharp))
    assert b - a == pytest.approx(1 / 7)


def test_clips_become_normalised_latents_and_their_own_pixels(tmp_path: Path, vae_folder: Path):
    job = Job.open(against(vae_folder, FLOAT), tmp_path)
    vae, true = job.roles["vae"], pixels()
    m = method("method.args.teacher=1")
    z, targets = m.targets({"pixels": true}, vae, torch.device("cpu"))
    signed = true.float() / 127.5 - 1
    raw = vae.net.encode(signed)
    mean, std = (
        torch.tensor(values).view(4, 1, 1, 1)
        for values in (vae.net.config.latents_mean, vae.net.config.latents_std)
    )
    torch.testing.assert_close(z, (raw - mean) / std)
    torch.testing.assert_close(targets["pixels"], signed)
    torch.testing.assert_close(targets["teacher"], vae.net.decode(raw))
    assert list(method().targets({"pixels": true}, vae, torch.device("cpu"))[1]) == ["pixels"]


def test_stored_latents_are_compared_with_what_the_vae_makes_of_them(
    tmp_path: Path, vae_folder: Path, latents: Path
):
    job = Job.open(against(vae_folder, FLOAT), tmp_path)
    batch = LatentBatches(latents, seed=0, batch=2).batch(0)
    m = method("method.args.pixels=0", "method.args.teacher=1")
    z, targets = m.targets(batch, job.roles["vae"], torch.device("cpu"))
    vae = job.roles["vae"].net
    assert torch.equal(z, batch["latents"]) and list(targets) == ["teacher"]
    torch.testing.assert_close(targets["teacher"], vae.decode(vae.denormalize(z)))
    (update,) = m.step(batch, job.roles, KEY)
    assert update.roles == ("decoder",) and update.loss.requires_grad


def test_stored_latents_have_no_true_pixels(tmp_path: Path):
    job = Job.open(tiny("decoder", FLOAT), tmp_path)
    with pytest.raises(ValueError, match=r"no true pixels; set method\.args\.pixels = 0 and"):
        next(job.method.step({"latents": torch.zeros(1, 4, 2, 2, 2)}, job.roles, KEY))


def test_a_run_without_a_target_is_refused():
    with pytest.raises(ValueError, match="pixels and teacher are both 0"):
        method("method.args.pixels=0")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("roles.decoder.config.patch_size=2", "4 frames of 4x4 pixels from a latent; the model"),
        ("roles.decoder.config.z_dim=8", "takes latents of 8 channels; the model's have 4"),
        ("roles.vae.trainable=true", r"roles\.vae\.trainable must be False in method decoder"),
        ("roles.decoder.config.depth=8", "unknown config field 'depth'"),
    ],
)
def test_a_decoder_that_does_not_fit_the_vae_is_refused(word: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        Job.open(tiny("decoder", word), tmp_path)


def test_a_new_decoder_begins_near_grey_and_a_given_one_as_it_is(tmp_path: Path, run: Path):
    z = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    new = Job.open(tiny("decoder", FLOAT), tmp_path / "new").roles["decoder"].net
    assert new.decode(z, clamp=False).abs().mean() < 0.5
    given = Job.open(tiny("decoder", FLOAT, f"roles.decoder.from={run}"), tmp_path / "given")
    learned = load_run(run).roles["decoder"].net
    assert torch.equal(given.roles["decoder"].net.decode(z), learned.decode(z))


def test_training_lowers_the_loss_on_clips_and_leaves_the_vae_alone(tmp_path: Path):
    words = ["optim.schedule=constant", "optim.lr=3e-3", "optim.muon.lr=1e-2", "run.steps=40"]
    recipe = tiny("decoder", FLOAT, *words)
    job = Job.open(recipe, tmp_path)
    with stream(recipe, start=0) as batches:
        batch = next(batches)
    vae = job.roles["vae"].net
    vae.set_statistics(*statistics(vae, [batch["pixels"]]))
    before = {name: p.clone() for name, p in vae.named_parameters()}
    losses = []
    for step in range(40):
        for update in job.method.step(batch, job.roles, KEY):
            job.strategy.backward(update.roles, update.loss)
            losses.append(update.loss.item())
        job.strategy.update("decoder", step=step)
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in vae.named_parameters())
    assert list(job.strategy.state_dict()) == ["decoder"]


def test_the_exported_folder_is_the_averaged_decoder_with_the_vaes_statistics(
    run: Path, vae_folder: Path, tmp_path: Path
):
    done = export(run, tmp_path / "tiny")
    assert done.error <= TOLERANCE < done.rounding < 0.1
    stored = decoders.read(tmp_path / "tiny")
    live = load_run(run).roles["decoder"].net
    assert stored.config.latents_mean == load_vae(vae_folder).config.latents_mean
    assert stored.config.latents_std == (1.1, 0.9, 1.3, 0.7)
    for name, tensor in live.state_dict().items():
        assert torch.equal(stored.state_dict()[name], tensor.bfloat16())
    with pytest.raises(ValueError, match="exists; choose another"):
        export(run, tmp_path / "tiny")
    export(run, tmp_path / "tiny", overwrite=True)


def test_an_exported_decoder_may_be_the_start_of_another_run(run: Path, tmp_path: Path):
    export(run, tmp_path / "tiny", changes={"dtype": "float32"})
    first = weights.Checkpoint(tmp_path / "tiny" / decoders.WEIGHTS)
    for source in (tmp_path / "tiny", run):
        job = Job.open(tiny("decoder", FLOAT, f"roles.decoder.from={source}"), tmp_path / "b")
        state = job.roles["decoder"].net.state_dict()
        assert all(torch.equal(state[name], first[name]) for name in first)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_published_file_or_an_exported_folder_needs_no_dims_beside_it(
    suffix: str, run: Path, vae_folder: Path, tmp_path: Path
):
    export(run, tmp_path / "tiny", changes={"dtype": "float32"})
    net = decoders.read(tmp_path / "tiny")
    wide = dataclasses.replace(net.config, space=(True, True, True), patch_size=1)
    published = Decoder(wide).state_dict() | {"encoder.0.weight": torch.ones(2)}
    file = tmp_path / f"taew{suffix}"
    (torch.save if suffix == ".pth" else save_file)(published, file)
    folder, out = tmp_path / "run", tmp_path / "done"
    for source, dims in ((tmp_path / "tiny", net.config), (file, wide)):
        recipe = against(vae_folder, FLOAT, "run.steps=1", f"roles.decoder.from={source}")
        bare = recipe.roles["decoder"].model_copy(update={"config": {}})
        recipe = recipe.model_copy(update={"roles": {**recipe.roles, "decoder": bare}})
        started, first = Job.open(recipe, folder).roles["decoder"].net, decoders.tensors(source)
        plain = dataclasses.replace(dims, latents_mean=(), latents_std=())
        assert started.config == plain, "it may go on with another VAE"
        assert all(torch.equal(started.state_dict()[n], w) for n, w in first.items())
        finish(recipe, folder)
        done = decoders.read(export(folder, out).folder)
        assert dataclasses.replace(done.config, latents_mean=(), latents_std=()) == plain
        assert done.config.latents_std == (1.1, 0.9, 1.3, 0.7)
        shutil.rmtree(folder)
        shutil.rmtree(out)


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
def test_a_network_that_stands_alone_and_is_not_there_is_refused_by_role(kind: str):
    spec = RoleSpec.model_validate({"kind": kind, "from": "no-such.pth"})
    message = rf"roles\.it\.from no-such\.pth is neither a run nor a {kind}'s own place"
    with pytest.raises(ValueError, match=message):
        origins.dims(spec, "it")


def test_latents_of_another_encoder_are_refused_at_export(latents: Path, tmp_path: Path):
    data = ["method.args.pixels=0", "method.args.teacher=1"]
    recipe = tiny("decoder", *data, "run.steps=1")
    spec = LatentsSpec(name="latents", folder=str(latents))
    finish(recipe.model_copy(update={"data": spec}), tmp_path / "run")
    with pytest.raises(ValueError, match=r"encodes by other weights|normalises latents by other"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_validation_looks_at_what_the_decoder_makes(tmp_path: Path):
    words = [f"validate.{key}={value}" for key, value in {**SIZES, "count": 2, "sheet": 1}.items()]
    recipe = tiny("decoder", "run.steps=1", "run.validate_every=1", FLOAT, *words)
    look = validator(recipe, tmp_path)
    assert look is not None
    job = Job.open(recipe, tmp_path, validate=look)
    seen = look(job.roles, step=0)
    nets = {name: role.net for name, role in job.roles.items()}
    world = look.clips.open()
    clips = [world.clip(1, i, "heldout") for i in range(2)]
    own, small = (
        [measure.reconstructed(nets["vae"], world, clip, decoder=d).psnr for clip in clips]
        for d in (None, nets["decoder"])
    )
    assert seen["psnr"] == pytest.approx(sum(small) / 2) != pytest.approx(sum(own) / 2)
    assert (tmp_path / "validate" / "step-00000000.png").is_file()


def test_latents_of_another_encoder_are_refused_before_the_run(
    latents: Path, vae_folder: Path, tmp_path: Path
):
    spec = LatentsSpec(name="latents", folder=str(latents))
    check(against(vae_folder).model_copy(update={"data": spec}))
    other = load_vae(vae_folder)
    with torch.no_grad():
        next(other.encoder.parameters()).add_(0.1)
    layout.save_part(other, tmp_path / "vae", part="vae", family="wan")
    with pytest.raises(ValueError, match="encodes by other weights than those of"):
        check(against(tmp_path).model_copy(update={"data": spec}))
