"""Where first weights and dims come from, above all when a role of another name made them."""

from __future__ import annotations

import json

import pytest
import torch
from distill_toys import KEY, lively
from fastvideo_train import origins
from fastvideo_train.loop import Job
from fastvideo_train.recipe import RoleSpec
from tiny_recipes import finish, tiny

from fastvideo import hub
from fastvideo.models import classifier as classifiers
from fastvideo.weights import Checkpoint

ATTENTION = "roles.student.attention"


def _same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dense"
    return finish(tiny("flow_matching", "run.steps=2", "run.dtype=float32"), folder)


@pytest.fixture(scope="module")
def dmd_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dmd"
    return finish(tiny("dmd", "run.steps=2", "run.dtype=float32"), folder)


def _role(kind, folder, **more):
    return RoleSpec.model_validate({"kind": kind, "from": str(folder), **more})


def test_a_run_serves_its_student_as_teacher_and_critic(dense_run, tmp_path):
    names = ("student", "teacher", "critic", "text")
    words = [f"roles.{name}.from={dense_run.folder}" for name in names]
    job = Job.open(tiny("dmd", "run.dtype=float32", *words), tmp_path)
    average = dense_run.strategy.gather("student")
    for name in ("student", "teacher", "critic"):
        assert _same(dict(job.roles[name].net.state_dict()), average), name
    assert _same(dict(job.roles["text"].net.state_dict()), dense_run.strategy.gather("text"))


def test_a_run_of_student_and_critic_serves_each_by_its_name_and_others_by_the_student(dmd_run):
    student, critic = (dmd_run.strategy.gather(name) for name in ("student", "critic"))
    spec = _role("dit", dmd_run.folder)
    assert _same(origins.first_weights(spec, "critic"), critic)
    assert _same(origins.first_weights(spec, "student"), student)
    assert _same(origins.first_weights(spec, "teacher"), student) and not _same(student, critic)


def test_what_a_run_kept_frozen_is_read_from_where_that_run_had_it(dense_run, tmp_path):
    words = [f"roles.{name}.from={dense_run.folder}" for name in ("student", "teacher", "text")]
    run = finish(tiny("perflow", "run.steps=1", *words), tmp_path / "perflow")
    frozen = origins.first_weights(_role("text", run.folder), "text")
    assert _same(frozen, dense_run.strategy.gather("text"))


def test_a_run_of_several_roles_without_a_student_is_ambiguous(dmd_run, tmp_path):
    recipe = dmd_run.recipe
    roles = {"left": recipe.roles["student"], "right": recipe.roles["critic"]}
    run = recipe.model_copy(update={"roles": roles})
    spec = _role("dit", dmd_run.folder)
    several = r"several roles of kind 'dit'.*\(it trained: left \(dit\)"
    with pytest.raises(ValueError, match=several):
        origins._role_behind(run, spec, "teacher", tmp_path)
    with pytest.raises(ValueError, match=r"roles\.vae\.from .* has no role of kind 'vae'"):
        origins.first_weights(_role("vae", dmd_run.folder), "vae")


def test_a_teacher_is_told_the_text_states_that_it_knows(dense_run, tmp_path):
    other = finish(tiny("flow_matching", "run.steps=1", "run.seed=7"), tmp_path / "other").folder
    words = [f"roles.{name}.from={dense_run.folder}" for name in ("student", "teacher", "text")]
    origins.check_text(tiny("perflow", *words))
    with pytest.raises(ValueError, match=rf"roles\.teacher is from {other}, whose text encoder"):
        origins.check_text(tiny("perflow", *words, f"roles.teacher.from={other}"))


def test_dims_come_from_the_folder_and_the_recipes_own_go_on_top(dense_run, tiny_folder):
    student = dict(dense_run.roles["student"].config)
    assert origins.dims(_role("dit", dense_run.folder), "teacher") == student
    sparse = _role("dit", dense_run.folder, config={"gate_compress": True})
    assert origins.dims(sparse, "student") == {**student, "gate_compress": True}
    bundled = origins.dims(_role("dit", "wan-nano", config={"gate_compress": True}), "student")
    assert bundled["num_layers"] == 8 and bundled["gate_compress"] is True
    assert origins.dims(_role("vae", tiny_folder), "vae")["z_dim"] == 4
    assert origins.dims(_role("dit", "", config={"ffn_dim": 8}), "student") == {"ffn_dim": 8}


