"""A model folder with LoRAs in its weights: a copy in which the denoiser's file is new.

So is how it is sampled, if a LoRA brings that along.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from fastvideo import files, formats, hub, lora, sampler_note, spec, weights
from fastvideo.formats import diffusers, wan
from fastvideo.lora.file import read, some
from fastvideo.model import build_part, load
from fastvideo.sampling import LoraUse
from fastvideo.spec import UNSTATED, Provenance, Sampler, Spec


def merge(model: str | Path, loras: Sequence[LoraUse], folder: str | Path) -> Path:
    """Write `folder`, in the layout of the model's own; it appears whole or not at all.

    Every weight keeps its type; sums are made in float32. A LoRA that was distilled brings the
    scheduler, steps, guidance and attention of the folder's spec. Raises `ValueError` if a LoRA
    does not fit, two want other samplers, or the folder is there or cannot be written.
    """
    target = Path(folder)
    files.check_new(target)
    own, source = hub.open_spec(model, weights=True)
    layout = formats.find(source)
    uses, net = lora.uses_of(loras), build_part(own, "dit")
    wanted = _wanted(uses, net)
    if wanted and layout is wan:
        raise ValueError(
            f"{source} is a folder of the original Wan, which cannot say how it is sampled, and"
            f" {', '.join(one.path for one in loras)} would; merge into a folder of diffusers"
        )
    made = sampler_note.applied(wanted, own) if wanted else own
    fits: lora.Fits = {}
    parts = lora.collect(uses, net, known=fits)
    tensors = dict(layout.tensors(source, "dit"))
    tensors |= {name: lora.merged(tensors[name], added) for name, added in parts.items()}
    if layout is wan:
        tensors = {wan.names("dit").to_original(name) or name: t for name, t in tensors.items()}
    part = Path() if layout is wan else Path(diffusers.SUBFOLDERS["dit"])
    stem = wan.STEM if layout is wan else diffusers.stem(source, "dit")
    with files.folder(target, overwrite=False) as aside:
        shutil.copytree(source, aside, ignore=partial(_old, source / part), dirs_exist_ok=True)
        weights.save(aside / part / f"{stem}.safetensors", tensors)
        if wanted or spec.read(source) is not None:
            spec.write(_named(made, target.name, loras, [*fits.values()]), aside)
        if wanted:
            _write_stock_scheduler(made, aside)
        load(aside, device="cpu", parts=("dit",))  # strictly: what cannot be read takes no name
    return target


def _wanted(uses: Sequence[lora.Use], net: nn.Module) -> Sampler | None:
    """Return how the LoRAs of a network want to be sampled; `ValueError` if one is there in part.

    A style may lack some modules; what was distilled as a whole is nothing in part.
    """
    found: dict[str, Sampler] = {}
    for use in uses:
        wanted = sampler_note.read(use.path) if use.strength else None
        if wanted is None:
            continue
        lacking = lora.fit(read(use.path), net).unmatched
        if lacking:
            raise ValueError(
                f"{use.path} was distilled with {some(list(lacking))}, which the model has not;"
                " export its run as a whole: fastvideo export RUN --merge-lora"
            )
        found[str(use.path)] = wanted
    return sampler_note.agreed(found) if found else None


def _write_stock_scheduler(made: Spec, folder: Path) -> None:
    """Write the scheduler's config for stock diffusers; its other parts stay as they are."""
    config = diffusers.scheduler_config(made)
    tree = {"scheduler/scheduler_config.json": config}
    index = folder / "model_index.json"
    if index.is_file():
        kind = ["diffusers", config["_class_name"]]
        tree[index.name] = {**formats.read_json(index), "scheduler": kind}
    for name, values in tree.items():
        files.write_text(folder / name, json.dumps(values, indent=2) + "\n", overwrite=True)


def _old(part: Path, at: str, names: list[str]) -> list[str]:
    """Return what is not copied: hidden files, and the denoiser's old files of weights."""
    endings = (".safetensors", ".safetensors.index.json")
    return [n for n in names if n.startswith(".") or (Path(at) == part and n.endswith(endings))]


def _licence(use: LoraUse) -> str:
    """Return what a LoRA's own export says of its licence."""
    header = weights.read_metadata(hub.find_lora(use.path))
    try:
        said = dict(json.loads(header.get("provenance", "{}")))
    except (TypeError, ValueError):  # another tool's word
        said = {}
    return str(said.get("licence") or UNSTATED)


def _named(own: Spec, name: str, loras: Sequence[LoraUse], lacking: Sequence[str]) -> Spec:
    added = [f"{Path(use.path).name} ({use.hash[:12]}) at {use.strength:g}" for use in loras]
    left = [f"not applied: {text}" for text in lacking if text]
    said = own.provenance
    parents = {own.name: said.licence or UNSTATED, **said.parents}
    parents |= {Path(use.path).name: _licence(use) for use in loras}
    provenance = Provenance(
        notes="; ".join([f"{own.name} + " + " + ".join(added), *left]), parents=parents
    )
    return own.model_copy(update={"name": name, "provenance": provenance})
