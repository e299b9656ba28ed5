"""Recipes are strict, layered, and say what is wrong in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fastvideo_train import recipe as recipes
from fastvideo_train.recipe import AttentionSpec, Recipe
from tiny_recipes import CONFIGS, tiny

from fastvideo.config import parse

ALL = sorted([*CONFIGS.glob("*.toml"), *CONFIGS.parent.glob("trio/*.toml")])


@pytest.mark.parametrize("path", ALL, ids=lambda p: f"{p.parent.name}-{p.stem}")
@pytest.mark.parametrize("smoke", [False, True])
def test_every_bundled_recipe_parses_and_survives_a_round_trip(path, smoke):
    recipe = recipes.load(path, smoke=smoke)
    assert parse(Recipe, recipes.dump(recipe), source="dump") == recipe
    assert not smoke or recipe.run.steps == 3


def test_set_words_go_on_top_of_the_file():
    recipe = recipes.load(CONFIGS / "vae.toml", sets=["optim.muon.lr=0.25", "run.name=other"])
    assert recipe.optim.muon is not None and recipe.optim.muon.lr == 0.25
    assert recipe.run.name == "other"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run.step=3", r"run\.step in .* is unknown; did you mean 'steps'"),
        ("run.steps=0", r"run\.steps 0 in .*must be at least 1"),
        ("roles.vae.trainable=false", "no role is trainable"),
        ("roles.vae.optim.rate=1", r"rate in roles\.vae\.optim is unknown"),
        ("data.name=nowhere", "nowhere"),
        ("run.name=../up", "run.name"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(word, message):
    with pytest.raises(ValueError, match=message) as caught:
        recipes.load(CONFIGS / "vae.toml", sets=[word])
    assert "\n" not in str(caught.value)


def test_smoke_needs_a_smoke_table(tmp_path: Path):
    path = tmp_path / "r.toml"
    path.write_text('[run]\nname = "x"\n')
    with pytest.raises(ValueError, match=r"has no \[smoke\] table"):
        recipes.load(path, smoke=True)


def test_a_smoke_table_of_another_source_replaces_the_data():
    assert recipes.load(CONFIGS / "dit.toml").data.name == "latents"
    assert recipes.load(CONFIGS / "dit.toml", smoke=True).data.name == "synthetic"


def test_a_recipe_states_only_what_differs_from_the_one_it_extends():
    base, longer = recipes.load(CONFIGS / "dit-image.toml"), recipes.load(CONFIGS / "dit.toml")
    assert longer.roles["student"].config == base.roles["student"].config
    assert longer.run.name != base.run.name


def test_a_method_or_scheduler_of_another_name_takes_nothing_from_the_extended_recipe():
    base, few = (recipes.load(CONFIGS / name) for name in ("dit.toml", "dit-perflow.toml"))
    assert "text_dropout" in base.method.args and "text_dropout" not in few.method.args
    assert "shift" in base.export["scheduler"]["args"]
    assert "shift" not in few.export["scheduler"]["args"]
    assert few.run.threads == base.run.threads, "the name of a run is only a label"
    assert few.export["defaults"]["height"] == base.export["defaults"]["height"]


def test_an_attention_of_another_pattern_takes_nothing_from_the_one_before(tmp_path: Path):
    dense = tmp_path / "dense.toml"
    above = f'extends = "{CONFIGS / "dit-perflow.toml"}"\n'
    dense.write_text(above + '[roles.student.attention]\npattern = "dense"\n')
    words = ["roles.teacher.attention.pattern=dense"]
    attentions = [role.attention for role in recipes.load(dense, sets=words).roles.values()]
    assert {(a.pattern, len(a.args)) for a in attentions} == {("dense", 0)}
    kept = recipes.load(CONFIGS / "dit-perflow.toml", sets=["roles.teacher.attention.pattern=vsa"])
    assert kept.roles["teacher"].attention.args["sparsity"] == 0.5


def test_a_recipe_inherits_no_name_title_licence_or_author(tmp_path: Path):
    own = tmp_path / "mine.toml"
    own.write_text(f'extends = "{CONFIGS / "dit.toml"}"\n[run]\nname = "mine"\n')
    assert set(recipes.load(own).export) == {"vae", "scheduler", "defaults"}
    own.write_text(own.read_text() + '[export.provenance]\nlicence = "mine"\n')
    assert recipes.load(own).export["provenance"] == {"licence": "mine"}
    assert recipes.load(own, sets=["export.name=x"]).export["name"] == "x"


def test_bundled_recipes_of_models_say_themselves_what_they_are():
    for path in CONFIGS.parent.rglob("*.toml"):
        made = recipes.load(path).export
        if "scheduler" in made:
            assert made["name"] and {"title", "licence", "recipe"} <= set(made["provenance"]), path


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path):
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text(f'extends = "../{tmp_path.name}/a.toml"\n')
    with pytest.raises(ValueError, match="extends itself"):
        recipes.load(tmp_path / "a.toml")


def test_a_role_overrides_single_keys_of_the_optimizer():
    recipe = recipes.load(CONFIGS / "vae.toml", sets=["roles.vae.optim.lr=7.0"])
    assert recipe.optim_of("vae").lr == 7.0
    assert recipe.optim_of("vae").muon == recipe.optim.muon


def test_differences_name_every_changed_leaf():
    loaded = [
        recipes.load(CONFIGS / "vae.toml", sets=[f"run.steps={n}", f"optim.lr={n}.0"])
        for n in (8, 9)
    ]
    old, new = map(recipes.dump, loaded)
    assert recipes.differences(old, new) == ["run.steps: 8 -> 9", "optim.lr: 8.0 -> 9.0"]


def test_a_recipe_is_read_without_torch():
    code = (
        "import sys; from fastvideo_train import recipe;"
        f"recipe.load({str(CONFIGS / 'vae.toml')!r}); assert 'torch' not in sys.modules"
    )
    env_path = ":".join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": env_path, "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_sparsity_rises_in_steps_to_its_target():
    args = {"pattern": "vsa", "args": {"sparsity": 0.5}, "anneal_every": 10, "anneal_by": 0.2}
    spec = AttentionSpec.model_validate(args)
    assert [spec.at(step).sparsity for step in (0, 9, 10, 29, 30, 99)] == [
        0.0,
        0.0,
        0.2,
        0.4,
        0.5,
        0.5,
    ]
    constant = spec.model_copy(update={"anneal_every": 0})
    assert constant.at(0).sparsity == 0.5


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"pattern": "vsa"}, "either sparsity"),
        ({"pattern": "vsa", "args": {"sparsity": 2}}, "nearest: 0.99"),
        ({"pattern": "dense", "anneal_every": 5}, "needs a pattern with a sparsity"),
        ({"patern": "vsa"}, "patern"),
    ],
)
def test_a_wrong_attention_of_a_role_is_refused(attention, message):
    tree = recipes.dump(tiny("flow_matching"))
    tree["roles"]["student"]["attention"] = attention
    with pytest.raises(ValueError, match=message):
        parse(Recipe, tree, source="test")
