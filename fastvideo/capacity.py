"""Whether a clip fits in this machine's memory, by an estimate that is below what it takes.

It counts what cannot be avoided: all frames twice on the host, as bytes and as the stack of them,
and on a machine without a GPU the largest tensors of the denoiser and of the VAE's last stage.
Measured at 1024x1024 on a CPU with the bundled model: 660 bytes a pixel in the decoder, of which it
counts 384. A clip that is suggested instead takes half of the memory by the same estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvideo.models.wan_dit_config import WanConfig
from fastvideo.shapes import Compression, PixelShape
from fastvideo.spec import Spec

_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri/renderD128")
_BYTES = 2  # of bfloat16, the smallest type that anything computes in
_LIVE_IN_DECODER = 6  # tensors of the last stage that are live at once
_SPARE = 2  # of memory, for what is suggested
_GIB = 2**30


def check(clip: PixelShape, spec: Spec | None) -> None:
    """Raise `ValueError` for a clip that needs more than the machine's memory.

    Without a spec its frames alone count.
    """
    memory, needed = host_memory(), estimate(clip, spec)
    if memory is None or needed <= memory:
        return
    nearest = _nearest(clip, spec, memory // _SPARE)
    raise ValueError(
        f"height {clip.height} x width {clip.width} x num_frames {clip.frames} needs at"
        f" least {needed / _GIB:.1f} GiB; this machine has {memory / _GIB:.1f}; nearest: {nearest}"
    )


def estimate(clip: PixelShape, spec: Spec | None, *, on_cpu: bool | None = None) -> int:
    """Return bytes of host memory that a clip takes at least."""
    pixels = clip.height * clip.width
    frames = 2 * 3 * pixels * clip.frames
    if spec is None or not (has_no_gpu() if on_cpu is None else on_cpu):
        return frames
    tokens = clip.latent(spec.compression).tokens(spec.compression.patch).num_tokens
    return frames + max(tokens * _token(spec.dit.config), pixels * _pixel(spec))


def host_memory() -> int | None:
    """Return the bytes of memory of this machine, or of its container; None if it does not say."""
    known = []
    limit, info = Path("/sys/fs/cgroup/memory.max"), Path("/proc/meminfo")
    if limit.is_file() and limit.read_text().strip().isdigit():
        known.append(int(limit.read_text()))
    if info.is_file():
        known.append(1024 * int(info.read_text().split()[1]))
    return min(known, default=None)


def has_no_gpu() -> bool:
    """Tell, without torch, whether this machine has no device of a GPU's driver."""
    return not any(Path(device).exists() for device in _GPUS)


def _token(dit: Mapping[str, Any]) -> int:
    """Bytes of a token in a layer: residual, q, k, v, their output, and the MLP's hidden."""
    heads, head_dim, ffn_dim = (
        dit.get(name, getattr(WanConfig, name))
        for name in ("num_attention_heads", "attention_head_dim", "ffn_dim")
    )
    return int(_BYTES * (5 * heads * head_dim + ffn_dim))


def _pixel(spec: Spec) -> int:
    """Bytes of a pixel in the last stage of the VAE's decoder, for the frames of a latent one."""
    vae = spec.vae.config
    width = vae.get("decoder_base_dim") or vae.get("base_dim", 96)
    area = (vae.get("patch_size") or 1) ** 2
    return int(_LIVE_IN_DECODER * _BYTES * spec.compression.temporal * width / area)


def _nearest(clip: PixelShape, spec: Spec | None, memory: int) -> str:
    """Return the largest clip of about the same shape that fits, then of fewer frames."""
    c = Compression() if spec is None else spec.compression
    frames = clip.frames
    while True:
        for percent in range(100, 9, -1):
            height, width = (
                max(step, int(side * percent / 100) // step * step)
                for side, step in zip((clip.height, clip.width), c.pixel_multiple, strict=True)
            )
            if estimate(PixelShape(frames, height, width), spec) <= memory:
                return f"{width}x{height}x{frames}"
        if frames == 1:
            return "none"
        frames = (frames - 1) // 2 // c.temporal * c.temporal + 1
