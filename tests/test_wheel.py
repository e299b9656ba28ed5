"""The wheel: exactly three packages and the bundled model; it generates outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"fastvideo", "fastvideo_inference", "fastvideo_train"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, so that building leaves nothing in the checkout
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(ROOT / name, source / name) if _same_disk(folder) else _copy(name, source)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--wheel-dir",
            str(folder),
            str(source),
        ],
        check=True,
    )
    return next(folder.glob("*.whl"))


def _same_disk(folder: Path) -> bool:
    return folder.stat().st_dev == ROOT.stat().st_dev


def _copy(name: str, source: Path) -> None:
    (source / name).write_bytes((ROOT / name).read_bytes())


def test_wheel_holds_exactly_three_packages_and_the_bundled_model(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert tops == PACKAGES
    assert {f"{p}/py.typed" for p in PACKAGES} <= set(names)
    assert "fastvideo/zoo/wan-nano/fastvideo.json" in names
    assert any(n.startswith("fastvideo/zoo/wan-nano/transformer/") for n in names)
    tracked = {str(p.relative_to(ROOT)) for p in (ROOT / "fastvideo/zoo").rglob("*") if p.is_file()}
    assert tracked <= set(names)


def test_installed_wheel_generates_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(target),
            str(wheel),
        ],
        check=True,
    )
    env = {**os.environ, "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}
    where = [sys.executable, "-c", "import fastvideo, fastvideo_inference as i; print(i.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(target)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "fastvideo",
            "generate",
            "a big red ball moving left at night",
            "--frames",
            "5",
            "-o",
            "clip.mp4",
        ],
        cwd=tmp_path,
        env=env,
        check=True,
    )
    assert (tmp_path / "clip.mp4").stat().st_size > 500
