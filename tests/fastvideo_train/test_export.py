from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from fastvideo_train import provenance
from fastvideo_train.bundle import load_vae
from fastvideo_train.data.latents import encode_pixels, encode_world
from fastvideo_train.export import TOLERANCE, TrainClips, check, export, load_run
from fastvideo_train.loop import Job, Validated, train
from fastvideo_train.recipe import LatentsSpec
from fastvideo_train.validate import Clips, validator
from tiny_recipes import finish, tiny
from torch.nn import functional as F

from fastvideo import hub, preview, weights
from fastvideo import model as models
from fastvideo.formats import diffusers as layout
from fastvideo.models.classifier import read
from fastvideo.spec import Provenance
from fastvideo.weights import Checkpoint
from fastvideo.worlds.shapes import World
from tests import clips

CLIPS = {"count": 3, "num_frames": 5, "height": 64, "width": 64}
DEFAULTS = {"num_frames": 5, "height": 64, "width": 64, "num_inference_steps": 2}
WORDS = [f"validate.{key}={value}" for key, value in CLIPS.items()]


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vae"
    finish(tiny("vae"), folder)
    return folder


@pytest.fixture(scope="module")
def vae_folder(vae_run):
    folder = vae_run / "export"
    done = export(vae_run, folder, changes={"clips": CLIPS})
    assert done.folder == folder and done.error <= TOLERANCE < done.rounding < 0.1
    return folder


@pytest.fixture(scope="module")
def dit_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dit"
    finish(tiny("flow_matching"), folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(dit_run, vae_folder):
    folder = dit_run / "export"
    changes = {"name": "tiny", "vae": str(vae_folder), "defaults": DEFAULTS}
    export(dit_run, folder, changes=changes)
    return folder


def test_an_export_claims_what_the_run_knows_and_nothing_else(dit_run, model_folder, tmp_path):
    spec, _ = hub.open_spec(model_folder)
    said = spec.provenance
    assert not (said.title or said.licence or said.source or said.notes)
    assert said.recipe == "run nano-dit-image: 6 steps of flow_matching"
    assert said.data == "random latents" and set(said.parents.values()) == {"not stated"}
    recipe = tiny("flow_matching", "roles.text.from=wan-nano", f"roles.student.from={dit_run}")
    data = LatentsSpec(name="latents", folder=str(tmp_path / "mine"))
    recipe = recipe.model_copy(update={"data": data})
    mine = Provenance(licence="MIT", recipe="mine.toml", parents={"more": "CC0"})
    said = provenance.of(recipe, 3, mine, vae="/somewhere/secret/vae")
    assert (said.licence, said.recipe, said.data) == ("MIT", "mine.toml", "latents mine")
    assert said.parents == {
        "wan-nano": "Apache-2.0",
        "run nano-dit-image": "not stated",
        "vae": "not stated",
        "more": "CC0",
    }


def test_a_vae_is_exported_with_the_statistics_of_its_latents(vae_run, tmp_path):
    export(vae_run, tmp_path / "out", changes={"clips": CLIPS, "dtype": "float32"})
    vae = load_vae(tmp_path / "out")
    world = World(height=64, width=64, num_frames=5)
    frames = [torch.tensor(world.clip(0, i).frames_THWC) for i in range(3)]
    raw = torch.cat([encode_pixels(vae, f.permute(3, 0, 1, 2)[None]) for f in frames])
    z = vae.normalize(raw).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(len(z)).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        z.std(1, correction=0), torch.ones(len(z)).double(), atol=1e-3, rtol=0
    )
    found = preview.find(tmp_path / "out", vae)
    pixels = torch.stack(frames).permute(0, 4, 1, 2, 3)
    assert found == preview.fit(vae.normalize(raw), pixels / 127.5 - 1)
    seen = torch.tensor(preview.to_rgb(vae.normalize(raw), found)[:, 0]).double()
    small = F.adaptive_avg_pool2d(pixels[:, :, 0].double(), seen.shape[1:3]).permute(0, 2, 3, 1)
    assert (seen - small).square().mean() < 0.9 * small.var(), "it shows more than a grey image"


