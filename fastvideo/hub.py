"""From a model's name to its folder and spec, and from a LoRA's to its file, without torch.

A model's name is a bundled one ("fastwan-nano"), a folder, or "owner/name" on the Hugging Face hub;
a LoRA's is a file, a folder with one, "owner/name" or "owner/name/file.safetensors" there.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastvideo import env, files, formats, registry
from fastvideo import spec as specs
from fastvideo.formats import diffusers
from fastvideo.log import logger
from fastvideo.spec import Spec

ZOO = Path(__file__).parent / "zoo"
DEFAULT_MODEL = "fastwan-nano"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILE = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)/(?P<file>.+\.safetensors)")
_LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_ADAPTER_CONFIG = "adapter_config.json"  # PEFT keeps alpha there
_SMALL_FILES = ("*.json", "*.txt", "*.model", "decoders/*")
_WEIGHTS = ("*.safetensors", "*.pth")


def bundled() -> list[str]:
    """List the models that come with the package.

    A folder with a `config.json` of its own is a single network: a world's classifier, no model.
    """
    folders = [p for p in ZOO.iterdir() if p.is_dir()] if ZOO.is_dir() else []
    return sorted(p.name for p in folders if not (p / "config.json").is_file())


def is_remote(name: str) -> bool:
    """Tell whether a model of this name is on the hub: neither bundled nor a folder or a run."""
    path = Path(name).expanduser()
    first = path.parts[0] if path.parts else ""
    near = path.exists() or first == "runs" or Path(first).is_dir()
    return name not in bundled() and not near and bool(_HUB_NAME.fullmatch(name))


@dataclass(frozen=True)
class OpenModel:
    """A model that was found: the name asked for, its spec, its folder.

    Without `has_weights` only the small files of a hub repository are there; see `fetched`.
    """

    name: str
    spec: Spec
    folder: Path
    has_weights: bool = True


def open_spec(name_or_path: str | Path, *, weights: bool = False) -> tuple[Spec, Path]:
    """Return spec and folder of `open_model`."""
    found = open_model(name_or_path, weights=weights)
    return found.spec, found.folder


def open_model(name_or_path: str | Path, *, weights: bool = False) -> OpenModel:
    """Find a model and read (or derive) its spec, with the dims of its networks filled in.

    weights: fetch the weights too, if the model is on the hub, once its small files are all right.
    Raises a one-line `ValueError` for an unknown name, a folder without a model, a wrong spec.
    """
    name = str(name_or_path)
    folder = _local(name)
    found = _read(name, folder or _download(name, _SMALL_FILES), has_weights=folder is not None)
    return fetched(found) if weights else found


def fetched(found: OpenModel) -> OpenModel:
    """Return a model with its weights here, those of the commit that its small files are of.

    Its spec is derived anew: whether a network has VSA's gates may stand in its weights alone.
    """
    if found.has_weights:
        return found
    folder = _download(found.name, (*_SMALL_FILES, *_WEIGHTS), revision=found.folder.name)
    return _read(found.name, folder, has_weights=True)


def find_lora(name: str | Path) -> Path:
    """Find a LoRA's file; one that was fetched from the hub before needs no network.

    Raises a one-line `ValueError` if there is none, or if a folder holds several and none of them
    has a usual name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _only_lora(path, str(name))
    if not path.is_absolute() and not Path(path.parts[0] if path.parts else "").is_dir():
        match = _HUB_FILE.fullmatch(str(name))
        if match and ".." not in Path(match["file"]).parts:
            patterns = [match["file"], str(Path(match["file"]).with_name(_ADAPTER_CONFIG))]
            found = _lora_snapshot(match["repo"], *patterns) / match["file"]
            if found.is_file():
                return found
            raise ValueError(f"LoRA {str(name)!r}: {match['repo']} has no file {match['file']}")
        if _HUB_NAME.fullmatch(str(name)) and path.suffix != ".safetensors":
            # not every file: some repositories hold dozens of LoRAs
            folder = _lora_snapshot(str(name), *_LORA_FILES, _ADAPTER_CONFIG)
            return _only_lora(folder, str(name), anything=False)
    raise ValueError(
        f"LoRA {str(name)!r} is neither a file, nor a folder, nor a hub name like 'owner/name' or"
        " 'owner/name/file.safetensors'"
    )


