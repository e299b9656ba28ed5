"""The name of a component is the name of its file: find it, list them, suggest a near miss."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import Any


def did_you_mean(word: str, legal: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest legal word, whatever its case; else nothing."""
    small = {x.lower(): x for x in legal}
    near = difflib.get_close_matches(word.lower(), list(small), n=1)
    return f"; did you mean {small[near[0]]!r}?" if near else ""


def names(package: str) -> list[str]:
    """List the components of a package: its public modules, sorted, without importing them."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(m.name for m in found if not m.name.startswith("_"))


def module(package: str, name: str) -> ModuleType:
    """Import the component `name` of `package`; `ValueError` with the legal names if unknown."""
    legal = names(package)
    if name not in legal:
        kind = package.rpartition(".")[2].replace("_", " ")
        kind = f"{kind[:-3]}y" if kind.endswith("ies") else kind.removesuffix("s")
        hint = did_you_mean(name, legal)
        raise ValueError(f"{kind} {name!r} is unknown{hint} (known: {', '.join(legal)})")
    return importlib.import_module(f"{package}.{name}")


def load(package: str, name: str, attribute: str) -> Any:
    """Return `attribute` of the component `name`, or the object that `module:object` names."""
    if ":" in name:
        return _outside(name)
    return getattr(module(package, name), attribute)


def _outside(name: str) -> Any:
    path, _, target = name.partition(":")
    try:
        return getattr(importlib.import_module(path), target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} must name an importable module:object: {error}") from error
