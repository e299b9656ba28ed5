"""Which videos of a folder become clips of which bucket, and their pixels; free of torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastvideo import footage
from fastvideo.footage import Footage, UnusableError
from fastvideo_train.data.buckets import Bucket, Fit, Rules, UnfitError
from fastvideo_train.data.folder import Bad, Found, Scanned, Video

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """A video that is trained on: its facts, the hash of its bytes, and where it goes."""

    video: Video
    footage: Footage
    digest: str
    fit: Fit

    def frames(self, fps: float) -> Pixels:
        """Return what training sees (T H W 3); `UnusableError` if the file is damaged."""
        view, count = self.fit.view, self.fit.bucket.frames
        return footage.read(self.video.path, fps=fps, num_frames=count, view=view)


@dataclass(frozen=True)
class Plan:
    """Clips by bucket and name; `bad` are broken, `unfit` sound but left out by the rules."""

    rules: Rules
    clips: tuple[Clip, ...]
    bad: tuple[Bad, ...]
    unfit: tuple[Bad, ...]

    def buckets(self) -> dict[Bucket, int]:
        """Return how many clips each bucket has, without the empty ones."""
        return dict(sorted(Counter(clip.fit.bucket for clip in self.clips).items()))

    def of(self, bucket: str) -> list[Clip]:
        """Return the clips of a bucket, in their order."""
        return [clip for clip in self.clips if clip.fit.bucket.name == bucket]

    def lines(self) -> str:
        """Return `clips.jsonl`, a line for each clip: all of it that decides the shards."""
        rows: Iterable[dict[str, Any]] = (
            {
                "name": clip.video.name,
                "bucket": clip.fit.bucket.name,
                "video": clip.digest,
                "caption": clip.video.caption,
            }
            for clip in self.clips
        )
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def digest(self) -> str:
        """Return the hash of `lines`."""
        return hashlib.blake2b(self.lines().encode(), digest_size=16).hexdigest()


def make(found: Found, scanned: Iterable[Scanned], rules: Rules) -> Plan:
    """Sort what was scanned into clips, bad files and those that the rules leave out."""
    clips, bad, unfit = list[Clip](), list(found.bad), list[Bad]()
    for one in scanned:
        name = one.video.name
        if one.footage is None:
            bad.append(Bad(name, one.reason))
            continue
        try:
            clips.append(Clip(one.video, one.footage, one.digest, rules.fit(one.footage)))
        except UnfitError as error:
            unfit.append(Bad(name, str(error)))
    clips.sort(key=lambda clip: (clip.fit.bucket, clip.video.name))
    bad.sort(key=lambda one: one.name)
    return Plan(rules, tuple(clips), tuple(bad), tuple(unfit))


@dataclass(frozen=True)
class Decoded:
    """The clips of one batch that could be decoded: pixels (B, 3, T, H, W), and the others."""

    pixels: Pixels
    clips: list[Clip]
    bad: list[Bad]


@dataclass(frozen=True)
class Decoder:
    """Decodes batch after batch of one bucket's clips; what a worker process is given."""

    batches: Sequence[Sequence[Clip]]
    fps: float

    def __call__(self, index: int) -> Decoded:
        """Return one batch; a clip that fails is left out of it with the reason."""
        kept, bad, frames = list[Clip](), list[Bad](), list[Pixels]()
        for clip in self.batches[index]:
            try:
                frames.append(clip.frames(self.fps).transpose(3, 0, 1, 2))
                kept.append(clip)
            except UnusableError as error:
                bad.append(Bad(clip.video.name, str(error)))
        bucket = self.batches[index][0].fit.bucket
        shape = (0, 3, bucket.frames, bucket.height, bucket.width)
        return Decoded(np.stack(frames) if frames else np.empty(shape, np.uint8), kept, bad)
