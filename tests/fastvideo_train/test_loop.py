"""The loop: exact resumption, accumulation, stopping, divergence, blocked gradients."""

from __future__ import annotations

import json
import math

import pytest
import torch
from fastvideo_train import logs, origins
from fastvideo_train.loop import DivergedError, Job, Saved, StepDone, Validated, train
from fastvideo_train.methods import StepKey, Update
from fastvideo_train.recipe import RoleSpec
from tiny_recipes import FILES, finish, tiny

from fastvideo import registry
from fastvideo.weights import Checkpoint

METHODS = sorted(FILES)


def _equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_every_method_has_a_tiny_recipe():
    assert registry.names("fastvideo_train.methods") == METHODS


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_one_without_interruption_bit_for_bit(method, dtype, tmp_path):
    recipe = tiny(method, f"run.dtype={dtype}", "run.accumulate=2")
    straight = finish(recipe, tmp_path / "straight")
    stopped = finish(recipe, tmp_path / "stopped", until=3)
    assert stopped.step == 3
    resumed = finish(recipe, tmp_path / "stopped")
    assert straight.step == resumed.step == 6
    assert _equal(straight.strategy.state_dict(), resumed.strategy.state_dict())
    for a, b in zip(straight.roles.values(), resumed.roles.values(), strict=True):
        assert _equal(dict(a.net.state_dict()), dict(b.net.state_dict()))
    numbers = [
        [{k: v for k, v in r.items() if not k.endswith("_s")} for r in logs.read(job.folder)]
        for job in (straight, resumed)
    ]
    assert numbers[0] == numbers[1] and [r["step"] for r in numbers[0]] == [1, 2, 3, 4, 5, 6]


def test_a_step_depends_on_the_seed(tmp_path):
    one = finish(tiny("vae", "run.steps=2"), tmp_path / "a")
    two = finish(tiny("vae", "run.steps=2", "run.seed=1"), tmp_path / "b")
    assert not _equal(one.strategy.gather("vae"), two.strategy.gather("vae"))


@pytest.mark.parametrize(
    ("method", "sets"),
    [
        ("vae", ["run.steps=40", "optim.lr=1e-2"]),
        ("classify", ["run.steps=60", "run.batch=8", "optim.lr=1e-2"]),
        # nearly pure noise goes in, so that copying it out is most of the way
        ("flow_matching", ["run.steps=60", "optim.lr=5e-3", "method.args.logit_mean=3.0"]),
    ],
)
def test_training_lowers_the_loss(method, sets, tmp_path):
    job = finish(tiny(method, "run.batch=4", *sets), tmp_path)
    losses = [record["train/loss"] for record in logs.read(job.folder)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_accumulated_micro_batches_make_the_gradient_of_their_mean(tmp_path):
    def grads(*sets: str) -> dict[str, torch.Tensor]:
        job = Job.open(tiny("vae", "run.dtype=float32", *sets), tmp_path / "".join(sets))
        job.method = _Squares()
        count = job.recipe.run.accumulate
        values = torch.arange(1.0, 5.0).split(4 // count)
        for lane in range(count):
            key = StepKey(0, 0, 1, lane)
            for update in job.method.step({"x": values[lane]}, job.roles, key):
                job.strategy.backward(update.roles, update.loss)
        return {n: g.clone() for n, g in job.strategy._trained["vae"].grads.items()}

    whole, parts = grads(), grads("run.accumulate=2")
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name])


class _Squares:
    """A loss that is quadratic in every weight, scaled by the batch."""

    wants = ()

    def step(self, batch, roles, key):
        total = sum(p.square().sum() for p in roles["vae"].net.parameters())
        yield Update(("vae",), batch["x"].mean() * total)


class _TwoPhases:
    """The student's loss passes through the text encoder, which then learns by itself."""

    wants = ()

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def step(self, batch, roles, key):
        student, text = (next(roles[n].net.parameters()) for n in ("student", "text"))
        self.seen += [student.detach().clone(), text.detach().clone()]
        yield Update(("student",), student.square().sum() * text.square().sum(), {"a": 1.0})
        self.seen += [student.detach().clone(), text.detach().clone()]
        yield Update(("text",), text.square().sum() + 0.0 * student.sum(), {"b": 2.0})
        self.seen += [student.detach().clone(), text.detach().clone()]


