"""What a weights folder says of itself: networks, scheduler, attention, defaults, provenance.

The file is `fastvideo.json` at the root of a model folder. A distilled model is a spec with few
steps and a sparse pattern; there is no other switch. A folder without the file gets a spec derived
from its own configs by `fastvideo.formats`, and `derived` tells which entries were guessed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from fastvideo import files, sampling
from fastvideo.config import Strict, parse
from fastvideo.shapes import Compression, LatentShape, PixelShape

FILE_NAME = "fastvideo.json"
UNSTATED = "not stated"
"""The licence of a parent that says none."""
TEXT_TO_VIDEO = ("encode_text", "prepare_latents", "denoise", "decode")
"""The row of stages of a text-to-video model (files of `fastvideo/stages/`)."""


class Network(Strict):
    """One network: its family (a file under `fastvideo/models/<kind>/`) and its own dims."""

    family: str
    config: dict[str, Any] = Field(default_factory=dict)


class Scheduler(Strict):
    """A scheduler (a file under `fastvideo/schedulers/`) and its arguments."""

    name: str = "unipc"
    args: dict[str, Any] = Field(default_factory=dict)


class Attention(Strict):
    """An attention pattern by name, with its arguments."""

    pattern: str = "dense"
    args: dict[str, Any] = Field(default_factory=dict)


class Defaults(Strict):
    """What a request that says nothing gets."""

    num_frames: sampling.NumFrames = 81
    height: sampling.Height = 480
    width: sampling.Width = 832
    fps: sampling.Fps = 16
    num_inference_steps: sampling.NumSteps = 50
    guidance_scale: sampling.GuidanceScale = 5.0
    negative_prompt: sampling.NegativePrompt = ""
    max_text_tokens: int = Field(default=512, ge=1)


class Sampler(Strict):
    """How weights that were learned beside a model are sampled; None leaves it to the model."""

    scheduler: Scheduler | None = None
    num_inference_steps: sampling.NumSteps | None = None
    guidance_scale: sampling.GuidanceScale | None = None
    attention: Attention | None = None


class Provenance(Strict):
    """Who made the weights, from what, and under which name they may be quoted.

    parents: the models that the weights were learned from or on, each with its licence.
    """

    title: str = ""
    licence: str = ""
    source: str = ""
    recipe: str = ""
    notes: str = ""
    data: str = ""
    parents: dict[str, str] = Field(default_factory=dict)


class Spec(Strict):
    """A model folder's description of itself."""

    version: int = 1
    name: str
    dit: Network
    vae: Network
    text: Network
    compression: Compression = Compression()
    scheduler: Scheduler = Scheduler()
    attention: Attention = Attention()
    stages: tuple[str, ...] = TEXT_TO_VIDEO
    defaults: Defaults = Defaults()
    provenance: Provenance = Provenance()
    derived: tuple[str, ...] = ()
    unknown_keys: tuple[str, ...] = Field(default=(), exclude=True)  # found beside it; not stored

    @field_validator("version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version != 1:
            raise ValueError("this release reads version 1; a newer fastvideo wrote this folder")
        return version

    def latent_shape(self, *, frames: int, height: int, width: int) -> LatentShape:
        """Return the latents of a clip; raise `ValueError` with the nearest legal sizes."""
        return PixelShape(frames, height, width).latent(self.compression)


def read(folder: str | Path) -> Spec | None:
    """Read a model folder's `fastvideo.json`; None if it has none, `ValueError` if it is wrong."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(files.read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    return parse(Spec, values, source=str(path))


def write(spec: Spec, folder: str | Path) -> Path:
    """Write `fastvideo.json`, with network dims left to each network's own `config.json`."""
    path = Path(folder) / FILE_NAME
    values = spec.model_dump(mode="json", exclude={k: {"config"} for k in ("dit", "vae", "text")})
    if spec.stages == TEXT_TO_VIDEO:  # older releases do not know the key
        del values["stages"]
    for key in ("data", "parents"):  # nor these
        if not values["provenance"][key]:
            del values["provenance"][key]
    return files.write_text(path, json.dumps(values, indent=2) + "\n", overwrite=True)