def lora_hash(path: Path) -> str:
    """Return the SHA-256 of a LoRA's file, and of PEFT's config beside it if it has one."""
    parts = [path]
    if path.name == _LORA_FILES[1] and path.with_name(_ADAPTER_CONFIG).is_file():
        parts.append(path.with_name(_ADAPTER_CONFIG))
    return _sha256(tuple((str(part), files.stamp(part)) for part in parts))


def cache_dir() -> Path:
    """Return the folder where the hub's client keeps what it fetched."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _filled(spec: Spec, configs: dict[str, dict[str, object]], folder: Path) -> Spec:
    networks = {
        part: getattr(spec, part).model_copy(update={"config": config})
        for part, config in configs.items()
    }
    true = diffusers.compression(configs["dit"], configs["vae"])
    if true != spec.compression:
        raise ValueError(
            f"compression {spec.compression} in {folder / specs.FILE_NAME} contradicts the dims of "
            f"vae and transformer, which make it {true}"
        )
    return spec.model_copy(update=networks)


def _read(name: str, folder: Path, *, has_weights: bool) -> OpenModel:
    layout = formats.find(folder)
    own = specs.read(folder)
    if own is None:
        derived: Spec = layout.derive_spec(folder)
        for line in derived.derived if has_weights else ():
            logger.info("%s has no %s; %s", folder.name, specs.FILE_NAME, line)
        # a hub snapshot's folder is named by its commit
        title = name if folder.parent.name == "snapshots" else derived.name
        spec = derived.model_copy(update={"name": title})
    else:
        spec = _filled(own, layout.configs(folder), folder)
    spec = spec.model_copy(update={"unknown_keys": layout.unknown_keys(folder)})
    return OpenModel(name, spec, folder, has_weights)


def _local(name: str) -> Path | None:
    """Return the folder of a bundled name or a path; None for a name on the hub."""
    if name in bundled():
        return ZOO / name
    folder = Path(name).expanduser()
    if name and folder.is_dir():  # an empty path is the current folder
        return folder
    if folder.is_file():
        raise ValueError(f"model {name!r} is a file; give the folder that holds all of its parts")
    if _HUB_NAME.fullmatch(name) and not name.startswith("."):
        return None
    names = bundled()
    known = ", ".join(names) or "none"
    hint = registry.did_you_mean(name, names)
    raise ValueError(
        f"model {name!r} is neither bundled ({known}), nor a folder, nor a hub name like "
        f"'owner/name'{hint}"
    )


@functools.lru_cache(maxsize=64)
def _sha256(stamps: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    """Digest files; a stamp only tells a changed file from a known one."""
    digest = hashlib.sha256()
    for path, _ in stamps:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def _lora_snapshot(repository: str, *patterns: str) -> Path:
    """Ask the hub once for each process: a LoRA is looked up for every clip."""
    return _download(repository, patterns, what="LoRA")


def _only_lora(folder: Path, name: str, *, anything: bool = True) -> Path:
    """Return the file of a usual name, or the only one; on the hub only usual names are fetched."""
    usual = [folder / file for file in _LORA_FILES if (folder / file).is_file()]
    found = usual or sorted(p for p in folder.glob("*.safetensors") if anything and p.is_file())
    if len(found) == 1:
        return found[0]
    have = f"it has: {', '.join(p.name for p in found[:8])}" if found else "none has a usual name"
    raise ValueError(f"LoRA {name!r} must name one file: {name}/file.safetensors ({have})")


def _download(
    name: str, patterns: Sequence[str], *, what: str = "model", revision: str | None = None
) -> Path:
    """Return the snapshot of a hub repository; one that was fetched before needs no network."""
    from huggingface_hub import snapshot_download

    offline = env.is_offline()
    fetch = partial(snapshot_download, allow_patterns=[*patterns], local_files_only=offline)
    try:
        return Path(fetch(name, revision=revision) if revision else fetch(name))
    except Exception as error:  # the client raises its own, httpx's and the system's errors
        reason = str(error).strip().partition("\n")[0]
        state = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else reason
        raise ValueError(
            f"{what} {name!r} is not a folder here and cannot be fetched from the hub: {state}"
        ) from None
