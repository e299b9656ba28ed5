"""A page over a server of the tiny model, and forms that its browser would send."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("fastapi") and find_spec("gradio"):
    from tests.serving import Running, config_of
else:
    collect_ignore_glob = ["test_*.py"]

DEMOS = Path(__file__).parents[2] / "demos"
SIDE = {"prompt": "a red ball", "seed": "3", "guidance_scale": 1}


@pytest.fixture(scope="session")
def demos() -> Iterator[Any]:
    """The folder of the page's modules on the path, as the command has it."""
    sys.path.insert(0, str(DEMOS))
    yield __import__("page")
    sys.path.remove(str(DEMOS))


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for the tests of a file, with one worker."""
    running = Running(config_of(tiny_folder, tmp_path_factory.mktemp("served")))
    yield running
    running.stop()


@pytest.fixture
def page(demos: Any, server: Running) -> Iterator[Any]:
    """A page of its own, whose files are gone at the end."""
    made = demos.Page(server.url)
    yield made
    made.close()
    assert not made.folder.exists()
