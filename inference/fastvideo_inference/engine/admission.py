"""Who is let in: a queue of bounded length, and of promised jobs those that will be done in time.

A promised job is let in if its forecast end is before its deadline, with the margin that nine of
ten forecasts kept to lately, and if it makes no job late that was let in before.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastvideo_inference.engine import pools
from fastvideo_inference.engine.book import Book
from fastvideo_inference.engine.config import ServeConfig, WorkerConfig
from fastvideo_inference.engine.fleet import Slot
from fastvideo_inference.engine.forecast import Demand, Lane, ends
from fastvideo_inference.engine.job import LateError, QueueFullError
from fastvideo_inference.engine.record import Record
from fastvideo_inference.goodput import profile as profiles
from fastvideo_inference.goodput.profile import DENOISE, HIGH, Estimate, Profile, Setting

_KEPT = 64  # errors of forecasts, of which a margin is made
_GUESS_S = 10.0  # of a clip, before any was made
Order = Callable[[list[Record]], list[Record]]


class Admission:
    """Checks new jobs against what waits and runs; with a profile's seconds, else past ones."""

    def __init__(self, config: ServeConfig, book: Book, policy: Any) -> None:
        self._config, self._book, self._policy = config, book, policy
        self._classes = {slo.name: slo for slo in config.class_}
        self._deadlines_s = {s.name: s.deadline_s for s in config.class_ if s.deadline_s}
        self._errors_s = deque[float](maxlen=_KEPT)
        self._rows: dict[tuple[object, ...], dict[str, float] | None] = {}
        self._alone: dict[tuple[object, ...], tuple[float, float]] = {}
        found = map(profiles.read, config.profile)
        self._profiles: dict[str, Profile] = {one.model: one for one in found}

    def admit(
        self,
        new: Record,
        waiting: Sequence[Record],
        at: Mapping[Slot, Record | None],
        order: Order,
    ) -> Record:
        """Return the job, or that of its best smaller setting which is in time.

        `at` is what each worker runs. Raises `QueueFullError`, `LateError`, or `ValueError` for a
        promise that idle workers could not keep either.
        """
        self._check_room(new, [one for one in waiting if one.is_queued])
        asked, refusals = new.job.submission, list[ValueError]()
        slo, given = self._classes[new.job.slo_class], asked.allow_smaller
        adapts = slo.allow_smaller if given is None else given
        settings = [Setting(asked.params, asked.decoder), *(asked.smaller if adapts else ())]
        for setting in settings:
            own = replace(asked, params=setting.params, decoder=setting.decoder, smaller=())
            if asked.names and setting is not settings[0]:
                own = replace(own, names=replace(asked.names, decoder=setting.decoder))
            one = Record(replace(new.job, submission=own), new.spec)
            try:
                pools.check(self._config.worker, own, new.spec)
                self._check(one, waiting, at, order)
            except ValueError as error:
                refusals.append(error)
                continue
            one.job = replace(one.job, predicted_s=one.forecast_s)
            if refusals:
                one.add_notices(f"{setting}, to be in time: {refusals[0]}")
            return one
        late = [error for error in refusals if isinstance(error, LateError)]
        raise min(late, key=lambda error: error.retry_after_s) if late else refusals[0]

    def _check_room(self, new: Record, queued: Sequence[Record]) -> None:
        name = new.job.slo_class
        limit = self._classes[name].queue
        if sum(other.job.slo_class == name for other in queued) < limit:
            return
        clip_s = self._book.clip_s(new.model, new.total) or _GUESS_S
        at_once = min(pools.num_workers(self._config.worker, new.model, new.row))
        text = f"the queue of class {name} is full: {limit} jobs wait"
        raise QueueFullError(text, retry_after_s=max(1.0, clip_s / at_once))

    def _check(
        self,
        new: Record,
        waiting: Sequence[Record],
        at: Mapping[Slot, Record | None],
        order: Order,
    ) -> None:
        name = new.job.slo_class
        if name not in self._deadlines_s:
            return
        if self._seconds(new) is None:
            if new.model in self._profiles:
                own = Setting(new.job.submission.params, new.job.submission.decoder)
                raise ValueError(f"class {name} promises nothing of {own}: it was not measured")
            return
        if (key := _key(new)) not in self._alone:  # a crowd of equal requests is refused in no time
            ends = self._ends([new], dict.fromkeys(at), new, order)
            self._alone[key] = ends[new.id], self._spread_s(new)
        alone_s, own_s = self._alone[key]
        if alone_s + own_s > self._deadlines_s[name]:
            raise ValueError(
                f"class {name} promises {self._deadlines_s[name]:g} s; this clip takes"
                f" {alone_s + own_s:.1f} s on idle workers"
            )
        after = self._ends([*waiting, new], at, new, order)
        now = time.time()
        new.forecast_s = after[new.id]
        wait_s = new.forecast_s - alone_s
        late_s = new.forecast_s + own_s + self._error_s(wait_s) - self._left_s(new, now)
        if late_s <= 0:
            late_s = self._harm_s(after, waiting, at, new, order)
        if late_s > 0:
            text = f"class {name} promises {self._deadlines_s[name]:g} s, which would be missed"
            raise LateError(f"{text} by {late_s:.1f} s", retry_after_s=late_s)

    def _harm_s(
        self,
        after: Mapping[str, float],
        waiting: Sequence[Record],
        at: Mapping[Slot, Record | None],
        new: Record,
        order: Order,
    ) -> float:
        """Return by how many seconds a new job makes one late that was in time; else 0."""
        now, before, late_s = time.time(), dict[str, float](), 0.0
        for other in [*waiting, *filter(None, at.values())]:
            left_s = self._left_s(other, now)
            if after.get(other.id, 0.0) > left_s:
                before = before or self._ends(waiting, at, new, order)
                if before.get(other.id, math.inf) <= left_s:
                    late_s = max(late_s, after[other.id] - left_s)
        return late_s

    def note(self, record: Record, took_s: Mapping[str, float]) -> None:
        """Learn from a clip that is done: its stages' seconds, and how far off its forecast was."""
        if record.forecast_s is not None:
            self._errors_s.append(time.time() - record.job.accepted_at_s - record.forecast_s)
        known, asked = self._profiles.get(record.model), record.job.submission
        self._rows.clear()
        self._alone.clear()
        is_shared = any(pool.parallel for pool in self._config.worker)
        if known and self._estimates(record, self._config.worker[0]) and not is_shared:
            self._profiles[record.model] = known.corrected(
                asked.params, took_s, decoder=asked.decoder
            )

    def _ends(
        self,
        waiting: Iterable[Record],
        at: Mapping[Slot, Record | None],
        new: Record,
        order: Order,
    ) -> dict[str, float]:
        """Return in how many seconds each job ends whose seconds are known."""
        lanes, begun, queued = [], list[tuple[Record, Demand]](), [*waiting]
        found: dict[str, float] = {}
        for slot, record in at.items():
            lanes.append(lane := Lane(slot.pool, slot.config.stages))
            seconds = self._seconds(record) if record else None
            if record is None or slot.task is None or record.is_warmup:
                continue
            if seconds is None:
                lane.free_s = 0.0 if self._gives_way(record, new) else _GUESS_S
                continue
            own, later = seconds[slot.pool], slot.task.later
            if self._gives_way(record, new):
                lane.free_s = own[DENOISE] / record.job.submission.params.num_inference_steps
                queued.append(record)
                continue
            stages = record.row[record.index : len(record.row) - len(later)]
            lane.free_s = found[record.id] = sum(own[stage] for stage in stages)
            if later:
                begun.append((record, Demand(later, seconds, lane.free_s)))
        for record in order(queued):
            if seconds := self._seconds(record):
                begun.append((record, Demand(record.row[record.index :], seconds)))
        done = ends([demand for _, demand in begun], lanes)
        return found | {record.id: s for (record, _), s in zip(begun, done, strict=True)}

    def _gives_way(self, running: Record, new: Record) -> bool:
        """Tell whether a job is asked back from its worker, within a step, for a new one."""
        is_later = self._policy.PREEMPTS and running.job.stage == DENOISE
        return is_later and self._policy.preempts(new.job, running.job, self._deadlines_s)

    def _seconds(self, record: Record) -> dict[int, dict[str, float]] | None:
        """Return the seconds that each stage still takes on each pool; None if nothing is known."""
        since = record.since or (record.next, time.monotonic())
        done_s = record.job.stage_seconds.get(record.next, 0.0)
        done_s += time.monotonic() - since[1] if since[0] == record.next else 0.0
        found, own = {}, _key(record)
        for index, pool in enumerate(self._config.worker):
            key = (*own, index)
            if key not in self._rows:
                self._rows[key] = self._row_s(record, pool)
            known = self._rows[key]
            if known is None:
                return None
            left = {**known, record.next: max(0.0, known[record.next] - done_s)}
            found[index] = {s: left[s] for s in record.row if record.fits(pool, s)}
        return found

    def _row_s(self, record: Record, pool: WorkerConfig) -> dict[str, float] | None:
        """Return a profile's seconds, else those of past clips of about this size."""
        profile = self._profiles.get(record.model)
        if profile and (row := self._estimates(record, pool)):
            loads = profile.reload_s(pool.stages, pool.memory)
            loads[pool.stages[0]] += profile.dispatch_s
            return {stage: one.median + loads.get(stage, 0.0) for stage, one in row.items()}
        known = self._book.stages_s(record.model, record.total)
        saved = {record.row[-1]: known["save"]} if known else {}
        return known and {s: known.get(s, 0.0) + saved.get(s, 0.0) for s in record.row}

    def _estimates(self, record: Record, pool: WorkerConfig) -> dict[str, Estimate]:
        profile, asked = self._profiles[record.model], record.job.submission
        try:
            return profile.row_s(asked.params, decoder=asked.decoder, parallel=pool.parallel)
        except ValueError:  # a setting that was not measured
            return {}

    def _error_s(self, wait_s: float) -> float:
        """Return how much later than forecast nine of ten of the last jobs ended, at most.

        It is bounded by the wait, so that idle workers take every clip that they can do in time.
        """
        errors = sorted(self._errors_s)
        return max(0.0, min(wait_s, errors[math.ceil(HIGH * len(errors)) - 1])) if errors else 0.0

    def _spread_s(self, record: Record) -> float:
        """Return how much longer than usual one of ten clips takes; 0 if that is not known."""
        whole = Estimate(0.0, 0.0)
        for stage in record.row if record.model in self._profiles else ():
            pool = next(one for one in self._config.worker if record.fits(one, stage))
            whole += self._estimates(record, pool).get(stage, Estimate(0.0, 0.0))
        return whole.high - whole.median

    def _left_s(self, record: Record, now_s: float) -> float:
        """Return the seconds until a job's deadline; endless without a promise."""
        deadline_s = self._deadlines_s.get(record.job.slo_class, math.inf)
        return record.job.accepted_at_s + deadline_s - now_s


def _key(record: Record) -> tuple[object, ...]:
    """Return what a clip's seconds depend on."""
    asked = record.job.submission
    p = asked.params
    clip = (p.width, p.height, p.num_frames, p.num_inference_steps, p.guidance_scale)
    return (asked.model, *clip, p.attention, asked.decoder)
