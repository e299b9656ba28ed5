"""The training loop: batches in, updates in the method's order, checkpoints and numbers out.

    job = Job.open(recipe, run_dir)
    for event in train(job, stop=stop):        # StepDone, Validated, Saved
        ...

It knows roles and losses only, nothing of pixels or tokens. The batch and every draw of a step are
functions of (seed, step, lane), so a resumed run equals one without interruption bit for bit.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fastvideo import registry
from fastvideo.config import parse
from fastvideo.log import logger
from fastvideo_train import recipe as recipes
from fastvideo_train import roles as role_builder
from fastvideo_train.batches import stream
from fastvideo_train.checkpoints import Checkpoints
from fastvideo_train.logs import Logs
from fastvideo_train.methods import Batch, Method, StepKey, Update
from fastvideo_train.recipe import Recipe
from fastvideo_train.roles import Role
from fastvideo_train.strategies import Strategy

# A resumed run may not change these: its weights would no longer fit, or mean the same.
FIXED_SECTIONS = ("roles", "method", "data")
FREE_KEYS = ("data.workers",)  # who renders a batch does not change it


@dataclass(frozen=True)
class StepDone:
    """One finished step; `step` counts from 1. `metrics` is there every `log_every` steps."""

    step: int
    num_steps: int
    loss: float
    samples_per_s: float
    seconds_left: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Validated:
    """Numbers of a validation with averaged weights."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: Path


Event = StepDone | Validated | Saved


class DivergedError(ValueError):
    """The loss or a gradient is not finite."""


class Validate(Protocol):
    """Looks at the networks, which compute with averaged weights during the call."""

    def __call__(self, roles: Mapping[str, Role], *, step: int) -> Mapping[str, float]:
        """Return numbers for the log."""


@dataclass
class Job:
    """A run that is ready to train from `step`, the number of finished steps."""

    recipe: Recipe
    folder: Path
    roles: Mapping[str, Role]
    method: Method
    strategy: Strategy
    checkpoints: Checkpoints
    step: int = 0
    trained_s: float = 0.0
    validate: Validate | None = None

    @classmethod
    def open(cls, recipe: Recipe, folder: Path, *, validate: Validate | None = None) -> Job:
        """Build the networks; continue from the folder's latest checkpoint if there is one.

        Raises `ValueError` for a recipe that method, networks or checkpoint refuse.
        """
        method = make_method(recipe)
        role_builder.check(recipe, method.wants)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        roles = role_builder.build(recipe, method.wants)
        method.initialise(roles)
        strategy: Strategy = registry.load(
            "fastvideo_train.strategies", recipe.run.strategy, "Strategy"
        )(recipe)
        strategy.prepare(roles)
        job = cls(
            recipe=recipe,
            folder=folder,
            roles=roles,
            method=method,
            strategy=strategy,
            checkpoints=Checkpoints(folder / "checkpoints", recipe.run.keep),
            validate=validate,
        )
        job._resume()
        if recipe.run.compile:
            role_builder.compile_calls(roles, method.wants)
        return job

    def save(self) -> Saved:
        """Write a checkpoint of now."""
        info = {
            "step": self.step,
            "trained_s": round(self.trained_s, 1),
            "torch": torch.__version__,
            "recipe": recipes.dump(self.recipe),
            "dims": {name: dict(role.config) for name, role in self.roles.items()},
        }
        path = self.checkpoints.save(self.step, self.strategy.state_dict(), info)
        return Saved(self.step, path)

    def _resume(self) -> None:
        path = self.checkpoints.latest()
        if path is None:
            return
        info = self.checkpoints.read_info(path)
        _check_same(_filled(info["recipe"], path), recipes.dump(self.recipe), source=str(path))
        self.strategy.load_state_dict(self.checkpoints.read_state(path), source=str(path))
        self.step, self.trained_s = info["step"], info["trained_s"]
        logger.info("resumed %s at step %d", path, self.step)


def make_method(recipe: Recipe) -> Method:
    """Return the recipe's method; raise `ValueError` for an unknown one or for its wrong config."""
    module = registry.module("fastvideo_train.methods", recipe.method.name)
    config = parse(module.Config, recipe.method.args, source=f"method.args of {recipe.run.name}")
    method: Method = module.Method(config)
    return method


