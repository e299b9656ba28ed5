"""From a model's name to its folder and spec, without torch.

A name is a bundled model ("wan-nano"), a folder, or "owner/name" on the Hugging Face hub.
"""

from __future__ import annotations

import re
from pathlib import Path

from fastvideo import env, formats, registry
from fastvideo import spec as specs
from fastvideo.formats import diffusers
from fastvideo.log import logger
from fastvideo.spec import Spec

ZOO = Path(__file__).parent / "zoo"
DEFAULT_MODEL = "wan-nano"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL_FILES = ("*.json", "*.txt", "*.model")
_WEIGHTS = ("*.safetensors", "*.pth")


def bundled() -> list[str]:
    """List the models that come with the package.

    A folder with a `config.json` of its own is a single network: a world's classifier, no model.
    """
    folders = [p for p in ZOO.iterdir() if p.is_dir()] if ZOO.is_dir() else []
    return sorted(p.name for p in folders if not (p / "config.json").is_file())


def open_spec(name_or_path: str | Path, *, weights: bool = False) -> tuple[Spec, Path]:
    """Find a model and read (or derive) its spec, with the dims of its networks filled in.

    weights: fetch the weights too, if the model is on the hub.
    Raises a one-line `ValueError` for an unknown name, a folder that is no model, a wrong spec.
    """
    folder = _locate(str(name_or_path), weights=weights)
    layout = formats.find(folder)
    own = specs.read(folder)
    if own is None:
        derived: Spec = layout.derive_spec(folder)
        for line in derived.derived:
            logger.info("%s has no %s; %s", folder.name, specs.FILE_NAME, line)
        # a hub snapshot's folder is named by its commit
        title = str(name_or_path) if folder.parent.name == "snapshots" else derived.name
        return derived.model_copy(update={"name": title}), folder
    return _filled(own, layout.configs(folder), folder), folder


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


def _locate(name: str, *, weights: bool) -> Path:
    if name in bundled():
        return ZOO / name
    folder = Path(name).expanduser()
    if name and folder.is_dir():  # an empty path is the current folder
        return folder
    if folder.is_file():
        raise ValueError(f"model {name!r} is a file; give the folder that holds all of its parts")
    if _HUB_NAME.fullmatch(name) and not name.startswith("."):
        return _download(name, weights=weights)
    names = bundled()
    known = ", ".join(names) or "none"
    hint = registry.did_you_mean(name, names)
    raise ValueError(
        f"model {name!r} is neither bundled ({known}), nor a folder, nor a hub name like "
        f"'owner/name'{hint}"
    )


def _download(name: str, *, weights: bool) -> Path:
    """Return the snapshot of a hub repository; one that was fetched before needs no network."""
    from huggingface_hub import snapshot_download

    patterns = [*_SMALL_FILES, *(_WEIGHTS if weights else ())]
    offline = env.is_offline()
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:  # the client raises its own, httpx's and the system's errors
        reason = str(error).strip().partition("\n")[0]
        state = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else reason
        raise ValueError(
            f"model {name!r} is not a folder here and cannot be fetched from the hub: {state}"
        ) from None
