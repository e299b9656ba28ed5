"""The files of `train/launch` start what they say, with the launchers' own commands."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastvideo_train import recipe as recipes
from tiny_recipes import ROOT

LAUNCH = ROOT / "train" / "launch"
RECIPE = "configs/train/wan-1.3b/vsa.toml"


def environment(**more: str) -> dict[str, str]:
    """This interpreter's launchers first, a free port, and none of a launcher's own variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    own = {"PATH": path, "PYTHONPATH": os.pathsep.join(sys.path), "PORT": port}
    return {**kept, **own, "OMP_NUM_THREADS": "1", **more}


LAUNCHERS = sorted(path for path in LAUNCH.glob("*.sh") if path.stem != "trio")


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_a_launch_file_is_sound_bash_and_names_1_8_and_64_devices(path):
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert os.access(path, os.X_OK)
    head = path.read_text().partition("set -euo pipefail")[0]
    lines = [x for x in head.splitlines() if f"train/launch/{path.name}" in x]
    assert len(lines) == 3 and "run.batch=1 " in lines[0] and "run.batch=64 " in lines[2]
    assert "64" in head


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_train_a_smoke_recipe(launcher, tmp_path):
    pytest.importorskip("accelerate") if launcher == "accelerate" else None
    words = [RECIPE, "--smoke", "--run-dir", str(tmp_path / "r")]
    if launcher == "accelerate":
        words += ["--set", "run.strategy=accelerate"]
    done = subprocess.run(
        ["bash", LAUNCH / f"{launcher}.sh", "2", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("step 3: saved") == 1
    assert (tmp_path / "r" / "checkpoints" / "latest").is_file()


def _stand_in(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_slurm_starts_torchrun_on_each_machine_and_stops_before_its_time(tmp_path):
    _stand_in(tmp_path, "scontrol", 'echo "node3"; echo "node4"')
    _stand_in(tmp_path, "srun", 'shift; exec "$@"')
    _stand_in(tmp_path, "torchrun", 'echo "torchrun $*"')
    given = environment(
        SLURM_JOB_NODELIST="node[3-4]",
        SLURM_NNODES="2",
        SLURM_JOB_ID="712345",
        SLURM_GPUS_PER_NODE="h200:8",
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_END_TIME=str(2**40),
    )
    given["PATH"] = f"{tmp_path}{os.pathsep}{given['PATH']}"
    command = ["bash", LAUNCH / "slurm.sh", RECIPE, "--set", "parallel.data=2"]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    said = done.stdout
    assert "--nnodes 2" in said and "--rdzv-endpoint node3:32345" in said
    assert "--nproc-per-node 8" in said and "--rdzv-id 712345" in said
    assert re.search(rf"-m fastvideo train {RECIPE} --set parallel.data=2 --max-minutes \d+", said)
    given["SLURM_JOB_END_TIME"] = str(int(time.time()) + 600)
    short = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    assert short.returncode == 1 and "leaves no quarter of an hour" in short.stderr


def test_slurm_directives_are_those_of_one_launcher_a_machine():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    found = [x.removeprefix("#SBATCH --") for x in lines if x.startswith("#SBATCH")]
    last = max(i for i, x in enumerate(lines) if x.startswith("#SBATCH"))
    assert all(not x or x.startswith("#") for x in lines[:last]), "sbatch reads only what is above"
    told = dict(x.partition("=")[::2] for x in found)
    assert told["ntasks-per-node"] == "1" and told["gpus-per-node"] == "8"
    assert "requeue" in told and "time" in told


def test_the_chain_of_trio_has_a_stage_for_every_recipe_in_their_order():
    path = LAUNCH / "trio.sh"
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert os.access(path, os.X_OK)
    stages = re.findall(r"^ +train ([a-z -]+)$", path.read_text(), re.MULTILINE)
    order = [name for stage in stages for name in stage.split()]
    assert sorted(order) == sorted(p.stem for p in (ROOT / "configs/train/trio").glob("*.toml"))
    run_of = {
        name: recipes.load(ROOT / f"configs/train/trio/{name}.toml").run.name for name in order
    }
    for name in order:
        recipe = recipes.load(ROOT / f"configs/train/trio/{name}.toml")
        for role in recipe.roles.values():
            earlier = [f"runs/{run_of[n]}" for n in order[: order.index(name)]]
            assert not role.from_ or role.from_ in earlier, f"{name} starts from {role.from_}"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--max-minutes", "0"], "runs/trio-vae-image has no checkpoint yet, so the chain ends"),
        (["--max-minutes", "0.02"], "runs/trio-vae-image is at step "),
    ],
)
def test_a_run_that_is_not_finished_ends_the_chain(words, told, tmp_path):
    words = ["--", *words, "--set", "run.compile=false", "--set", "run.batch=4"]
    done = subprocess.run(
        ["bash", LAUNCH / "trio.sh", "vae", *words],
        cwd=tmp_path,
        env=environment(DEVICE="cpu", WORKERS="0"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1 and told in done.stderr, done.stderr[-2000:]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["trio-vae-image"]


def test_the_chain_of_trio_refuses_a_stage_that_it_lacks(tmp_path):
    done = subprocess.run(
        ["bash", LAUNCH / "trio.sh", "vaes"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "stage 'vaes' is unknown; known: vae, latents" in done.stderr
    assert list(tmp_path.iterdir()) == []
