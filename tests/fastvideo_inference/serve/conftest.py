"""Servers of the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("fastapi"):
    from tests.serving import Running, Start, config_of
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for the tests of a file, without keys."""
    running = Running(config_of(tiny_folder, tmp_path_factory.mktemp("served")))
    yield running
    running.stop()


@pytest.fixture
def start(tiny_folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Start servers of a test's own config."""
    started: list[Running] = []

    def begin(**values: Any) -> Running:
        started.append(Running(config_of(tiny_folder, tmp_path / "served", **values)))
        return started[-1]

    yield begin
    for running in started:
        running.stop()
