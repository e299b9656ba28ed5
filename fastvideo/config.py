"""Strict, frozen configuration: one schema for TOML, command line, HTTP and UI.

class Recipe(Strict):
    steps: int = 10

recipe = parse(Recipe, read_toml(path), source=str(path))
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError

from fastvideo import files
from fastvideo.log import given_twice, warned
from fastvideo.registry import did_you_mean


class Strict(BaseModel):
    """A frozen value that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


M = TypeVar("M", bound=BaseModel)
Keys: TypeAlias = Sequence[str | int]
"""The path of a value in a tree: keys of tables and indices of lists."""
Source: TypeAlias = str | Callable[[Keys], str]
"""What errors name as the origin of values, or a function from the path of a value to that."""


def where(source: Source, keys: Keys = ()) -> str:
    """Name a source, or the place in it that gave the value at a path."""
    return source if isinstance(source, str) else source(keys)


def parse(model: type[M], values: Mapping[str, Any], *, source: Source) -> M:
    """Build `model` from a tree of values; one-line `ValueError` naming key, rule and source."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where(source)} must hold keys and values, not {type(values).__name__}")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        found = error.errors(include_url=False)
        inner = {e["loc"][:depth] for e in found for depth in range(len(e["loc"]))}
        # pydantic calls a list too short that has a wrong item
        lines = [_explain(model, e, _origin(source, e)) for e in found if e["loc"] not in inner]
        raise ValueError("; ".join(lines)) from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file; raise `ValueError` naming the file and line if it cannot be parsed."""
    try:
        return tomllib.loads(files.read_text(path))
    except FileNotFoundError:
        raise ValueError(f"config {path} does not exist") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config {path} is not valid TOML: {error}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"config {path} cannot be read: {error}") from None


def toml_line(path: str | Path, keys: Keys) -> str:
    """Return `path:line` of a value in a TOML file, or of the nearest table or list around it.

    It is found in the text, since tomllib keeps no lines: a multi-line string may mislead it.
    """
    around = [
        (len(found), -number)
        for number, found in _toml_paths(files.read_text(path))
        if found == list(keys[: len(found)])
    ]
    return f"{path}:{-max(around)[1]}" if around else str(path)


def set_word(changes: Mapping[str, Any], keys: Keys) -> str | None:
    """Return the `--set` that gave the value at a path; None if it is not among the changes."""
    tree: Any = changes
    for depth, key in enumerate(keys):
        if not isinstance(tree, Mapping):  # a list or table that was written as one value
            return f"--set {'.'.join(map(str, keys[:depth]))}"
        if key not in tree:
            return None
        tree = tree[key]
    return f"--set {'.'.join(map(str, keys))}" if keys else None


def assignments(pairs: Iterable[str]) -> dict[str, Any]:
    """Turn `a.b=value` words (from --set) into a tree; values are TOML, bare words text.

    Logs what is given twice.
    """
    tree: dict[str, Any] = {}
    pairs = tuple(pairs)
    warned(repeated(pairs))
    for pair in pairs:
        key, equals, text = pair.partition("=")
        keys = [part.strip() for part in key.split(".")]
        if not equals or not all(keys):
            raise ValueError(f"--set {pair!r} must look like key.subkey=value")
        tree = merge(tree, _nested(keys, _value(text.strip())))
    return tree


def repeated(pairs: Iterable[str]) -> tuple[str, ...]:
    """Return a line for each key that several `--set` give."""
    return given_twice(f"--set {pair.partition('=')[0].strip()}" for pair in pairs)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the leaves of `over` on top; neither is changed."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        out[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return out


_TOML_LINE = re.compile(r"""\s*(\[*)\s*([\w."' -]+?)\s*[]=]""")


def _toml_paths(text: str) -> Iterator[tuple[int, list[str | int]]]:
    """Yield (line, path) of every key and header of a TOML text."""
    table, counts = list[str | int](), Counter[str]()
    for number, line in enumerate(files.lines(text), start=1):
        if match := _TOML_LINE.match(line):
            brackets, words = match.groups()
            names: list[str | int] = [word.strip(" \"'") for word in words.split(".")]
            if brackets:
                table = [*names, counts[words]] if brackets == "[[" else names
                counts[words] += 1
            yield number, table if brackets else [*table, *names]


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if keys[1:] else value}


def _value(text: str) -> Any:
    try:
        tree = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    is_whole = len(tree) == 1 and (text[0] in "\"'[{" or "#" not in text)
    return tree["value"] if is_whole else text  # else TOML would drop a comment or a second line


def _origin(source: Source, error: Any) -> str:
    """Return where a wrong value came from; what is missing came from nowhere, but its table."""
    return where(source, error["loc"][:-1] if error["type"] == "missing" else error["loc"])


def _explain(model: type[BaseModel], error: Any, source: str) -> str:
    path = [str(part) for part in error["loc"]]
    keys, shown = _keys_at(model, path[:-1])
    where = ".".join([*shown, *path[-1:]])
    if error["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        hint = did_you_mean(path[-1], keys)
        return f"{where} in {source} is unknown{hint}"
    if error["type"] == "missing":
        return f"{where} is missing in {source}"
    if error["type"] == "union_tag_invalid":
        return _explain_tag(where, error["ctx"], source)
    if error["type"] == "union_tag_not_found":
        key = error["ctx"]["discriminator"].replace("'", "")
        return f"{where}.{key} is missing in {source}"
    value = json.dumps(error["input"], default=repr)
    given = f"{where} {value}" if where else ""
    return f"{given} in {source}: {_rule(error)}".strip()


def _explain_tag(where: str, context: Mapping[str, Any], source: str) -> str:
    """Name the key that chooses between tables; pydantic would quote the whole table."""
    key, legal = (str(context[k]).replace("'", "") for k in ("discriminator", "expected_tags"))
    hint = did_you_mean(context["tag"], legal.split(", "))
    return (
        f"{where}.{key} {json.dumps(context['tag'])} in {source} is unknown{hint} (known: {legal})"
    )


def _rule(error: Any) -> str:
    """Return the rule that a value breaks, its limit in plain words."""
    limits = {"greater_than_equal": ("at least", "ge"), "less_than_equal": ("at most", "le")}
    if error["type"] in limits:
        words, key = limits[error["type"]]
        return f"must be {words} {error['ctx'][key]}"
    message: str = error["msg"].removeprefix("Value error, ")
    return message.replace("Input should ", "must ", 1)


def _keys_at(model: type, path: list[str]) -> tuple[list[str], list[str]]:
    """Return the keys of the table at a path, and the path without the tags of unions."""
    models, shown = [model], list[str]()
    for part in path:
        chosen = [m for m in models if part in _tags(m)] if len(models) > 1 else []
        if chosen:
            models = chosen
            continue
        shown.append(part)
        # a table of tables or a list: its names and indices stay with the model at hand
        models = _inner_models(_fields(models[0]).get(part)) or models
    return list(_fields(models[0])), shown


def _tags(model: type) -> list[Any]:
    """Return the values of a model's fields that have only one."""
    kinds = [kind for kind in _fields(model).values() if get_origin(kind) is Literal]
    return [get_args(kind)[0] for kind in kinds if len(get_args(kind)) == 1]


def _fields(model: type) -> dict[str, Any]:
    if issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    return get_type_hints(model)


def _inner_models(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        is_model = issubclass(annotation, BaseModel) or is_dataclass(annotation)
        return [annotation] if is_model else []
    return [model for part in get_args(annotation) for model in _inner_models(part)]
