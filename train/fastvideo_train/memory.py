"""What a run takes of each device's memory, by arithmetic, before a weight is loaded.

    estimate = of(recipe, degrees, dims=...)
    estimate.total, estimate.largest(3)

Bytes for each number of a role; e is 2 or 4, what it computes in, W the parts that weights are cut
into (shard x ring x ulysses). Numbers that compute in float32 are their own masters.

                single, accelerate       fsdp2, W > 1            deepspeed, ZeRO z
    weights     e                        0: gathered by layer    4, z = 3: 4 / W
    masters     4 if e = 2               4 / W                   4 / W
    gradients   4 + e, see below         8 / W                   4, z > 1: 4 / W
    optimizer   AdamW 8, Muon 4          the same / W            8 / W, 0 if offloaded
    average     4                        4 / W                   4
    frozen      e                        e / W (dit, text)       e

Gradients are a float32 sum and those of the last backward pass; with accumulate > 1 bfloat16 ones
are widened for a moment, 4 more. FSDP2 leaves whole what is float32 in a bfloat16 network; its
`gathered` are the embeddings and head of each network, and of the largest layer three copies in the
forward pass' dtype (two layers and the gradients of one) and a float32 one to be reduced.

Activations of a learning denoiser, for l = clips x tokens / (ring x ulysses) of a process, width C,
feed-forward F, N layers (each term names tensors that autograd keeps, `models/dit/wan.py`):

    layer  = l (14 e C + 4 r C + 2 e F)    r = 3 norms of q, k, q of the text in float32; 6 on a CPU
             + 2 l e C + 5 H n n           with VSA: gate and coarse branch; scores of n tiles
    kept   = N layer,                      with recompute N l e C, the layers' inputs
    passing = l (F + 6 C) e,               gradients of a layer; with recompute that layer too

and twice the embeddings, which every process makes of all tokens. Instead of `passing`, a frozen
denoiser may need more while these are kept: l (2 F + 8 C) e, for twice the clips under guidance. Of
attention backends only `bmm`, for short clips on a CPU, keeps scores: clips e H L^2, and 3 l e C in
each layer, and the former once more in passing. Ulysses needs 2 x 3 (VSA: 4) l e C for its
exchanges.

All parts are added, though not all are at their largest at once: 1 % below to 20 % above what was
alive in tests on a CPU. Not in it: activations of networks that are no denoiser, Muon's passes,
batches, keys that `gather` copies on a CPU (3 % of a run that was measured). On a GPU `RESERVE` is
added for CUDA, NCCL and what the allocator cannot use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvideo import attention, registry, weights
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.shapes import Compression, LatentShape, PixelShape, TokenGrid
from fastvideo_train import lora, origins
from fastvideo_train.data._manifest import VideoManifest, latent_frames, read_manifest
from fastvideo_train.flops import num_tiles
from fastvideo_train.optim import is_matrix
from fastvideo_train.recipe import LatentsSpec, Recipe, RoleSpec, SyntheticSpec
from fastvideo_train.roles import CUT_WHEN_FROZEN, NETWORK_CLASS

GIB = 1 << 30
RESERVE = 3 * GIB

Dims = Callable[[RoleSpec, str], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """Some bytes of one device's memory: whose (a role, or empty) and what for."""

    role: str
    what: str
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """The parts of a device's memory, and what the arithmetic had to assume."""

    parts: tuple[Part, ...]
    num_params: Mapping[str, int]
    clip: LatentShape | None
    host: int = 0
    """Bytes of host memory that new weights take on each process before FSDP2 cuts them."""
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes on the fullest process."""
        return sum(part.bytes for part in self.parts)

    def largest(self, count: int) -> list[Part]:
        """Return the largest parts, first the largest."""
        return sorted(self.parts, key=lambda part: -part.bytes)[:count]


@dataclass(frozen=True)
class _Network:
    """A role on meta: its numbers, and for a denoiser its dims."""

    name: str
    spec: RoleSpec
    net: nn.Module
    dtype: torch.dtype
    keep_float32: tuple[str, ...]

    @property
    def e(self) -> int:
        return self.dtype.itemsize

    @property
    def learns(self) -> bool:
        return self.spec.trainable

    def count(self, *, learning: bool, wide: bool, within: nn.Module | None = None) -> int:
        """Return how many numbers learn or do not, and compute in float32 beside others or not."""
        params = (within or self.net).named_parameters()
        return sum(
            p.numel() for n, p in params if p.requires_grad == learning and self._is_wide(n) == wide
        )

    def _is_wide(self, name: str) -> bool:
        return self.e < 4 and any(part in name for part in self.keep_float32)


def of(recipe: Recipe, degrees: ParallelConfig, *, dims: Dims = origins.dims) -> Estimate:
    """Estimate what a recipe takes of each of its devices; networks are built on meta.

    dims: returns a role's dims. Raises `ValueError` for dims that make no network.
    """
    networks = [_on_meta(recipe, name, dims) for name in recipe.roles]
    clip, source = clip_of(recipe)
    notes = [f"clips of {source}"] if source else []
    parts = [part for one in networks for part in _state(one, recipe, degrees)]
    denoisers = [one for one in networks if one.spec.kind == "dit"]
    if denoisers and clip is not None:
        parts += _activations(denoisers, recipe, degrees, clip)
    host = 0
    if recipe.run.strategy == "fsdp2" and degrees.world_size > 1:
        host = sum(_built(one) for one in networks)
        parts += _gathered([n for n in networks if n.learns or n.spec.kind in CUT_WHEN_FROZEN])
    if any(one.learns for one in networks if one.spec.kind != "dit") or clip is None:
        notes.append("activation memory is estimated for DiTs only")
    if recipe.run.device.startswith("cuda"):
        parts.append(Part("", "CUDA, NCCL and the allocator (allowance)", RESERVE))
    return Estimate(
        parts=tuple(part for part in parts if part.bytes),
        num_params={one.name: sum(p.numel() for p in one.net.parameters()) for one in networks},
        clip=clip,
        host=host,
        notes=tuple(notes),
    )


def clip_of(recipe: Recipe) -> tuple[LatentShape | None, str]:
    """Return the largest clip of a run in latents, and who says so; None for a run without."""
    data = recipe.data
    if isinstance(data, SyntheticSpec):
        return LatentShape(data.frames, data.height, data.width), "[data]"
    if not isinstance(data, LatentsSpec):
        return None, ""
    if (Path(data.folder) / "manifest.json").is_file():
        return _largest_stored(data), data.folder
    export_defaults = recipe.export.get("defaults", {})
    if not {"num_frames", "height", "width"} <= export_defaults.keys():
        return None, ""
    pixels = PixelShape(
        export_defaults["num_frames"], export_defaults["height"], export_defaults["width"]
    )
    clip = pixels.latent(Compression())
    frames = data.spread or clip.frames
    return replace(clip, frames=frames), f"[export.defaults], as {data.folder} is not here yet"


def _largest_stored(data: LatentsSpec) -> LatentShape:
    manifest = read_manifest(data.folder)
    stored = manifest.buckets if isinstance(manifest, VideoManifest) else [manifest]
    shapes = []
    for one in stored:
        _, t, h, w = one.latent_shape
        if data.frames is not None:
            t = latent_frames(data.frames, one.num_frames, t)
        shapes.append(LatentShape(data.spread or t, h, w))
    return max(shapes, key=lambda s: s.frames * s.height * s.width)


def _on_meta(recipe: Recipe, name: str, dims: Dims) -> _Network:
    spec = recipe.roles[name]
    family = registry.module(f"fastvideo.models.{spec.kind}", spec.family)
    dtype = getattr(torch, spec.dtype or recipe.run.dtype)
    keep = family.KEEP_FLOAT32 if spec.kind == "dit" else ()
    if spec.kind == "text" and recipe.stored_text:
        return _Network(name, spec, nn.Module(), dtype, keep)
    config = family.Config.parse(dims(spec, name))
    net: nn.Module = weights.build(lambda: getattr(family, NETWORK_CLASS[spec.kind])(config))
    net.requires_grad_(spec.trainable)
    if spec.lora is not None:
        lora.add(net, spec.lora, seed=recipe.run.seed, source=f"roles.{name}.lora")
    return _Network(name, spec, net, dtype, keep)


def _built(one: _Network) -> int:
    """Return the bytes of new weights as `roles.py` makes them, whole; of a LoRA its maps."""
    new = [p for p in one.net.parameters() if not one.spec.from_ or p.requires_grad]
    if one.spec.from_ and one.spec.lora is None:
        return 0
    return sum(p.numel() for p in new) * (4 if one.learns else one.e)


def _state(one: _Network, recipe: Recipe, degrees: ParallelConfig) -> list[Part]:
    """Return what a role takes for the whole of a run, by its strategy."""
    low, wide = (one.count(learning=True, wide=w) for w in (False, True))
    frozen = one.e * one.count(learning=False, wide=False)
    is_cut = recipe.run.strategy == "fsdp2" and degrees.world_size > 1
    cut = degrees.of("weights") if is_cut else 1
    held = Fraction(low, cut) + wide
    optimizer = _optimizer(one, recipe) * held
    average = 4 * held if recipe.decay_of(one.name) else Fraction(0)
    weights_of, masters, gradients = Fraction(0), 4 * held, 8 * held
    if is_cut and (one.learns or one.spec.kind in CUT_WHEN_FROZEN):
        frozen = math.ceil(frozen / cut)
    elif not is_cut:
        weights_of = Fraction(one.e * low + 4 * wide)
        masters = Fraction(4 * low if one.e < 4 else 0)
        widened = 4 * low if one.e < 4 and recipe.run.accumulate > 1 else 0
        gradients = Fraction((4 + one.e) * low + 8 * wide + widened)
    if recipe.run.strategy == "deepspeed":
        zero, everyone = recipe.run.strategy_args.get("zero", 2), degrees.world_size
        weights_of = Fraction(4 * low, everyone if zero == 3 else 1)
        masters, gradients = (
            Fraction(4 * low, everyone),
            Fraction(4 * low, everyone if zero > 1 else 1),
        )
        is_offloaded = recipe.run.strategy_args.get("offload", False)
        optimizer = Fraction(0 if is_offloaded else 8 * low, everyone)
    sizes: dict[str, Fraction] = {
        "weights": weights_of,
        "masters": masters,
        "gradients": gradients,
        "optimizer": optimizer,
        "average": average,
        "frozen weights": Fraction(frozen + 4 * one.count(learning=False, wide=True)),
    }
    return [Part(one.name, what, math.ceil(size)) for what, size in sizes.items()]


def _optimizer(one: _Network, recipe: Recipe) -> Fraction:
    """Return bytes of optimizer state for each learning number: 8 of AdamW, 4 of Muon."""
    shapes = {n: tuple(p.shape) for n, p in one.net.named_parameters() if p.requires_grad}
    total = sum(math.prod(s) for s in shapes.values())
    if not total or recipe.optim_of(one.name).muon is None:
        return Fraction(8)
    several = [n for n, s in shapes.items() if len(s) >= 2]
    ends = {"first": several[0], "last": several[-1]} if several else {"first": "", "last": ""}
    by_muon = sum(math.prod(s) for n, s in shapes.items() if is_matrix(n, s, **ends))
    return Fraction(8 * total - 4 * by_muon, total)


def _activations(
    denoisers: list[_Network], recipe: Recipe, degrees: ParallelConfig, clip: LatentShape
) -> list[Part]:
    """Return what the hungriest learning denoiser keeps, and what passes beside it at its most."""
    kept = passing = exchanged = Part("", "", 0)
    for one in denoisers:
        work = _Work.of(one, recipe, degrees, clip)
        if one.learns:
            kept = max(kept, Part(one.name, "activations", math.ceil(work.kept)), key=_size)
        need = Part(one.name, "activations in passing", math.ceil(work.passing))
        passing = max(passing, need, key=_size)
        if degrees.ulysses > 1:
            sent = Part("", "buffers of Ulysses", math.ceil(work.exchanged))
            exchanged = max(exchanged, sent, key=_size)
    return [kept, passing, exchanged]


@dataclass(frozen=True)
class _Work:
    """Bytes of a denoiser's forward and backward pass on one process."""

    kept: float
    passing: float
    exchanged: float

    @classmethod
    def of(cls, one: _Network, recipe: Recipe, degrees: ParallelConfig, clip: LatentShape) -> _Work:
        c: Any = one.net.config
        grid = clip.tokens(c.patch_size)
        clips = recipe.run.batch // degrees.of("batch")
        tokens, e = clips * grid.num_tokens, one.e
        own = tokens / degrees.of("sequence")
        whole = 2 * tokens * e * c.dim
        pattern = attention.parse(one.spec.attention.pattern, one.spec.attention.args)
        is_vsa = isinstance(pattern, attention.Vsa)
        exchanged = 2 * (4 if is_vsa else 3) * own * e * c.dim
        if not one.learns:
            guided = 2 if one.name == "teacher" else 1
            return cls(0, guided * (own * (2 * c.ffn_dim + 8 * c.dim) * e + whole), exchanged)
        norms = 3 if recipe.run.device.startswith("cuda") else 6
        layer = own * ((14 * e + 4 * norms) * c.dim + 2 * e * c.ffn_dim)
        if isinstance(pattern, attention.Vsa):
            tiles = num_tiles(pattern, grid)
            layer += 2 * own * e * c.dim + 5 * clips * c.num_attention_heads * tiles**2
        passes = _passes(one, recipe, c.num_layers)
        passing = own * (c.ffn_dim + 6 * c.dim) * e
        if _keeps_scores(one, recipe, pattern, grid):
            scores = clips * c.num_attention_heads * grid.num_tokens**2 / degrees.of("sequence")
            layer += e * (scores + 3 * own * c.dim)
            passing += e * scores
        if not recipe.run.recompute:
            return cls(passes * c.num_layers * layer + whole, passing, exchanged)
        inputs = passes * c.num_layers * own * e * c.dim
        return cls(inputs + whole, layer + passing, exchanged)


