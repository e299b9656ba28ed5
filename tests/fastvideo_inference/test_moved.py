"""Documented names of the last release are still read, with a warning that says the new ones."""

from __future__ import annotations

from importlib import import_module

import pytest
from fastvideo_inference import events, moved

from fastvideo import stages


@pytest.mark.parametrize("old", moved.NEW)
def test_a_name_that_moved_is_read_with_a_warning(old: str):
    module, _, name = old.rpartition(".")
    with pytest.warns(
        DeprecationWarning, match=rf"^{old} is now {moved.NEW[old]}\.{name};"
    ) as told:
        found = getattr(import_module(module), name)
    assert found is getattr(import_module(moved.NEW[old]), name)
    assert told[0].filename == __file__, "the line to change"


def test_a_name_is_imported_from_an_old_module_and_others_are_not_there():
    with pytest.warns(DeprecationWarning, match="Done"):
        from fastvideo_inference.events import Done
    assert Done is stages.Done
    with pytest.raises(
        AttributeError, match=r"module 'fastvideo_inference.events' has no .* 'Dome'"
    ):
        _ = events.Dome
