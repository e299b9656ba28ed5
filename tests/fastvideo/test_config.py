"""Configuration is strict: what is unknown, wrong or unreadable is named with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from fastvideo.config import Strict, assignments, merge, parse, read_toml, set_word, toml_line


@dataclass(frozen=True)
class Size:
    height: int = 16


class Optim(Strict):
    lr: float = Field(default=1e-4, gt=0)
    kind: str = "adamw"


class Clips(Strict):
    name: Literal["clips"] = "clips"
    workers: int = 1


class Stored(Strict):
    name: Literal["stored"] = "stored"
    folder: str = ""


class Recipe(Strict):
    steps: int
    data: Annotated[Clips | Stored, Field(discriminator="name")] = Clips()
    optim: Optim = Optim()
    size: Size = Size()
    others: dict[str, Optim] = Field(default_factory=dict)
    last: Optim | None = None


def error(values: object) -> str:
    with pytest.raises(ValueError) as caught:
        parse(Recipe, values, source="x.toml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_become_a_frozen_model():
    recipe = parse(Recipe, {"steps": 3, "optim": {"lr": 0.1}}, source="x.toml")
    assert recipe.optim == Optim(lr=0.1)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.steps = 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stpes": 1}, "stpes in x.toml is unknown; did you mean 'steps'?"),
        ({"optim": {"llr": 1}}, "optim.llr in x.toml is unknown; did you mean 'lr'?"),
        ({"size": {"hight": 1}}, "size.hight in x.toml is unknown; did you mean 'height'?"),
        ({"others": {"a": {"knd": 1}}}, "others.a.knd in x.toml is unknown; did you mean 'kind'?"),
        ({"last": {"knd": 1}}, "last.knd in x.toml is unknown; did you mean 'kind'?"),
        (
            {"data": {"name": "stored", "foldr": 1}},
            "data.foldr in x.toml is unknown; did you mean 'folder'?",
        ),
        ({"data": {"name": "stored", "workers": 1}}, "data.workers in x.toml is unknown"),
        (
            {"data": {"name": "clips", "workers": None}},
            "data.workers null in x.toml: must be a valid integer",
        ),
        ({"data": {"workers": 1}}, "data.name is missing in x.toml"),
        ({"zzz": 1}, "zzz in x.toml is unknown"),
        ({"optim": {"lr": 0}}, "optim.lr 0 in x.toml: must be greater than 0"),
    ],
)
def test_wrong_key_or_value_is_named_with_its_source(values, message):
    assert error({"steps": 1, **values}) == message


def test_missing_key_is_named():
    assert error({}) == "steps is missing in x.toml"


def test_all_mistakes_are_told_at_once():
    assert error({"optim": {"llr": 1}}).count(";") == 2


def test_tree_that_is_no_mapping_is_refused():
    assert error([1, 2]) == "x.toml must hold keys and values, not list"


def test_toml_is_read(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("steps = 3\n[optim]\nlr = 1e-3\n")
    assert read_toml(path) == {"steps": 3, "optim": {"lr": 1e-3}}


def test_unreadable_toml_is_named_with_the_line(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("steps = 3\nsteps = \n")
    with pytest.raises(ValueError, match=r"a\.toml is not valid TOML: .*line 2"):
        read_toml(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a\.toml cannot be read"):
        read_toml(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_toml(tmp_path / "b.toml")


@pytest.mark.parametrize(
    ("pair", "tree"),
    [
        ("steps=3", {"steps": 3}),
        ("optim.lr=1e-3", {"optim": {"lr": 1e-3}}),
        ("optim.kind=muon", {"optim": {"kind": "muon"}}),
        ('optim.kind="3"', {"optim": {"kind": "3"}}),
        ("optim.kind=a=b", {"optim": {"kind": "a=b"}}),
        ("betas=[0.9, 0.99]", {"betas": [0.9, 0.99]}),
        ("on=true", {"on": True}),
        ("name=", {"name": ""}),
        ("name=3 # 4", {"name": "3 # 4"}),
        ("name=3\nb = 4", {"name": "3\nb = 4"}),
        (" a . b = 1 ", {"a": {"b": 1}}),
    ],
)
def test_assignment_is_read_as_toml_or_as_a_bare_word(pair, tree):
    assert assignments([pair]) == tree


def test_later_assignments_win_and_join_the_tree():
    assert assignments(["a.b=1", "a.c=2", "a.b=3"]) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize("pair", ["steps", "=3", "a..b=1", ".a=1"])
def test_malformed_assignment_is_refused(pair):
    with pytest.raises(ValueError, match=r"must look like key\.subkey=value"):
        assignments([pair])


TOML = """# steps = 1
base = "x = 1"
'size' = "8x8"
models.a = "b"
rows = [{name = "inline", steps = 1}]  # steps
[models.more]
"quoted key" = 1
[[row]]
name = "a"
 steps=1
[[row]]
steps = [
  1,
]
[row.sub]
steps = 4
"""


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (["base"], 2),
        (["size"], 3),
        (["models", "a"], 4),
        (["models", "more", "quoted key"], 7),
        (["rows", 0, "steps"], 5),
        (["row", 0, "steps"], 10),
        (["row", 1, "steps", 0], 12),
        (["row", 1], 11),
        (["row", 1, "sub", "steps"], 11),
        (["steps"], None),
        ([], None),
    ],
)
def test_a_key_has_the_line_of_the_text_that_gives_it(tmp_path, keys, line):
    path = tmp_path / "a.toml"
    path.write_text(TOML)
    assert toml_line(path, keys) == (f"{path}:{line}" if line else str(path))


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        (["steps"], "--set steps"),
        (["rows", 1, "name"], "--set rows"),
        (["optim", "lr"], "--set optim.lr"),
        (["optim", "kind"], None),
        (["seed"], None),
        ([], None),
    ],
)
def test_a_value_has_the_set_word_that_gave_it(keys, word):
    assert set_word(assignments(["steps=1", "rows=[{}]", "optim.lr=1"]), keys) == word


def test_errors_name_the_place_of_each_wrong_value_and_the_table_of_a_missing_one():
    def source(keys):
        return f"<{'.'.join(map(str, keys))}>"

    with pytest.raises(
        ValueError, match=r"^steps \"x\" in <steps>: .*; optim.lr 0 in <optim.lr>: "
    ):
        parse(Recipe, {"steps": "x", "optim": {"lr": 0}}, source=source)
    with pytest.raises(ValueError, match=r"^steps is missing in <>$"):
        parse(Recipe, {}, source=source)


def test_merge_replaces_leaves_and_changes_neither_side():
    base, over = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3}, "d": [2]}
    assert merge(base, over) == {"a": {"b": 3, "c": 2}, "d": [2]}
    assert base == {"a": {"b": 1, "c": 2}, "d": [1]}
    assert over == {"a": {"b": 3}, "d": [2]}


def test_merge_replaces_a_table_by_a_value_and_a_value_by_a_table():
    assert merge({"a": {"b": 1}}, {"a": 2}) == {"a": 2}
    assert merge({"a": 2}, {"a": {"b": 1}}) == {"a": {"b": 1}}