def test_each_phase_updates_its_role_alone_before_the_next_phase_runs(tmp_path):
    job = Job.open(tiny("flow_matching", "run.steps=1", "run.dtype=float32"), tmp_path)
    job.method = method = _TwoPhases()
    (done, saved) = train(job)
    assert isinstance(done, StepDone) and isinstance(saved, Saved)
    student, text = method.seen[0::2], method.seen[1::2]
    assert not torch.equal(student[0], student[1]) and torch.equal(text[0], text[1])
    assert torch.equal(student[1], student[2]) and not torch.equal(text[1], text[2])
    assert done.metrics["a"] == 1.0 and done.metrics["b"] == 2.0


class _Explodes:
    wants = ()

    def step(self, batch, roles, key):
        total = sum(p.sum() for p in roles["vae"].net.parameters())
        yield Update(("vae",), total * (math.nan if key.step == 2 else 1.0))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_clips(tmp_path):
    job = Job.open(tiny("vae", "run.save_every=1"), tmp_path)
    job.method = _Explodes()
    with pytest.raises(
        DivergedError, match=r"loss is nan at step 3, clips train/0/4, train/0/5"
    ) as e:
        list(train(job))
    assert "step-00000002" in str(e.value)
    assert Job.open(job.recipe, tmp_path).step == 2


def test_a_stop_ends_after_the_step_with_a_checkpoint(tmp_path):
    job = Job.open(tiny("vae"), tmp_path)
    events = list(train(job, stop=lambda: job.step >= 2))
    assert [type(e) for e in events] == [StepDone, StepDone, Saved]
    assert job.checkpoints.latest() == tmp_path / "checkpoints" / "step-00000002"


def test_no_time_means_no_step(tmp_path):
    assert list(train(Job.open(tiny("vae"), tmp_path), max_seconds=0.0)) == []


def test_validation_sees_averaged_weights_and_gives_the_own_ones_back(tmp_path):
    recipe, seen = tiny("vae", "run.steps=2", "run.validate_every=2", "optim.lr=0.1"), {}

    def validate(roles, *, step):
        seen.update({n: p.detach().clone() for n, p in roles["vae"].net.named_parameters()})
        return {"psnr": 20.0}

    job = Job.open(recipe, tmp_path, validate=validate)
    events = list(train(job))
    assert Validated(2, {"psnr": 20.0}) in events
    average, own = job.strategy.gather("vae"), job.strategy.gather("vae", averaged=False)
    name = "decoder.conv_in.weight"
    assert torch.equal(seen[name], average[name].bfloat16())
    now = dict(job.roles["vae"].net.named_parameters())[name]
    assert torch.equal(now, own[name].bfloat16()) and not torch.equal(now, seen[name])
    assert {"step": 2, "validate/psnr": 20.0} in logs.read(tmp_path)


def test_a_resumed_run_may_last_longer_but_not_be_another(tmp_path):
    finish(tiny("vae", "run.steps=1"), tmp_path)
    assert Job.open(tiny("vae", "run.steps=2"), tmp_path).step == 1
    with pytest.raises(ValueError, match=r"roles\.vae\.config\.base_dim: 8 -> 16; use --fresh"):
        Job.open(tiny("vae", "roles.vae.config.base_dim=16"), tmp_path)


def test_a_checkpoint_older_than_a_key_of_the_recipe_goes_on(tmp_path):
    recipe = tiny("flow_matching", "run.steps=2")
    finish(recipe, tmp_path, until=1)
    (info,) = tmp_path.glob("checkpoints/step-*/info.json")
    values = json.loads(info.read_text())
    for role in values["recipe"]["roles"].values():
        del role["attention"]
    del values["recipe"]["run"]["log_every"]
    info.write_text(json.dumps(values))
    assert Job.open(recipe, tmp_path).step == 1


