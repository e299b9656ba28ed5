"""Several processes of one run: what they agree on, their parts of a batch, torchrun and faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fastvideo_train import logs, loop, origins
from fastvideo_train.batches import stream
from fastvideo_train.checkpoints import Checkpoints
from fastvideo_train.loop import Job, StepDone, train
from fastvideo_train.methods import StepKey
from fastvideo_train.recipe import Recipe
from fastvideo_train.world import World
from rank_runs import opened, same, small, weights
from test_strategies_deepspeed import runs as deepspeed_runs
from tiny_recipes import CONFIGS, ROOT, finish, tiny

from fastvideo.parallel import mesh
from fastvideo.parallel.degrees import ParallelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGE = str(CONFIGS / "dit-image.toml")
VSA = "configs/train/wan-1.3b/vsa.toml"


# What processes agree on


def _agreement(rank: int, size: int) -> list[object]:
    world = World(mesh.build(ParallelConfig(data=size), torch.device("cpu")))
    seen = {"loss": [float(rank)], **({"rare": [7.0, 9.0]} if rank == 1 else {})}
    answers: list[object] = [
        world.any(rank == 2, False),
        world.every(rank),
        world.means(seen),
        world.on_first(lambda: {"rank": rank}),
    ]
    for error in (ValueError("wrong recipe"), KeyError("ours")):

        def fail(error: Exception = error) -> None:
            raise error

        try:
            world.on_first(fail)
        except Exception as caught:
            answers.append((type(caught).__name__, str(caught).strip("'")))
    return answers


def test_processes_agree_on_flags_means_and_what_the_first_one_did(ranks):
    answers = ranks(3, _agreement)
    for one in answers:
        assert one[:4] == [(True, False), [0, 1, 2], {"loss": 1.0, "rare": 8.0}, {"rank": 0}]
        assert one[4] == ("ValueError", "wrong recipe")
    assert answers[0][5] == ("KeyError", "ours") and answers[1][5] == ("RuntimeError", "ours")


def _with_a_disk_of_its_own(rank: int, size: int, recipe: Recipe, folder: str) -> str:
    try:
        opened(recipe, f"{folder}/{rank}", size)
    except ValueError as error:
        return str(error)
    return ""


def test_processes_that_find_other_checkpoints_are_refused_on_each(ranks, tmp_path):
    recipe = small("flow_matching", "run.strategy=accelerate")
    finish(small("flow_matching"), tmp_path / "0")
    said = ranks(2, _with_a_disk_of_its_own, recipe, str(tmp_path))
    for rank, words in enumerate(said):
        assert f"{tmp_path}/{rank} (step-00000003, none); all machines need one folder" in words


def test_one_device_for_all_processes_is_refused():
    recipe = small("flow_matching", "run.strategy=accelerate", "run.device=cuda:1")
    with pytest.raises(ValueError, match="cuda:1 would be that of all 2 processes; nearest: cuda,"):
        loop.check(recipe, ParallelConfig(data=2))


# Their parts of a batch


@pytest.mark.parametrize("config", ["vae", "flow_matching", "latents"])
def test_parts_of_a_batch_are_the_whole_batch(config, tmp_path):
    recipe = tiny("vae" if config == "vae" else "flow_matching", "run.batch=6")
    if config == "latents":
        recipe = recipe.model_copy(update={"data": _latents(tmp_path)})
    if config == "vae":
        recipe = tiny("vae", "run.batch=6", "data.workers=0")
    with stream(recipe, start=2) as batches:
        whole = next(batches)
    parts = []
    for i in range(3):
        with stream(recipe, start=2, part=(i, 3)) as batches:
            parts.append(next(batches))
    key = "pixels" if config == "vae" else "latents"
    assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
    for words in ("captions", "ids"):
        assert [w for part in parts for w in part[words]] == whole[words]
    if config != "vae":
        assert all(torch.equal(part["frame_T"], whole["frame_T"]) for part in parts)


def _latents(folder: Path):
    from fastvideo_train.data.latents import encode_world
    from fastvideo_train.recipe import LatentsSpec

    vae = finish(tiny("vae", "run.steps=1", "run.dtype=float32"), folder / "vae").roles["vae"].net
    sizes = {"num_frames": 9, "height": 64, "width": 64}
    encode_world(vae, "shapes", folder / "z", num_clips=7, seed=0, shard_size=4, batch=2, **sizes)
    return LatentsSpec(name="latents", folder=str(folder / "z"), spread=2)


def test_a_clip_draws_the_same_numbers_in_whatever_part_it_is():
    whole = StepKey(0, 3, 10, lane=1)
    parts = [StepKey(0, 3, 10, lane=1, first=first) for first in (0, 2, 4)]
    for draw in ("noise", "uniform"):
        wanted = getattr(whole, draw)("a", (6, 4, 5))
        got = torch.cat([getattr(part, draw)("a", (2, 4, 5)) for part in parts])
        assert torch.equal(got, wanted) and len({float(x.sum()) for x in wanted}) == 6
    assert len({key.shared("a") for key in (whole, *parts)}) == 1


# Gradients, divergence and validation


class _Names:
    """A method whose loss reaches both roles and names the student alone."""

    def __init__(self, method) -> None:
        self.method = method

    def step(self, batch, roles, key):
        import dataclasses

        for update in self.method.step(batch, roles, key):
            assert update.roles == ("student", "text"), "both learn in this recipe"
            yield dataclasses.replace(update, roles=("student",))


def _moved(rank: int, size: int, strategy: str, folder: str) -> dict[str, bool]:
    recipe = small("flow_matching", f"run.strategy={strategy}", "optim.lr=1e-2", "run.steps=1")
    job = opened(recipe, Path(folder), size)
    job.method = _Names(job.method)
    names = ("student", "text")
    before = {n: {k: w.clone() for k, w in _own(job, n).items()} for n in names}
    list(train(job))
    after = {n: _own(job, n) for n in names}
    return {n: any(not torch.equal(before[n][k], w) for k, w in after[n].items()) for n in names}


def _own(job: Job, role: str) -> dict[str, torch.Tensor]:
    return job.strategy.gather(role, averaged=False)


@pytest.mark.parametrize("strategy", ["accelerate", "fsdp2"])
def test_gradients_reach_the_named_roles_alone(strategy, ranks, tmp_path):
    for moved in ranks(2, _moved, strategy, str(tmp_path)):
        assert moved == {"student": True, "text": False}


def _diverged(rank: int, size: int, folder: str) -> str:
    job = opened(small("flow_matching", "run.strategy=accelerate"), Path(folder), size)
    if rank == 1:
        with torch.no_grad():
            next(job.roles["student"].net.parameters()).fill_(torch.nan)
    try:
        list(train(job))
    except ValueError as error:
        return str(error)
    return ""


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_the_same_words(ranks, tmp_path):
    one, other = ranks(2, _diverged, str(tmp_path))
    assert one == other and "loss is nan at step 1" in one and one.count("synthetic/") == 6


def _validated(rank: int, size: int, strategy: str, folder: str) -> list[object]:
    sets = (f"run.strategy={strategy}", "run.validate_every=1", "run.steps=1", "optim.lr=1e-2")
    job = opened(small("flow_matching", *sets), Path(folder), size)
    calls = []

    def validate(roles, *, step):
        calls.append(step)
        generator = torch.Generator().manual_seed(0)
        net = roles["student"].net
        cond = roles["student"].family.Conditioning(torch.zeros(1, 2, net.config.text_dim))
        x = torch.randn(1, net.config.in_channels, 1, 8, 8, generator=generator)
        net.prepare(cond)  # beside `forward`, as rendering calls it
        return {"size": float(net(x, torch.full((1, 1), 500.0), cond).abs().mean())}

    job.validate = validate
    events = [e for e in train(job) if not isinstance(e, StepDone)]
    return [calls, dict(events[0].metrics)]


@pytest.mark.parametrize("strategy", ["accelerate", "fsdp2"])
def test_the_first_rank_validates_whole_averaged_networks_and_all_learn_the_numbers(
    strategy, ranks, tmp_path
):
    (calls, numbers), (others, same) = ranks(2, _validated, strategy, str(tmp_path / "two"))
    ((_, wanted),) = ranks(1, _validated, "single", str(tmp_path / "one"))
    assert calls == [1] and others == [] and same == numbers
    assert numbers["size"] == pytest.approx(wanted["size"], rel=1e-4) and wanted["size"] > 0
    assert [r["step"] for r in logs.read(tmp_path / "two")] == [1, 1], "written by one of them"


# torchrun


def launched(
    run_dir: Path, *sets: str, program: tuple[str, ...] = ("-m", "fastvideo"), recipe: str = IMAGE
) -> subprocess.Popen[str]:
    """`fastvideo train` in several processes, as a user starts it."""
    words = [w for s in ("run.dtype=float32", "run.batch=4", *sets) for w in ("--set", s)]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", *program, "train"),
            *(recipe, "--smoke", "--run-dir", str(run_dir), *words),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(running: subprocess.Popen, text: str) -> str:
    """Read the run's output up to a line that contains a text."""
    seen = ""
    for line in running.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came: {seen}{running.stderr.read()}")


