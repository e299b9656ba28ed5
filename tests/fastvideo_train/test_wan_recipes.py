"""The recipes at the published sizes: what they say, and their smoke forms on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastvideo_train import budget, export, loop, memory
from fastvideo_train import recipe as recipes
from fastvideo_train.recipe import Recipe
from tiny_recipes import ROOT

from fastvideo.cli import main
from fastvideo.formats.diffusers import NEGATIVE_PROMPT

FILES = sorted((ROOT / "configs" / "train").glob("wan-*/*.toml"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in FILES]
SIZES = {"wan-1.3b": 1_418_996_800, "wan-14b": 14_288_491_584}
GATED = {"wan-1.3b": 1_489_821_760, "wan-14b": 15_337_272_384}


def by_name(name: str, *sets: str, smoke: bool = False) -> Recipe:
    return recipes.load(ROOT / "configs" / "train" / f"{name}.toml", sets=sets, smoke=smoke)


def test_both_sizes_have_the_same_three_recipes():
    assert [f"{s}/{r}" for s in SIZES for r in ("dmd", "sparse", "vsa")] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_for_eight_devices_and_builds_the_published_networks(name):
    recipe, size = by_name(name), name.partition("/")[0]
    degrees = recipe.degrees(8)
    loop.check(recipe, degrees)
    found = memory.of(recipe, degrees, dims=budget.dims_here).num_params
    student = GATED[size] if recipe.roles["student"].attention.pattern == "vsa" else SIZES[size]
    assert found["student"] == student
    assert {found[n] for n in found if n in ("teacher", "critic")} <= {SIZES[size]}
    assert recipe.stored_text and recipe.run.recompute and recipe.run.strategy == "fsdp2"


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_for_64_devices_that_a_recipe_names_keeps_its_global_batch(name):
    recipe = by_name(name)
    is_long = name == "wan-14b/vsa"
    batch = 64 if name.startswith("wan-1.3b") else 16
    words = ["parallel.data=8", f"run.batch={batch}", f"run.accumulate={4 if is_long else 1}"]
    large = by_name(name, *words)
    loop.check(large, large.degrees(64))
    assert large.run.batch * large.run.accumulate == recipe.run.batch * recipe.run.accumulate


@pytest.mark.parametrize("name", NAMES)
def test_the_negative_prompt_is_the_one_that_encode_stores_for_wan(name):
    recipe = by_name(name)
    assert recipe.method.args["negative_prompt"] == NEGATIVE_PROMPT
    assert recipe.export["defaults"]["negative_prompt"] == NEGATIVE_PROMPT


@pytest.mark.parametrize("name", NAMES)
def test_the_export_table_fits_the_method_and_what_it_is_sampled_with(name):
    recipe = by_name(name)
    local = recipe.model_copy(update={"export": {**recipe.export, "vae": "wan-nano"}})
    export.check(local)


@pytest.mark.parametrize("name", NAMES)
def test_a_smoke_run_trains_and_saves(name, tmp_path: Path, capsys):
    path = str(ROOT / "configs" / "train" / f"{name}.toml")
    assert main(["train", path, "--smoke", "--run-dir", str(tmp_path / "r")]) == 0
    assert "step 3: saved" in capsys.readouterr().out
    smoke = by_name(name, smoke=True)
    pattern = smoke.roles["student"].attention
    assert (pattern.pattern == "vsa") == (not name.endswith("dmd"))
