"""Parts of models that a worker holds: loaded for their stage, freed for others' memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastvideo import hub
from fastvideo.hub import OpenModel
from fastvideo.log import logger
from fastvideo.model import Model, build_part, load
from fastvideo.parallel.mesh import Meshes
from fastvideo_inference import recipe
from fastvideo_inference.recipe import DecoderId, ModelId

_GIB = 2**30
_FIELDS = {"text": ("text", "tokenizer"), "dit": ("dit", "loras"), "vae": ("vae", "decoder")}
_Key = tuple[str, str, str]  # model, part, path of a small decoder in place of the VAE's


class Parts:
    """Loaded parts of any number of models, the least recently used freed first.

    `load_s` holds the seconds of loading those parts that the last call of `model` lacked.
    """

    def __init__(
        self, meshes: Meshes, *, memory: float | None, loading: Callable[[], None]
    ) -> None:
        self._meshes = meshes
        self._limit = None if memory is None else memory * _GIB
        self._loading = loading
        self._bases: dict[str, tuple[OpenModel, Model]] = {}  # without weights
        self._parts: OrderedDict[_Key, Model] = OrderedDict()
        self._ids: dict[str, ModelId] = {}
        self._sizes: dict[_Key, int] = {}
        self.load_s: dict[str, float] = {}

    def model(self, name: str, parts: Sequence[str], *, decoder: str = "") -> Model:
        """Return a model whose `parts` are loaded; with a `decoder`, it is in the VAE's place."""
        found, base = self._base(name)
        device = self._meshes.device
        keys: list[_Key] = [(name, part, decoder if part == "vae" else "") for part in parts]
        missing = [key for key in keys if key not in self._parts]
        self.load_s = {}
        if missing:
            self._loading()
        for key in missing:
            started = time.perf_counter()
            self._make_room(self._size(base, key), keep=keys)
            own = () if key[2] else (key[1],)
            self._parts[key] = load(found, device=device, parts=own, decoder=key[2] or None)
            self.load_s[key[1]] = time.perf_counter() - started
        fields: dict[str, Any] = {}
        for key in keys:
            self._parts.move_to_end(key)
            fields |= {name: getattr(self._parts[key], name) for name in _FIELDS[key[1]]}
        return replace(base, meshes=self._meshes, **fields)

    def ids(self, name: str, *, decoder: str = "") -> tuple[ModelId, DecoderId | None]:
        """Return what a recipe says of a model and its decoder."""
        found, _ = self._base(name)
        if name not in self._ids:
            digest = recipe.fingerprint(found.folder)
            self._ids[name] = ModelId(
                name_or_path=found.name, spec=found.spec.name, fingerprint=digest
            )
        return self._ids[name], recipe.decoder_id(decoder or None, found.spec, found.folder)

    def _base(self, name: str) -> tuple[OpenModel, Model]:
        if name not in self._bases:
            found = hub.open_model(name, weights=True)
            self._bases[name] = found, load(found, device=self._meshes.device, parts=())
        return self._bases[name]

    def _make_room(self, size: int, *, keep: Sequence[_Key]) -> None:
        if self._limit is None:
            return
        held = {key: self._sizes[key] for key in self._parts}
        for key in [key for key in self._parts if key not in keep]:
            if sum(held.values()) + size <= self._limit:
                return
            logger.info("%s of %s is freed", key[1], key[0])
            del self._parts[key], held[key]  # at once: networks are in no cycles of references
            if self._meshes.device.type == "cuda":
                torch.cuda.empty_cache()

    def _size(self, model: Model, key: _Key) -> int:
        """Return the bytes of a part's weights, as its type is when it is loaded."""
        if key not in self._sizes:
            # a small decoder counts for nothing
            own = () if key[2] else build_part(model.spec, key[1]).parameters()
            self._sizes[key] = sum(p.numel() for p in own) * model.dtype.itemsize
        return self._sizes[key]
