"""Predicted profiles of Wan2.1 on data-center GPUs: a roofline over published efficiencies.

profile = predicted("H200", "14B")    # profile.source == "predicted"

Seconds of a stage are its floor (FLOP over matrix throughput, plus bytes of the pointwise passes
over memory bandwidth) divided by the efficiency that the best published measurement reaches.
Nothing here was run: a profile by `fastvideo profile` on the device replaces it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import astuple, dataclass

import fastvideo
from fastvideo import attention as patterns
from fastvideo.attention import Pattern, Vsa
from fastvideo.models.wan_dit_config import WanConfig
from fastvideo.sampling import SamplingParams
from fastvideo.shapes import TokenGrid
from fastvideo.spec import Defaults, Network, Spec
from fastvideo_inference.goodput import profile as profiles
from fastvideo_inference.goodput.profile import Cell, Device, Profile, work_of

EFFICIENCY = {
    "dense": 0.75,  # FastVideo, H200, 3 steps in 1.49 s (floor 1.11)
    "vsa": 0.60,  # FastVideo, H200, 3 steps in 0.98 s (floor 0.61)
    "text": 0.33,  # UMT5-XXL, H100 eager, 18.4 ms (floor 6.1)
    "vae": 0.21,  # SGLang, H200, fused RMSNorm + SiLU, 1.88 s (floor 0.40)
    "taehv": 0.25,  # 60 ms, a goal (floor 15): published is LightTAE, 0.25 s on H100
}


@dataclass(frozen=True)
class Gpu:
    """Throughput: bf16 FLOP/s without sparsity, bytes/s of memory and of one link direction."""

    flop_s: float
    memory_s: float
    link_s: float
    is_datasheet: bool = True

    def efficiency(self, name: str) -> float:
        """Return the share of a floor that is reached: of a data sheet, at most half.

        Of its own data sheet H200 sustains 790 / 989.
        """
        share = EFFICIENCY[name]
        return min(0.5, share * 790 / 989) if self.is_datasheet else share


DEVICES = {
    "H200": Gpu(790e12, 4.3e12, 450e9, is_datasheet=False),  # measured matmul and device copy
    "B200": Gpu(2250e12, 8e12, 900e9),
    "GB200": Gpu(2500e12, 8e12, 900e9),
}
SHAPES = {
    "1.3B": WanConfig(num_attention_heads=12, num_layers=30, ffn_dim=8960),
    "14B": WanConfig(),
}
PATTERNS = ("dense", "vsa(sparsity=0.8)", "vsa(sparsity=0.9)")
_SIZES = ((832, 480, 81), (1280, 720, 81))
_BF16, _TEXT_TOKENS = 2, 512
_TEXT_PARAMS = 24 * (4 * 4096**2 + 3 * 4096 * 10240)  # of UMT5-XXL's layers
_FUSED_PASSES = 19  # of fused pointwise kernels over a layer's tokens in a forward
_LINK_SHARE, _CALL_S = 0.75, 15e-6  # of NVLink's bandwidth; latency of a collective
_DECODE_SERIAL = 1 / 7  # of a spatially sharded decode: 1.75x on 2 GPUs (Amdahl)
_LOAD_S = 6.2e9  # bytes/s: mmap, threads and a pinned buffer (FastVideo, B200)
_SAVE_PX_S = 832 * 480 * 81 / 0.29  # pixels/s: x264 by PyAV, measured on a CPU
_PREPARE_S = 0.001
_VAE_BYTES = 254e6


def predicted(device: str, shape: str) -> Profile:
    """Return the profile of a Wan2.1 shape on a device; `ValueError` lists the known ones."""
    for name, value, known in (("device", device, DEVICES), ("shape", shape, SHAPES)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown (known: {', '.join(known)})")
    config = SHAPES[shape]
    dims = ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim")
    spec = Spec(
        name=f"wan2.1-{shape}",
        dit=Network(family="wan", config={name: getattr(config, name) for name in dims}),
        vae=Network(family="wan"),
        text=Network(family="umt5"),
        defaults=Defaults(num_inference_steps=3, guidance_scale=1.0),
    )
    version = fastvideo.__version__
    return Profile(
        source="predicted",
        model=f"Wan-AI/Wan2.1-T2V-{shape}-Diffusers",
        fingerprint="predicted",
        spec=spec,
        device=Device(name=device, kind="cuda", threads=1, torch="", fastvideo=version),
        gib={part: size / 2**30 for part, size in part_bytes(config).items()},
        cells=tuple(_cells(DEVICES[device], config, spec)),
    )


def part_bytes(config: WanConfig) -> dict[str, float]:
    """Return the bf16 bytes of each part; those of UMT5-XXL's embedding too."""
    d = config.dim
    dit = config.num_layers * (8 * d * d + 2 * d * config.ffn_dim) + 7 * d * d + config.text_dim * d
    return {
        "text": _BF16 * (_TEXT_PARAMS + 256384.0 * 4096),
        "dit": float(_BF16 * dit),
        "vae": _VAE_BYTES,
    }


