"""Fields of a network's config, read by one rule for every family."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from fastvideo.registry import did_you_mean


def read(config: type, values: Mapping[str, Any], *, ignored: Collection[str] = ()) -> Any:
    """Build a dataclass from JSON: lists become tuples, `ignored` and `_keys` do not count.

    Raises `ValueError` for a field that the dataclass does not have.
    """
    legal = [field.name for field in dataclasses.fields(config)]
    own: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith("_") or key in ignored:
            continue
        if key not in legal:
            raise ValueError(f"unknown config field {key!r}{did_you_mean(key, legal)}")
        own[key] = tuple(value) if isinstance(value, list) else value
    return config(**own)
