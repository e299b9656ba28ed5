"""The config of a server from its TOML file, checked as a whole before anything is loaded."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fastvideo import hub
from fastvideo.config import parse, read_toml, toml_line
from fastvideo.parallel import degrees
from fastvideo.registry import did_you_mean, names
from fastvideo_inference.engine.config import ServeConfig, WorkerConfig
from fastvideo_inference.request import DEVICE
from fastvideo_inference.serve.catalogue import Catalogue


def read(path: Path | None) -> ServeConfig:
    """Read a config; a one-line `ValueError` names the line that is wrong. None: the defaults."""
    if path is None:
        return ServeConfig()
    config = parse(ServeConfig, read_toml(path), source=lambda keys: toml_line(path, keys))
    try:
        check(config)
    except ValueError as error:
        raise ValueError(f"{error} (in {path})") from None
    return config


def check(config: ServeConfig) -> None:
    """Raise `ValueError` for what no single value shows: names, files, stages, degrees."""
    classes = [one.name for one in config.class_]
    _check_unique("class.name", classes)
    _check_unique("key.name", [key.name for key in config.key])
    _check_unique("key.sha256", [key.sha256 for key in config.key])
    for key in config.key:
        if key.slo_class not in ("", *classes):
            hint = did_you_mean(key.slo_class, classes)
            raise ValueError(f"key.class {key.slo_class!r} is unknown{hint}")
    policies = names("fastvideo_inference.engine.policies")
    if config.policy not in policies:
        known = ", ".join(policies)
        raise ValueError(f"policy {config.policy!r} is unknown (known: {known})")
    for worker in config.worker:
        _check_worker(worker)
        if config.executor == "local" and len(worker.devices) > 1:
            raise ValueError(
                "executor 'local' has one process; worker.devices of several need 'process'"
            )
    catalogue = Catalogue(config)
    for name in set(catalogue.models.values()):
        if not hub.is_remote(name):
            _check_row(name, config.worker)
    for lora in config.lora.values():
        hub.find_lora(lora)
    for name, decoder in config.decoder.items():
        is_path = Path(decoder).name != decoder  # else a name in a model's own folder of decoders
        if is_path and not Path(decoder).expanduser().exists():
            raise ValueError(f"decoder.{name} {decoder!r} does not exist")


def _check_worker(worker: WorkerConfig) -> None:
    known = names("fastvideo.stages")
    for stage in worker.stages:
        if stage not in known:
            hint = did_you_mean(stage, known)
            raise ValueError(
                f"worker.stages {stage!r} is unknown{hint} (known: {', '.join(known)})"
            )
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for device in worker.devices:
        if device.startswith("cpu:") and device[4:].isdigit() and int(device[4:]) >= cores:
            raise ValueError(f"worker.devices {device!r}: this machine has {cores} cores")
        if not (DEVICE.fullmatch(device) or device.removeprefix("cpu:").isdigit()):
            raise ValueError(f"worker.devices {device!r} is unknown; use cpu, cpu:N, cuda, cuda:N")
    try:
        found = degrees.parse(worker.parallel)
        found.check(len(worker.devices))
        if found.of("batch") > 1:
            raise ValueError("a worker makes one clip with whole weights; for more, use count")
    except ValueError as error:
        raise ValueError(f"worker.parallel {worker.parallel!r}: {error}") from None


def _check_row(model: str, workers: Iterable[WorkerConfig]) -> None:
    """Raise unless each stage of a model is run by a worker."""
    offered = {s for one in workers if one.model in ("", model) for s in one.stages}
    row = hub.open_spec(model)[0].stages
    missing = [stage for stage in row if stage not in offered]
    if missing:
        raise ValueError(f"worker.stages: no worker runs {', '.join(missing)} of model {model}")


def _check_unique(field: str, values: list[str]) -> None:
    twice = [value for value, times in Counter(values).items() if times > 1]
    if twice:
        raise ValueError(f"{field} {twice[0]!r} is given twice")