def _keeps_scores(
    one: _Network, recipe: Recipe, pattern: attention.Pattern, grid: TokenGrid
) -> bool:
    if recipe.run.device != "cpu" or not isinstance(pattern, attention.Dense):
        return False
    dims: Any = one.net.config
    chosen = attention.choose(
        one.spec.attention.backend,
        layout=attention.plan(pattern, grid),
        dtype=torch.float32 if one.e == 4 else torch.bfloat16,
        device="cpu",
        needs_grad=True,
        head_dim=dims.attention_head_dim,
    )
    return chosen.__name__.endswith(".bmm")


def _passes(one: _Network, recipe: Recipe, layers: int) -> float:
    """Return how many forward passes of a role one loss reaches back through (`_gan.py`)."""
    args = recipe.method.args
    if recipe.method.name != "dmd" or not args.get("gan") or one.name != "critic":
        return 1.0
    used: int = args.get("gan_layers", -(-layers // 2))
    return 1 + 2 * used / layers


def _gathered(networks: list[_Network]) -> list[Part]:
    """Return what FSDP2 puts together: the outer part of each network, and layers one by one."""
    outer, largest = 0, Part("", "", 0)
    for one in networks:
        layers = _layers(one.net) if one.spec.kind in CUT_WHEN_FROZEN else []
        of_layers = [_numbers(one, layer) for layer in layers]
        rest = _numbers(one, one.net) - sum(of_layers)
        per_number = 3 * one.e + (4 if one.learns else 0)
        outer += one.e * rest
        backward = (one.e + 4) * rest if one.learns else 0
        most = max(per_number * max(of_layers, default=0), backward)
        largest = max(largest, Part(one.name, "gathered layers", most), key=_size)
    return [largest, Part("", "gathered embeddings and heads", outer)]


def _numbers(one: _Network, module: nn.Module) -> int:
    return sum(one.count(learning=x, wide=False, within=module) for x in (True, False))


def _layers(net: nn.Module) -> list[nn.Module]:
    lists = (m for m in net.modules() if isinstance(m, nn.ModuleList))
    return list(next((m for m in lists if len(m) and len({type(x) for x in m}) == 1), ()))


def _size(part: Part) -> int:
    return part.bytes
