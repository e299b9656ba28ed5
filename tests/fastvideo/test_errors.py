"""Errors as one line, and those that are found before any work is done."""

from __future__ import annotations

import pytest

from fastvideo import errors


def test_refusing_turns_a_value_error_into_a_refusal():
    with pytest.raises(errors.RefusedError, match=r"a\.mp4: Permission denied"), errors.refusing():
        raise PermissionError(13, "Permission denied", "a.mp4")
    with pytest.raises(errors.RefusedError, match="no such thing"), errors.refusing():
        raise ValueError("no such\n  thing")


def test_refusing_leaves_a_fault_of_ours_as_it_is():
    with pytest.raises(AssertionError, match="ours"), errors.refusing():
        raise AssertionError("ours")
