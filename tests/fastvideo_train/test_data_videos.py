"""Real videos to shards to training: exact content, nothing lost to a kill, nothing stale used."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import rank_runs
import torch
from fastvideo_train import recipe as recipes
from fastvideo_train import roles as role_builder
from fastvideo_train.data import folder as folders
from fastvideo_train.data import plan as plans
from fastvideo_train.data import videos
from fastvideo_train.data._manifest import read_manifest
from fastvideo_train.data._stores import Rota
from fastvideo_train.data.buckets import Rules
from fastvideo_train.data.latents import LatentBatches, encode_pixels, encoder_hash
from fastvideo_train.data.text_states import StoredText
from fastvideo_train.data.videos import Job
from fastvideo_train.export import load_run
from fastvideo_train.loop import StepDone, train
from odd_videos import captioned, grey, truncated, write
from tiny_recipes import finish, tiny

from fastvideo import model as models
from fastvideo.cli import main
from fastvideo.stages import encode_text
from fastvideo.weights import Checkpoint, read_metadata

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(str(ROOT / part) for part in (".", "inference", "train"))
RULES = Rules(width=48, height=32, frames=(5, 9), fps=8, multiple=(16, 16), temporal=4)
SETTINGS = {"dtype": "float32", "device": "cpu", "shard": 2, "batch": 1}
WORDS = [
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--shard",
    "2",
    "--workers",
    "0",
    "--frames",
    "5,9",
]


def tall(index: int):
    return grey(index).reshape(48, 32, 3)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos in three buckets, two of which share a caption, and one that is broken."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(4):
        captioned(write(folder / f"long{i}.mp4", count=18 + i), f"a ball moving {'left' * (i % 2)}")
    for i in range(2):
        captioned(write(folder / f"short{i}.webm", "libvpx-vp9", count=12 + i), "a red ball")
        captioned(write(folder / f"tall{i}.mp4", picture=tall, count=20 + i), f"a square at {i}")
    captioned(truncated(folder / "long0.mp4", folder / "broken.mp4", 0.4), "a big ball")
    return folder


def plan_of(clips: Path) -> plans.Plan:
    found = folders.find(clips)
    return plans.make(found, folders.scan(found.videos), RULES)


def encode(clips: Path, model: Path, out: Path, **changes: object) -> Job:
    job = Job.open(plan_of(clips), str(model), out, **SETTINGS | changes)
    job.encode_text()
    job.encode_clips()
    return job


@pytest.fixture(scope="module")
def latents(clips: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents")
    encode(clips, tiny_folder, out)
    return out


@pytest.fixture(scope="module")
def other_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with another VAE encoder and another text encoder."""
    model = models.load(tiny_folder, device="cpu", dtype="float32")
    with torch.no_grad():
        next(model.vae.encoder.parameters()).add_(0.1)
        next(model.text.encoder.parameters()).add_(0.1)
    from fastvideo.formats import diffusers

    return diffusers.save(model, tmp_path_factory.mktemp("models") / "other")


def content(folder: Path) -> dict[str, bytes]:
    skipped = ("scan.jsonl", "lock")  # stamps hold times; a command leaves the file of its lock
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in skipped)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# What is stored


def test_stored_latents_are_those_of_the_frames_that_the_plan_shows(clips, tiny_folder, latents):
    vae = models.load(tiny_folder, device="cpu", dtype="float32", parts=("vae",)).vae
    plan = plan_of(clips)
    assert {b.name: n for b, n in plan.buckets().items()} == {
        "48x32x5": 2,
        "48x32x9": 4,
        "32x48x9": 2,
    }
    seen = {}
    for path in latents.glob("[0-9]*.safetensors"):
        words = read_metadata(path)
        for row, name, caption in zip(
            Checkpoint(path).tensor("latents"),
            json.loads(words["ids"]),
            json.loads(words["captions"]),
            strict=True,
        ):
            seen[name] = row, caption
    assert sorted(seen) == sorted(clip.video.name for clip in plan.clips)
    for clip in plan.clips:
        row, caption = seen[clip.video.name]
        pixels = torch.from_numpy(clip.frames(8)).permute(3, 0, 1, 2)[None]
        torch.testing.assert_close(row.float(), encode_pixels(vae, pixels)[0], atol=2e-3, rtol=2e-3)
        assert caption == clip.video.caption


