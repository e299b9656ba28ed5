"""What a command sets for the libraries below it."""

from __future__ import annotations

import os

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