def test_a_teacher_without_a_config_has_the_dims_of_its_run(dense_run, tmp_path):
    recipe = tiny("perflow", f"roles.teacher.from={dense_run.folder}")
    bare = recipe.roles["teacher"].model_copy(update={"config": {}})
    recipe = recipe.model_copy(update={"roles": {**recipe.roles, "teacher": bare}})
    teacher = Job.open(recipe, tmp_path).roles["teacher"]
    assert teacher.config == dense_run.roles["student"].config and not teacher.trainable


def test_what_was_new_and_frozen_in_a_run_is_not_there_and_said_by_role_and_run(tmp_path):
    run = finish(tiny("perflow", "run.steps=1"), tmp_path / "run").folder
    with pytest.raises(ValueError, match=rf"roles\.text of {run} was new there and is not saved"):
        origins.first_weights(_role("text", run), "text")
    with pytest.raises(ValueError, match=rf"roles\.text\.from {run}: roles\.text of {run} was"):
        Job.open(tiny("perflow", f"roles.text.from={run}"), tmp_path / "next")


def test_a_classifiers_folder_brings_its_own_dims(tmp_path):
    """The bundled one, so that what a user has at hand starts a run of his own."""
    folder = hub.ZOO / "shapes-classifier"
    values = json.loads((folder / "config.json").read_text())
    family = values.pop("family")
    spec = _role("classifier", folder, family=family)
    dims = origins.dims(spec, "classifier")
    assert json.loads(json.dumps(dims)) == values
    net = classifiers.read(folder)
    assert _same(origins.first_weights(spec, "classifier"), dict(Checkpoint(folder)))
    assert type(net.config).parse(dims) == net.config
    wider = _role("classifier", folder, family=family, config={"features": 8})
    assert origins.dims(wider, "classifier")["features"] == 8


def test_a_bundled_model_is_a_teacher_by_its_name():
    weights = origins.first_weights(_role("dit", "wan-nano", trainable=False), "teacher")
    assert weights["patch_embedding.weight"].shape == (192, 16, 1, 2, 2)


SPARSE = (
    "roles.student.config.gate_compress=true",
    f'{ATTENTION}={{pattern="vsa", args={{sparsity=0.5, tile=[1, 2, 2]}}, backend="gather"}}',
)


@pytest.mark.parametrize("method", ["perflow", "dmd"])
def test_only_a_sparse_student_computes_with_the_sparse_backend(method, tmp_path):
    """Each role of one step, by what was called: the teacher's and critic's stay dense."""
    every = ("method.args.student_every=1",) if method == "dmd" else ()
    dense = "roles.teacher.attention.backend=sdpa"
    job = lively(method, tmp_path, *SPARSE, dense, *every)
    batch = _batch(job)
    for update in job.method.step(batch, job.roles, KEY):
        assert update.loss.isfinite()
    used = {
        name: [a.self_backend.__name__.rpartition(".")[2] for a, _ in role._attends.values()]
        for name, role in job.roles.items()
        if role.kind == "dit"
    }
    assert used["student"] == ["gather"] and used["teacher"] == ["sdpa"]
    assert used.get("critic", ["sdpa"])[0] in ("sdpa", "bmm")


def _batch(job):
    from fastvideo_train.batches import stream

    with stream(job.recipe, start=0) as batches:
        return next(batches)


@pytest.mark.parametrize("method", ["perflow", "dmd"])
def test_a_sparse_distillation_from_a_dense_run_resumes_bit_for_bit(method, dense_run, tmp_path):
    """Born-zero gates on a dense run's weights; two optimizers, averages, a sparsity that rises."""
    names = [n for n in tiny(method).roles if n != "text"]
    words = [f"roles.{name}.from={dense_run.folder}" for name in names]
    rises = [f"{ATTENTION}.anneal_every=2", f"{ATTENTION}.anneal_by=0.25"]
    recipe = tiny(method, *words, *SPARSE, *rises, "run.accumulate=2")
    straight = finish(recipe, tmp_path / "straight")
    finish(recipe, tmp_path / "stopped", until=3)
    resumed = finish(recipe, tmp_path / "stopped")
    for name in straight.strategy.state_dict():
        for averaged in (True, False):
            a, b = (j.strategy.gather(name, averaged=averaged) for j in (straight, resumed))
            assert _same(a, b), name
    gates = [w for n, w in straight.strategy.gather("student").items() if "to_gate" in n]
    assert gates and all(w.any() for w in gates), "born zero, and learned"
