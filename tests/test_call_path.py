"""From a command line to the first forward of the denoiser: what is done once, and how deep."""

from __future__ import annotations

import functools
import inspect
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastvideo_inference import recipe
from fastvideo_inference.commands import eval as eval_command
from fastvideo_inference.commands import generate
from fastvideo_inference.pipeline import VideoPipeline

import fastvideo
from fastvideo import cli, hub, resolve, sampling
from fastvideo.models.dit.wan import WanDiT
from tests import clips

ROOT = Path(fastvideo.__file__).parents[1]
PRODUCT = tuple(f"{ROOT / name}/" for name in ("fastvideo", "inference", "train"))
PROMPT = "a red ball moving left"
MODULES = (generate, eval_command, VideoPipeline)  # they are imported before calls are counted


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[str]]:
    """Count calls of functions, under every name that the product has given them."""
    calls: Counter[str] = Counter()

    def counted(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[function.__name__] += 1
            return function(*args, **kwargs)

        return wrapper

    def start(*functions: Any) -> Counter[str]:
        for function in functions:
            wrapper = counted(function)
            for module in [m for n, m in sys.modules.items() if n.startswith("fastvideo")]:
                for key in [k for k, v in vars(module).items() if v is function]:
                    monkeypatch.setattr(module, key, wrapper)
        return calls

    return start


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Files of the product on the stack at every entry of the denoiser, outermost first."""
    seen: list[list[str]] = []
    forward = WanDiT.forward

    def noted(self: WanDiT, *args: Any, **kwargs: Any) -> Any:
        frame, files = sys._getframe(1), [inspect.getfile(WanDiT)]
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        own = [f.removeprefix(f"{ROOT}/") for f in files[::-1] if f.startswith(PRODUCT)]
        seen.append(list(dict.fromkeys(own)))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WanDiT, "forward", noted)
    return seen


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


ONCE = {"open_model": 1, "resolve": 1, "decoder_id": 1}


def test_a_clip_opens_its_model_and_resolves_its_request_once(count, stacks, tiny_folder: Path):
    calls = count(hub.open_model, resolve.resolve, recipe.decoder_id)
    words = ["generate", PROMPT, "--model", str(tiny_folder), "--frames", "5", "-o", "a.mp4"]
    assert cli.main(words) == 0
    assert calls == ONCE
    assert len(stacks) == 4, "two steps, with guidance"
    for files in stacks:
        assert len(files) <= 6, files
        assert files[0] == "fastvideo/cli.py" and files[-1] == "fastvideo/models/dit/wan.py"


def test_a_prompt_is_checked_once(tiny_folder: Path):
    checked = []

    def note(frame: Any, event: str, arg: object) -> None:
        if event == "call" and frame.f_code is sampling._check_prompt.__code__:
            checked.append(frame.f_locals["prompt"])

    words = ["generate", PROMPT, "--model", str(tiny_folder), "--frames", "5", "--steps", "1"]
    sys.setprofile(note)
    try:
        assert cli.main([*words, "--set", "fps=4", "-o", "a.mp4"]) == 0
    finally:
        sys.setprofile(None)
    assert checked.count(PROMPT) == 1


def test_a_repeated_clip_does_too(count, tiny_folder: Path):
    words = ["generate", PROMPT, "--model", str(tiny_folder), "--frames", "5", "-o", "a.mp4"]
    assert cli.main(words) == 0
    calls = count(hub.open_model, resolve.resolve, recipe.decoder_id)
    assert cli.main(["generate", "--from", "a.mp4", "-o", "b.mp4"]) == 0
    assert calls == ONCE


def test_every_prompt_of_a_file_is_resolved_once_for_one_model(count, tiny_folder: Path):
    Path("p.txt").write_text("a red ball\na blue ball\na green ball\n")
    calls = count(hub.open_model, resolve.resolve, recipe.decoder_id)
    words = ["--prompts", "p.txt", "--frames", "5", "--steps", "1", "-o", "{index}.mp4"]
    assert cli.main(["generate", "--model", str(tiny_folder), *words]) == 0
    assert calls == {**ONCE, "resolve": 3}


def test_a_call_of_a_loaded_pipeline_resolves_its_request_once(count, stacks, tiny_folder: Path):
    calls = count(hub.open_model, resolve.resolve, recipe.decoder_id)
    pipe = VideoPipeline.from_pretrained(tiny_folder, dtype="float32")
    assert calls == {"open_model": 1, "decoder_id": 1}
    pipe(PROMPT, num_frames=5, num_inference_steps=1)
    assert calls == ONCE
    assert all(len(files) <= 6 for files in stacks), stacks


def test_complete_parameters_are_not_resolved_again(count, tiny_folder: Path):
    pipe = VideoPipeline.from_pretrained(tiny_folder, dtype="float32")
    params = clips.params(pipe.model, PROMPT, num_frames=5, num_inference_steps=1)
    calls = count(hub.open_model, resolve.resolve, recipe.decoder_id)
    *_, done = pipe.events(params)
    assert not calls and done.state.requests == (params,)
    written = pipe.video(done.state).recipe
    assert written["request"] == params.model_dump(mode="json", exclude={"backend"})
    assert set(written["backends"]) == {"self", "cross"}, "what ran, not what was left open"


def test_an_evaluation_opens_and_resolves_once_for_all_its_prompts(
    count, stacks, tiny_folder: Path
):
    calls = count(hub.open_model, resolve.resolve, recipe.decoder_id)
    words = ["--prompts", "3", "--reconstructions", "1", "--repeats", "0", "--steps", "1"]
    assert cli.main(["eval", str(tiny_folder), *words, "--batch", "2", "-o", "e", "--json"]) == 0
    assert calls == ONCE
    assert len(stacks) == 4, "two batches, with guidance"
    (made,) = Path("e").glob("*/recipe.json")
    assert json.loads(made.read_text())["request"]["num_inference_steps"] == 1


class Fetched(list[set[str]]):
    """Suffixes of the files that each look at the hub fetched, out of the folder `source`."""

    source: Path


@pytest.fixture
def on_the_hub(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Fetched:
    """Put the tiny model on the hub as owner/name; return the suffixes that each look fetched."""
    import huggingface_hub

    cache, fetched = tmp_path_factory.mktemp("hub") / "snapshots" / "0123", Fetched()
    fetched.source = tiny_folder

    def snapshot(
        name: str, *, allow_patterns: list[str], revision: str | None = None, **_: bool
    ) -> str:
        commit = "0123" if "*.safetensors" in allow_patterns else None
        assert (name, revision) == ("owner/name", commit), "weights are of the small files' commit"
        found = {p for pattern in allow_patterns for p in fetched.source.rglob(pattern)}
        for path in found:
            copy = cache / path.relative_to(fetched.source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
        fetched.append({path.suffix for path in found})
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return fetched


def test_weights_on_the_hub_are_fetched_once_the_request_is_known_to_be_legal(on_the_hub):
    words = ["generate", PROMPT, "--model", "owner/name", "--steps", "1", "-o", "a.mp4"]
    assert cli.main([*words, "--frames", "6"]) == 2
    assert on_the_hub and not any(".safetensors" in suffixes for suffixes in on_the_hub)
    assert cli.main([*words, "--frames", "5"]) == 0
    assert ".safetensors" in on_the_hub[-1]
    assert cli.main(["generate", "--from", "a.mp4", "-o", "b.mp4"]) == 0


ROWS = '[[rows]]\nname = "a"\nmodel = "owner/name"\n[[rows]]\nname = "b"\nmodel = "owner/name"\n'


@pytest.mark.parametrize(
    "words",
    [
        ["generate", PROMPT, "--model", "owner/name", "--attention", "vsa(sparsity=2)"],
        ["generate", PROMPT, "--model", "owner/name", "--decoder", "none"],
        ["generate", PROMPT, "--model", "owner/name", "--lora", "none.safetensors"],
        ["generate", PROMPT, "--model", "owner/name", "--parallel", "ulysses=2"],
        ["generate", PROMPT, "--model", "owner/name", "--count", "2", "-o", "{prompt}.mp4"],
        ["eval", "owner/name", "--frames", "6"],
        ["eval", "owner/name", "--fps", "12.5"],
        ["eval", "--compare", "c.toml", "--set", "frames=6"],
        ["eval", "--compare", "c.toml", "--set", "models={b=3}"],
    ],
)
def test_what_a_spec_refuses_costs_no_download(on_the_hub, words: list[str]):
    Path("c.toml").write_text('base = "a"\n' + ROWS)
    assert cli.main(words) == 2
    assert not any(".safetensors" in suffixes for suffixes in on_the_hub)


@pytest.mark.parametrize(
    "how",
    [
        {"device": "cudda"},
        {"dtype": "float23"},
        {"decoder": "none"},
        {"parallel": "ulysses=2"},
        {"vae": None},
    ],
)
def test_nor_does_what_a_pipeline_cannot_be_loaded_with(on_the_hub, how: dict[str, Any]):
    with pytest.raises(ValueError, match="|".join(how)):
        VideoPipeline.from_pretrained("owner/name", **how)
    assert not any(".safetensors" in suffixes for suffixes in on_the_hub)


def test_a_comparison_fetches_a_model_once_all_rows_are_legal(on_the_hub):
    Path("c.toml").write_text('base = "a"\ntimed = 0\nrepeats = 0\n' + ROWS + "steps = 1\n")
    assert cli.main(["eval", "--compare", "c.toml", "--prompts", "1", "-o", "e", "--json"]) == 0
    assert [".safetensors" in suffixes for suffixes in on_the_hub[:2]] == [False, True]


def test_gates_that_stand_in_the_weights_alone_are_seen_once_these_are_there(
    on_the_hub, gated_folder: Path, tmp_path: Path
):
    """Then the model is sparse, as it is from a folder."""
    own = Path(shutil.copytree(gated_folder, tmp_path / "own"))
    (own / "fastvideo.json").unlink()
    config = own / "transformer" / "config.json"
    dims = json.loads(config.read_text())
    assert dims.pop("gate_compress") is True
    config.write_text(json.dumps(dims))
    on_the_hub.source = own
    words = ["generate", PROMPT, "--steps", "1", "--frames", "5", "--size", "48x32", "--json"]
    for name, model in (("a", str(own)), ("b", "owner/name")):
        assert cli.main([*words, "--model", model, "-o", f"{name}.mp4"]) == 0
        made = recipe.read_recipe(f"{name}.mp4").request
        assert made.attention.startswith("vsa(sparsity=0.8")


def test_a_pipeline_and_an_evaluation_fetch_the_weights_of_a_hub_model(on_the_hub):
    pipe = VideoPipeline.from_pretrained("owner/name", dtype="float32")
    assert pipe(PROMPT, num_frames=5, num_inference_steps=1).recipe["model"]["spec"] == "tiny"
    words = ["--prompts", "1", "--reconstructions", "1", "--repeats", "0", "--steps", "1"]
    assert cli.main(["eval", "owner/name", *words, "-o", "e", "--json"]) == 0
