"""The demo page in a real browser: a prompt is typed, a clip plays. Slow: marker `full`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the extra `demo` (gradio) is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROOT = Path(__file__).parents[2]
PROMPT = "a small blue square moving right"

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def url(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve demos/app.py from a process of its own; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("demo") / "log"
    words = ["--port", str(port), "--model", str(tiny_folder)]
    with log.open("w") as output:
        served = subprocess.Popen(
            [sys.executable, str(ROOT / "demos" / "app.py"), *words],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(address, served, log)
        yield address
    finally:
        served.terminate()
        served.wait(30)


def _wait_for(address: str, served: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 120
    while served.poll() is None and time.monotonic() < until:
        try:
            urllib.request.urlopen(f"{address}/config", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the page does not answer: {log.read_text()}")


@pytest.fixture
def page(url: str) -> Iterator[Any]:
    """Open the page; what the browser's console calls an error is in `page.wrong`."""
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(
            executable_path=CHROMIUM,
            args=["--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required"],
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.wrong = []
        page.on("console", lambda m: page.wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.goto(url)
        page.get_by_role("button", name="Generate", exact=True).wait_for(timeout=60_000)
        yield page
        browser.close()


def shots(folder: Path) -> Path:
    """Where screenshots go: a folder that somebody wants to look at, or the test's own."""
    return Path(os.environ.get("FASTVIDEO_SHOTS", folder))


def _own_errors(page: Any) -> list[str]:
    """Return console errors; fonts that gradio fetches from the net may be out of reach."""
    return [text for text in page.wrong if "net::ERR_" not in text]


def test_a_typed_prompt_becomes_a_clip_that_plays(page: Any, tmp_path: Path):
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Seed", exact=True).fill("3")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.wait_for_function("document.querySelector('video')?.readyState >= 3", timeout=120_000)
    video = page.locator("video").first
    width, height, duration = video.evaluate("v => [v.videoWidth, v.videoHeight, v.duration]")
    assert (width, height) == (48, 32)
    assert duration == pytest.approx(9 / 8, abs=0.1)
    page.get_by_text("seed 3;").wait_for(timeout=30_000)
    shot = page.screenshot(path=shots(tmp_path) / "clip.png", full_page=True)
    assert len(shot) > 10_000
    assert _own_errors(page) == []


def _choose(page: Any, model: str) -> None:
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name=model, exact=True).click()


def test_progress_is_drawn_and_stop_ends_the_run(page: Any, tmp_path: Path):
    _choose(page, "wan-nano")  # a tiny one would end before it is stopped
    steps = page.get_by_label("number input for Steps", exact=True)
    page.wait_for_function("e => e.value === '10'", arg=steps.element_handle(), timeout=30_000)
    steps.fill("100")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.locator("progress[max='100']").wait_for(timeout=60_000)
    page.screenshot(path=shots(tmp_path) / "progress.png")
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("stopped", exact=True).wait_for(timeout=30_000)
    assert page.locator("video").count() == 0
    assert _own_errors(page) == []


def test_a_model_of_few_steps_fixes_their_number(page: Any, tmp_path: Path):
    _choose(page, "fastwan-nano")
    steps = page.get_by_label("number input for Steps", exact=True)
    page.wait_for_function("e => e.value === '3'", arg=steps.element_handle(), timeout=30_000)
    assert steps.is_disabled()
    page.get_by_label("Prompt", exact=True).fill("a big red ball moving left")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.wait_for_function("document.querySelector('video')?.readyState >= 3", timeout=120_000)
    page.screenshot(path=shots(tmp_path) / "few.png", full_page=True)
    assert _own_errors(page) == []


def test_an_empty_prompt_is_answered_on_the_page(page: Any, tmp_path: Path):
    page.get_by_label("Prompt", exact=True).fill("")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_text("the prompt is empty; say what the clip should show").wait_for(timeout=30_000)
    page.screenshot(path=shots(tmp_path) / "error.png")
    assert page.locator("video").count() == 0