def train(
    job: Job, *, stop: Callable[[], bool] = lambda: False, max_seconds: float = math.inf
) -> Iterator[Event]:
    """Train until the recipe's last step, `stop()` or `max_seconds`; always end with a checkpoint.

    Raises `DivergedError` with the batch's ids if the loss or a gradient is not finite; the last
    checkpoint is then the state before.
    """
    run = job.recipe.run
    began = saved_at = time.monotonic()
    first_step, saved_step, trained_before = job.step, -1, job.trained_s
    smooth = _Smooth()
    with (
        Logs(job.folder, start_step=job.step) as logs,
        stream(job.recipe, start=job.step * run.accumulate) as batches,
    ):
        while job.step < run.steps and not stop() and time.monotonic() - began < max_seconds:
            metrics = _one_step(job, list(itertools.islice(batches, run.accumulate)))
            job.step += 1
            job.trained_s = trained_before + time.monotonic() - began
            done = _done(job, metrics, smooth.add(metrics["loss"]), first_step, began)
            if done.metrics:
                logs.write(job.step, done.metrics)
            yield done
            if job.validate and run.validate_every and job.step % run.validate_every == 0:
                yield _validate(job, job.validate, logs)
            is_due = run.save_every and job.step % run.save_every == 0
            if is_due or time.monotonic() - saved_at > run.save_every_s:
                yield job.save()
                saved_step, saved_at = job.step, time.monotonic()
        if saved_step != job.step and job.step > first_step:
            yield job.save()


def _one_step(job: Job, batches: list[Batch]) -> dict[str, float]:
    """Run all phases of a step; micro-batches of one phase add up before its roles are updated.

    `loss` is that of the last phase, the one that a method has in every step; each phase's is also
    logged under the role that it updates.
    """
    run = job.recipe.run
    phases = [
        job.method.step(batch, job.roles, StepKey(run.seed, job.step, run.steps, lane))
        for lane, batch in enumerate(batches)
    ]
    metrics: dict[str, float] = {}
    while True:
        seen: dict[str, list[float]] = {}
        updates = [update for phase in phases if (update := _advance(job, phase, seen))]
        if not updates:
            break
        assert len(updates) == len(phases), "every micro-batch of a step has the same phases"
        means = {key: math.fsum(values) / len(values) for key, values in seen.items()}
        roles = updates[0].roles
        metrics |= {**means, f"{roles[0]}/loss": means["loss"]}
        _check_finite(job, means["loss"], batches, "loss")
        for role in roles:
            for key, value in job.strategy.update(role, step=job.step).items():
                metrics[f"{role}/{key}"] = value
            _check_finite(job, metrics[f"{role}/grad_norm"], batches, f"gradient of {role}")
    return metrics


def _advance(job: Job, phase: Iterator[Update], seen: dict[str, list[float]]) -> Update | None:
    """Back-propagate a micro-batch's next phase; note its numbers, which not all may have."""
    update = next(phase, None)
    if update is None:
        return None
    job.strategy.backward(update.roles, update.loss)
    for key, value in {"loss": update.loss.detach(), **update.metrics}.items():
        seen.setdefault(key, []).append(float(value))
    return update


def _check_finite(job: Job, value: float, batches: list[Batch], what: str) -> None:
    if math.isfinite(value):
        return
    ids = [name for batch in batches for name in batch["ids"]]
    latest = job.checkpoints.latest()
    last = f"; the last checkpoint is {latest}" if latest else ""
    raise DivergedError(f"{what} is {value} at step {job.step + 1}, clips {', '.join(ids)}{last}")


def _validate(job: Job, validate: Validate, logs: Logs) -> Validated:
    with job.strategy.averaged(), torch.no_grad():
        metrics = validate(job.roles, step=job.step)
    logs.write(job.step, metrics, prefix="validate")
    return Validated(job.step, metrics)


def _done(
    job: Job, metrics: Mapping[str, float], loss: float, first_step: int, began: float
) -> StepDone:
    run = job.recipe.run
    seconds = time.monotonic() - began
    per_step = seconds / (job.step - first_step)
    rate = run.batch * run.accumulate / per_step
    is_logged = job.step % run.log_every == 0 or job.step in (1, run.steps)
    shown = {**metrics, "samples_per_s": rate, "elapsed_s": job.trained_s} if is_logged else {}
    return StepDone(job.step, run.steps, loss, rate, per_step * (run.steps - job.step), shown)


def _filled(old: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a checkpoint's recipe with the keys that it is older than, at their defaults."""
    return recipes.dump(parse(recipes.Recipe, old, source=str(path)))


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], *, source: str) -> None:
    """Refuse changes that a checkpoint cannot follow; log the others."""
    changes = recipes.differences(old, new)
    keys = {change: change.partition(":")[0] for change in changes}
    fixed = [
        change
        for change, key in keys.items()
        if (key.split(".")[0] in FIXED_SECTIONS and key not in FREE_KEYS) or key == "run.seed"
    ]
    if fixed:
        raise ValueError(
            f"{source} was made by another recipe: {'; '.join(fixed)}; use --fresh to start anew"
        )
    for change in changes:
        logger.warning("resuming with a changed recipe: %s", change)


class _Smooth:
    """A running average of the loss that starts at its first value."""

    def __init__(self, decay: float = 0.95) -> None:
        self.decay = decay
        self.total = self.weight = 0.0

    def add(self, value: float) -> float:
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.total / self.weight