def test_text_states_are_stored_once_for_each_distinct_prompt(clips, tiny_folder, latents):
    model = models.load(tiny_folder, device="cpu", dtype="float32")
    texts = [
        prompt
        for path in sorted(latents.glob("text-*.safetensors"))
        for prompt in json.loads(read_metadata(path)["text"])
    ]
    captions = {clip.video.caption for clip in plan_of(clips).clips}
    assert len(texts) == len(set(texts)) == 2 + len(captions) == 7
    assert set(texts) == captions | {"", model.spec.defaults.negative_prompt}
    stored = dataclasses.replace(model, text=StoredText(latents))
    for prompt in texts:
        theirs = encode_text.encode(model, [prompt]).text_BLC
        torch.testing.assert_close(encode_text.encode(stored, [prompt]).text_BLC, theirs)
    both = encode_text.encode(stored, [texts[0], texts[3]]).text_BLC
    assert torch.equal(both[1:], encode_text.encode(stored, [texts[3]]).text_BLC)
    with pytest.raises(ValueError, match="a prompt of 3 tokens has no state"):
        encode_text.encode(stored, ["green night"])


def test_the_manifest_names_encoders_and_rules_and_what_was_left_out(tiny_folder, latents):
    manifest = read_manifest(latents)
    vae = models.load(tiny_folder, device="cpu", dtype="float32", parts=("vae",)).vae
    assert manifest.encoder == encoder_hash(vae) and manifest.rules == RULES
    assert manifest.compute == "float32 on cpu"
    (bad,) = [json.loads(line) for line in (latents / "skipped.jsonl").read_text().splitlines()]
    assert bad["file"] == "broken.mp4" and "cannot be read" in bad["reason"]
    assert not list((latents / "parts").iterdir())


def test_workers_and_batches_change_no_clip(clips, tiny_folder, latents, tmp_path):
    job = Job.open(plan_of(clips), str(tiny_folder), tmp_path, **SETTINGS)
    job.encode_text()
    job.encode_clips(workers=2)
    assert content(tmp_path) == content(latents)


