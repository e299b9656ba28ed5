"""A loaded model: spec, networks, tokenizer, and where and in which type they run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastvideo import cpu, foreign, formats, registry, weights
from fastvideo.formats import PARTS
from fastvideo.hub import OpenModel, fetched, open_model
from fastvideo.log import logger
from fastvideo.lora import Loras
from fastvideo.models import decoder as decoders
from fastvideo.models.text.tokenizer import Tokenizer
from fastvideo.parallel.mesh import Meshes, alone
from fastvideo.spec import Spec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CLASSES = {"text": "TextEncoder", "dit": "DiT", "vae": "Vae"}
_SMALL_TEXT_PARAMS = 50_000_000


@dataclass(frozen=True)
class Model:
    """A bundle that stages read. Families share functions, not a base class: hence `Any`.

    folder: where it was loaded from; None for a model put together in memory.
    loras: what is merged into the denoiser's weights now, with the lock of threads that share them.
    decoder: what makes pixels of normalised latents in place of the VAE; None for the VAE itself.
    meshes: the processes that make a clip together, each with whole networks of its own.
    """

    spec: Spec
    dit: Any
    vae: Any
    text: Any
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    folder: Path | None = None
    loras: Loras = field(default_factory=Loras)
    decoder: Any = None
    meshes: Meshes = field(default_factory=alone)


class MissingPart:
    """The place of a part that was not loaded: its config is known, any other use is refused."""

    def __init__(self, part: str, config: Any = None) -> None:
        self._part = part
        if config is not None:
            self.config = config

    def __getattr__(self, name: str) -> Any:
        """Refuse attributes and methods."""
        if name.startswith("__"):  # what copy and pickle ask every object for
            raise AttributeError(name)
        raise AssertionError(f"the {self._part} was not loaded, and its {name} is wanted")

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Refuse a call."""
        raise AssertionError(f"the {self._part} was not loaded, and it is called")


def load(
    name_or_path: str | Path | OpenModel,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    parts: Collection[str] = PARTS,
    decoder: str | Path | None = None,
) -> Model:
    """Load a model strictly, in evaluation mode and without gradients.

    device: "auto" is CUDA if there is one.
    dtype: "auto" is bfloat16 where the device computes in it; a small text encoder stays float32.
    parts: of "text", "dit", "vae"; the others cannot be used.
    decoder: a small decoder to use in place of the VAE's own, by its name in the folder's decoders/
        or its path; None or "vae" is the VAE's own.
    Raises a one-line `ValueError` for whatever is wrong with the name or the folder.
    """
    unknown = sorted(set(parts) - set(PARTS))
    assert not unknown, f"parts {unknown} are none of {PARTS}"
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)  # what is wrong with these is said before weights are fetched
    found = name_or_path if isinstance(name_or_path, OpenModel) else open_model(name_or_path)
    found = fetched(found)
    spec, folder = found.spec, found.folder
    foreign.warn(spec.unknown_keys, source=folder)
    layout = formats.find(folder)
    loaded: dict[str, Any] = {
        part: _load_part(spec, layout, folder, part, device=device, dtype=dtype)
        if part in parts
        else MissingPart(part, _config(spec, part))
        for part in PARTS
    }
    tokenizer: Any = MissingPart("tokenizer")
    if "text" in parts:
        tokenizer = Tokenizer.load(layout.tokenizer_folder(folder))
        _check_vocabulary(tokenizer, spec, folder)
    return Model(
        spec,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        folder=folder,
        decoder=load_decoder(spec, folder, decoder, device=device, dtype=dtype),
        **loaded,
    )


def build_part(spec: Spec, part: str) -> nn.Module:
    """Build one network of a spec on the meta device."""
    config = _config(spec, part)
    make = registry.load(f"fastvideo.models.{part}", getattr(spec, part).family, _CLASSES[part])
    module: nn.Module = weights.build(lambda: make(config))
    return module


def pick_device(device: str | torch.device) -> torch.device:
    """Resolve "auto"; raise `ValueError` for a device that is not there."""
    if device == "auto":
        chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logger.info("device %s (auto)", chosen)
        return chosen
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, but torch finds no CUDA device")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # the types that absent devices raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device} cannot be used here: {reason}") from None
    return chosen


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Resolve "auto" and names; raise `ValueError` for an unknown one."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        chosen = torch.bfloat16 if _computes_bfloat16(device) else torch.float32
        logger.info("dtype %s (auto, on %s)", chosen, device)
        return chosen
    if dtype not in DTYPES:
        hint = registry.did_you_mean(dtype, DTYPES)
        raise ValueError(f"dtype {dtype!r} is unknown{hint} (known: auto, {', '.join(DTYPES)})")
    return DTYPES[dtype]


def _config(spec: Spec, part: str) -> Any:
    network = getattr(spec, part)
    return registry.load(f"fastvideo.models.{part}", network.family, "Config").parse(network.config)


def _check_vocabulary(tokenizer: Tokenizer, spec: Spec, folder: Path) -> None:
    known = int(spec.text.config.get("vocab_size", tokenizer.vocab_size))
    if tokenizer.vocab_size > known:
        raise ValueError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids, its text encoder {known}"
        )


def _computes_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 is fast here, not only possible: every CPU can emulate it slowly."""
    return cpu.has_bfloat16() if device.type == "cpu" else device.type == "cuda"


def load_decoder(
    spec: Spec,
    folder: Path,
    name: str | Path | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module | None:
    """Load a small decoder for a model's folder; None for the VAE's own."""
    if name is None or str(name) == decoders.OWN:
        return None
    found = decoders.locate(name, folder)
    vae = asdict(_config(spec, "vae"))
    decoders.check_fits(
        decoders.read_config(found), source=found, compression=spec.compression, vae=vae
    )
    net: nn.Module = decoders.read(found, device=device, dtype=dtype)
    num_params = sum(p.numel() for p in net.parameters())
    logger.info("decoder %s: %s parameters, in place of the VAE's own", found, f"{num_params:,}")
    return net


def _load_part(
    spec: Spec,
    layout: ModuleType,
    folder: Path,
    part: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    try:
        module = build_part(spec, part)
    except ValueError as error:
        raise ValueError(f"{error} (from the config of the {part} in {folder})") from None
    family = registry.module(f"fastvideo.models.{part}", getattr(spec, part).family)
    num_params = sum(p.numel() for p in module.parameters())
    if part == "text" and num_params < _SMALL_TEXT_PARAMS:
        dtype = torch.float32  # costs nothing, and every later number depends on these states
    weights.load_into(
        module,
        layout.tensors(folder, part),
        source=f"{part} in {folder}",
        dtype=dtype,
        device=device,
        keep_float32=family.KEEP_FLOAT32 if part == "dit" else (),
        aliases=family.ALIASES if part == "text" else None,
    )
    logger.info("%s %s: %s parameters in %s", part, spec.name, f"{num_params:,}", dtype)
    return module.eval().requires_grad_(False)
