"""What a command sets for the libraries below it."""

from __future__ import annotations

import os
import time

import pytest

from fastvideo import cli, env


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, env._SPINS),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_a_command_bounds_the_spinning_of_threads_unless_the_user_decides(
    given: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", {**os.environ})
    assert cli.main(["--help"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == found


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", {**os.environ})
    return monkeypatch


@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": " "},
        {"RANK": "3"},
        {"RANK": "3", "LOCAL_RANK": "1"},
        {"RANK": "x", "WORLD_SIZE": "1"},
        {"RANK": "3", "WORLD_SIZE": " "},
    ],
)
def test_what_a_launcher_left_behind_changes_nothing(left, launcher, capsys):
    os.environ.update(left)
    launcher.setattr(time, "sleep", lambda s: pytest.fail("it waits for a first process"))
    assert (env.world_size(), env.rank(), env.local_rank()) == (1, 0, 0)
    assert cli.main(["inspect", "nowhere-model"]) == 2
    assert "neither bundled" in capsys.readouterr().err
    if left.get("WORLD_SIZE", "").strip() != "1":
        assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & os.environ.keys()


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE 'two' must be a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE '0' must be a whole number from 1"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE '-2' must be"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK 'x' must be a whole number from 0"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2 must be less than WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1.5"}, "LOCAL_RANK '1.5' must be"),
    ],
)
def test_a_wrong_variable_of_a_launcher_is_named_in_one_line(left, words, launcher, capsys):
    os.environ.update(left)
    assert cli.main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_launcher_s_own_variables_count(launcher):
    os.environ.update({"WORLD_SIZE": "4", "RANK": " 3", "LOCAL_RANK": "1"})
    env.check_launcher()
    assert (env.world_size(), env.rank(), env.local_rank()) == (4, 3, 1)
    assert os.environ["RANK"] == " 3"
