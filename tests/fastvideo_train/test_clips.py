from __future__ import annotations

import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import torch
from fastvideo_train.data.clips import ClipBatches
from toy_world import World

from tests.processes import has_ended

SIZES = {"seed": 3, "batch": 4, "num_frames": 5, "height": 16, "width": 24}


def make(**changes):
    return ClipBatches("toy_world:World", **{**SIZES, **changes})


def same(a, b):
    return torch.equal(a["pixels"], b["pixels"]) and {**a, "pixels": 0} == {**b, "pixels": 0}


def test_a_batch_is_the_worlds_clips_in_the_layout_that_networks_take():
    batch = make().batch(2)
    clip = World(height=16, width=24, num_frames=5).clip(3, 2 * 4 + 1)
    assert batch["pixels"].shape == (4, 3, 5, 16, 24) and batch["pixels"].dtype == torch.uint8
    assert batch["pixels"].is_contiguous()
    assert np.array_equal(batch["pixels"][1].permute(1, 2, 3, 0).numpy(), clip.frames_THWC)
    assert batch["captions"][1] == clip.caption and batch["truths"][1] == clip.truth
    assert batch["ids"][1] == "train/3/9"


def test_a_batch_is_a_pure_function_of_seed_and_step():
    kwargs = {"crop": (8, 8), "window": True, "render_frames": 9}
    assert same(make(**kwargs).batch(7), make(**kwargs).batch(7))
    assert not same(make(**kwargs).batch(7), make(**kwargs).batch(8))
    assert not same(make(**kwargs).batch(7), make(**kwargs, seed=4).batch(7))


def test_crops_and_windows_are_cut_out_of_the_render_at_varying_places():
    batch = make(crop=(8, 12), window=True, render_frames=9, batch=32).batch(0)
    assert batch["pixels"].shape == (32, 3, 5, 8, 12)
    world = World(height=16, width=24, num_frames=9)
    places = set()
    for item in range(32):
        frames = world.clip(3, item).frames_THWC.transpose(3, 0, 1, 2)
        cut = batch["pixels"][item].numpy()
        found = [
            (t, y)
            for t in range(5)
            for y in range(9)
            if np.array_equal(frames[:, t : t + 5, y : y + 8, :12], cut)
        ]
        assert found
        places.add(found[0])
    assert len(places) > 8


def test_several_crops_share_one_render_and_have_their_own_ids():
    batch = make(crop=(8, 8), crops_per_clip=2).batch(1)
    assert batch["ids"] == ["train/3/2", "train/3/2/1", "train/3/3", "train/3/3/1"]


def test_workers_give_the_same_batches_in_the_same_order_as_none():
    want = [make().batch(step) for step in range(5, 10)]
    got = list(make(workers=2, start_step=5).prefetch(5))
    assert len(got) == 5 and all(same(a, b) for a, b in zip(want, got, strict=True))


def test_leaving_an_endless_prefetch_ends_its_workers():
    before = set(multiprocessing.active_children())
    batches = make(workers=1).prefetch()
    next(batches)
    assert set(multiprocessing.active_children()) - before
    batches.close()
    assert not set(multiprocessing.active_children()) - before


class Broken(World):
    def clip(self, seed, index, split="train"):
        raise ZeroDivisionError("no clip 0")


def test_an_error_in_a_worker_is_raised_with_its_cause():
    with pytest.raises(RuntimeError, match="no clip 0"):
        next(ClipBatches("test_clips:Broken", **SIZES, workers=1).prefetch())


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_workers_without_a_word(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import os, signal\n"
        "from fastvideo_train.data.clips import ClipBatches\n"
        "if __name__ == '__main__':\n"
        f"    batches = ClipBatches('toy_world:World', **{SIZES!r}, workers=1).prefetch()\n"
        "    next(batches)\n"
        "    try:\n"
        "        os.killpg(0, signal.SIGINT)\n"
        "        next(batches)\n"
        "    except KeyboardInterrupt:\n"
        "        batches.close()\n"
        "        print('stopped')\n"
    )
    path = ":".join(sys.path)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=60,
    )
    assert done.stdout == "stopped\n" and done.stderr == "" and done.returncode == 0


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import multiprocessing, os\n"
        "from fastvideo_train.data.clips import ClipBatches\n"
        "if __name__ == '__main__':\n"
        f"    batches = ClipBatches('toy_world:World', **{SIZES!r}, workers=1).prefetch()\n"
        "    next(batches)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert has_ended(int(done.stdout))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crop": (17, 8)}, "crop height 17 must be from 1 to 16"),
        ({"crop": (8, 25)}, "crop width 25 must be from 1 to 24"),
        ({"window": True, "render_frames": 4}, "num_frames 5 must be from 1 to 4"),
        ({"crops_per_clip": 3}, "batch 4 must be a positive multiple of crops_per_clip 3"),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)
