"""A folder of videos encoded once: latents in buckets, and a text state for each distinct caption.

job = Job.open(plan, "wan-1.3b", "latents/", device="cuda", dtype="bfloat16")
job.encode_text(report)          # one encoder in memory at a time
job.encode_clips(report, workers=4)

The folder is refused before any network is loaded if it holds clips or encoders other than these.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fastvideo import files, formats, hub, registry, weights
from fastvideo.model import load, pick_device, pick_dtype
from fastvideo.models.text import encode_prompts
from fastvideo.models.text.tokenizer import Tokenizer
from fastvideo.shapes import PixelShape
from fastvideo.spec import Spec
from fastvideo_train.data import hashes
from fastvideo_train.data._manifest import (
    MANIFEST,
    BucketManifest,
    TextManifest,
    VideoManifest,
    differences,
    read_manifest,
)
from fastvideo_train.data._parts import Part, Parts
from fastvideo_train.data._workers import in_order
from fastvideo_train.data.folder import Bad
from fastvideo_train.data.latents import DTYPES, encode_pixels
from fastvideo_train.data.plan import Clip, Decoder, Plan

CLIPS, SKIPPED = "clips.jsonl", "skipped.jsonl"
TEXT = "text"  # the group of prompts, beside the groups that are named by their size
PROMPTS_AT_ONCE = 8
CHUNK = 4  # latent frames that the VAE encodes at once: a whole clip of 720p takes tens of GB
STORED: Final = "float16"
SPARE = 1.05  # headers, captions, and the parts of a shard while it is written

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """What is to be encoded into a folder, by which model, and where that computes."""

    plan: Plan
    folder: Path
    manifest: VideoManifest
    model: Path
    spec: Spec
    prompts: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def open(
        cls,
        plan: Plan,
        model: str,
        folder: str | Path,
        *,
        prompts: Sequence[str] = (),
        device: str = "auto",
        dtype: str = "auto",
        shard: int = 256,
        batch: int = 1,
    ) -> Job:
        """Claim a folder; `ValueError` if it holds anything else, or the disk is too small.

        prompts: texts to store beside the captions, the empty one and the model's negative one.
        shard, batch: clips in a file, and clips encoded at once.
        """
        if not plan.clips:
            raise ValueError("no video can be encoded; fastvideo data validate says why")
        spec, source = hub.open_spec(model, weights=True)
        texts = ("", spec.defaults.negative_prompt, *prompts)
        captions = dict.fromkeys([*texts, *(clip.video.caption for clip in plan.clips)])
        place = pick_device(device)
        kind = pick_dtype(dtype, place)
        manifest = _describe(plan, spec, source, captions, shard=shard, batch=batch).model_copy(
            update={"compute": f"{str(kind).removeprefix('torch.')} on {place.type}"}
        )
        job = cls(plan, Path(folder), manifest, source, spec, tuple(captions), place, kind)
        job._claim()
        job._check_disk()
        return job

    @cached_property
    def size_bytes(self) -> int:
        """Return about how much the whole folder will take."""
        width = registry.load("fastvideo.models.dit", self.spec.dit.family, "Config")
        states = width.parse(self.spec.dit.config).text_dim * self.dtype.itemsize
        tokenizer = Tokenizer.load(formats.find(self.model).tokenizer_folder(self.model))
        limit = self.manifest.text.max_tokens
        longest = max(limit, 4 * max(len(prompt) for prompt in self.prompts) + 2)
        _, mask_BL = tokenizer(self.prompts, longest)  # uncut: encoding warns of those that are cut
        num_tokens = int(mask_BL.sum(1).clamp(max=limit).sum())
        numbers = sum(b.planned * torch.Size(b.latent_shape).numel() for b in self.manifest.buckets)
        clips = numbers * DTYPES[self.manifest.dtype].itemsize
        return int(SPARE * (clips + num_tokens * (states + 4)))

    def encode_text(self, report: Report | None = None) -> None:
        """Encode the prompts that are not there yet."""
        parts = self._parts(TEXT, len(self.prompts), PROMPTS_AT_ONCE)
        parts.settle()
        missing = parts.missing()
        if not missing:
            return
        model = load(self.model, device=self.device, dtype=self.dtype, parts=("text",))
        limit = self.manifest.text.max_tokens
        for part in missing:
            prompts = list(self.prompts[part.start : part.stop])
            with torch.no_grad():
                states_BLC = encode_prompts(
                    model.text, model.tokenizer, prompts, max_tokens=limit, device=str(self.device)
                )
            parts.write(part, _ragged(states_BLC, model.tokenizer, prompts, limit), {TEXT: prompts})
            if report:
                report(part.stop, len(self.prompts))

    def encode_clips(self, report: Report | None = None, *, workers: int = 0) -> list[Bad]:
        """Encode the clips that are not there yet; return all that turned out to be damaged.

        Worker processes decode ahead; one VAE encodes.
        """
        stores = {b.name: self._parts(b.name, b.planned) for b in self.manifest.buckets}
        for parts in stores.values():
            parts.settle()
        missing = [part for parts in stores.values() for part in parts.missing()]
        if missing:
            self._encode_parts(stores, missing, report, workers)
        bad = [Bad(*pair) for pair in self._skipped()]
        lines = (json.dumps({"file": b.name, "reason": b.reason}) for b in self._all_bad(bad))
        files.write_text(self.folder / SKIPPED, "".join(f"{x}\n" for x in lines), overwrite=True)
        return bad

    def _encode_parts(
        self, stores: dict[str, Parts], missing: list[Part], report: Report | None, workers: int
    ) -> None:
        vae = load(self.model, device=self.device, dtype=self.dtype, parts=("vae",)).vae
        clips = {name: self.plan.of(name) for name in stores}
        batches = [clips[part.group][part.start : part.stop] for part in missing]
        decode = Decoder(batches, self.plan.rules.fps)
        total = len(self.plan.clips)
        done = total - sum(len(batch) for batch in batches)
        with closing(in_order(decode, start=0, stop=len(batches), workers=workers)) as decoded:
            for part, one in zip(missing, decoded, strict=True):
                latents = self._latents(vae, part.group, torch.from_numpy(one.pixels), one.clips)
                words: dict[str, list[Any]] = {
                    "captions": [clip.video.caption for clip in one.clips],
                    "ids": [clip.video.name for clip in one.clips],
                    "skipped": [[bad.name, bad.reason] for bad in one.bad],
                }
                stores[part.group].write(part, {"latents": latents}, words)
                done += part.stop - part.start
                if report:
                    report(done, total)

    def _latents(self, vae: Any, group: str, pixels: Tensor, clips: list[Clip]) -> Tensor:
        kind = DTYPES[self.manifest.dtype]
        if not clips:
            bucket = next(b for b in self.manifest.buckets if b.name == group)
            return torch.empty(0, *bucket.latent_shape, dtype=kind)
        latents = encode_pixels(vae, pixels, chunk=CHUNK).to(kind).cpu()
        if not bool(latents.isfinite().all()):
            names = ", ".join(clip.video.name for clip in clips)
            raise ValueError(f"latents of {names} do not fit {kind} or are not finite")
        return latents

    def _parts(self, group: str, count: int, batch: int | None = None) -> Parts:
        m = self.manifest
        return Parts(self.folder, group, count=count, shard=m.shard_size, batch=batch or m.batch)

    def _skipped(self) -> list[list[str]]:
        shards = (p for b in self.manifest.buckets for p in self.folder.glob(f"{b.name}-*"))
        texts = (weights.read_metadata(path)["skipped"] for path in sorted(shards))
        return [pair for text in texts for pair in json.loads(text)]

    def _all_bad(self, damaged: list[Bad]) -> list[Bad]:
        return sorted([*self.plan.bad, *self.plan.unfit, *damaged], key=lambda bad: bad.name)

    def _claim(self) -> None:
        """Write manifest and list of clips, or refuse a folder with others, naming what differs."""
        path = self.folder / MANIFEST
        if path.exists():
            have = read_manifest(self.folder)
            wrong = differences(have, self.manifest, but=("clips", "rules", "buckets", "text"))
            if isinstance(have, VideoManifest):
                wrong += differences(have.rules, self.manifest.rules)
                clips = _other_clips(self.folder, self.plan)
                told = ("count", "prompts") if clips else ()
                wrong += [f"text {x}" for x in differences(have.text, self.manifest.text, but=told)]
                wrong += clips
            if wrong:
                raise ValueError(
                    f"{self.folder} is stale or holds other latents ({'; '.join(wrong)}); delete it"
                    " or choose another"
                )
        elif any(self.folder.glob("*.safetensors")):
            raise ValueError(f"{self.folder} holds other files; choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_text(self.folder / CLIPS, self.plan.lines(), overwrite=True)
        files.write_text(path, self.manifest.model_dump_json(indent=2) + "\n", overwrite=True)

    def _check_disk(self) -> None:
        there = sum(p.stat().st_size for p in self.folder.rglob("*.safetensors"))
        need = self.size_bytes - there
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise ValueError(
                f"{self.folder} needs about {need / 1e9:.3g} GB more and its disk has"
                f" {free / 1e9:.3g} GB left"
            )


def _describe(
    plan: Plan, spec: Spec, source: Path, prompts: Iterable[str], *, shard: int, batch: int
) -> VideoManifest:
    """Return the manifest of a plan, its encoders read from mapped files, `compute` left open."""
    if shard < 1 or batch < 1 or shard % batch:
        raise ValueError(f"shard {shard} must be a positive multiple of batch {batch}")
    config = registry.load("fastvideo.models.vae", spec.vae.family, "Config").parse(spec.vae.config)
    layout, texts = formats.find(source), list(prompts)
    buckets = []
    for bucket, count in plan.buckets().items():
        grid = PixelShape(bucket.frames, bucket.height, bucket.width).latent(spec.compression)
        shape = (config.z_dim, grid.frames, grid.height, grid.width)
        buckets.append(
            BucketManifest(
                name=bucket.name, num_frames=bucket.frames, latent_shape=shape, planned=count
            )
        )
    aliases = registry.module("fastvideo.models.text", spec.text.family).ALIASES
    text = TextManifest(
        encoder=hashes.of_text(layout.tensors(source, "text"), aliases),
        tokenizer=hashes.of_tokenizer(layout.tokenizer_folder(source)),
        prompts=hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest(),
        max_tokens=spec.defaults.max_text_tokens,
        count=len(texts),
    )
    return VideoManifest(
        shard_size=shard,
        dtype=STORED,
        encoder=hashes.of_vae(source),
        latents_mean=config.latents_mean,
        latents_std=config.latents_std,
        clips=plan.digest(),
        rules=plan.rules,
        batch=batch,
        compute="",
        buckets=tuple(buckets),
        text=text,
    )


def _other_clips(folder: Path, plan: Plan) -> list[str]:
    """Say which clips are others than when the folder was begun; nothing if they are the same."""
    now = {line: json.loads(line)["name"] for line in files.lines(plan.lines())}
    path = folder / CLIPS
    lines = files.lines(path.read_text(encoding="utf-8")) if path.is_file() else []
    before = {line: json.loads(line)["name"] for line in lines}
    old = sorted({name for line, name in before.items() if line not in now})
    new = sorted({name for line, name in now.items() if line not in before})
    kinds = {
        "gone": [n for n in old if n not in new],
        "new": [n for n in new if n not in old],
        "changed": [n for n in new if n in old],
    }
    return [
        f"{len(names)} {kind}: {', '.join(names[:3])}{' ...' if names[3:] else ''}"
        for kind, names in kinds.items()
        if names
    ]


def _ragged(
    states_BLC: Tensor, tokenizer: Tokenizer, prompts: list[str], limit: int
) -> dict[str, Tensor]:
    """Return the rows of real tokens alone, their ids, and how many each prompt has."""
    ids_BL, mask_BL = tokenizer(prompts, limit)
    used_BL = mask_BL.bool()
    return {
        "states": states_BLC[:, : mask_BL.shape[1]].cpu()[used_BL],
        "ids": ids_BL[used_BL].int(),
        "lengths": mask_BL.sum(1).int(),
    }
