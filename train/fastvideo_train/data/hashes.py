"""Fingerprints of the encoders that stored data depends on, read from files that stay mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastvideo import formats
from fastvideo.formats import diffusers

VAE_PARTS = ("encoder.", "quant_conv.")


def of_weights(tensors: Mapping[str, Tensor], parts: tuple[str, ...] = ("",)) -> str:
    """Return a fingerprint of the tensors whose names begin with one of `parts`.

    Weights count as rounded to bfloat16: stored in it or in float32, an encoder is the same one.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(name for name in tensors if name.startswith(parts)):
        rounded = tensors[name].detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {rounded.dtype} {tuple(rounded.shape)}".encode())
        digest.update(rounded.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_vae(folder: Path) -> str:
    """Return the fingerprint of a folder's VAE, as `encoder_hash` does of a loaded one."""
    layout = diffusers if (folder / diffusers.SUBFOLDERS["vae"]).is_dir() else formats.find(folder)
    return of_weights(layout.tensors(folder, "vae"), VAE_PARTS)


def of_text(tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> str:
    """Return the fingerprint of a text encoder; tied tensors count once, under their own name."""
    names = {aliases.get(name, name): name for name in tensors}
    names |= {name: name for name in tensors if name in names}
    return of_weights({own: tensors[name] for own, name in names.items()})


def of_tokenizer(folder: Path) -> str:
    """Return the fingerprint of a tokenizer's folder; `ValueError` if it has no file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no {path.name}")
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
