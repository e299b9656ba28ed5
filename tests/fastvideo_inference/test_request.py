"""What was typed after `generate` becomes checked jobs: layers, sources of values, and names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastvideo_inference import request
from fastvideo_inference.request import Batch, CliArgs

from fastvideo import sampling


@pytest.fixture
def read(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Batch]:
    """Read words for the tiny model in an empty folder; keywords but `fields` are of `CliArgs`."""
    monkeypatch.chdir(tmp_path)

    def read_words(fields: dict[str, Any] | None = None, **others: Any) -> Batch:
        return request.read(
            CliArgs(**{"fields": fields or {}, "model": str(tiny_folder), **others})
        )

    return read_words


def test_every_job_is_complete_and_has_a_name_of_its_own(read, tiny_folder: Path):
    Path("p.jsonl").write_text('{"prompt": "a", "seed": 4}\n{"text": "b", "frames": 5}\n')
    batch = read({"steps": 1, "guidance": None}, prompts=Path("p.jsonl"), output="{index}.mp4")
    first, second = batch.jobs
    assert (first.params.prompt, first.params.seed, first.params.num_frames) == ("a", 4, 9)
    assert (second.params.prompt, second.params.num_frames) == ("b", 5)
    assert first.params.num_inference_steps == second.params.num_inference_steps == 1
    assert [str(job.path) for job in batch.jobs] == ["0.mp4", "1.mp4"]
    assert (batch.model.name, batch.model.folder) == (str(tiny_folder), tiny_folder)
    assert (batch.device, batch.dtype, batch.decoder) == ("auto", "auto", None)


def test_a_flag_wins_over_a_row_over_set_over_a_config(read):
    Path("c.toml").write_text('negative = "c"\nframes = 5\nfps = 1\nsteps = 1\nsize = "64x32"\n')
    Path("p.jsonl").write_text(json.dumps({"prompt": "x", "num_inference_steps": 3, "fps": 3}))
    args = {"config": Path("c.toml"), "prompts": Path("p.jsonl")}
    (job,) = read({"fps": 4}, settings=("fps=2", "width=96", "steps=2"), **args).jobs
    made = job.params
    assert (made.negative_prompt, made.num_frames, made.width, made.height) == ("c", 5, 96, 32)
    assert (made.num_inference_steps, made.fps) == (3, 4)


CONFIG = "c.toml", 'prompt = "x"\nframes = 6'
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "flag": ({"fields": {"prompt": "x", "steps": 0}}, "num_inference_steps 0 in --steps"),
    "flag of two": ({"fields": {"prompt": "x", "size": "48x40"}}, r"height 40 .* \(from --size\)$"),
    "set": (
        {"fields": {"prompt": "x"}, "settings": ("frames=6",)},
        r"num_frames 6 .* \(from --set",
    ),
    "set of a type": (
        {"fields": {"prompt": "x"}, "settings": ("seed=true",)},
        "seed true in --set",
    ),
    "config": ({"config": Path("c.toml")}, r"num_frames 6 must be .* \(from c\.toml:2\)$"),
    "key of a config": ({"config": Path("typo.toml")}, r"^modle in typo\.toml:3 .* mean 'model'"),
    "type in a config": ({"config": Path("type.toml")}, r"^seed true in type\.toml:4: must be a v"),
    "size in a config": ({"config": Path("size.toml")}, r"^size 48 in size\.toml:1: must look"),
    "twice in a config": (
        {"config": Path("twice.toml")},
        r"^steps in twice\.toml:2 gives num_inference_steps a second time",
    ),
    "no prompt in a row": ({"prompts": Path("n.jsonl")}, r"^prompt is missing in n\.jsonl:2$"),
    "no prompt at all": ({}, "^there is no prompt; try: fastvideo generate"),
    "model in a row": ({"prompts": Path("m.jsonl")}, r"^model in m\.jsonl:1 .* rows; use --model$"),
    "seeds past the last": (
        {"fields": {"prompt": "x", "seed": 2**63 - 1}, "count": 2},
        r"^seed 9223372036854775807 of 2 clips must be at most \d+6 \(from --seed\)$",
    ),
    "key of a row": ({"prompts": Path("k.jsonl")}, r"^stepz in k\.jsonl:2 .* mean 'steps'"),
    "type in a row": ({"prompts": Path("t.jsonl")}, r'^num_inference_steps "4" in t\.jsonl:1'),
    "key of a set": (
        {"fields": {"prompt": "x"}, "settings": ("steps=1", "framse=5")},
        r"^framse in --set framse is unknown; did you mean 'frames'",
    ),
    "table of a set": (
        {"fields": {"prompt": "x"}, "settings": ("request.steps=1",)},
        "^request in --set request is unknown",
    ),
    "fps": ({"fields": {"prompt": "x", "fps": "fast"}}, '^fps "fast" in --fps: must be a number'),
    "row": ({"prompts": Path("p.jsonl")}, r"num_frames 7 must be .* \(from p\.jsonl:2\)$"),
    "twice": (
        {"fields": {"prompt": "x"}, "settings": ("steps=1", "num_inference_steps=2")},
        "num_inference_steps in --set num_inference_steps gives num_inference_steps a second",
    ),
    "model": ({"fields": {"prompt": "x"}, "settings": ("model=3",)}, "model 3 in --set model must"),
    "decoder": (
        {"fields": {"prompt": "x"}, "settings": ("decoder=[]",)},
        "decoder .* in --set decoder mus",
    ),
    "default": (
        {"fields": {"prompt": "x", "attention": "sta(windows=[[99, 1, 1]])"}},
        r"larger than the grid .* \(from --attention\)$",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_says_where_it_was_given(read, case: str):
    Path(CONFIG[0]).write_text(CONFIG[1])
    Path("typo.toml").write_text('prompt = "x"\n\nmodle = "y"\n')
    Path("type.toml").write_text("# seed = 1\n  \"text\" = 'seed = 3'\n\n\tseed=true\n")
    Path("size.toml").write_text('size = 48\nprompt = "x"')
    Path("twice.toml").write_text('num_inference_steps = 3\nsteps = 3\nprompt = "x"')
    Path("p.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "frames": 7}')
    Path("n.jsonl").write_text('{"prompt": "x"}\n{"frames": 5}')
    Path("m.jsonl").write_text('{"prompt": "x", "model": "y"}')
    Path("k.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "stepz": 7}')
    Path("t.jsonl").write_text('{"prompt": "x", "steps": "4"}')
    args, text = WRONG[case]
    with pytest.raises(ValueError, match=text) as caught:
        read(**args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("text=a red ball", "prompt", "a red ball"),
        ('text="a = \\"b\\" # c"', "prompt", 'a = "b" # c'),
        ("text='say \"hi\"'", "prompt", 'say "hi"'),
        ('text=say "hi" # now', "prompt", 'say "hi" # now'),
        ('text="5"', "prompt", "5"),
        ("negative=", "negative_prompt", ""),
        ("steps = 1", "num_inference_steps", 1),
        ("guidance=2", "guidance_scale", 2.0),
        ("size=64x32", "width", 64),
        ('size="64 x 32"', "height", 32),
        ("size=64*32", "width", 64),
        ("fps=24000/1001", "fps", 24000 / 1001),
        ('fps="12.5"', "fps", 12.5),
        ("frames=5", "num_frames", 5),
    ],
)
def test_a_set_word_is_a_field_by_any_name_in_any_quotes(read, word: str, name: str, value: Any):
    Path("c.toml").write_text('prompt = "from the config"\nnegative = "too"')
    (job,) = read(config=Path("c.toml"), settings=(word,)).jobs
    assert getattr(job.params, name) == value


def test_several_clips_of_each_prompt_differ_in_seed_and_name(read):
    Path("p.jsonl").write_text('{"prompt": "a", "seed": 4}\n{"prompt": "b"}\n')
    batch = read({"steps": 1}, prompts=Path("p.jsonl"), count=2, output="{prompt}-{seed}.mp4")
    seeds = [job.params.seed for job in batch.jobs]
    assert seeds[:2] == [4, 5] and seeds[3] == seeds[2] + 1
    names = [str(job.path) for job in batch.jobs]
    assert names == [f"{p}-{s}.mp4" for p, s in zip("aabb", seeds, strict=True)]
    by_index = read({"seed": 1}, prompts=Path("p.jsonl"), count=3, output="{index}.mp4").jobs
    assert [str(job.path) for job in by_index] == [f"{i}.mp4" for i in range(6)]
    assert [job.params.seed for job in by_index] == [1, 2, 3] * 2
    with pytest.raises(ValueError, match=r"names one file for 2 clips; add \{index\} or \{seed\}"):
        read({"prompt": "x"}, count=2, output="{prompt}.mp4")


def test_several_seeds_make_a_clip_of_each_prompt_and_seed(read):
    Path("p.jsonl").write_text('{"prompt": "a", "seed": 4}\n{"prompt": "b"}\n')
    words = {"steps": 1, "seed": "7, -1,2"}
    jobs = read(words, prompts=Path("p.jsonl"), output="{prompt}-{seed}.mp4").jobs
    assert [job.params.prompt for job in jobs] == [*"aaabbb"]
    assert [job.params.seed for job in jobs][::2] == [7, 2, jobs[4].params.seed] != [7, 2, -1]
    made = read({"prompt": "x", "seed": "5,9"}, count=2, output="{seed}.mp4").jobs
    assert [str(job.path) for job in made] == ["5.mp4", "6.mp4", "9.mp4", "10.mp4"]
    with pytest.raises(ValueError, match=r"names one file for 2 clips; add \{index\} or \{seed\}"):
        read({"prompt": "x", "seed": "5,9"}, output="a.mp4")
    for wrong, shown in (
        ("x", '"x"'),
        ("1,x", '"x"'),
        ("1,", '""'),
        ("5.5", '"5.5"'),
        ("-2,1", "-2"),
    ):
        with pytest.raises(ValueError, match=f"^seed {shown} in --seed: must be "):
            read({"prompt": "x", "seed": wrong})


def test_every_sampling_field_of_the_command_has_a_flag_of_its_own():
    flags = {name: request.flag_of(name) for name in sampling.settings(sampling.CLI)}
    assert flags["num_inference_steps"] == "--steps" and flags["drop_gates"] == "--drop-gates"
    assert flags["height"] == flags["width"] == "--size" and flags["prompt"] == "the prompt"
    assert len(set(flags.values())) == len(flags) - 1


@pytest.mark.parametrize(
    ("device", "dtype", "processes", "text"),
    [
        ("gpu", None, 1, "--device 'gpu' is unknown"),
        ("cuda:x", None, 1, "--device 'cuda:x' is unknown"),
        (None, "float23", 1, "--dtype 'float23' is unknown; did you mean 'float32'"),
        ("cuda:1", None, 2, "--device cuda:1 is one device for 2 processes.*; say cuda$"),
    ],
)
def test_a_place_that_is_none_is_refused(device, dtype, processes: int, text: str):
    with pytest.raises(ValueError, match=text):
        request.check_place(device, dtype, num_processes=processes)
    for known in (None, "auto", "cpu", "cuda:0", "xpu:1", "mps"):
        request.check_place(known, None)
