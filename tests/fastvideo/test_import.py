"""Importing the package is cheap, and its public names are all there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastvideo

HEAVY = ["torch", "numpy", "pydantic", "typer", "rich", "av", "imageio", "fastvideo_inference"]


def loaded_after(code: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after running `code`."""
    script = f"import sys\n{code}\nprint(*sys.modules, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines())


def test_importing_fastvideo_loads_no_heavy_package():
    assert not loaded_after("import fastvideo") & set(HEAVY)


def test_a_request_is_made_without_torch():
    code = "from fastvideo import GenerateRequest; GenerateRequest(prompt='x')"
    loaded = loaded_after(code)
    assert "fastvideo.sampling" in loaded
    assert not loaded & {"torch", "numpy", "av", "fastvideo_inference"}


@pytest.mark.parametrize("name", fastvideo.__all__)
def test_every_public_name_resolves(name: str):
    assert getattr(fastvideo, name) is not None
    assert name in dir(fastvideo)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'VideoPipelin'"):
        fastvideo.VideoPipelin  # noqa: B018
