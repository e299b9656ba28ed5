"""The recipe that travels inside every clip: enough to make the same frames again."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, model_serializer

import fastvideo
from fastvideo import hub, media
from fastvideo.config import Strict, parse
from fastvideo.models import decoder as decoders
from fastvideo.sampling import LoraUse, SamplingParams
from fastvideo.spec import Spec

if TYPE_CHECKING:
    from fastvideo.lora import Loras

# The comment tag is the one that every player shows and every copy keeps.
TAG = "comment"
_SAMPLE_BYTES = 1 << 20


class ModelId(Strict):
    """Which weights: the name asked for, the spec's name, and a fingerprint of the files."""

    name_or_path: str
    spec: str
    fingerprint: str


class DecoderId(Strict):
    """Which small decoder, where the VAE's own was not used: the name or path, and its files."""

    name_or_path: str
    fingerprint: str


@dataclass(frozen=True)
class Names:
    """What clients of a server call a model, a small decoder and LoRAs."""

    model: str
    decoder: str = ""
    lora: tuple[str, ...] = ()


class Recipe(Strict):
    """Everything that decided the frames of one clip."""

    version: int = 1
    model: ModelId
    request: SamplingParams
    device: str
    dtype: str
    latents: str = "seed"  # or "given", if the caller passed its own noise
    decoder: DecoderId | None = None
    backends: dict[str, str] = Field(default_factory=dict)  # that ran for self- and cross-attention
    versions: dict[str, str] = Field(default_factory=dict)
    unknown_keys: tuple[str, ...] = ()  # of configs that other libraries wrote; they do not count
    not_applied: tuple[str, ...] = ()  # modules of LoRAs that the network does not have

    @model_serializer(mode="wrap")
    def _without_newer(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what earlier releases do not know, where it says nothing."""
        written: dict[str, Any] = write(self)
        if not self.not_applied:
            del written["not_applied"]
        return written

    @field_serializer("request")
    def _as_written(self, request: SamplingParams) -> dict[str, Any]:
        """Leave out the backend that was left to us: `backends` says which one ran."""
        is_open = request.backend == "auto"
        return request.model_dump(mode="json", exclude={"backend"} if is_open else set())


def fingerprint(place: str | Path) -> str:
    """Digest a model folder: names and sizes of all files, and the first and last MiB of each.

    A decoder's folder or file likewise; the decoders that a model folder holds do not count for it,
    as a recipe names the one that was used.

    Reading 28 GB of weights to the end would take longer than making a clip; new weights of the
    same shapes differ in these parts too.
    """
    digest = hashlib.blake2b(digest_size=16)
    root = Path(place)
    files = (p for p in root.rglob("*") if p.suffix in {".json", ".safetensors", ".pth", ".pt"})
    for path in [root] if root.is_file() else sorted(files):
        name = path.relative_to(root)
        if name.parts[:1] == (decoders.FOLDER,):
            continue
        size = path.stat().st_size
        digest.update(f"{name.as_posix()}:{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def decoder_id(name: str | Path | None, spec: Spec, folder: Path) -> DecoderId | None:
    """Identify a small decoder for the model of a folder; None for the VAE's own.

    Raises `ValueError` if it is not there or, as far as its config says, does not fit. A file
    without a config is opened only with the model: it takes torch to read one.
    """
    if name is None or str(name) == decoders.OWN:
        return None
    place = decoders.locate(name, folder)
    if place.is_dir():
        config, vae = decoders.read_config(place), spec.vae.config
        decoders.check_fits(config, source=place, compression=spec.compression, vae=vae)
    return DecoderId(name_or_path=str(name), fingerprint=fingerprint(place))


def unknown_keys(loras: Iterable[LoraUse]) -> Iterator[str]:
    """Yield the keys of LoRAs' configs that are not known here, each behind its path."""
    from fastvideo.lora import file

    for use in loras:
        for entry in file.unknown_keys(hub.find_lora(use.path)):
            yield f"{use.path}: {entry}"


def not_applied(loras: Iterable[LoraUse], merged: Loras) -> Iterator[str]:
    """Yield what of LoRAs was not applied, each behind its path."""
    from fastvideo.lora import uses_of

    for one in loras:
        for use in uses_of([one]):
            if lacking := merged.lacking(use):
                yield f"{one.path}: {lacking}"


def versions() -> dict[str, str]:
    """Return the versions that may decide the last bit of a frame."""
    found = {"fastvideo": fastvideo.__version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "av"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # pragma: no cover - a core dependency
            found[name] = "missing"
    return found


def renamed(made: Recipe, names: Names) -> Recipe:
    """Return a recipe that names model, decoder and LoRAs as clients of a server do."""
    loras = []
    told = {"unknown_keys": made.unknown_keys, "not_applied": made.not_applied}
    for use, name in zip(made.request.lora, names.lora, strict=True):
        loras.append(use.model_copy(update={"path": name}))
        start = f"{use.path}: "
        told = {
            key: tuple(
                f"{name}: {x.removeprefix(start)}" if x.startswith(start) else x for x in all_
            )
            for key, all_ in told.items()
        }
    request = made.request.model_copy(update={"lora": tuple(loras)})
    new: dict[str, Any] = {"request": request, **told}
    new["model"] = made.model.model_copy(update={"name_or_path": names.model})
    if made.decoder:
        new["decoder"] = made.decoder.model_copy(update={"name_or_path": names.decoder})
    return made.model_copy(update=new)


def read_recipe(path: str | Path) -> Recipe:
    """Read the recipe out of a clip; raise `ValueError` if it holds none of ours."""
    import json

    text = media.read_metadata(path).get(TAG)
    try:
        values: Any = json.loads(text or "")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} carries no recipe of fastvideo in its {TAG} tag")
    return parse(Recipe, values, source=str(path))
