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


def test_the_sparse_edition_is_sparse_by_itself_and_shares_the_vae():
    spec, _ = hub.open_spec("wan-nano-vsa")
    assert spec.attention.pattern == "vsa"
    dense, sparse = (hub.ZOO / name / "vae" for name in ("wan-nano", "wan-nano-vsa"))
    for file in dense.iterdir():
        assert file.read_bytes() == (sparse / file.name).read_bytes(), file.name
