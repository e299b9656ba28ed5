"""The demo page without a browser: its handlers, and what Gradio's HTTP side lets through."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastvideo import media
from tests.demos.conftest import SIDE
from tests.serving import Running, config_of

LONG = {**SIDE, "num_inference_steps": 100}
PATIENCE_S = 60.0


def form(*sides: Any, run: str = "run", count: Any = 1) -> dict[str, Any]:
    return {"run": run, "count": count, "sides": list(sides)}


def tab(name: str = "tab") -> Any:
    return SimpleNamespace(session_hash=name)


def last(views: Iterator[Any]) -> Any:
    *_, view = views
    return view


def until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def jobs(server: Running) -> list[Any]:
    return list(server.ask("GET", "/v1/videos")[2]["data"])


@pytest.fixture
def client(page: Any) -> Iterator[Any]:
    from gradio_client import Client

    blocks = page.build()
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    yield Client(url, verbose=False)
    blocks.close(verbose=False)


def test_a_form_over_http_becomes_a_clip_and_wrong_values_one_line(client: Any, page: Any):
    """In one test, as launching takes longer than all that it does."""
    job = client.submit(form({**SIDE, "seed": str(2**53 + 1)}), api_name="/generate")
    view = job.result(timeout=PATIENCE_S)
    assert view["phase"] == "over", view
    (clip,) = view["clips"]
    facts = media.read_facts(clip["file"])
    assert (facts.width, facts.height, facts.num_frames) == (48, 32, 9)
    assert json.loads(clip["recipe"])["request"]["seed"] == 2**53 + 1, "no browser rounds it"
    assert set(clip["seconds"]) >= {"encode_text", "denoise", "decode", "save"}
    for seed in (1.5, 2**63, "1e400"):
        view = client.predict(form({**SIDE, "seed": seed}), api_name="/generate")
        assert (view["phase"], view["field"]) == ("failed", "seed")
        assert view["error"].startswith("seed ") and "\n" not in view["error"]
    page.leave(tab(next(iter(page.sessions))))
    assert list(page.folder.iterdir()) == []


def test_views_tell_the_stages_and_seconds_are_the_servers(page: Any, server: Running):
    seen, views = [], page.generate(form({**SIDE, "num_inference_steps": 60}), tab())
    done: dict[str, float] = {}
    for view in views:
        seen.append((view["phase"], view.get("stage"), view.get("index")))
        done |= {name: s for job in jobs(server) for name, s in job["stage_seconds"].items()}
    assert seen[-1][0] == "over"
    assert {"denoise", "decode"} <= {stage for phase, stage, _ in seen if phase == "making"}
    assert view["clips"][0]["seconds"] == pytest.approx(done, rel=0.1)
    assert jobs(server) == [], "the server keeps nothing of it"


@pytest.mark.parametrize(
    ("values", "text", "field"),
    [
        ({"seed": "1.5"}, 'seed "1.5": must be a valid integer', "seed"),
        ({"seed": math.inf}, "seed Infinity: must be a valid integer", "seed"),
        ({"seed": math.nan}, "seed NaN: must be a valid integer", "seed"),
        ({"seed": "9223372036854775808"}, "must be at most 9223372036854775807", "seed"),
        ({"seed": "-7"}, "must be at least -1", "seed"),
        ({"prompt": " "}, "the prompt is empty", "prompt"),
        ({"prompt": None}, "prompt is missing", "prompt"),
        ({"num_inference_steps": 2.5}, "must be a valid integer", "num_inference_steps"),
        ({"num_inference_steps": 500}, "exceeds the limit", "num_inference_steps"),
        ({"guidance_scale": math.inf}, "must be a finite number", "guidance_scale"),
        ({"width": 50}, "nearest", "width"),
        ({"model": "other"}, "model 'other' is unknown", "model"),
        ({"decoder": "other"}, "decoder 'other' is unknown", "decoder"),
        ({"steps_": 3}, "steps_", "steps_"),
        ({"latents": [1]}, "latents does not go over HTTP", "latents"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_field(
    page: Any, server: Running, values: dict[str, Any], text: str, field: str
):
    view = last(page.generate(form({**SIDE, **values}), tab()))
    assert view["phase"] == "failed"
    assert text in view["error"] and "\n" not in view["error"]
    assert view["field"] == field
    assert jobs(server) == []


@pytest.mark.parametrize("given", [None, 3, [], {"sides": "x"}, form(), form(1), form(*[SIDE] * 3)])
def test_a_form_of_another_shape_is_refused(page: Any, given: Any):
    assert last(page.generate(given, tab()))["phase"] == "failed"


def test_stop_ends_a_running_clip_and_a_queued_one(page: Any, server: Running):
    running = page.generate(form(LONG, run="first"), tab())
    while next(running).get("stage") != "denoise":
        pass
    queued = page.generate(form(LONG, run="second"), tab("other"))
    while (view := next(queued)).get("ahead") is None:
        pass
    assert (view["phase"], view["ahead"]) == ("waiting", 0)
    assert page.stop("second")
    assert last(queued)["phase"] == "stopped"
    assert [job["status"] for job in jobs(server)] == ["in_progress"]
    assert page.stop("first")
    *_, view = running
    assert (view["phase"], view["clips"]) == ("stopped", [])
    assert jobs(server) == []
    assert not page.stop("first"), "there is no such run any more"
    assert list(page.folder.rglob("*.mp4")) == []


def test_a_closed_tab_cancels_its_jobs_and_leaves_no_file(page: Any, server: Running):
    last(page.generate(form(SIDE), tab()))
    views = page.generate(form(LONG), tab())
    while next(views).get("stage") != "denoise":
        pass
    page.leave(tab())
    views.close()
    assert jobs(server) == [] and page.runs == {}
    assert list(page.folder.iterdir()) == []


def test_two_tabs_that_ask_for_several_clips_take_turns(page: Any):
    made: list[str] = []

    def ask(name: str) -> None:
        for view in page.generate(form(SIDE, run=name, count=3), tab(name)):
            if len(view["clips"]) > made.count(name):
                made.append(name)

    tabs = [threading.Thread(target=ask, args=(name,)) for name in "ab"]
    for one in tabs:
        one.start()
    for one in tabs:
        one.join(PATIENCE_S)
    assert sorted(made) == [*"aaabbb"]
    assert all({*made[i : i + 3]} == {*"ab"} for i in range(4)), made


def test_sides_share_prompt_and_seed_and_each_has_its_model(
    demos: Any, start: Any, tiny_copy: Path
):
    """A model that one tab chooses changes nothing in another."""
    running = start(tiny_copy)
    page = demos.Page(running.url)
    first, second = (one["id"] for one in page.offers()["data"])
    other = page.generate(form({**SIDE, "model": first}), tab("other"))
    next(other)
    view = last(page.generate(form({**SIDE, "seed": ""}, {**SIDE, "model": second}), tab()))
    seeds = {json.loads(clip["recipe"])["request"]["seed"] for clip in view["clips"]}
    assert [clip["model"] for clip in view["clips"]] == [first, second]
    assert len(seeds) == 1
    assert last(other)["clips"][0]["model"] == first
    page.close()


@pytest.fixture
def start(tiny_folder: Path, tmp_path: Path) -> Iterator[Any]:
    """Start a server of two models."""
    started: list[Running] = []

    def begin(other: Path) -> Running:
        models = [tiny_folder, other.rename(other.with_name("other"))]
        workers = [{"model": str(model), "devices": ["cpu"]} for model in models]
        started.append(Running(config_of(tiny_folder, tmp_path / "served", worker=workers)))
        return started[-1]

    yield begin
    for running in started:
        running.stop()


def test_after_many_clips_some_of_them_cancelled_no_file_is_left(page: Any, server: Running):
    """Those of a session stay, the newest ones, until its tab is closed."""
    before = sorted(server.folder.rglob("*.mp4"))
    for number in range(50):
        views = page.generate(form(SIDE), tab(f"tab {number % 2}"))
        next(views)
        if number % 5 == 4:
            page.stop("run")
        last(views)
    kept = [len(list(folder.iterdir())) for folder in page.folder.iterdir()]
    assert kept == [20, 20]
    for name in ("tab 0", "tab 1"):
        page.leave(tab(name))
    assert list(page.folder.iterdir()) == [] and jobs(server) == []
    assert sorted(server.folder.rglob("*.mp4")) == before


def test_a_server_that_is_not_there_is_said_in_a_line(demos: Any):
    page = demos.Page("http://127.0.0.1:9")
    assert page.offers()["error"].startswith("server http://127.0.0.1:9 does not answer")
    assert "does not answer" in last(page.generate(form(SIDE), tab()))["error"]
    page.close()


def test_no_telemetry_and_no_clip_of_a_name_that_a_browser_chose(demos: Any, page: Any):
    assert not page.build().analytics_enabled
    last(page.generate(form(SIDE), tab("../../outside")))
    (folder,) = page.folder.iterdir()
    assert folder.parent == page.folder
