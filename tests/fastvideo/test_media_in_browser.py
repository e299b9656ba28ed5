"""Colours of a clip as a real browser shows them. Slow: marker `full`."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_videos import COLOURS, flat

from fastvideo import media

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CENTRE = """async source => {
    const video = document.createElement("video");
    const shown = new Promise((done, failed) => {
        video.requestVideoFrameCallback(done);
        video.onerror = () => failed(video.error.message);
    });
    video.src = source;
    document.body.replaceChildren(video);
    await shown;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    const drawn = canvas.getContext("2d", {willReadFrequently: true});
    drawn.drawImage(video, 0, 0);
    return [...drawn.getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data];
}"""

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (apt-get install chromium)"),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Serve the test's folder; yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# `swiftshader` composes as a GPU does, which is another code than that without one.
@pytest.mark.parametrize("flag", ["--disable-gpu", "--use-angle=swiftshader"])
def test_colours_are_the_same_in_a_browser(tmp_path: Path, url: str, flag: str):
    seen, wanted = [], []
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(
            executable_path=CHROMIUM, args=["--disable-dev-shm-usage", flag]
        )
        page = browser.new_page()
        page.goto(url)
        for shape, step in [((34, 90), 1), ((480, 854), 1), ((720, 1280), 1), ((1080, 1920), 4)]:
            for index in range(0, len(COLOURS), step):
                name = f"{index}-{shape[0]}.mp4"
                media.write_video(tmp_path / name, flat(shape)[[index] * 2], fps=8)
                seen.append(page.evaluate(CENTRE, f"{url}/{name}")[:3])
                wanted.append(COLOURS[index])
        browser.close()
    assert np.abs(np.array(seen) - np.array(wanted, int)).max() <= 3
