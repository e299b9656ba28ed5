"""The bundled models: each loads strictly, renders, and fits into a repository."""

from __future__ import annotations

import pytest

from fastvideo import hub, model, render

MEBIBYTE = 1 << 20


@pytest.mark.parametrize("name", hub.bundled())
def test_a_bundled_model_loads_and_renders_its_own_number_of_steps(name: str):
    loaded = model.load(name, device="cpu", dtype="bfloat16")
    (frames,) = render.frames(loaded, ["a big red ball"], num_frames=5, height=64, width=64)
    assert frames.shape == (5, 64, 64, 3)
    assert frames.std() > 5, "a clip is not of one colour"


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
