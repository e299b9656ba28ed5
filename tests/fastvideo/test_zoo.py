"""The bundled models: each loads strictly, renders, and fits into a repository."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from fastvideo_inference.evaluation import Evaluation

from fastvideo import hub, media, model
from fastvideo.metrics.psnr import psnr
from tests import clips

MEBIBYTE = 1 << 20


GOLDEN = Path(__file__).parent / "golden"
"""Five frames of a clip of each model; for a new edition, `python -m tests.fastvideo.test_zoo`."""
STEPS = {"fastwan-nano": 3, "wan-nano": 2, "wan-nano-vsa": 2}


def five_frames(name: str) -> np.ndarray:
    """Return five frames of a clip, (H, 5 W, 3)."""
    loaded = model.load(name, device="cpu", dtype="float32")  # bfloat16 differs by machine
    prompt, how = "a big red ball moving left at night", {"num_inference_steps": STEPS[name]}
    (frames,) = clips.frames(loaded, [prompt], seed=1, num_frames=17, **how)
    return np.concatenate(list(frames[::4]), axis=1)


@pytest.mark.parametrize("name", hub.bundled())
def test_a_bundled_model_makes_its_golden_frames(name: str):
    made, golden = five_frames(name), iio.imread(GOLDEN / f"{name}.png")
    assert made.shape == golden.shape == (128, 640, 3)
    assert psnr(made[None], golden[None]) >= 40


@pytest.mark.full
def test_the_default_model_is_as_faithful_as_its_card_says(tmp_path: Path):
    plan = Evaluation.plan(hub.DEFAULT_MODEL, output=tmp_path, prompts=48, repeats=0)
    for _ in plan.run():
        pass
    (every,) = (line for line in plan.report().lines if line.attribute == "all")
    assert every.rate >= 0.9


@pytest.mark.parametrize("name", hub.bundled())
def test_a_bundled_model_has_a_card_and_at_most_40_mebibytes(name: str):
    folder = hub.ZOO / name
    assert (folder / "README.md").is_file()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 40 * MEBIBYTE


@pytest.mark.parametrize("name", ["wan-nano-vsa", "fastwan-nano"])
def test_the_sparse_editions_are_sparse_by_themselves_and_share_the_vae(name: str):
    spec, _ = hub.open_spec(name)
    assert spec.attention.pattern == "vsa"
    dense, sparse = (hub.ZOO / one / "vae" for one in ("wan-nano", name))
    for file in dense.iterdir():
        assert file.read_bytes() == (sparse / file.name).read_bytes(), file.name


def test_the_default_takes_three_steps_without_guidance():
    spec, _ = hub.open_spec(hub.DEFAULT_MODEL)
    assert (spec.defaults.num_inference_steps, spec.defaults.guidance_scale) == (3, 1.0)
    assert spec.scheduler.name == "few_step" and len(spec.scheduler.args["sigmas"]) == 3


if __name__ == "__main__":
    for name in hub.bundled():
        media.write_png(GOLDEN / f"{name}.png", five_frames(name), overwrite=True)
