"""Latents of clips, encoded once into shards and served as shuffled batches.

encode_world(vae, "shapes", "latents/", num_clips=20_000, seed=0,
             num_frames=81, height=128, width=128)
batches = LatentBatches("latents/", seed=0, batch=16, frames=17)

A folder holds `manifest.json` and shards of raw posterior means with captions. Raw, because the
statistics that normalise them may be improved without encoding again; the manifest carries them.
`videos.py` writes such folders from videos; they are read here too.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from fastvideo import files, rng, weights
from fastvideo.errors import RefusedError, refusing
from fastvideo.log import logger
from fastvideo.worlds import generator_version
from fastvideo_train.data import WHOLE, Part, hashes, items
from fastvideo_train.data._manifest import (
    MANIFEST,
    Manifest,
    differences,
    latent_frames,
    read_manifest,
)
from fastvideo_train.data._stores import Group, Rota, Shard, open_groups, shard_name
from fastvideo_train.data.clips import ClipBatches

MAY_CHANGE = ("count", "latents_mean", "latents_std")  # none of them touches a finished shard
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Report = Callable[[int, int], None]


class Vae(Protocol):
    """What is asked of a VAE here: `Vae` of a module under `fastvideo/models/vae/`."""

    config: Any

    def encode(self, pixels_BCTHW: Tensor, /, *, chunk: int | None = None) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Tensor]: ...


class LatentBatch(TypedDict):
    """One batch: normalised float32 latents (B, C, T, H, W), one caption and id per clip.

    `frame_T` says which latent frames of the clips these are.
    """

    latents: Tensor
    frame_T: Tensor
    captions: list[str]
    ids: list[str]


def encode_world(
    vae: Vae,
    world: str,
    out_folder: str | Path,
    *,
    num_clips: int,
    seed: int,
    num_frames: int,
    height: int,
    width: int,
    fps: int = 16,
    split: str = "train",
    shard_size: int = 256,
    batch: int = 4,
    dtype: str = "float16",
    workers: int = 0,
    report: Report | None = None,
) -> Manifest:
    """Render clips 0 .. num_clips - 1, encode them, and write what is not there yet.

    The same call after a kill resumes with the first unfinished shard; a larger `num_clips` adds
    to the folder. `report(done, total)` is called after every batch. Raises `RefusedError` if the
    folder holds latents of anything else (another encoder, world, size, seed), naming what differs.
    """
    if num_clips < 1 or batch < 1 or shard_size < 1 or shard_size % batch:
        raise RefusedError(
            f"num_clips {num_clips} and batch {batch} must be at least 1, and shard_size"
            f" {shard_size} a multiple of batch"
        )
    folder = Path(out_folder)
    sizes: dict[str, Any] = {"num_frames": num_frames, "height": height, "width": width}
    sizes |= {"seed": seed, "fps": fps, "split": split}
    clips = ClipBatches(world, batch=batch, workers=workers, **sizes)
    manifest = Manifest(
        world=world,
        generator_version=generator_version(world),
        shard_size=shard_size,
        dtype=dtype,  # type: ignore[arg-type]
        encoder=encoder_hash(vae),
        latent_shape=_latent_shape(vae, (num_frames, height, width)),
        latents_mean=vae.config.latents_mean,
        latents_std=vae.config.latents_std,
        count=num_clips,
        **sizes,
    )
    with refusing():
        _claim(folder, manifest)
    for shard in range(manifest.num_shards):
        if not _finished(folder, manifest, shard):
            _encode_shard(vae, clips, folder, manifest, shard, report)
        if report:
            report(shard * shard_size + manifest.shard_count(shard), num_clips)
    return manifest


def encode_pixels(vae: Vae, pixels_BCTHW: Tensor, *, chunk: int | None = None) -> Tensor:
    """Encode uint8 pixels to raw posterior means, in the VAE's dtype and on its device.

    With `chunk`, so many latent frames at a time: the same numbers in less memory.
    """
    like = next(vae.parameters())
    signed = pixels_BCTHW.to(like.device, torch.float32).div_(127.5).sub_(1).to(like.dtype)
    with torch.no_grad():
        return vae.encode(signed, chunk=chunk)


def statistics(vae: Vae, clips: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per latent channel over batches of uint8 pixels."""
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for pixels in clips:
        z = encode_pixels(vae, pixels).double().transpose(0, 1).flatten(1).cpu()  # C, N
        count += z.shape[1]
        total, square = total + z.sum(1), square + z.square().sum(1)
    if count < 2:
        raise ValueError("latent statistics need at least one clip")
    mean = total / count
    std = (square / count - mean.square()).clamp_min(1e-12).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def encoder_hash(vae: Vae) -> str:
    """Return a fingerprint of the weights that decide the latents; the decoder's do not."""
    return hashes.of_weights(vae.state_dict(), hashes.VAE_PARTS)


