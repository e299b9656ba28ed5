"""SIGTERM: one line, exit code 143, clean-ups run, and nobody waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from types import ModuleType
from fastvideo import cli, files, termination

def work():
{work}

module = ModuleType("work")
module.work = work
sys.modules["work"] = module
cli.VERBS["work"] = ("work:work", "Work.")
cli.IN_MANY += ("work",)
sys.exit(cli.main(["work"]))
"""
CLEANING = """
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep({seconds})
"""
IN_A_KERNEL = """
    import torch
    termination.PATIENCE_S = 0.5
    a = torch.ones(7000, 7000, dtype=torch.float64)
    with files.claimed(Path("a.mp4")), files.atomic(Path("b.mp4"), overwrite=False) as new:
        new.write_text("half")
        print("ready", flush=True)
        a @ a
"""
SWALLOWED = """
    try:
        print("ready", flush=True)
        time.sleep(60)
    except BaseException:
        pass
    {then}
"""
OWN_HANDLER = """
    termination.PATIENCE_S = 0.01
    before = signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
    print("ready", flush=True)
    while "asked" not in sys.stdin.readline(): pass
    time.sleep(0.5)
    signal.signal(signal.SIGTERM, before)
    print("done", flush=True)
"""


def start(work: str, folder: Path, **variables: str) -> subprocess.Popen[str]:
    """Run a verb in a process of its own, up to its line "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(work=work)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("variables", "words"),
    [({}, "terminated\n"), ({"RANK": "1", "WORLD_SIZE": "2"}, "")],
    ids=["alone", "a launcher's second process"],
)
def test_clean_ups_run_and_the_command_ends_with_one_line_and_143(tmp_path, variables, words):
    process = start(CLEANING.format(seconds=0), tmp_path, **variables)
    process.terminate()
    out, err = process.communicate()
    assert (process.returncode, out, err) == (143, "cleaning\n", words)


@pytest.mark.parametrize("then", ["return 0", "raise AttributeError('module has no void')"])
def test_a_signal_that_somebody_swallows_ends_the_command_all_the_same(tmp_path: Path, then: str):
    process = start(SWALLOWED.format(then=then), tmp_path)
    process.terminate()
    _, err = process.communicate()
    assert (process.returncode, err) == (143, "terminated\n")


def test_a_second_signal_during_the_clean_up_ends_at_once(tmp_path: Path):
    process = start(CLEANING.format(seconds=600), tmp_path)
    process.terminate()
    assert process.stdout is not None and process.stdout.readline() == "cleaning\n"
    process.terminate()
    assert process.wait() == -signal.SIGTERM


def test_a_kernel_that_does_not_end_is_left_and_nothing_half_written_stays(tmp_path: Path):
    process = start(IN_A_KERNEL, tmp_path)
    process.terminate()
    out, err = process.communicate()
    assert (process.returncode, out, err) == (143, "", "terminated\n")
    assert not list(tmp_path.iterdir())


def test_a_handler_that_a_verb_has_meanwhile_decides(tmp_path: Path):
    process = start(OWN_HANDLER, tmp_path)
    process.terminate()
    assert process.stdout is not None and process.stdout.readline() == "asked\n"
    out, err = process.communicate("asked\n")
    assert (process.returncode, out, err) == (0, "done\n", "")
