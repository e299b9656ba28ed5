"""Small decoders to take in place of a VAE's own: one family per file, and where one is kept.

    place = locate("tiny", model_folder)      # <model_folder>/decoders/tiny, or a path
    check_fits(read_config(place), ...)       # torch-free for a folder
    net = read(place, dtype=torch.bfloat16)

A folder of a decoder holds `config.json` (the family and its dims) and `model.safetensors`; a
published file of weights alone serves as well. Nothing here takes one that was not asked for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo import files, registry
from fastvideo.log import logger
from fastvideo.shapes import Compression

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FOLDER = "decoders"  # of a model folder: one subfolder per decoder
OWN = "vae"  # asks for the VAE's own decoder
SUFFIXES = (".pth", ".pt", ".safetensors")
PUBLISHED = "taehv"  # the family of files that come without a config
_NEAR = 1e-4


def names(model_folder: str | Path) -> list[str]:
    """List the decoders in a model folder."""
    return sorted(path.parent.name for path in Path(model_folder).glob(f"{FOLDER}/*/{CONFIG}"))


def locate(name: str | Path, model_folder: str | Path) -> Path:
    """Find a decoder: a name in the model folder, else the path of a folder or file.

    Raises `ValueError` with the names that are there.
    """
    known = names(model_folder)
    if str(name) in known:
        return Path(model_folder) / FOLDER / str(name)
    path = Path(name).expanduser()
    if path.is_dir() and (path / CONFIG).is_file():
        return path
    if path.is_file() and path.suffix in SUFFIXES:
        return path
    hint = registry.did_you_mean(str(name), [OWN, *known])
    raise ValueError(
        f"decoder {str(name)!r} is neither one of {model_folder} ({', '.join([OWN, *known])}), nor"
        f" a folder with a {CONFIG}, nor a file of weights ({', '.join(SUFFIXES)}){hint}"
    )


def family(place: Path) -> str:
    """Return the name of a decoder's family."""
    return str(_values(place)["family"]) if place.is_dir() else PUBLISHED


def read_config(place: Path) -> Any:
    """Read a decoder's dims, those of a file without a config from its tensors.

    Raises `ValueError` for what no family can be built from.
    """
    if not place.is_dir():
        return registry.module(__name__, PUBLISHED).dims_of(tensors(place), source=place)
    values = _values(place)
    config = import_module(f"fastvideo.models.{values.pop('family')}_config").Config
    try:
        return config.parse(values)
    except ValueError as error:
        raise ValueError(f"{error} (from {place / CONFIG})") from None


def check_fits(
    config: Any, *, source: str | Path, compression: Compression, vae: Mapping[str, Any]
) -> None:
    """Raise `ValueError` if a decoder is made for other latents than those of a VAE.

    vae: the VAE's dims; its statistics are compared if both sides know theirs. Latent spaces of the
    same size are told apart by them.
    """
    channels = vae.get("z_dim", config.z_dim)
    if config.z_dim != channels:
        raise ValueError(
            f"decoder {source} takes latents of {config.z_dim} channels;"
            f" the model's have {channels}"
        )
    has, needs = (
        (x.temporal_stride, x.spatial_stride) if x is config else (x.temporal, x.spatial)
        for x in (config, compression)
    )
    if has != needs:
        raise ValueError(
            f"decoder {source} makes {has[0]} frames of {has[1]}x{has[1]} pixels from a latent;"
            f" the model needs {needs[0]} of {needs[1]}x{needs[1]}"
        )
    for key in ("latents_mean", "latents_std"):
        mine, theirs = getattr(config, key), tuple(vae.get(key, ()))
        if mine and theirs and any(abs(a - b) > _NEAR for a, b in zip(mine, theirs, strict=True)):
            raise ValueError(
                f"decoder {source} belongs to another VAE: its latents were normalised by other"
                f" statistics ({key} begins with {mine[0]:.4f}, the model's with {theirs[0]:.4f})"
            )


def read(
    place: Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Any:
    """Load a decoder strictly, for evaluation; `ValueError` if that fails."""
    from fastvideo import weights

    config, made = read_config(place), registry.module(__name__, family(place))
    net: Any = weights.build(lambda: made.Decoder(config))
    weights.load_into(net, tensors(place), source=place, dtype=dtype, device=device)
    return net.eval().requires_grad_(False)


def tensors(place: Path) -> dict[str, Tensor]:
    """Open a decoder's weights; a published file's encoder is left out, and the log says so."""
    from fastvideo import weights

    found = weights.Checkpoint(place / WEIGHTS if place.is_dir() else place)
    kept = {name: tensor for name, tensor in found.items() if not name.startswith("encoder.")}
    if len(kept) < len(found):
        logger.info("%s: %d tensors of an encoder are not used", place, len(found) - len(kept))
    return kept


def write(net: Any, folder: str | Path, *, family: str, dtype: torch.dtype) -> None:
    """Write a decoder's folder."""
    from fastvideo import weights

    values = {"family": family, **dataclasses.asdict(net.config)}
    files.write_text(Path(folder) / CONFIG, json.dumps(values, indent=2) + "\n", overwrite=True)
    weights.save(Path(folder) / WEIGHTS, weights.cast(net.state_dict(), dtype=dtype))


def _values(folder: Path) -> dict[str, Any]:
    """Read a folder's config; `ValueError` if it names no family of this package."""
    path = folder / CONFIG
    try:
        values = dict(json.loads(files.read_text(path)))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as the config of a decoder: {error}") from None
    legal = registry.names(__name__)
    if values.get("family") not in legal:
        raise ValueError(
            f"family {values.get('family')!r} in {path} is no decoder (known: {', '.join(legal)})"
        )
    return values
