"""The config of a server from its TOML file, checked as a whole before anything is loaded."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

import fastvideo
from fastvideo import hub, timing
from fastvideo.config import parse, read_toml, toml_line
from fastvideo.parallel import degrees
from fastvideo.registry import did_you_mean, names
from fastvideo_inference import recipe
from fastvideo_inference.engine import pools
from fastvideo_inference.engine.config import ServeConfig, WorkerConfig
from fastvideo_inference.engine.job import Submission
from fastvideo_inference.goodput import profile as profiles
from fastvideo_inference.request import DEVICE
from fastvideo_inference.serve.catalogue import Catalogue


def read(path: Path | None, *, executor: str | None = None) -> ServeConfig:
    """Read a config; a one-line `ValueError` names the line that is wrong. None: the defaults.

    `executor` replaces the file's.
    """
    own = {} if executor is None else {"executor": executor}
    if path is None:
        return ServeConfig.model_validate(own)
    config = parse(ServeConfig, read_toml(path), source=lambda keys: toml_line(path, keys))
    config = config.model_copy(update=own)
    try:
        check(config)
    except ValueError as error:
        raise ValueError(f"{error} (in {path})") from None
    return config


def check(config: ServeConfig) -> None:
    """Raise `ValueError` for what no single value shows: names, files, stages, degrees."""
    classes = [one.name for one in config.class_]
    for field, values in (
        ("class.name", classes),
        ("key.name", [key.name for key in config.key]),
        ("key.sha256", [key.sha256 for key in config.key]),
    ):
        for value, times in Counter(values).items():
            if times > 1:
                raise ValueError(f"{field} {value!r} is given twice")
    for key in config.key:
        _check_known("key.class", key.slo_class or classes[0], classes)
    _check_known("policy", config.policy_name, names("fastvideo_inference.engine.policies"))
    for worker in config.worker:
        _check_worker(worker, is_local=config.executor == "local")
    for model in set(Catalogue(config).models.values()):
        if not hub.is_remote(model):
            _check_row(model, config.worker)
    default = config.worker[0].model or hub.DEFAULT_MODEL
    if not hub.is_remote(default):  # its warm-up is to be possible
        spec, workers = hub.open_spec(default)[0], config.worker
        params = pools.tiny(default, spec, workers, seed=0)
        pools.check(workers, Submission(default, params), spec)
    for lora in config.lora.values():
        hub.find_lora(lora)
    for path in config.profile:
        _check_profile(path, config)
    for name, decoder in config.decoder.items():
        is_path = Path(decoder).name != decoder  # else a name in a model's own folder of decoders
        if is_path and not Path(decoder).expanduser().exists():
            raise ValueError(f"decoder.{name} {decoder!r} does not exist")


def _check_profile(path: Path, config: ServeConfig) -> None:
    made = profiles.read(path)
    if made.model not in Catalogue(config).models.values():
        raise ValueError(f"profile {path} is of model {made.model!r}, which is not served")
    own = [one for one in config.worker if one.model in ("", made.model)]
    devices = {device for one in own for device in one.devices}
    place, on_cpu = timing.place(), any(device.startswith("cpu") for device in devices)
    here = {"kind": "cpu", "name": place["cpu"]} if on_cpu else {}
    if on_cpu and all(":" in device for device in devices):
        here |= {"threads": 1}
    if made.source == "measured":
        here |= {"torch": place["torch"], "fastvideo": fastvideo.__version__}
    made.check(fingerprint=recipe.fingerprint(hub.open_model(made.model).folder), **here)


def _check_known(field: str, word: str, known: Collection[str]) -> None:
    if word not in known:
        hint = did_you_mean(word, known)
        raise ValueError(f"{field} {word!r} is unknown{hint} (known: {', '.join(known)})")


def _check_worker(worker: WorkerConfig, *, is_local: bool) -> None:
    for stage in worker.stages:
        _check_known("worker.stages", stage, names("fastvideo.stages"))
    if is_local and len(worker.devices) > 1:
        raise ValueError("worker.devices: several need executor 'process'; 'local' has one process")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for device in worker.devices:
        device_type, _, number = device.partition(":")
        if device_type == "cpu" and number.isdigit() and int(number) >= cores:
            raise ValueError(f"worker.devices {device!r}: this machine has {cores} cores")
        if not DEVICE.fullmatch(device) and not (device_type == "cpu" and number.isdigit()):
            raise ValueError(f"worker.devices {device!r} is unknown; use cpu, cpu:N, cuda, cuda:N")
    try:
        split = degrees.parse(worker.parallel)
        split.check(len(worker.devices))
        if split.of("batch") > 1:
            raise ValueError("a worker makes one clip with whole weights; for more, use count")
    except ValueError as error:
        raise ValueError(f"worker.parallel {worker.parallel!r}: {error}") from None


def _check_row(model: str, workers: Iterable[WorkerConfig]) -> None:
    """Raise unless each stage of a model is run by a worker."""
    offered = {s for one in workers if one.model in ("", model) for s in one.stages}
    missing = [stage for stage in hub.open_spec(model)[0].stages if stage not in offered]
    if missing:
        raise ValueError(f"worker.stages: no worker runs {', '.join(missing)} of model {model}")
