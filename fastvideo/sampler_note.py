"""How a LoRA is sampled: an entry in the header of its file, and what a model makes of it.

wanted = read(path)                             # None in a file of another tool
if wanted: check(path, wanted, spec)            # refuses a model that is sampled otherwise
if wanted: spec = applied(wanted, spec)         # that of a model with the LoRA in its weights

A LoRA that was distilled makes noise at a model's own steps; nothing in its weights would say so.
Torch comes in only to compare schedulers that are spelled differently.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastvideo import attention as patterns
from fastvideo.config import parse
from fastvideo.formats import METADATA, read_header
from fastvideo.spec import Attention, Sampler, Scheduler, Spec

KEY = "fastvideo_sampler"
"""The entry of the header, as JSON."""
_OWN = ("scheduler", "attention")  # entries of a spec; the others are among its defaults


def header(wanted: Sampler) -> dict[str, str]:
    """Return the entry to write."""
    return {KEY: json.dumps(wanted.model_dump(mode="json", exclude_none=True))}


def read(path: str | Path) -> Sampler | None:
    """Read a file's entry; None if it has none, `ValueError` if it is wrong.

    A damaged file has none either: whoever reads its tensors says what is wrong.
    """
    entries = read_header(Path(path)).get(METADATA, {})
    text = entries.get(KEY) if isinstance(entries, dict) else None
    if text is None:
        return None
    source = f"{KEY} in the header of {path}"
    try:
        values = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    return parse(Sampler, values, source=source)


def of(spec: Spec) -> Sampler:
    """Return how a model is sampled when a request says nothing."""
    return Sampler(
        scheduler=spec.scheduler,
        num_inference_steps=spec.defaults.num_inference_steps,
        guidance_scale=spec.defaults.guidance_scale,
        attention=spec.attention,
    )


def check(path: str | Path, wanted: Sampler, spec: Spec, *, named: Collection[str] = ()) -> None:
    """Raise `ValueError` if a model is sampled otherwise than a LoRA wants.

    named: entries that the request itself decides, which are not compared.
    """
    has = of(spec)
    others = [
        f"{key} {_text(value)}, not {_text(getattr(has, key))}"
        for key, value in _given(wanted).items()
        if key not in named and not _same(value, getattr(has, key))
    ]
    if others:
        raise ValueError(
            f"lora {path} is not sampled as {spec.name} is: {'; '.join(others)}; write a folder"
            " that is sampled so: fastvideo lora merge MODEL LORA -o FOLDER"
        )


def agreed(found: Mapping[str, Sampler]) -> Sampler:
    """Return what several LoRAs want together; `ValueError` names two that differ."""
    entries: dict[str, tuple[str, Any]] = {}
    for path, wanted in found.items():
        for key, value in _given(wanted).items():
            first, other = entries.setdefault(key, (path, value))
            if not _same(value, other):
                raise ValueError(
                    f"loras {first} and {path} are not sampled alike: {key} {_text(other)} and"
                    f" {_text(value)}; merge one of the two"
                )
    return Sampler(**{key: value for key, (_, value) in entries.items()})


def applied(wanted: Sampler, spec: Spec) -> Spec:
    """Return the spec of a model that is sampled so; `ValueError` for what this release lacks."""
    given = _given(wanted)
    for value in given.values():
        _settled(value)
    own = {key: given.pop(key) for key in _OWN if key in given}
    known = tuple(f"{key}:" for key in own)
    own["derived"] = tuple(line for line in spec.derived if not line.startswith(known))
    own["defaults"] = spec.defaults.model_copy(update=given)
    made = spec.model_copy(update=own)
    pattern = patterns.parse(made.attention.pattern, made.attention.args)
    has_gates = bool(spec.dit.config.get("gate_compress"))
    patterns.check_gates(pattern, has_gates=has_gates, name=spec.name)
    return made


def _given(wanted: Sampler) -> dict[str, Any]:
    return {key: value for key, value in wanted if value is not None}


def _same(a: Any, b: Any) -> bool:
    return bool(a == b or _settled(a) == _settled(b))


def _settled(value: Any) -> Any:
    """Return an entry with its defaults filled in."""
    if isinstance(value, Attention):
        return patterns.parse(value.pattern, value.args)
    if isinstance(value, Scheduler):
        from fastvideo import schedulers  # torch comes in here

        return schedulers.create(value.name, value.args)
    return value


def _text(value: Any) -> str:
    if isinstance(value, Attention):
        return patterns.write(patterns.parse(value.pattern, value.args))
    return f"{value.name} {value.args}" if isinstance(value, Scheduler) else f"{value:g}"