def workers(running: subprocess.Popen) -> list[int]:
    """Process ids of the ranks, by rank."""
    path = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    found = {}
    for pid in path.read_text().split():
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = [w for w in words if w.startswith(b"RANK=")]
        if rank:
            found[int(rank[0][5:])] = int(pid)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.full
def test_torchrun_trains_prints_once_stops_on_a_signal_to_one_rank_and_goes_on(tmp_path):
    run = tmp_path / "r"
    sets = ("run.strategy=fsdp2", "run.save_every=1")
    first = launched(run, *sets, "run.steps=100000")
    try:
        seen = until(first, "step 2: ")
        os.kill(workers(first)[1], signal.SIGTERM)
        out, err = first.communicate(timeout=120)
    finally:
        first.kill()
    out = seen + out
    assert out.count("step 1: loss") == 1 and out.count("the same command resumes") == 1
    assert "exitcode  : 130" in err and "Traceback (most recent call last)" not in out
    done = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert f"stopped at step {done};" in out
    second = launched(run, *sets, f"run.steps={done + 1}")
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert f"step {done} of {done + 1}" in out
    info = json.loads((run / f"checkpoints/step-{done + 1:08d}/info.json").read_text())
    assert info["step"] == done + 1
    assert [r["step"] for r in logs.read(run)] == list(range(1, done + 2))