def test_a_resumed_run_obeys_what_its_recipe_changed(tmp_path):
    finish(tiny("vae", "run.steps=1", "ema.decay=0", "data.workers=0"), tmp_path)
    words = ("run.steps=2", "ema.decay=0.9", "optim.betas=[0.5, 0.6]", "data.workers=1")
    job = Job.open(tiny("vae", *words), tmp_path)
    assert _equal(job.strategy.gather("vae"), job.strategy.gather("vae", averaged=False))
    adamw = job.strategy._trained["vae"].optimizer.adamw
    assert adamw is not None and {g["betas"] for g in adamw.param_groups} == {(0.5, 0.6)}


def test_a_resumed_run_may_change_a_roles_optimizer_average_and_backend(tmp_path, caplog):
    first = ("run.steps=2", "run.dtype=float32", "roles.critic.ema=0")
    finish(tiny("dmd", *first), tmp_path)
    words = (
        "roles.critic.optim.betas=[0.5, 0.6]",
        "roles.critic.optim.clip=0.25",
        "roles.student.attention.backend=bmm",
        "roles.student.ema=0.5",
    )
    job = Job.open(tiny("dmd", *first, *words), tmp_path)
    assert job.step == 2 and job.roles["student"].attention.backend == "bmm"
    trained = job.strategy._trained
    student, critic = (trained[name].optimizer for name in ("student", "critic"))
    assert (
        {g["betas"] for g in critic.adamw.param_groups}
        == {(0.5, 0.6)}
        != {g["betas"] for g in student.adamw.param_groups}
    )
    assert (critic.spec.clip, trained["student"].ema.decay) == (0.25, 0.5)
    logged = [m for m in caplog.messages if m.startswith("resuming with a changed recipe")]
    assert len(logged) == len(words)


@pytest.mark.parametrize(
    "word",
    [
        "roles.student.attention.anneal_by=0.5",
        "roles.student.config.ffn_dim=32",
        "roles.critic.dtype=float32",
    ],
)
def test_what_a_roles_weights_mean_may_not_change_on_resume(word, tmp_path):
    finish(tiny("dmd", "run.steps=2"), tmp_path)
    with pytest.raises(ValueError, match=rf"{word.partition('=')[0]}: .*; use --fresh"):
        Job.open(tiny("dmd", word), tmp_path)


def test_a_role_without_an_average_is_its_own_weights_and_saves_none(tmp_path):
    """As of a critic, which nothing takes: it need not be kept a third time."""
    job = finish(tiny("dmd", "run.steps=2", "roles.critic.ema=0"), tmp_path / "run")
    state = job.strategy.state_dict()
    assert state["critic"]["ema"] is None and state["student"]["ema"] is not None
    pairs = [[job.strategy.gather(n, averaged=a) for a in (True, False)] for n in state]
    assert [_equal(*pair) for pair in pairs] == [name == "critic" for name in state]
    spec = RoleSpec.model_validate({"kind": "dit", "from": str(job.folder)})
    assert _equal(origins.first_weights(spec, "critic"), pairs[list(state).index("critic")][1])
    with pytest.raises(ValueError, match=r"roles\.critic\.ema .*: must be"):
        tiny("dmd", "roles.critic.ema=1")


def test_bfloat16_weights_are_rounded_copies_of_float32_masters(tmp_path):
    job = finish(tiny("vae", "run.steps=3"), tmp_path)
    masters = job.strategy.gather("vae", averaged=False)
    for name, param in job.roles["vae"].net.named_parameters():
        assert masters[name].dtype == torch.float32 and param.dtype == torch.bfloat16
        assert torch.equal(param, masters[name].bfloat16())


def test_a_run_starts_from_the_average_of_another_run(tmp_path):
    first = finish(tiny("vae", "run.steps=2"), tmp_path / "first")
    second = Job.open(tiny("vae", f"roles.vae.from={tmp_path / 'first'}"), tmp_path / "second")
    masters = second.strategy.gather("vae", averaged=False)
    assert _equal(masters, first.strategy.gather("vae")), "in float32, not rounded to bfloat16"


