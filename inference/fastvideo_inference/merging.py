"""A model folder with LoRAs in its weights: a copy in which only the denoiser's file is new."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fastvideo import formats, hub, lora, spec, weights
from fastvideo.formats import diffusers, wan
from fastvideo.model import build_part, load
from fastvideo.spec import Spec
from fastvideo_inference.request import LoraUse
from fastvideo_inference.stages.denoise import uses_of


def merge(model: str | Path, loras: Sequence[LoraUse], folder: str | Path) -> Path:
    """Write `folder`, in the layout of the model's own; it appears whole or not at all.

    Every weight keeps its type; sums are made in float32. Raises `ValueError` if a LoRA does not
    fit, or the folder is there or cannot be written.
    """
    target = Path(folder)
    if target.exists():
        raise ValueError(f"{target} exists; choose another folder or remove it")
    own, source = hub.open_spec(model, weights=True)
    layout = formats.find(source)
    parts = lora.collect(uses_of(loras), build_part(own, "dit"))
    tensors = dict(layout.tensors(source, "dit"))
    tensors |= {name: lora.merged(tensors[name], added) for name, added in parts.items()}
    if layout is wan:
        tensors = {wan.names("dit").to_original(name) or name: t for name, t in tensors.items()}
    part = Path() if layout is wan else Path(diffusers.SUBFOLDERS["dit"])
    stem = wan.STEM if layout is wan else diffusers.stem(source, "dit")
    aside = target.with_name(f".{target.name}.part")
    try:
        shutil.copytree(source, aside, ignore=partial(_old, source / part))
        weights.save(aside / part / f"{stem}.safetensors", tensors)
        if spec.read(source) is not None:
            spec.write(_named(own, target.name, loras), aside)
        load(aside, device="cpu", parts=("dit",))  # strictly: what cannot be read takes no name
        aside.rename(target)
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _old(part: Path, at: str, names: list[str]) -> list[str]:
    """Return the denoiser's old files of weights, which are not copied."""
    endings = (".safetensors", ".safetensors.index.json")
    return [name for name in names if Path(at) == part and name.endswith(endings)]


def _named(own: Spec, name: str, loras: Sequence[LoraUse]) -> Spec:
    added = [f"{Path(use.path).name} ({use.hash[:12]}) at {use.strength:g}" for use in loras]
    notes = "; ".join([*filter(None, [own.provenance.notes]), f"{own.name} + " + " + ".join(added)])
    provenance = own.provenance.model_copy(update={"notes": notes})
    return own.model_copy(update={"name": name, "provenance": provenance})
