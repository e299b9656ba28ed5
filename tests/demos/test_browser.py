"""The demo page in a real browser, with the bundled models. Slow: marker `full`.

FASTVIDEO_SHOTS is a folder for a screenshot of every state, at both widths, dark and light.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT_MS = 180_000
DESK, PHONE = (1280, 900), (390, 844)

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run `fastvideo demo`; at its end its server and its files are gone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("demo")
    profile = folder / "profile.json"
    measure = ["profile", "fastwan-nano", "--repeats", "2", "-o", str(profile)]
    words = ["demo", "--port", str(port), "--profile", str(profile)]
    words += ["--lora", f"style={style(folder)}"]
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder)}
    python = [sys.executable, "-m", "fastvideo"]
    subprocess.run([*python, *measure], env={**os.environ, **own}, check=True)
    served = subprocess.Popen(
        [*python, *words],
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert served.stdout is not None
        line = served.stdout.readline()
        assert line.startswith("the page is at ")
        yield line.split()[-1]
        child = Path(f"/proc/{served.pid}/task/{served.pid}/children").read_text().split()
        served.send_signal(signal.SIGTERM)
        assert served.wait(30) == 143
        assert child and not any(Path("/proc", one).exists() for one in child)
        assert list(folder.rglob("*.mp4")) == []
    finally:
        served.kill()
        served.wait()


def style(folder: Path) -> Path:
    """Write a LoRA that changes the bundled model a little."""
    torch.manual_seed(0)
    name = "blocks.0.attn1.to_q"
    sizes = {"lora_A": (4, 192), "lora_B": (192, 4)}
    weights = {f"{name}.{key}.weight": torch.randn(size) for key, size in sizes.items()}
    save_file({key: 0.05 * one for key, one in weights.items()}, folder / "style.safetensors")
    return folder / "style.safetensors"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    flags = ["--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required"]
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(url: str, browser: Any) -> Iterator[Callable[..., Any]]:
    """Open tabs of browsers of their own; none of them may have met an error."""
    tabs: list[Any] = []

    def begin(size: tuple[int, int] = DESK, *, scheme: str = "light") -> Any:
        viewport = {"width": size[0], "height": size[1]}
        tab = browser.new_page(viewport=viewport, color_scheme=scheme)
        tab.wrong = []
        tab.on("console", lambda m: tab.wrong.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
        tab.on("response", lambda r: tab.wrong.append(r.url) if r.status >= 400 else None)
        # what the browser itself gave up, such as the rest of a clip that is not shown any more
        is_real = lambda r: "ERR_ABORTED" not in str(r.failure)  # noqa: E731
        tab.on("requestfailed", lambda r: tab.wrong.append(r.url) if is_real(r) else None)
        tab.on(
            "request", lambda r: None if r.url.startswith((url, "data:")) else tab.wrong.append(r)
        )
        tab.goto(url)
        tab.locator(".primary:enabled").wait_for(timeout=WAIT_MS)
        tabs.append(tab)
        return tab

    yield begin
    for tab in tabs:
        tab.close()
        assert tab.wrong == []


def generate(tab: Any, **fields: str) -> None:
    for name, value in fields.items():
        field = tab.locator(f"[name={name}]")
        field.select_option(value) if name.endswith("model") else field.fill(value)
    tab.locator(".primary").click()


def make_slowly(tab: Any) -> None:
    """Begin a clip that takes longer than all that is done meanwhile."""
    tab.locator("[name=model]").select_option("wan-nano")
    more(tab)
    tab.get_by_role("slider", name="Steps").fill("100")
    generate(tab)


def wait_for_clip(tab: Any, count: int = 1) -> list[Any]:
    """Return what the videos of the screen say of themselves once they play."""
    script = """n => { const all = [...document.querySelectorAll('.screen video')];
      return document.querySelector('.progress').hidden && all.length === n
        && all.every(v => v.readyState >= 3 && v.currentTime > 0.2) }"""
    tab.wait_for_function(script, arg=count, timeout=WAIT_MS)
    of_each = "all => all.map(v => [v.videoWidth, v.videoHeight, v.duration, v.currentTime])"
    return list(tab.locator(".screen video").evaluate_all(of_each))


def more(tab: Any) -> None:
    tab.locator(".composer summary").click()


def shoot(tab: Any, name: str) -> None:
    if folder := os.environ.get("FASTVIDEO_SHOTS"):
        tab.screenshot(path=Path(folder, f"{name}.png"), full_page=True)


def serious(tab: Any) -> list[str]:
    """Return what axe finds that keeps people out."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(tab).response["violations"]
    return [
        f"{one['id']}: {one['nodes'][0]['html'][:200]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def test_enter_makes_a_clip_whose_preview_changes_and_that_plays(open_page: Any):
    tab = open_page()
    prompt = tab.get_by_label("Prompt", exact=True)
    prompt.fill("a small blue square")
    prompt.press("Shift+Enter")
    prompt.type("moving right")
    assert prompt.input_value() == "a small blue square\nmoving right"
    tab.evaluate(
        "window.seen = new Set(); new MutationObserver(() => { const image ="
        " document.querySelector('.moving img'); if (image) seen.add(image.src) })"
        ".observe(document.querySelector('.screen'), { childList: true, subtree: true })"
    )
    prompt.press("Enter")
    assert tab.locator(".primary").is_disabled(), "nothing more can be begun"
    ((width, height, duration, _),) = wait_for_clip(tab)
    assert (width, height) == (128, 128)
    assert duration == pytest.approx(81 / 16, abs=0.1)
    assert tab.evaluate("seen.size") >= 3, "three steps, and frames as they are decoded"
    shown = float(tab.locator(".took b").inner_text().split()[0])
    stages = re.findall(r"([\d.]+) s", tab.locator(".bar ul").inner_text())
    assert shown == pytest.approx(sum(map(float, stages)), abs=0.25)
    with tab.expect_download() as download:
        tab.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename.startswith("a-small-blue-square-moving-right-")


def test_stop_ends_a_running_clip_and_one_that_waits(open_page: Any):
    first, second = open_page(), open_page()
    make_slowly(first)
    first.locator(".moving").wait_for(timeout=WAIT_MS)
    generate(second)
    second.locator(".progress p", has_text="Next in the queue").wait_for(timeout=WAIT_MS)
    shoot(second, "1280-light-queued")
    second.get_by_role("button", name="Stop").click()
    second.locator(".progress[hidden]").wait_for(timeout=WAIT_MS, state="attached")
    assert first.locator(".progress").is_visible(), "a stop is for its own tab"
    first.get_by_role("button", name="Stop").click()
    first.locator(".progress[hidden]").wait_for(timeout=WAIT_MS, state="attached")
    for tab in (first, second):
        assert tab.locator("video").count() == 0
        assert tab.locator(".primary").is_enabled()
        assert tab.get_by_text("Your clip plays here").is_visible()


def test_a_closed_tab_makes_room_and_another_keeps_its_model(open_page: Any):
    first, second = open_page(), open_page()
    make_slowly(first)
    first.locator(".moving").wait_for(timeout=WAIT_MS)
    generate(second)
    second.locator(".progress p", has_text="Next in the queue").wait_for(timeout=WAIT_MS)
    first.close()
    wait_for_clip(second)
    assert second.locator(".facts .words").inner_text().startswith("fastwan-nano")
    assert second.locator("[name=model]").input_value() == "fastwan-nano"


def test_settings_come_back_from_the_gallery_and_from_a_dropped_file(
    open_page: Any, tmp_path: Path
):
    tab = open_page()
    tab.locator("[name=num_frames]").evaluate("e => { e.value = 41 }")
    generate(tab, seed="9007199254740993", prompt="a red star moving up at night")
    wait_for_clip(tab)
    with tab.expect_download() as download:
        tab.get_by_role("link", name="Download").click()
    file = tmp_path / "clip.mp4"
    download.value.save_as(file)
    for way in ("gallery", "drop"):
        tab.locator("[name=seed]").fill("1")
        tab.locator("[name=prompt]").fill("another")
        tab.locator("[name=num_frames]").evaluate("e => { e.value = 5 }")
        if way == "gallery":
            tab.locator(".gallery").get_by_role("button", name="Use these settings").click()
        else:
            drop(tab, file)
        tab.wait_for_function("document.forms[0].elements.prompt.value.startsWith('a red star')")
        assert tab.locator("[name=num_frames]").input_value() == "41"
        # JSON's numbers are doubles in a browser
        assert tab.locator("[name=seed]").input_value() == "9007199254740993"
    (tmp_path / "other.mp4").write_bytes(b"\0" * 100)
    drop(tab, tmp_path / "other.mp4")
    tab.get_by_text("holds no recipe").wait_for()


def test_lora_decoder_size_and_length_are_what_the_clip_says(open_page: Any):
    tab = open_page()
    more(tab)
    tab.locator("[name=lora]").select_option("style")
    tab.locator("[name=decoder]").select_option("tiny")
    tab.get_by_label("Strength").fill("0.5")
    tab.locator("[name=size]").select_option("176x96")
    tab.get_by_label("Length").fill("41")
    generate(tab)
    ((width, height, duration, _),) = wait_for_clip(tab)
    assert (width, height) == (176, 96)
    assert duration == pytest.approx(41 / 16, abs=0.1)
    words = tab.locator(".facts .words").inner_text()
    assert "tiny decoder" in words and "style at 0.5" in words


def test_a_budget_is_kept_or_refused_where_the_server_knows_the_model(open_page: Any):
    tab = open_page()
    more(tab)
    tab.get_by_label("Ready within").select_option("10 s")
    generate(tab)
    wait_for_clip(tab)
    assert float(tab.locator(".took b").inner_text().split()[0]) < 10
    tab.get_by_label("Ready within").select_option("2 s")
    tab.get_by_label("Length").fill("161")
    tab.locator("[name=size]").select_option("240x128")
    more(tab)
    generate(tab)
    tab.get_by_role("alert").get_by_text("class 2 s promises 2 s").wait_for(timeout=WAIT_MS)
    assert tab.locator("[name=slo_class][aria-invalid]").is_visible(), "its group opens"
    tab.locator("[name=model]").select_option("wan-nano")
    assert tab.locator("[name=slo_class]").is_hidden(), "nothing is promised for it"


def drop(tab: Any, file: Path) -> None:
    """Drop a file on the page, as a browser does."""
    transfer = tab.evaluate_handle(
        """([bytes, name]) => { const all = new DataTransfer();
        all.items.add(new File([new Uint8Array(bytes)], name)); return all }""",
        [list(file.read_bytes()), file.name],
    )
    tab.dispatch_event(".fv", "dragover", {"dataTransfer": transfer})
    assert tab.locator(".drop").is_visible()
    tab.dispatch_event(".fv", "drop", {"dataTransfer": transfer})


def test_an_error_names_its_field_and_leaves_the_last_clip(open_page: Any):
    tab = open_page()
    generate(tab)
    wait_for_clip(tab)
    generate(tab, seed="1.5")
    tab.get_by_role("alert").get_by_text('seed "1.5": must be a valid integer').wait_for()
    assert tab.locator("[name=seed][aria-invalid]").count() == 1
    wait_for_clip(tab)
    assert tab.locator(".facts article").count() == 1
    tab.locator("[name=prompt]").fill(" ")
    assert tab.locator(".primary").is_disabled()


def test_two_settings_play_in_step(open_page: Any):
    tab = open_page()
    tab.get_by_label("Compare two settings").check()
    generate(tab, b_model="wan-nano", seed="5")
    (first, second) = wait_for_clip(tab, 2)
    assert first[:3] == second[:3]
    apart = "() => { const [a, b] = document.querySelectorAll('.screen video');"
    apart += " return Math.abs(a.currentTime - b.currentTime) }"
    for _ in range(10):
        assert tab.evaluate(apart) < 0.2
        time.sleep(0.2)
    tab.get_by_role("button", name="Pause both").click()
    tab.get_by_label("Position in both clips").fill("0.5")
    tab.wait_for_function(
        "() => [...document.querySelectorAll('.screen video')].every(v => v.paused"
        " && Math.abs(v.currentTime - v.duration / 2) < 0.1)"
    )
    words = tab.locator(".facts").inner_text()
    assert "times as fast" in words and "as asked" in words
    assert tab.locator(".took").count() == 2


def test_the_page_answers_while_a_clip_is_made(open_page: Any):
    tab, other = open_page(), open_page()
    make_slowly(tab)
    tab.locator(".moving").wait_for(timeout=WAIT_MS)
    other.reload()
    other.locator(".primary:enabled").wait_for(timeout=WAIT_MS)
    assert tab.locator(".progress").is_visible(), "it is still made"
    tab.get_by_role("button", name="Stop").click()
    tab.locator(".progress[hidden]").wait_for(timeout=WAIT_MS, state="attached")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_every_state_is_fit_to_be_seen(open_page: Any, size: tuple[int, int], scheme: str):
    """At both widths, dark and light, nothing is cut off and axe finds no serious fault."""
    tab, is_phone = open_page(size, scheme=scheme), size == PHONE

    def check(state: str) -> None:
        shoot(tab, f"{size[0]}-{scheme}-{state}")
        assert serious(tab) == [], state
        assert tab.evaluate("document.documentElement.scrollWidth") == size[0], state

    check("1-empty")
    generate(tab, seed="3")
    tab.locator(".moving").wait_for(timeout=WAIT_MS)
    if is_phone:
        box = "document.querySelector('.moving').getBoundingClientRect()"
        tab.wait_for_function(f"{box}.top >= 0 && {box}.bottom <= innerHeight")
        assert tab.get_by_role("button", name="Stop").is_visible()
    check("2-making")
    wait_for_clip(tab)
    check("3-clip")
    more(tab)
    tab.get_by_label("Compare two settings").check()
    check("4-settings")
    generate(tab)
    wait_for_clip(tab, 2)
    check("5-compared")
    generate(tab, seed="1.5")
    tab.get_by_role("alert").wait_for()
    check("6-error")
