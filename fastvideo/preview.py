"""RGB previews out of latents, by a linear map that belongs to the VAE.

found = find(model.folder, model.vae)          # vae/preview.toml, or the published map of Wan2.1's
frames = to_rgb(step.clean, found)             # uint8 (B, T, h, w, 3), a frame for each latent one

A preview costs one small product where a decode costs seconds. The file is outside a model's
fingerprint, since it decides no frame of a clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from fastvideo.files import write_text

FILE = Path("vae") / "preview.toml"
MAX_SIDE_PX = 256


@dataclass(frozen=True)
class PreviewMap:
    """RGB in [-1, 1] = normalised latents (C) @ `weights` (C, 3) + `bias` (3)."""

    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]


# Comfy-Org/ComfyUI, comfy/latent_formats.py, class Wan21: latent_rgb_factors and their bias.
WAN21 = PreviewMap(
    weights=(
        (-0.1299, -0.1692, 0.2932),
        (0.0671, 0.0406, 0.0442),
        (0.3568, 0.2548, 0.1747),
        (0.0372, 0.2344, 0.1420),
        (0.0313, 0.0189, -0.0328),
        (0.0296, -0.0956, -0.0665),
        (-0.3477, -0.4059, -0.2925),
        (0.0166, 0.1902, 0.1975),
        (-0.0412, 0.0267, -0.1364),
        (-0.1293, 0.0740, 0.1636),
        (0.0680, 0.3019, 0.1128),
        (0.0032, 0.0581, 0.0639),
        (-0.1251, 0.0927, 0.1699),
        (0.0060, -0.0633, 0.0005),
        (0.3477, 0.2275, 0.2950),
        (0.1984, 0.0913, 0.1861),
    ),
    bias=(-0.1835, -0.0868, -0.3360),
)
_WAN21_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075)
"""The first statistics of Wan2.1's latents, by which its VAE is known."""


def find(folder: Path | None, vae: Any) -> PreviewMap | None:
    """Return the map of a loaded model's VAE; None if there is none for it.

    Raises `ValueError` for a file of another number of channels.
    """
    path = None if folder is None else folder / FILE
    if path is not None and path.is_file():
        return _read(path, num_channels=vae.config.z_dim)
    mean = tuple(vae.config.latents_mean)[: len(_WAN21_MEAN)]
    return WAN21 if mean == _WAN21_MEAN and vae.config.z_dim == len(WAN21.weights) else None


def to_rgb(latents_BCTHW: Tensor, found: PreviewMap) -> npt.NDArray[np.uint8]:
    """Map normalised latents to frames (B, T, h, w, 3) of at most 256 pixels a side."""
    weights_C3 = torch.tensor(found.weights, device=latents_BCTHW.device)
    rgb_BTHW3 = latents_BCTHW.float().permute(0, 2, 3, 4, 1) @ weights_C3
    rgb_BTHW3 = rgb_BTHW3 + torch.tensor(found.bias, device=rgb_BTHW3.device)
    scale = MAX_SIDE_PX / max(rgb_BTHW3.shape[2:4])
    if scale < 1:
        height, width = (max(1, int(side * scale)) for side in rgb_BTHW3.shape[2:4])
        flat_NHW3 = rgb_BTHW3.flatten(0, 1).permute(0, 3, 1, 2)
        small = F.interpolate(flat_NHW3, (height, width), mode="area").permute(0, 2, 3, 1)
        rgb_BTHW3 = small.reshape(*rgb_BTHW3.shape[:2], height, width, 3)
    levels = (rgb_BTHW3.nan_to_num() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.cpu().numpy()


def fit(latents_BCTHW: Tensor, pixels_B3THW: Tensor) -> PreviewMap:
    """Fit the map to normalised latents and the pixels in [-1, 1] that they encode.

    Each latent frame is held against the mean of its pixels.
    """
    _, channels, frames, height, width = latents_BCTHW.shape
    stride = (pixels_B3THW.shape[2] - 1) // max(1, frames - 1) or 1
    first, rest = pixels_B3THW[:, :, :1], pixels_B3THW[:, :, 1:]
    means = [F.adaptive_avg_pool3d(first.float(), (1, height, width))]
    if frames > 1:  # a causal VAE encodes the first frame alone
        assert rest.shape[2] == stride * (frames - 1), "pixels and latents of one clip"
        means.append(F.adaptive_avg_pool3d(rest.float(), (frames - 1, height, width)))
    target = torch.cat(means, dim=2).permute(0, 2, 3, 4, 1).reshape(-1, 3)
    known = latents_BCTHW.float().permute(0, 2, 3, 4, 1).reshape(-1, channels)
    known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
    solved = torch.linalg.lstsq(known.double(), target.double()).solution.tolist()
    rows = [tuple(round(value, 4) for value in row) for row in solved]
    return PreviewMap(weights=tuple(rows[:-1]), bias=rows[-1])


def write(found: PreviewMap, folder: Path) -> Path:
    """Write `vae/preview.toml` into a model folder."""
    rows = "".join(f"    {list(row)},\n" for row in found.weights)
    text = f"# RGB in [-1, 1] = normalised latents @ weights + bias\nbias = {list(found.bias)}\n"
    return write_text(folder / FILE, f"{text}weights = [\n{rows}]\n", overwrite=True)


def _read(path: Path, *, num_channels: int) -> PreviewMap:
    from fastvideo.config import read_toml  # late: benchmarks run stages without pydantic

    values = read_toml(path)
    try:
        rows = tuple(tuple(map(float, row)) for row in values["weights"])
        bias = tuple(map(float, values["bias"]))
    except (KeyError, TypeError, ValueError):
        rows, bias = (), ()
    if len(rows) != num_channels or any(len(row) != 3 for row in (*rows, bias)):
        raise ValueError(f"{path} must hold weights of {num_channels} x 3 and a bias of 3 numbers")
    return PreviewMap(rows, bias)