def test_odd_names_and_captions_end_no_encode_and_change_nothing_for_the_next(
    clips, tiny_folder, tmp_path
):
    folder, out = tmp_path / "odd", tmp_path / "l"
    folder.mkdir()
    for name in ("a\u2028b.mp4", "c\x0c\x85.mp4", "plain.mp4", os.fsdecode(b"\xff.mp4")):
        shutil.copy(clips / "long0.mp4", folder / name)
        (folder / name).with_suffix(".txt").write_text("a red\u2028ball")
    words = ["data", "encode", str(folder), "-o", str(out), "--model", str(tiny_folder), *WORDS]
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-m", "fastvideo", *words],
            env={**os.environ, "PYTHONPATH": PATHS, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert "3 clips in 1 buckets; 1 left out" in run.stdout
    (left,) = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert left == {"file": r"\xff.mp4", "reason": "file name is not UTF-8: rename it"}
    assert not list(out.glob(".*")) and len((out / "scan.jsonl").read_text().split("\n")) == 4


# A kill


KILLER = """
import os, signal, sys
from fastvideo import cli, weights
save, left, how = weights.save, int(sys.argv[1]), int(sys.argv[2])
def counted(path, *args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), how)
    return save(path, *args)
weights.save = counted
sys.exit(cli.main(sys.argv[3:]))
"""


def ended_by(how: int, writes: int, clips: Path, model: Path, out: Path) -> tuple[int, str]:
    words = ["data", "encode", str(clips), "-o", str(out), "--model", str(model), *WORDS]
    run = subprocess.run(
        [sys.executable, "-c", KILLER, str(writes), str(how), *words],
        env={**os.environ, "PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stderr


def test_after_kills_the_shards_have_the_bytes_of_an_uninterrupted_run(
    clips, tiny_folder, latents, tmp_path, monkeypatch, capsys
):
    code, _ = ended_by(signal.SIGKILL, 1, clips, tiny_folder, tmp_path)  # text is not finished
    assert code == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.safetensors"))) < 4
    code, err = ended_by(signal.SIGTERM, 12, clips, tiny_folder, tmp_path)  # amid the clips
    assert (code, err.splitlines()[-1]) == (143, "terminated")
    assert not list(tmp_path.rglob(".*"))
    names = [p.name for p in tmp_path.glob("[0-9]*.safetensors")]
    parts = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*.safetensors")}
    done = sum(len(json.loads(read_metadata(tmp_path / n)["ids"])) for n in names)
    done += sum(name.startswith(("32x", "48x")) for name in parts)
    assert 0 < done < 8
    decoded: list[str] = []
    frames = plans.Clip.frames
    monkeypatch.setattr(
        plans.Clip, "frames", lambda c, fps: decoded.append(c.video.name) or frames(c, fps)
    )
    words = ["data", "encode", str(clips), "-o", str(tmp_path), "--model", str(tiny_folder), *WORDS]
    assert main(words) == 0
    assert len(decoded) == len(set(decoded)) == 8 - done  # none again, none lost
    assert content(tmp_path) == content(latents)
    assert "8 clips in 3 buckets; 1 left out" in capsys.readouterr().out
    decoded.clear()
    monkeypatch.setattr(videos, "load", lambda *a, **k: pytest.fail("a network was loaded"))
    assert main(words) == 0 and decoded == []


def test_a_clip_that_is_damaged_inside_is_left_out_and_the_others_are_whole(
    clips, tiny_folder, tmp_path
):
    copy = Path(shutil.copytree(clips, tmp_path / "clips"))
    plan = plan_of(copy)
    path = copy / "long1.mp4"  # after the scan, as a fault of the disk might
    path.write_bytes(path.read_bytes()[:760] + bytes(200) + path.read_bytes()[960:])
    job = Job.open(plan, str(tiny_folder), tmp_path / "out", **SETTINGS)
    job.encode_text()
    (bad,) = job.encode_clips()
    assert bad.name == "long1.mp4" and bad.reason
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["broken.mp4", "long1.mp4"]
    batches = LatentBatches(tmp_path / "out", seed=0, batch=1)
    assert len(batches) == 7
    assert "long1.mp4" not in {name for s in range(7 * 3) for name in batches.batch(s)["ids"]}


# Nothing stale


@pytest.fixture
def nothing_loads(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("a network was loaded")

    monkeypatch.setattr(videos, "load", fail)
    monkeypatch.setattr(role_builder, "build", fail)


def test_encode_refuses_a_folder_of_other_encoders_before_loading_one(
    clips, other_folder, latents, nothing_loads
):
    before = content(latents)
    with pytest.raises(
        ValueError, match=r"is stale or holds other latents .encoder .*text encoder"
    ):
        encode(clips, other_folder, latents)
    assert content(latents) == before


def test_encode_refuses_other_rules_clips_and_prompts_by_name(
    clips, tiny_folder, latents, nothing_loads, tmp_path
):
    copy = Path(shutil.copytree(clips, tmp_path / "clips"))
    captioned(copy / "long0.mp4", "a blue ball")
    captioned(write(copy / "new.mp4", count=18), "a square")
    (copy / "tall1.mp4").unlink()
    with pytest.raises(
        ValueError, match=r"1 gone: tall1.mp4; 1 new: new.mp4; 1 changed: long0.mp4"
    ):
        encode(copy, tiny_folder, latents)
    with pytest.raises(ValueError, match="text count 7, not 8"):
        encode(clips, tiny_folder, latents, prompts=["green"])
    with pytest.raises(ValueError, match="shard_size 2, not 4"):
        encode(clips, tiny_folder, latents, shard=4)
    found = folders.find(clips)
    other = RULES.model_copy(update={"fps": 4.0})
    plan = plans.make(found, folders.scan(found.videos), other)
    with pytest.raises(ValueError, match=r"fps 8.0, not 4.0"):
        Job.open(plan, str(tiny_folder), latents, **SETTINGS)


def test_a_disk_that_is_too_small_is_refused_before_loading(
    clips, tiny_folder, tmp_path, monkeypatch, nothing_loads
):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"needs about .* GB more and its disk has 1e-07 GB left"):
        encode(clips, tiny_folder, tmp_path / "out")


def test_the_estimate_of_disk_space_is_near_the_shards(clips, tiny_folder, latents):
    job = Job.open(plan_of(clips), str(tiny_folder), latents, **SETTINGS)
    tensors = sum(
        tensor.nbytes
        for path in latents.glob("*.safetensors")
        for tensor in Checkpoint(path).values()
    )
    assert tensors <= job.size_bytes <= 1.2 * tensors


# Training reads it


def recipe(latents: Path, model: Path, *sets: str, text: str = "stored") -> recipes.Recipe:
    words = {
        "data": {"name": "latents", "folder": str(latents), "text": text},
        "run": {"dtype": "float32", "steps": 3, "batch": 2},
        "roles": {
            "student": {"config": {"in_channels": 4, "out_channels": 4, "text_dim": 32}},
            "text": {"from": str(model), "trainable": False, "config": {}, "optim": {}},
        },
        "method": {"args": {"tokenizer": str(model / "tokenizer"), "max_text_tokens": 16}},
        "validate": {},
        "export": {},
    }
    from fastvideo.config import assignments, merge, parse

    tree = recipes.dump(tiny("flow_matching"))
    for key in ("data", "validate", "export"):
        tree[key] = {}
    del tree["roles"]["text"]["config"]
    return parse(recipes.Recipe, merge(merge(tree, words), assignments(sets)), source="test")


def losses(made: recipes.Recipe, folder: Path) -> list[float]:
    from fastvideo_train.loop import Job as Run

    return [event.loss for event in train(Run.open(made, folder)) if isinstance(event, StepDone)]


def test_three_steps_learn_alike_from_stored_states_and_from_the_text_encoder(
    latents, tiny_folder, tmp_path
):
    stored = losses(recipe(latents, tiny_folder), tmp_path / "stored")
    encoded = losses(recipe(latents, tiny_folder, text="encoder"), tmp_path / "encoder")
    assert len(stored) == 3 and stored == pytest.approx(encoded, rel=1e-5)


def test_two_processes_learn_from_stored_states_as_one_does(latents, tiny_folder, tmp_path, ranks):
    made = {
        name: recipe(latents, tiny_folder, f"run.strategy={name}", "run.log_every=1")
        for name in ("single", "accelerate", "fsdp2")
    }
    wanted = rank_runs.losses(0, 1, made.pop("single"), str(tmp_path))
    first, second = ranks(2, rank_runs.losses_of_each, made, str(tmp_path))
    assert first == second and len(wanted) == 3
    for got in first.values():
        for ours, theirs in zip(got, wanted, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_run_on_stored_states_loads_no_text_encoder_but_exports_with_it(
    latents, tiny_folder, tmp_path
):
    job = finish(recipe(latents, tiny_folder), tmp_path / "run")
    assert isinstance(job.roles["text"].net, StoredText) and job.roles["text"].num_params() == 0
    loaded = load_run(tmp_path / "run").roles["text"].net
    theirs = models.load(tiny_folder, device="cpu", dtype="float32", parts=("text",)).text
    assert torch.equal(loaded.shared.weight, theirs.shared.weight)


def test_a_batch_holds_one_bucket_and_is_a_function_of_seed_and_step(latents):
    one, other = (LatentBatches(latents, seed=3, batch=2) for _ in range(2))
    order = [one.batch(step) for step in range(8)]
    assert {tuple(b["latents"].shape[2:]) for b in order} == {(2, 4, 6), (3, 4, 6), (3, 6, 4)}
    again = [other.batch(step)["ids"] for step in reversed(range(8))][::-1]
    assert [b["ids"] for b in order] == again
    assert [b["ids"] for b in LatentBatches(latents, seed=4, batch=2).prefetch(8)] != again
    seen = Counter(name for ids in again for name in ids)  # two rounds of 1 + 2 + 1 batches
    assert set(seen.values()) == {2} and len(seen) == 8
    halves = [LatentBatches(latents, seed=3, batch=2, part=(i, 2)).batch(5)["ids"] for i in (0, 1)]
    assert halves[0] + halves[1] == again[5]


def test_a_run_says_once_which_buckets_repeat_clips_within_a_batch(
    latents, tiny_folder, tmp_path, caplog
):
    losses(recipe(latents, tiny_folder, "run.batch=3"), tmp_path / "three")
    (said,) = [r.getMessage() for r in caplog.records if "more than once" in r.getMessage()]
    assert said.endswith(
        "batches of 3 hold clips more than once where a bucket has fewer: 32x48x9 (2), 48x32x5 (2)"
    )
    ids = [batch["ids"] for batch in LatentBatches(latents, seed=3, batch=3).prefetch(4)]
    assert any(len(set(names)) < 3 for names in ids)
    caplog.clear()
    losses(recipe(latents, tiny_folder, "run.batch=2"), tmp_path / "two")
    assert "more than once" not in caplog.text


def test_buckets_have_batches_in_proportion_to_their_clips():
    rota = Rota((6, 2, 10), seed=0)
    places = [rota.place(step) for step in range(18)]
    assert Counter(group for group, _ in places) == {0: 6, 1: 2, 2: 10}
    for group, count in ((0, 6), (1, 2), (2, 10)):
        assert [turn for g, turn in places if g == group] == list(range(count))
    assert [rota.place(s) for s in reversed(range(18))][::-1] == places


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["roles.text.from={other}"], "text states in .* are stale: roles.text.from"),
        (
            ['export={{name="x", vae="{other}"}}'],
            "are stale: export.vae .* encodes by other weights",
        ),
        (["method.args.tokenizer=wan-nano"], "text states in .* are stale: method.args.tokenizer"),
        (["method.args.max_text_tokens=8"], "max_text_tokens 8 must be 16"),
        (["method.args.negative_prompt=a red night"], "negative_prompt 'a red night' has no state"),
        (["roles.text.trainable=true"], "needs roles.text with trainable = false and `from`"),
        (["data.folder={missing}"], "holds no latents"),
        (["data.folder={unfinished}"], r"unfinished: 32x48x9-00000.safetensors of 8 shards"),
        (["run.validate_every=1", "validate.vae={other}"], r"\[validate\]|validate.vae"),
    ],
)
def test_a_recipe_that_does_not_fit_its_data_is_refused_before_a_network_is_built(
    sets, message, latents, tiny_folder, other_folder, tmp_path, nothing_loads
):
    from fastvideo_train.loop import Job as Run

    unfinished = Path(shutil.copytree(latents, tmp_path / "unfinished"))
    (unfinished / "32x48x9-00000.safetensors").unlink()
    names = {"other": other_folder, "missing": tmp_path / "no", "unfinished": unfinished}
    made = recipe(latents, tiny_folder, *(word.format(**names) for word in sets))
    with pytest.raises(ValueError, match=message):
        Run.open(made, tmp_path / "run")


def test_a_prompt_that_was_stored_besides_may_be_the_negative_one(clips, tiny_folder, tmp_path):
    encode(clips, tiny_folder, tmp_path / "l", prompts=["a red night"])
    made = recipe(tmp_path / "l", tiny_folder, "method.args.negative_prompt=a red night")
    assert len(losses(made, tmp_path / "run")) == 3


# The commands


def test_validate_lists_what_is_bad_and_fails(clips, tiny_folder, capsys):
    words = ["data", "validate", str(clips), "--model", str(tiny_folder), "--workers", "0"]
    assert main(words) == 1  # the shortest clip is now the model's 9 frames
    out = capsys.readouterr().out
    assert "bad: broken.mp4: cannot be read" in out
    assert "left out: short0.webm: too short: 0.75 s are 6 frames at 8 fps (at least 9)" in out
    assert "6 usable, 1 bad, 2 left out" in out
    assert main([*words, "--json", "--quick"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["usable"] == 6 and [b["file"] for b in told["bad"]] == ["broken.mp4"]


def test_validate_of_a_sound_folder_succeeds(tmp_path, capsys):
    captioned(write(tmp_path / "a.mp4", count=9), "a red ball")
    words = ["--size", "48x32", "--frames", "9", "--workers", "0"]
    assert main(["data", "validate", str(tmp_path), *words]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 1 usable, 0 bad, 0 left out\n"


def test_files_that_nothing_comes_of_are_told_and_change_no_verdict(tmp_path, capsys):
    captioned(write(tmp_path / "a.mp4", count=9), "a red ball")
    captioned(write(tmp_path / "b.wmv", "wmv2", count=9), "a blue ball")
    for name in ("c.pdf", "d.pdf", "notes.md"):
        captioned(tmp_path / name, "a ball").with_suffix(Path(name).suffix).touch()
    captioned(tmp_path / "e.mp4", "a ball")
    words = [str(tmp_path), "--size", "48x32", "--frames", "9", "--workers", "0"]
    assert main(["data", "validate", *words]) == 0
    others = "3 files: .pdf (2), .md (1)"
    assert capsys.readouterr().out == (
        f"not videos: {others}\nno video: 4 captions without one: c.txt, d.txt, e.txt ...\n"
        f"{tmp_path}: 2 usable, 0 bad, 0 left out\n"
    )
    assert main(["data", "stats", *words]) == 0
    out = capsys.readouterr().out
    assert f"  not videos  {others}\n  no video    4 captions without one: c.txt" in out
    (tmp_path / "e.mp4").symlink_to("gone.mp4")
    assert main(["data", "validate", *words, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["bad"] == [{"file": "e.mp4", "reason": "broken link: gone.mp4 is not there"}]
    assert told["other_files"] == {".pdf": 2, ".md": 1}
    assert told["lone_captions"] == ["c.txt", "d.txt", "notes.txt"] and told["usable"] == 2
    (tmp_path / "a.mp4").unlink()
    (tmp_path / "b.wmv").unlink()
    assert main(["data", "stats", *words]) == 0  # nothing usable hides no other files
    assert others in capsys.readouterr().out


def test_stats_count_what_the_folder_holds(clips, tiny_folder, capsys):
    words = ["data", "stats", str(clips), "--model", str(tiny_folder), "--frames", "5,9"]
    assert main([*words, "--workers", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {name: b["clips"] for name, b in told["buckets"].items()} == {
        "48x32x5": 2,
        "48x32x9": 4,
        "32x48x9": 2,
    }
    assert told["sizes"] == {"48x32": 6, "32x48": 2} and told["codecs"] == {"h264": 6, "vp9": 2}
    assert (
        told["distinct_batch"] == 2 and told["captions"] == 5 and told["caption_words"]["min"] == 3
    )
    assert told["caption_tokens"]["min"] == 4  # three words and the end
    assert told["used_s"] == pytest.approx((2 * 5 + 6 * 9) / 8)
    assert main([*words, "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "8 usable, 1 bad, 0 left out" in out and "48x32 (6), 32x48 (2)" in out
    assert "of more than 2 hold a clip of the smallest bucket more than once" in out
    assert main([*words, "--workers", "0", "--json", "--fps", "8000/1001"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["used_s"] == pytest.approx((2 * 5 + 6 * 9) * 1001 / 8000)


def test_every_command_judges_by_decoding_and_stats_count_the_reasons(
    clips, tiny_folder, tmp_path, capsys
):
    folder = tmp_path / "clips"
    folder.mkdir()
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1"}
    whole = captioned(write(folder / "whole.mp4", count=18), "a ball")
    bent = captioned(folder / "bent.mp4", "a ball")
    raw = bytearray(whole.read_bytes())
    raw[-1500:-1400] = bytes(100)  # inside the last frames: no packet tells it
    bent.write_bytes(raw)
    captioned(write(folder / "combed.mp4", count=18, options=options), "a ball")
    captioned(write(folder / "short.mp4", count=2), "a ball")
    words = [str(folder), "--model", str(tiny_folder), "--workers", "0"]
    assert main(["data", "validate", *words, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [one["file"] for one in told["bad"]] == ["bent.mp4", "combed.mp4"]
    assert main(["data", "stats", *words, "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["usable"] == told["usable"] == 1 and counted["bad"] == 2
    assert counted["reasons"]["interlaced"] == counted["reasons"]["too short"] == 1
    assert sum(counted["reasons"].values()) == 3
    assert main(["data", "stats", *words]) == 0
    assert "interlaced (1)" in capsys.readouterr().out
    out = tmp_path / "l"
    assert main(["data", "encode", str(folder), "-o", str(out), *words[1:], *WORDS[:4]]) == 0
    assert "1 clips in 1 buckets; 3 left out" in capsys.readouterr().out


def test_preview_writes_a_sheet_for_each_bucket(clips, tiny_folder, tmp_path, capsys):
    words = ["data", "preview", str(clips), "--model", str(tiny_folder), "--frames", "5,9"]
    assert main([*words, "-o", str(tmp_path / "s.png"), "--workers", "0", "--count", "3"]) == 0
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["s-32x48x9.png", "s-48x32x5.png", "s-48x32x9.png"]
    assert "3 of 4 clips of 48x32x9" in capsys.readouterr().out


def test_smoke_encodes_a_few_of_the_shortest_clips_beside_the_folder(
    clips, tiny_folder, tmp_path, capsys
):
    words = ["data", "encode", str(clips), "-o", str(tmp_path / "l"), "--model", str(tiny_folder)]
    assert main([*words, *WORDS, "--smoke"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["l-smoke"]
    assert {b.num_frames for b in read_manifest(tmp_path / "l-smoke").buckets} == {5}
    assert len(LatentBatches(tmp_path / "l-smoke", seed=0, batch=1)) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["validate", "nowhere"], "nowhere is not a folder"),
        (["stats", ".", "--frames", "8"], r"num_frames 8 must be 4k+1"),
        (["stats", ".", "--frames", "a"], "--frames 'a' must be a number, or several"),
        (["stats", ".", "--set", "max_upscale=0.5"], "max_upscale 0.5"),
        (["encode", ".", "-o", "x"], "Missing option '--model'"),
        (["encode", ".", "-o", "x", "--model", "nowhere"], "nowhere"),
        (["encode", ".", "-o", "x", "--model", "wan-nano", "--frames", "4097"], "nearest: 4093"),
        (["encode", "-o", "x", "--model", "y", "--smoke"], "--smoke is for a folder of videos"),
        (["preview", "-o", "x.png", "--frames", "5,9"], "must be one number"),
    ],
)
def test_wrong_words_about_videos_are_refused_in_one_line(
    words, message, clips, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(clips)
    before = sorted(clips.iterdir())
    assert main(["data", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(clips.iterdir()) == before