def test_the_exported_weights_are_the_averaged_ones_in_bfloat16(vae_run, vae_folder):
    live = load_run(vae_run).roles["vae"].net.state_dict()
    stored = load_vae(vae_folder, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(stored[name], live[name].bfloat16()) for name in live)
    job = Job.open(tiny("vae"), vae_run)
    masters = job.strategy.gather("vae", averaged=False)
    averages = job.strategy.gather("vae")
    assert all(torch.equal(live[name], averages[name]) for name in averages)
    assert any(not torch.equal(averages[name], masters[name]) for name in averages)


def test_an_exported_model_goes_straight_into_load_and_renders(dit_run, model_folder):
    spec, _ = hub.open_spec(model_folder)
    recipe = load_run(dit_run).recipe
    assert spec.name == "tiny" and spec.defaults.num_frames == 5
    assert preview.find(model_folder, models.load(model_folder, parts=("vae",)).vae) is not None
    assert spec.defaults.max_text_tokens == recipe.method.args["max_text_tokens"]
    model = models.load(model_folder, dtype="float32")
    (frames,) = clips.frames(model, ["a red ball"], guidance_scale=1)
    assert frames.shape == (5, 64, 64, 3)
    live = load_run(dit_run).roles
    for part, role in (("dit", "student"), ("text", "text")):
        stored = getattr(model, part).state_dict()
        for name, tensor in live[role].net.state_dict().items():
            torch.testing.assert_close(stored[name], tensor, rtol=2**-8, atol=1e-6)


def test_a_sparse_run_is_exported_with_its_pattern_and_gates(vae_folder, tmp_path):
    sparse = ["roles.student.config.gate_compress=true", "roles.student.attention.pattern=vsa"]
    sizes = [
        "roles.student.attention.args.sparsity=0.5",
        "roles.student.attention.args.tile=[1,2,2]",
    ]
    finish(tiny("flow_matching", *sparse, *sizes), tmp_path / "run")
    changes = {"name": "tiny", "vae": str(vae_folder), "defaults": DEFAULTS}
    export(tmp_path / "run", tmp_path / "out", changes=changes)
    spec, _ = hub.open_spec(tmp_path / "out")
    assert spec.attention.pattern == "vsa"
    assert spec.attention.args == {"sparsity": 0.5, "tile": [1, 2, 2]}
    gates = [
        weight
        for name, weight in models.load(tmp_path / "out").dit.state_dict().items()
        if "to_gate_compress" in name
    ]
    assert gates and any(weight.any() for weight in gates)


def test_a_run_stopped_while_its_sparsity_rose_is_exported_with_the_last_one(vae_folder, tmp_path):
    sparse = ["roles.student.config.gate_compress=true", "roles.student.attention.pattern=vsa"]
    rises = ["roles.student.attention.anneal_every=1", "roles.student.attention.anneal_by=0.25"]
    args = "roles.student.attention.args={sparsity=0.75, tile=[1,2,2]}"
    finish(tiny("flow_matching", *sparse, args, *rises), tmp_path / "run", until=3)
    changes = {"name": "tiny", "vae": str(vae_folder), "defaults": DEFAULTS}
    export(tmp_path / "run", tmp_path / "out", changes=changes)
    spec, _ = hub.open_spec(tmp_path / "out")
    assert spec.attention.args == {"sparsity": 0.5, "tile": [1, 2, 2]}, "0, 0.25, 0.5"


def test_a_folder_that_reads_back_wrong_never_takes_its_name(vae_run, tmp_path, monkeypatch):
    from fastvideo_train import export as module

    def damaged(folder, **how):
        vae = load_vae(folder, **how)
        with torch.no_grad():
            next(vae.decoder.parameters()).add_(0.01)
        return vae

    monkeypatch.setattr(module, "load_vae", damaged)
    with pytest.raises(ValueError, match="is not exported: its vae, read back, differs"):
        export(vae_run, tmp_path / "out", changes={"clips": CLIPS})
    assert list(tmp_path.iterdir()) == []