@pytest.mark.full
def test_a_rank_that_is_killed_ends_the_run_which_goes_on_as_if_it_never_was(tmp_path, ranks):
    sets = ("run.strategy=accelerate", "run.save_every=1", "run.steps=100000")
    run = tmp_path / "run"
    running = launched(run, *sets)
    try:
        until(running, "step 2: saved")
        os.kill(workers(running)[1], signal.SIGKILL)
        began = time.monotonic()
        _, err = running.communicate(timeout=120)
        assert time.monotonic() - began < 60.0
    finally:
        running.kill()
    assert running.returncode != 0 and "another process of the run died" in err
    step = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    recipe = origins._recipe_of(run / f"checkpoints/step-{step:08d}")
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"log_every": 1})})
    rest, resumed = ranks(2, weights, recipe, str(run), step + 1, False)[0]
    straight, end = ranks(2, weights, recipe, str(tmp_path / "straight"), step + 1, False)[0]
    assert rest == straight[step:] and len(rest) == 1 and step >= 2
    assert same(end, resumed)


@pytest.mark.full
def test_the_error_of_the_rank_that_failed_comes_first_and_alone(tmp_path):
    """A file stands where the run's folder of checkpoints should be: only the first rank writes."""
    (tmp_path / "checkpoints").write_text("no folder")
    running = launched(tmp_path, "run.strategy=accelerate", "run.steps=1")
    _, err = running.communicate(timeout=300)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert running.returncode != 0 and len(lines) == 1, err
    assert "cannot save checkpoint" in lines[0] and "(rank " in lines[0]


FAILING = """
import os, sys
from fastvideo_train import loop
from fastvideo.cli import main

step = loop._one_step

def failing(job, batches):
    if os.environ["RANK"] == "1" and job.step == 2:
        raise ValueError("a batch that only this rank has is bad")
    return step(job, batches)

loop._one_step = failing
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.full
def test_an_error_of_another_rank_than_the_first_is_told_once_and_ends_the_run(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    sets = ("run.strategy=accelerate", "run.save_every=1", "run.steps=100")
    running = launched(tmp_path / "r", *sets, program=(str(tmp_path / "failing.py"),))
    try:
        until(running, "step 2: saved")
        _, err = running.communicate(timeout=60)
    finally:
        running.kill()
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert running.returncode != 0
    assert lines == ["error: a batch that only this rank has is bad (rank 1)"], err
    assert Checkpoints(tmp_path / "r" / "checkpoints").latest().name == "step-00000002"


ENDING = """
import os, sys, weakref
from contextlib import suppress
from fastvideo.cli import main
from fastvideo_train.world import World
from torch.distributed.distributed_c10d import _world

any_, groups = World.any, []

def last(self, *flags):
    if len(flags) == 1:
        groups.extend(map(weakref.ref, _world.pg_map))
        if os.environ["RANK"] == sys.argv[1]:
            starve()
    return any_(self, *flags)

def starve():
    core = {min(os.sched_getaffinity(0))}
    for thread in map(int, os.listdir("/proc/self/task")):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, core)
            if thread != os.getpid():
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    sys.setswitchinterval(1e6)

World.any = last
code = main(sys.argv[2:])
assert groups and not any(ref() for ref in groups)
sys.exit(code)
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="starves threads as Linux does")
@pytest.mark.parametrize(
    ("strategy", "rank", "recipe"),
    [
        pytest.param("accelerate", 0, IMAGE, marks=pytest.mark.full),
        pytest.param("accelerate", 1, IMAGE, marks=pytest.mark.full),
        # its Muon fills other caches of DTensor
        pytest.param("fsdp2", 1, IMAGE, marks=pytest.mark.full),
        pytest.param("fsdp2", 0, VSA, marks=pytest.mark.full),
        pytest.param("deepspeed", 0, VSA, marks=deepspeed_runs),
    ],
    ids=lambda value: Path(str(value)).stem,
)
def test_no_group_outlives_a_run_though_its_threads_are_late(strategy, rank, recipe, tmp_path):
    """On one rank the main thread comes first from the last exchange on, as on a loaded machine."""
    (tmp_path / "ending.py").write_text(ENDING)
    program = (str(tmp_path / "ending.py"), str(rank))
    sets = (f"run.strategy={strategy}", "run.steps=1", "roles.text.trainable=false")
    running = launched(tmp_path / "r", *sets, program=program, recipe=recipe)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert out.count("step 1: saved") == 1


def test_a_launch_that_cannot_be_is_refused_in_one_line_each(tmp_path):
    running = launched(tmp_path / "r", "parallel.shard=3", "run.strategy=fsdp2")
    _, err = running.communicate(timeout=120)
    assert "parallel degrees shard 3 need 3 processes, not 2" in err
    assert not (tmp_path / "r").exists() and "exitcode  : 2" in err