def dit_flop(config: WanConfig, grid: TokenGrid, pattern: Pattern) -> tuple[float, float]:
    """Return a forward's FLOP of linear layers and of attention, padding of sparse tiles included.

    Keys and values of the text are made once a clip and do not count.
    """
    d, length = config.dim, grid.num_tokens
    gate, pairs = 0, float(length**2)
    if isinstance(pattern, Vsa):
        t, h, w = pattern.tile
        tiles = -(-grid.frames // t) * -(-grid.height // h) * -(-grid.width // w)
        gate, pairs = 2 * d * d, (t * h * w) ** 2 * tiles * pattern.num_selected(tiles)
    linear = length * (12 * d * d + 4 * d * config.ffn_dim + gate)
    attention = 4 * d * (pairs + length * _TEXT_TOKENS)
    return config.num_layers * linear, config.num_layers * attention


def forward_s(
    gpu: Gpu, config: WanConfig, grid: TokenGrid, pattern: Pattern, *, ulysses: int = 1
) -> float:
    """Return the floor of a DiT forward in seconds, its tokens shared by `ulysses` GPUs.

    All-to-alls carry q, k, v, the output and a gate if there is one, and overlap with nothing.
    """
    tensor = grid.num_tokens * config.dim * _BF16
    pointwise_s = config.num_layers * _FUSED_PASSES * tensor / gpu.memory_s
    alone_s = sum(dit_flop(config, grid, pattern)) / gpu.flop_s + pointwise_s
    if ulysses == 1:
        return alone_s
    calls = config.num_layers * (5 if isinstance(pattern, Vsa) else 4)
    sent_s = tensor * (ulysses - 1) / ulysses**2 / (_LINK_SHARE * gpu.link_s)
    return alone_s / ulysses + calls * (sent_s + _CALL_S)


def text_flop() -> float:
    """Return the FLOP of UMT5-XXL for one prompt, padded to 512 tokens."""
    return 2.0 * _TEXT_PARAMS * _TEXT_TOKENS + 24 * 4 * _TEXT_TOKENS**2 * 4096


def vae_work(t: int, h: int, w: int) -> tuple[float, float]:
    """Return FLOP and unfused pointwise bytes of Wan2.1's VAE decoder; t, h, w are latents."""
    flop, passes = 2.0 * t * h * w * 27 * 4 * 384**2, 0.0  # the middle's two blocks
    for i, (into, dim) in enumerate(((384, 384), (192, 384), (192, 192), (96, 96))):
        flop += 2.0 * t * h * w * 27 * (into * dim + 5 * dim * dim)  # three residual blocks
        passes += 7 * 3 * t * h * w * dim  # norm and SiLU twice, and the sum
        if i < 2:
            flop += 2.0 * t * h * w * 6 * dim * dim
            t = 2 * t - 1
        if i < 3:
            h, w = 2 * h, 2 * w
            flop += 2.0 * t * h * w * 9 * dim * (dim // 2)
    return flop, _BF16 * passes


def tiny_flop(t: int, h: int, w: int) -> float:
    """Return the FLOP of TAEHV, which works on four frames for each latent one."""
    flop = 2.0 * t * h * w * 9 * 16 * 256
    for dim, out, frames in ((256, 128, 1), (128, 64, 2), (64, 64, 2)):
        flop += 2.0 * t * h * w * 3 * 36 * dim * dim  # three blocks of three convolutions
        h, w = 2 * h, 2 * w
        flop += 2.0 * t * h * w * frames * (dim * dim + 9 * dim * out)
        t *= frames
    return flop + 2.0 * t * h * w * 9 * 64 * 3


def decode_s(gpu: Gpu, latents: tuple[int, int, int], *, decoder: str = "") -> float:
    """Return the floor of decoding latents (t, h, w) in seconds."""
    flop, moved = (tiny_flop(*latents), 0.0) if decoder else vae_work(*latents)
    return flop / gpu.flop_s + moved / gpu.memory_s


def _cells(gpu: Gpu, config: WanConfig, spec: Spec) -> Iterator[Cell]:
    def cell(stage: str, seconds: float, work: float = 1.0, **how: str) -> Cell:
        return Cell(stage=stage, work=work, seconds=(seconds,), **how)

    for part, size in part_bytes(config).items():
        yield cell(f"{profiles.LOAD}.{part}", size / _LOAD_S)
    yield cell(profiles.ENCODE, text_flop() / gpu.flop_s / gpu.efficiency("text"))
    degrees = [n for n in (1, 2, 4, 8) if config.num_attention_heads % n == 0]
    for width, height, frames in _SIZES:
        clip = SamplingParams.model_construct(
            width=width, height=height, num_frames=frames, guidance_scale=1.0
        )
        latent = spec.latent_shape(frames=frames, height=height, width=width)
        grid, flop = latent.tokens(config.patch_size), work_of(profiles.DENOISE, clip, spec)
        pixels = work_of(profiles.DECODE, clip, spec)
        yield cell("prepare_latents", _PREPARE_S, pixels)
        yield cell(profiles.SAVE, pixels / _SAVE_PX_S, pixels)
        for n in degrees:
            parallel = f"ulysses={n}" if n > 1 else ""
            for text, guided in itertools.product(PATTERNS, (1, 2)):
                pattern = patterns.read(text)
                floor_s = guided * forward_s(gpu, config, grid, pattern, ulysses=n)
                seconds = floor_s / gpu.efficiency(text.partition("(")[0])
                how = {"attention": patterns.write(pattern), "parallel": parallel}
                yield cell(profiles.DENOISE, seconds, guided * flop, **how)
            shared = _DECODE_SERIAL + (1 - _DECODE_SERIAL) / n
            for name in ("", "taehv"):
                floor_s = decode_s(gpu, astuple(latent), decoder=name)
                seconds = shared * floor_s / gpu.efficiency(name or "vae")
                yield cell(profiles.DECODE, seconds, pixels, decoder=name, parallel=parallel)
