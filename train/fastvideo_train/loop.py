"""The training loop: batches in, updates in the method's order, checkpoints and numbers out.

    job = Job.open(recipe, run_dir)
    for event in train(job, stop=stop):        # StepDone, Validated, Saved
        ...

It knows roles and losses only, nothing of pixels or tokens. The batch and every draw of a step are
functions of (seed, step, lane, clip), so a resumed run equals one without interruption bit for bit,
and a run on several processes one on a single process, but for the order of sums. All processes
yield the same events; what is written and looked at is written and looked at by the first.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch

from fastvideo import attention, registry
from fastvideo.config import parse
from fastvideo.errors import NotFiniteError
from fastvideo.log import logger
from fastvideo.parallel import rules
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.parallel.mesh import alone
from fastvideo.parallel.sequence import spread
from fastvideo_train import recipe as recipes
from fastvideo_train import roles as role_builder
from fastvideo_train import strategies
from fastvideo_train.batches import check as check_data
from fastvideo_train.batches import stream
from fastvideo_train.checkpoints import Checkpoints
from fastvideo_train.logs import Logs
from fastvideo_train.methods import Batch, Method, StepKey, Update
from fastvideo_train.recipe import Recipe
from fastvideo_train.roles import Role
from fastvideo_train.strategies import Strategy
from fastvideo_train.world import World

# A resumed run may not change these: its weights would no longer fit, or mean the same.
FIXED_SECTIONS = ("roles", "method", "data")
# But how weights move from now on it may, and who computes the same.
FREE_KEYS = ("data.workers", "roles.*.optim.*", "roles.*.ema", "roles.*.attention.backend")


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
    world: World = field(default_factory=World)

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        folder: Path,
        *,
        validate: Validate | None = None,
        world: World | None = None,
    ) -> Job:
        """Build the networks; continue from the folder's latest checkpoint if there is one.

        Of several processes (`world`) all call this together. Raises `ValueError` for a recipe that
        method, networks or checkpoint refuse.
        """
        world = world or World(alone(recipe.run.device))
        check(recipe, world.meshes.degrees)
        world.on_first(lambda: check_data(recipe))
        method = make_method(recipe)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        strategy: Strategy = strategies.find(recipe)(recipe, world.meshes)
        roles = _roles(recipe, method, strategy, world)
        job = cls(
            recipe=recipe,
            folder=folder,
            roles=roles,
            method=method,
            strategy=strategy,
            checkpoints=Checkpoints(folder / "checkpoints", recipe.run.keep, world),
            validate=validate,
            world=world,
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
        path = self.checkpoints.save(
            self.step, self.strategy.state_dict(), info, more=self.strategy.save_more
        )
        return Saved(self.step, path)

    def _resume(self) -> None:
        path = self.checkpoints.latest()
        names = self.world.every(path.name if path else "none")
        if len(set(names)) > 1:
            raise ValueError(
                f"processes find other checkpoints in {self.folder} ({', '.join(names)}); all"
                " machines need one folder, on a disk that they share"
            )
        if path is None:
            return
        info = self.checkpoints.read_info(path)
        _check_same(_filled(info["recipe"], path), recipes.dump(self.recipe), source=str(path))
        state = self.checkpoints.read_state(path, like=self.strategy.state_dict())
        self.strategy.load_state_dict(state, source=str(path))
        self.strategy.load_more(path)
        self.step, self.trained_s = info["step"], info["trained_s"]
        logger.info("resumed %s at step %d", path, self.step)


def check(recipe: Recipe, degrees: ParallelConfig) -> None:
    """Raise `ValueError` for what is impossible, before a weight is loaded or a process joined."""
    method = make_method(recipe)
    method.check(recipe, degrees)
    role_builder.check(recipe, method.wants)
    strategies.find(recipe).check(recipe, degrees)
    if degrees.world_size > 1 and ":" in recipe.run.device:
        raise ValueError(
            f"run.device {recipe.run.device} would be that of all {degrees.world_size} processes;"
            f" nearest: {recipe.run.device.partition(':')[0]}, of which each takes its own"
        )
    if degrees.of("sequence") == 1:
        return
    cuts = f"parallel ring {degrees.ring} x ulysses {degrees.ulysses}"
    denoisers = {n: role for n, role in recipe.roles.items() if role.kind == "dit"}
    if not denoisers:
        raise ValueError(f"{cuts}: method {recipe.method.name} has no sequences; use data or shard")
    if recipe.run.compile:
        raise ValueError(f"{cuts}: run.compile must be false where sequences are split")
    for name, role in denoisers.items():
        try:
            rules.check(degrees, attention.parse(role.attention.pattern, role.attention.args))
        except ValueError as error:
            raise ValueError(f"roles.{name}.attention: {error}") from error


def _roles(recipe: Recipe, method: Method, strategy: Strategy, world: World) -> dict[str, Role]:
    """Build the networks, hand them to the strategy, and split the sequences of denoisers."""
    run = recipe.run.model_copy(update={"device": strategy.first_device})
    roles = role_builder.build(recipe.model_copy(update={"run": run}), method.wants)
    method.initialise(roles)
    if recipe.run.recompute:
        role_builder.recompute_layers(roles)
    strategy.prepare(roles)
    if world.meshes.axis("sequence").size == 1:
        return roles
    return {
        name: replace(role, spread=spread(role.net, world.meshes)) if role.kind == "dit" else role
        for name, role in roles.items()
    }


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
    run, world = job.recipe.run, job.world
    began = saved_at = time.monotonic()
    first_step, saved_step, trained_before = job.step, -1, job.trained_s
    smooth = _Smooth()
    batch_axis = world.meshes.axis("batch")
    part = (batch_axis.rank, batch_axis.size)

    def now() -> tuple[bool, ...]:
        """Whether to end, and whether a checkpoint is due by time: what one says, all do."""
        s = time.monotonic()
        return world.any(stop() or s - began >= max_seconds, s - saved_at > run.save_every_s)

    with (
        _logs(job) as logs,
        stream(job.recipe, start=job.step * run.accumulate, part=part) as batches,
    ):
        ends, _ = now()
        while job.step < run.steps and not ends:
            metrics = _one_step(job, list(itertools.islice(batches, run.accumulate)))
            job.step += 1
            job.trained_s = trained_before + time.monotonic() - began
            done = _done(job, metrics, smooth.add(metrics["loss"]), first_step, began)
            if done.metrics and logs:
                logs.write(job.step, done.metrics)
            yield done
            if job.validate and run.validate_every and job.step % run.validate_every == 0:
                yield _validate(job, job.validate, logs)
            ends, is_late = now()
            if is_late or (run.save_every and job.step % run.save_every == 0):
                yield job.save()
                saved_step, saved_at = job.step, time.monotonic()
        if saved_step != job.step and job.step > first_step:
            yield job.save()


def _logs(job: Job) -> contextlib.AbstractContextManager[Logs | None]:
    if not job.world.is_first:
        return contextlib.nullcontext()
    return Logs(job.folder, start_step=job.step)


def _one_step(job: Job, batches: list[Batch]) -> dict[str, float]:
    """Run all phases of a step; micro-batches of one phase add up before its roles are updated.

    `loss` is that of the last phase, the one that a method has in every step; each phase's is also
    logged under the role that it updates.
    """
    run, axis = job.recipe.run, job.world.meshes.axis("batch")
    first = axis.rank * (run.batch // axis.size)
    phases = [
        job.method.step(batch, job.roles, StepKey(run.seed, job.step, run.steps, lane, first))
        for lane, batch in enumerate(batches)
    ]
    metrics: dict[str, float] = {}
    while True:
        seen: dict[str, list[float]] = {}
        updates = [update for phase in phases if (update := _advance(job, phase, seen))]
        if not updates:
            break
        assert len(updates) == len(phases), "every micro-batch of a step has the same phases"
        means = job.world.means(seen)
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
    own = [name for batch in batches for name in batch["ids"]]
    ids = [name for names in job.world.every(own) for name in names]
    latest = job.checkpoints.latest()
    last = f"; the last checkpoint is {latest}" if latest else ""
    raise DivergedError(f"{what} is {value} at step {job.step + 1}, clips {', '.join(ids)}{last}")


def _validate(job: Job, validate: Validate, logs: Logs | None) -> Validated:
    with job.strategy.averaged() as roles, torch.no_grad():
        metrics = job.world.on_first(lambda: _validated(validate, roles, job.step))
    if logs:
        logs.write(job.step, metrics, prefix="validate")
    return Validated(job.step, metrics)


def _validated(validate: Validate, roles: Mapping[str, Role], step: int) -> dict[str, float]:
    """Return the numbers of a validation, none if its clips are not finite; training continues."""
    try:
        return dict(validate(roles, step=step))
    except NotFiniteError as error:
        logger.warning("validation at step %d gives no numbers: %s", step, error)
        return {}


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
        if (key.split(".")[0] in FIXED_SECTIONS and not _is_free(key)) or key == "run.seed"
    ]
    if fixed:
        raise ValueError(
            f"{source} was made by another recipe: {'; '.join(fixed)}; use --fresh to start anew"
        )
    for change in changes:
        logger.warning("resuming with a changed recipe: %s", change)


def _is_free(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in FREE_KEYS)


class _Smooth:
    """A running average of the loss that starts at its first value."""

    def __init__(self, decay: float = 0.95) -> None:
        self.decay = decay
        self.total = self.weight = 0.0

    def add(self, value: float) -> float:
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.total / self.weight