@pytest.mark.parametrize("first", ["runs/none", "{tmp_path}/none", "{tmp_path.name}/none"])
def test_a_missing_local_start_is_refused_and_never_asked_of_the_hub(tmp_path, monkeypatch, first):
    monkeypatch.chdir(tmp_path.parent)
    source = first.format(tmp_path=tmp_path)
    with pytest.raises(ValueError, match=rf"roles\.vae\.from {source} does not exist; train it"):
        Job.open(tiny("vae", f"roles.vae.from={source}"), tmp_path / "run")


def test_a_role_starts_from_a_part_of_a_model_folder(tmp_path, tiny_folder):
    config = json.loads((tiny_folder / "vae" / "config.json").read_text())
    dims = [f"roles.vae.config.{k}={json.dumps(v)}" for k, v in config.items() if k[0] != "_"]
    dims = [word for word in dims if not word.endswith("=null")]
    job = Job.open(tiny("vae", f"roles.vae.from={tiny_folder}", *dims), tmp_path)
    stored = Checkpoint(tiny_folder / "vae")
    masters = job.strategy.gather("vae")
    assert all(torch.equal(masters[name], stored[name].float()) for name in stored)


SPARSE = (
    "roles.student.config.gate_compress=true",
    "roles.student.attention.pattern=vsa",
    "roles.student.attention.args.sparsity=0.5",
    "roles.student.attention.args.tile=[1, 2, 2]",
    "roles.student.attention.anneal_every=2",
    "roles.student.attention.anneal_by=0.25",
)


def test_a_dense_run_goes_on_sparse_with_gates_that_start_at_zero(tmp_path):
    dense = finish(tiny("flow_matching", "run.steps=2"), tmp_path / "dense")
    starts = [f"roles.{role}.from={tmp_path / 'dense'}" for role in ("student", "text")]
    job = Job.open(tiny("flow_matching", *starts, *SPARSE), tmp_path / "sparse")
    weights = job.strategy.gather("student", averaged=False)
    gates = {name: w for name, w in weights.items() if "to_gate_compress" in name}
    rest = {name: w for name, w in weights.items() if name not in gates}
    assert len(gates) == 4 and not any(w.any() for w in gates.values())
    assert _equal(rest, dense.strategy.gather("student"))
    job = finish(tiny("flow_matching", *starts, *SPARSE), tmp_path / "sparse")
    learned = job.strategy.gather("student", averaged=False)
    assert all(learned[name].any() for name in gates)
    # one attention for each sparsity that the six steps passed through
    assert {pattern.sparsity for pattern, _ in job.roles["student"]._attends} == {0.0, 0.25, 0.5}


def test_a_sparse_run_resumes_bit_for_bit(tmp_path):
    recipe = tiny("flow_matching", *SPARSE)
    straight = finish(recipe, tmp_path / "straight")
    finish(recipe, tmp_path / "stopped", until=3)
    resumed = finish(recipe, tmp_path / "stopped")
    assert _equal(*(job.strategy.gather("student") for job in (straight, resumed)))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (
            '{pattern="sta", args={windows=[[1,1,1],[1,1,1],[1,1,1]], tile=[1,2,2]}}',
            r"roles\.student\.attention: sta has 3 windows; give one for all or 2, one a head",
        ),
        ('{backend="gathr"}', r"roles\.student\.attention: .*did you mean 'gather'"),
    ],
)
def test_attention_that_no_clip_could_have_is_refused_before_the_run(attention, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Job.open(tiny("flow_matching", f"roles.student.attention={attention}"), tmp_path)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ('{pattern="sta", args={windows=[[1,9,1]], tile=[1,2,2]}}', r"window .* nearest: \(1, "),
        ('{pattern="vsa", args={sparsity=0.5}, backend="flex"}', "has no backward pass on a CPU"),
    ],
)
def test_attention_that_does_not_fit_the_clips_is_refused_with_the_role(
    attention, message, tmp_path
):
    recipe = tiny("flow_matching", f"roles.student.attention={attention}")
    with pytest.raises(ValueError, match=r"^roles\.student\.attention: .*" + message):
        finish(recipe, tmp_path)


def test_gates_under_a_dense_pattern_are_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"roles\.student has the gates .*set roles\.student"):
        Job.open(tiny("flow_matching", SPARSE[0]), tmp_path)
