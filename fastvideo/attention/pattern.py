"""Attention patterns: which token sees which, as values without a size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastvideo.registry import did_you_mean


@dataclass(frozen=True)
class Dense:
    """Every token sees every token."""


Pattern = Dense

_PATTERNS: dict[str, type[Pattern]] = {"dense": Dense}


def parse(name: str, args: Mapping[str, Any] | None = None) -> Pattern:
    """Make a pattern from a spec's name and arguments; `ValueError` names what is unknown."""
    if name not in _PATTERNS:
        hint = did_you_mean(name, _PATTERNS)
        raise ValueError(
            f"attention pattern {name!r} is unknown{hint} (known: {', '.join(_PATTERNS)})"
        )
    kind = _PATTERNS[name]
    legal = kind.__dataclass_fields__
    for key in args or {}:
        if key not in legal:
            known = ", ".join(legal) or "none"
            hint = did_you_mean(key, legal)
            raise ValueError(
                f"attention pattern {name!r} has no argument {key!r}{hint} (known: {known})"
            )
    return kind(**(args or {}))
