"""The demo page, driven through its own HTTP server by gradio's client."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastvideo import VideoPipeline, media

gradio = pytest.importorskip("gradio", reason="the extra `demo` (gradio) is not installed")
DEMOS = Path(__file__).parents[2] / "demos"


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    sys.path.insert(0, str(DEMOS))
    try:
        yield __import__("app")
    finally:
        sys.path.remove(str(DEMOS))
        sys.modules.pop("app")


@pytest.fixture(scope="module")
def client(app: Any, tiny_folder: Path) -> Iterator[Any]:
    from gradio_client import Client

    blocks = app.build(VideoPipeline.from_pretrained(tiny_folder, dtype="float32"))
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, show_error=True)
    try:
        yield Client(url, verbose=False)
    finally:
        blocks.close(verbose=False)


def test_a_prompt_becomes_a_clip_with_its_recipe(client: Any, tiny_folder: Path):
    job = client.submit("a red ball", 3, 2, str(tiny_folder), api_name="/generate")
    path, recipe, status = job.result(timeout=120)
    facts = media.read_facts(path)
    assert (facts.width, facts.height, facts.num_frames) == (48, 32, 9)
    assert recipe["request"]["prompt"] == "a red ball"
    assert recipe["request"]["num_inference_steps"] == 2
    assert status.startswith("seed 3; ")
    seen = [output[2] for output in job.outputs()]
    assert any(text.startswith("denoise 1/2 <progress ") for text in seen)


@pytest.mark.parametrize(
    ("prompt", "seed", "text"),
    [(" ", 3, "the prompt is empty"), ("x", -7, "greater than or equal to -1")],
)
def test_what_is_illegal_is_shown_as_one_line(
    client: Any, tiny_folder: Path, prompt: str, seed: int, text: str
):
    with pytest.raises(Exception, match=text) as caught:
        client.predict(prompt, seed, 2, str(tiny_folder), api_name="/generate")
    assert "\n" not in str(caught.value)


def test_closing_the_generator_stops_between_two_steps(app: Any, tiny_folder: Path, monkeypatch):
    pipe = VideoPipeline.from_pretrained(tiny_folder, dtype="float32")
    calls = []
    forward = pipe.model.dit.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.model.dit, "forward", counted)
    running = app.Page(pipe).generate("a red ball", 3, 50, str(tiny_folder))
    status = ""
    while not status.startswith("denoise 2/50"):
        _, _, status = next(running)
    before = len(calls)
    running.close()
    assert 0 < before == len(calls) < 10


def test_the_stop_button_cancels_the_run(app: Any, tiny_folder: Path):
    blocks = app.build(VideoPipeline.from_pretrained(tiny_folder, dtype="float32"))
    functions = blocks.fns.values()
    run = next(f for f in functions if f.api_name == "generate")
    assert run.concurrency_limit == 1
    assert any(run._id in f.cancels for f in functions)
    assert blocks._queue.max_size == app.MAX_QUEUE