def test_an_old_folder_is_replaced_only_when_told(vae_run, vae_folder):
    before = (vae_folder / "vae" / "config.json").read_text()
    with pytest.raises(ValueError, match="exists; choose another"):
        export(vae_run, vae_folder, changes={"clips": CLIPS})
    export(vae_run, vae_folder, changes={"clips": CLIPS}, overwrite=True)
    assert (vae_folder / "vae" / "config.json").read_text() == before
    precious = vae_folder.with_name("precious")
    precious.mkdir()
    (precious / "config.json").write_text("{}")
    (precious / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an exported model, so it is not replaced"):
        export(vae_run, precious, changes={"clips": CLIPS}, overwrite=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a"}, r"vae is missing in \[export\] of"),
        ({"name": "a", "vae": "nowhere"}, "nowhere/vae/config.json does not exist"),
        ({"name": "a", "vea": "x"}, "vea .* is unknown; did you mean 'vae'"),
    ],
)
def test_what_an_export_lacks_is_named(dit_run, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        export(dit_run, tmp_path / "out", changes=changes)


def test_a_folder_without_a_checkpoint_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint; is it the folder of a run"):
        export(tmp_path, tmp_path / "out")


def test_latents_of_another_vae_are_refused(vae_folder, tmp_path):
    vae = load_vae(vae_folder, dtype=torch.bfloat16)
    sizes = {"num_frames": 5, "height": 64, "width": 64, "shard_size": 4, "batch": 2}
    encode_world(vae, "shapes", tmp_path / "latents", num_clips=4, seed=0, **sizes)
    data = LatentsSpec(name="latents", folder=str(tmp_path / "latents"))
    recipe = tiny("flow_matching").model_copy(update={"data": data})
    finish(recipe, tmp_path / "run", until=1)
    changes = {"name": "tiny", "vae": str(vae_folder), "defaults": DEFAULTS}
    export(tmp_path / "run", tmp_path / "good", changes=changes)
    other = shutil.copytree(vae_folder, tmp_path / "other")
    path = other / "vae" / "config.json"
    path.write_text(path.read_text().replace('"latents_std": [\n    ', '"latents_std": [\n    9'))
    with pytest.raises(ValueError, match="normalises latents by other statistics"):
        export(tmp_path / "run", tmp_path / "bad", changes={**changes, "vae": str(other)})
    with torch.no_grad():
        next(vae.encoder.parameters()).add_(0.5)
    layout.save_part(vae, other / "vae", part="vae", family="wan", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="encodes by other weights than those of"):
        export(tmp_path / "run", tmp_path / "bad", changes={**changes, "vae": str(other)})
    run = recipe.run.model_copy(update={"validate_every": 1})
    for folder, is_right in ((vae_folder, True), (other, False)):
        changed = {"run": run, "validation": {**CLIPS, "vae": str(folder)}}
        with nullcontext() if is_right else pytest.raises(ValueError, match="by other weights"):
            validator(recipe.model_copy(update=changed), tmp_path)


def test_a_vae_run_is_validated_by_its_reconstructions(tmp_path):
    recipe = tiny("vae", *WORDS, "run.validate_every=6")
    job = Job.open(recipe, tmp_path)
    look = validator(recipe, tmp_path)
    numbers = look(job.roles, step=3)
    assert {"psnr", "ssim", "right/shape", "right/all"} <= set(numbers)
    assert 3 < numbers["psnr"] < 30 and 0 <= numbers["right/scene"] <= 1
    assert (tmp_path / "validate" / "step-00000003.png").is_file()
    assert look(job.roles, step=3) == numbers


def test_a_denoising_run_is_validated_by_what_the_parser_reads(vae_folder, tmp_path):
    words = [*WORDS, f"validate.vae={vae_folder}", "validate.steps=2", "validate.batch=2"]
    recipe = tiny("flow_matching", *words)
    job = Job.open(recipe, tmp_path)
    job.roles["student"].net.forward = lambda *a, **k: pytest.fail("compiled for other sizes")
    numbers = validator(recipe, tmp_path)(job.roles, step=4)
    assert {"flicker", "right/colour", "right/all"} <= set(numbers)
    assert (tmp_path / "validate" / "step-00000004.png").is_file()
    assert "forward" in job.roles["student"].net.__dict__


def test_a_validation_whose_clips_are_not_finite_is_reported_and_training_goes_on(
    vae_folder, tmp_path, caplog
):
    broken = shutil.copytree(vae_folder, tmp_path / "broken")
    path = next((broken / "vae").glob("*.safetensors"))
    state = {name: tensor.clone() for name, tensor in Checkpoint(path).items()}
    state["post_quant_conv.weight"].view(-1)[0] = math.nan
    weights.save(path, state)
    words = [f"validate.vae={broken}", "validate.steps=1", "run.validate_every=1", "run.steps=2"]
    recipe = tiny("flow_matching", *WORDS, *words)
    job = Job.open(recipe, tmp_path / "run", validate=validator(recipe, tmp_path))
    made = [event for event in train(job) if isinstance(event, Validated)]
    assert made == [Validated(1, {}), Validated(2, {})]
    assert "validation at step 1 gives no numbers: decoded pixels are not finite" in caplog.text


def test_a_validation_of_single_frames_has_no_flicker(vae_folder, tmp_path):
    words = [*WORDS, "validate.num_frames=1", f"validate.vae={vae_folder}", "validate.steps=1"]
    recipe = tiny("flow_matching", *words)
    numbers = validator(recipe, tmp_path)(Job.open(recipe, tmp_path).roles, step=1)
    assert "right/colour" in numbers and "flicker" not in numbers


def test_a_validation_looks_at_other_clips_than_an_evaluation():
    assert Clips().seed != 0, "the seed of `fastvideo eval`"
    assert TrainClips().seed == 0, "another one would change the statistics of a second export"


def test_no_validate_table_means_no_validation_and_a_wrong_key_is_named(tmp_path):
    recipe = tiny("vae")
    assert validator(recipe.model_copy(update={"validation": {}}), tmp_path) is None
    with pytest.raises(ValueError, match=r"cuont .* is unknown; did you mean 'count'"):
        validator(tiny("vae", "validate.cuont=3"), tmp_path)


def test_a_classifier_is_exported_to_a_folder_of_its_own_and_validated_by_name(tmp_path):
    recipe = tiny("classify", *WORDS)
    job = finish(recipe, tmp_path / "run")
    done = export(tmp_path / "run", tmp_path / "out")
    assert done.error <= TOLERANCE < done.rounding < 0.1
    live, stored = load_run(tmp_path / "run").roles["classifier"].net, read(tmp_path / "out")
    assert stored.config == live.config
    assert all(
        torch.equal(t, live.state_dict()[n].bfloat16()) for n, t in stored.state_dict().items()
    )
    export(tmp_path / "run", tmp_path / "out", overwrite=True)
    numbers = validator(recipe, tmp_path)(job.roles, step=1)
    assert 0 <= numbers["right/shape"] <= 1 and "right/all" in numbers
    with pytest.raises(ValueError, match=r"dtyp .* is unknown"):
        export(tmp_path / "run", tmp_path / "other", changes={"dtyp": "float32"})


@pytest.mark.parametrize("method", ["perflow", "dmd"])
def test_a_distilled_run_is_exported_as_its_student_with_its_sampler(method, vae_folder, tmp_path):
    job = finish(tiny(method), tmp_path / "run")
    changes = {"name": "few", "vae": str(vae_folder)}
    exported = export(tmp_path / "run", tmp_path / "out", changes=changes)
    spec, _ = hub.open_spec(exported.folder)
    assert spec.scheduler.name == "few_step" and spec.scheduler.args["renoise"] is False
    assert (spec.defaults.num_inference_steps, spec.defaults.guidance_scale) == (3, 1.0)
    stored = models.load(exported.folder, device="cpu", dtype="bfloat16").dit.state_dict()
    average = job.strategy.gather("student")
    assert all(torch.equal(stored[n].bfloat16(), w.bfloat16()) for n, w in average.items())
    assert set(load_run(tmp_path / "run").roles) == {"student", "text"}, "no teacher, no critic"


def test_a_sampler_that_the_student_was_not_distilled_for_is_refused_before_the_run(vae_folder):
    words = [f"export.vae={vae_folder}", f"validate.vae={vae_folder}"]
    other = "export.scheduler.args.sigmas=[1.0, 0.5, 0.2]"
    with pytest.raises(ValueError, match=r"\[export\] of .* not what method perflow distils for"):
        check(tiny("perflow", *words, other))
    with pytest.raises(ValueError, match=r"\[validate\] of .* not what method dmd distils for"):
        validator(tiny("dmd", *words, "validate.scheduler.args.renoise=true"), Path())
    with pytest.raises(ValueError, match=r"\[validate\] of .* 10 steps are not .* nearest: 3"):
        validator(tiny("perflow", *words, "validate.steps=10"), Path())
    with pytest.raises(
        ValueError,
        match=r"\[export\] of .* guidance 4 must be 1: the student",
    ):
        check(tiny("perflow", *words, "export.defaults.guidance_scale=4"))
    check(tiny("perflow", *words))