class LatentBatches:
    """Shuffled batches out of a folder of latents, each a function of (seed, step).

    A batch holds clips of one bucket; buckets have batches in proportion to their clips. Every
    epoch is another permutation of a bucket's clips, decided by (seed, epoch); a bucket of fewer
    clips than a batch repeats them within it, which is logged. `frames` serves only
    the first frames of each clip: a causal VAE encodes a prefix to a prefix of the latents. Files
    are mapped, not read, so that a folder may be larger than memory. Raises `ValueError` if the
    folder is unfinished, or was encoded by other weights than `encoder` (from `encoder_hash`).

    With `spread`, each batch holds that many latent frames of its clips at an equal distance: of
    every distance that fits, then of every place, one is as likely as another. A network that is
    conditioned on the frames' distances sees whole motions at a fraction of the tokens.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        seed: int,
        batch: int,
        frames: int | None = None,
        spread: int | None = None,
        encoder: str | None = None,
        start_step: int = 0,
        part: Part = WHOLE,
    ) -> None:
        self.folder, self.manifest = Path(folder), read_manifest(folder)
        self.seed, self.size, self.start_step = seed, batch, start_step
        self.own = items(batch, part)
        m = self.manifest
        if encoder is not None and encoder != m.encoder:
            raise ValueError(
                f"latents in {folder} are stale: encoded by weights {m.encoder}, but the VAE at"
                f" hand is {encoder}; encode them again"
            )
        self._groups = open_groups(self.folder, m)
        self._lengths = [_served(group, frames) for group in self._groups]
        _tell_repeats(self._groups, batch, folder)
        self._spread = spread
        if spread is not None and spread > min(self._lengths):
            raise ValueError(
                f"spread {spread} is more than the {min(self._lengths)} latent frames of {folder}"
            )
        self._rota = Rota(tuple(len(group) for group in self._groups), seed)
        self._permutation = lru_cache(maxsize=2 * len(self._groups))(self._shuffled)
        sizes = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(m.latents_mean).view(sizes)
        self._std = torch.tensor(m.latents_std).view(sizes)

    def __len__(self) -> int:
        """Return the number of clips."""
        return sum(len(group) for group in self._groups)

    def batch(self, step: int) -> LatentBatch:
        """Return the batch of one step, or this process's part of it."""
        group, turn = self._rota.place(step)
        places = [self._place(group, turn * self.size + item) for item in self.own]
        frames = self._frames(step, self._lengths[group])
        kept = slice(frames.start, frames.stop, frames.step)
        raw = torch.stack([s.latents_NCTHW[i, :, kept] for s, i in places]).float()
        return LatentBatch(
            latents=(raw - self._mean) / self._std,
            frame_T=torch.tensor(frames),
            captions=[s.captions[i] for s, i in places],
            ids=[s.ids[i] for s, i in places],
        )

    def prefetch(self, steps: int | None = None) -> Iterator[LatentBatch]:
        """Yield the batches of `start_step` and later: `steps` of them, or for ever."""
        first = self.start_step
        for step in itertools.count(first) if steps is None else range(first, first + steps):
            yield self.batch(step)

    __iter__ = prefetch

    def _frames(self, step: int, count: int) -> range:
        gaps = (count if self._spread is None else self._spread) - 1
        generator = rng.numpy_generator(self.seed, "data/frames", step)
        stride = int(generator.integers(1, (count - 1) // gaps + 1)) if gaps else 1
        first = int(generator.integers(count - gaps * stride))
        return range(first, first + gaps * stride + 1, stride)

    def _place(self, group: int, sample: int) -> tuple[Shard, int]:
        epoch, position = divmod(sample, len(self._groups[group]))
        return self._groups[group].place(int(self._permutation(group, epoch)[position]))

    def _shuffled(self, group: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        clips = self._groups[group]
        return rng.numpy_generator(self.seed, clips.purpose, epoch).permutation(len(clips))


def _tell_repeats(groups: list[Group], batch: int, folder: str | Path) -> None:
    few = {g.purpose.partition("/")[2] or "all": len(g) for g in groups if len(g) < batch}
    if few:
        named = ", ".join(f"{name} ({count})" for name, count in few.items())
        logger.warning(
            "%s: batches of %d hold clips more than once where a bucket has fewer: %s",
            *(folder, batch, named),
        )


def _served(group: Group, frames: int | None) -> int:
    stored = group.latent_shape[1]
    return stored if frames is None else latent_frames(frames, group.num_frames, stored)


def _claim(folder: Path, manifest: Manifest) -> None:
    if (folder / MANIFEST).exists():
        have = read_manifest(folder)
        wrong = differences(have, manifest, but=MAY_CHANGE)
        if wrong or not isinstance(have, Manifest):
            raise ValueError(
                f"{folder} holds other latents ({'; '.join(wrong)}); delete it or choose another"
            )
        if have.count > manifest.count:
            raise ValueError(
                f"num_clips {manifest.count} is less than the {have.count} that {folder} holds"
            )
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n", overwrite=True)


def _finished(folder: Path, manifest: Manifest, shard: int) -> bool:
    path = folder / shard_name("", shard)
    if not path.exists():
        return False
    return weights.read_header(path)["latents"].shape[0] == manifest.shard_count(shard)


def _encode_shard(
    vae: Vae,
    clips: ClipBatches,
    folder: Path,
    manifest: Manifest,
    shard: int,
    report: Report | None,
) -> None:
    first, count = shard * manifest.shard_size, manifest.shard_count(shard)
    clips = clips.starting_at(first // clips.size)
    latents, captions, ids = [], list[str](), list[str]()
    for batch in clips.prefetch(-(-count // clips.size)):
        latents.append(encode_pixels(vae, batch["pixels"]).to(DTYPES[manifest.dtype]).cpu())
        captions += batch["captions"]
        ids += batch["ids"]
        if report:
            report(first + min(len(ids), count), manifest.count)
    stacked = torch.cat(latents)[:count].contiguous()
    if not bool(stacked.isfinite().all()):
        raise ValueError(f"latents of shard {shard} do not fit {manifest.dtype} or are not finite")
    words = {"captions": json.dumps(captions[:count]), "ids": json.dumps(ids[:count])}
    weights.save(folder / shard_name("", shard), {"latents": stacked}, words)


def _latent_shape(vae: Vae, pixels: tuple[int, int, int]) -> tuple[int, int, int, int]:
    blank = torch.zeros(1, 3, *pixels, dtype=torch.uint8)
    _, c, t, h, w = encode_pixels(vae, blank).shape
    return c, t, h, w
