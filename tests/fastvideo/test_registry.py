"""Components are found by the names of their files."""

from __future__ import annotations

import pytest

from fastvideo import registry


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "toy_parts"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "_private.py").touch()
    (folder / "red.py").write_text("Part = 'a red part'\n")
    (folder / "blue.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "toy_parts"


def test_names_are_the_public_files_and_import_none_of_them(package):
    assert registry.names(package) == ["blue", "red"]


def test_component_is_loaded_by_its_file_name(package):
    assert registry.load(package, "red", "Part") == "a red part"


def test_unknown_component_is_refused_with_the_known_ones(package):
    with pytest.raises(ValueError) as error:
        registry.module(package, "rad")
    message = str(error.value)
    assert message == "toy part 'rad' is unknown; did you mean 'red'? (known: blue, red)"


def test_colon_reaches_code_outside_the_package(package):
    assert registry.load("fastvideo.schedulers", "toy_parts.red:Part", "Scheduler") == "a red part"


@pytest.mark.parametrize("name", ["toy_parts.rad:Part", "toy_parts.red:Prat", ":x", "x:"])
def test_object_that_is_not_there_is_refused(package, name):
    with pytest.raises(ValueError, match="must name an importable module:object"):
        registry.load(package, name, "Part")


def test_no_word_is_suggested_for_a_far_one():
    assert registry.did_you_mean("zzz", ["steps"]) == ""
