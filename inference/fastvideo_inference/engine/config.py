"""The config of `fastvideo serve`: workers, SLO classes, keys, limits; torch-free, from TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from fastvideo.config import Strict
from fastvideo.spec import TEXT_TO_VIDEO


class WorkerConfig(Strict):
    """`count` equal workers, each one process, or a group of ranks if there are several devices.

    `stages` of the model's row that it runs (several: a monolith). `devices`, one a rank, are such
    as "cuda:0"; "cpu:0" is one pinned core. `parallel` shares a clip among the ranks. `memory`
    (GiB; None: no limit): parts that do not fit together are loaded for their stage and freed.
    `model` "" serves every bundled model, each loaded on first use, in half of the device's memory
    unless `memory` says otherwise.
    """

    stages: tuple[str, ...] = Field(default=TEXT_TO_VIDEO, min_length=1)
    model: str = ""
    devices: tuple[str, ...] = Field(default=("auto",), min_length=1)
    parallel: str = ""
    count: int = Field(default=1, ge=1)
    memory: float | None = Field(default=None, gt=0)


class ClassConfig(Strict):
    """An SLO class: how many jobs may wait, and within how many seconds of its acceptance a clip is
    promised to be ready (None: unpromised). `allow_smaller`: what a request leaves open is chosen
    so that the promise can be kept.
    """

    name: str = "default"
    deadline_s: float | None = Field(default=None, gt=0)
    queue: int = Field(default=64, ge=1)
    allow_smaller: bool = False


class KeyConfig(Strict):
    """An API key by its SHA-256; `rate` is accepted clips a minute, `running` jobs at once."""

    name: str = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    slo_class: str = Field(default="", alias="class")
    rate: float | None = Field(default=None, gt=0)
    running: int | None = Field(default=None, ge=1)


class Limits(Strict):
    """The most that a request over HTTP may ask for, and what the server keeps."""

    width: int = Field(default=1920, ge=1)
    height: int = Field(default=1920, ge=1)
    num_frames: int = Field(default=257, ge=1)
    pixels: int = Field(default=1 << 28, ge=1, description="width x height x num_frames")
    num_inference_steps: int = Field(default=100, ge=1)
    count: int = Field(default=16, ge=1, description="clips of one request")
    prompt_chars: int = Field(default=8000, ge=1, le=20_000, description="a task fits a socket")
    body_bytes: int = Field(default=1 << 20, ge=1)
    streams: int = Field(default=256, ge=1, description="of events, open at once, of each key")
    output_bytes: int = Field(default=20 << 30, ge=1)
    output_ttl_s: float = Field(default=24 * 3600.0, gt=0)


class ServeConfig(Strict):
    """The config of `fastvideo serve`; without a file, these defaults."""

    worker: tuple[WorkerConfig, ...] = Field(default=(WorkerConfig(),), min_length=1)
    class_: tuple[ClassConfig, ...] = Field(default=(ClassConfig(),), alias="class", min_length=1)
    key: tuple[KeyConfig, ...] = ()
    lora: dict[str, str] = Field(default_factory=dict, description="name: path")
    decoder: dict[str, str] = Field(default_factory=dict, description="name: path")
    limits: Limits = Limits()
    hosts: tuple[str, ...] = Field(default=(), description="names that clients without keys use")
    policy: str = Field(default="", description="deadline if a class promises one, else fifo")
    profile: tuple[Path, ...] = Field(default=(), description="of `fastvideo profile`, by model")
    executor: Literal["local", "process"] = "process"
    checkpoint_every: int = Field(default=1, ge=1, description="denoising steps")
    in_flight: int = Field(default=2, ge=1, description="states that wait between two stages")
    interrupted: Literal["requeue", "fail"] = "requeue"
    heartbeat_s: float = Field(default=10.0, gt=0)
    folder: Path = Path("outputs/serve")

    @property
    def policy_name(self) -> str:
        """The policy that is used."""
        is_promised = any(one.deadline_s for one in self.class_)
        return self.policy or ("deadline" if is_promised else "fifo")
