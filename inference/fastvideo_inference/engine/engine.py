"""The engine: jobs in, files out, whatever happens to workers.

engine = Engine(config)
await engine.start()
job = await engine.submit(Submission(model="fastwan-nano", params=params))    # committed
async for event in engine.events(job.id): ...

A job is a row of stages. It waits, is dispatched to a worker that runs its next stages, and returns
with a state from which the row resumes: on another worker, after preemption at a step boundary, or
after its worker's death. Every dispatch has an attempt number; reports of older attempts are
dropped. Only the engine publishes clips, and it announces an end once the journal has committed it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from fastvideo import hub, registry
from fastvideo.spec import Spec
from fastvideo_inference.engine import pools
from fastvideo_inference.engine.admission import Admission
from fastvideo_inference.engine.book import Book
from fastvideo_inference.engine.config import ServeConfig
from fastvideo_inference.engine.fleet import Fleet, Slot
from fastvideo_inference.engine.job import (
    TERMINAL,
    EngineStoppingError,
    Failure,
    Job,
    JobEvent,
    Submission,
)
from fastvideo_inference.engine.ledger import Ledger, log_error
from fastvideo_inference.engine.messages import LAST, Report, Task
from fastvideo_inference.engine.record import ENCODE, Counts, PromptCache, Record, add

MOST_DEATHS, _MOST_STARTS = 2, 3  # worker deaths of a job; failed starts of a worker in a row
_PACKAGE = "fastvideo_inference.engine"
_DRAIN_PAUSE_S = 0.05
_PATIENCE_S = 10.0  # of a warm-up while other jobs come


class Engine:
    """Owns the jobs, their last states, the queues and the workers, all on one event loop."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self._classes = {slo.name: slo for slo in config.class_}
        self._deadlines_s = {s.name: s.deadline_s for s in config.class_ if s.deadline_s}
        self._policy: Any = registry.module(f"{_PACKAGE}.policies", config.policy_name)
        executor = registry.load(f"{_PACKAGE}.executors", config.executor, "Executor")()
        self._book = Book()
        self._admission = Admission(config, self._book, self._policy)
        self._fleet = Fleet(config, executor, self._book, hear=self._hear, lost=self._lost)
        self._ledger = Ledger(config.folder)
        self._records = self._ledger.records
        self._cache, self._counts = PromptCache(), Counts()
        self._waiting: list[Record] = []  # for a worker, in the order in which they began to
        self._positions: dict[str, int] | None = None  # in the queue, until it changes
        self._specs: dict[str, Spec] = {}
        self._accepting = asyncio.Lock()
        self._ready: asyncio.Task[None] | None = None
        self._is_draining = False

    # What a server calls

    async def start(self) -> None:
        """Claim the folder's journal, restore its jobs, start the workers; return at once."""
        try:
            for job in await self._ledger.open():
                await self._restore(job)
            self._fleet.start(self._ledger.work)
        except BaseException:
            await self.stop()
            raise
        self._ready = asyncio.create_task(self._warm_up())
        self._ready.add_done_callback(log_error)

    async def ready(self) -> None:
        """Return when the default model has made a clip; raise `ValueError` if it cannot."""
        assert self._ready is not None, "start() comes first"
        await asyncio.shield(self._ready)

    def is_ready(self) -> bool:
        """Tell whether `ready` would return now."""
        ready = self._ready
        return bool(ready and ready.done() and not ready.cancelled() and not ready.exception())

    async def submit(self, submission: Submission) -> Job:
        """Commit a job for each clip, all or none; return the first, which names the others.

        Where an idempotency key was used before, those are the jobs of then. Raises
        `QueueFullError`, `LateError`, `EngineStoppingError`, `ConflictError`, and `ValueError` for
        what no worker can make in time. Like `cancel` and `delete`, it is done even if its caller
        is cancelled.
        """
        return await asyncio.shield(asyncio.ensure_future(self._accept(submission)))

    def known(self, submission: Submission) -> Job | None:
        """Return the job that a submission repeats; raise `ConflictError` or `GoneError`."""
        return self._ledger.known(submission)

    async def _accept(self, submission: Submission) -> Job:
        async with self._accepting:
            if known := self.known(submission):
                return known
            asked, records = await self._new(submission), list[Record]()
            waiting = [one for one in self._waiting if not one.is_warmup]
            at = {slot: self._at(slot) for slot in self._fleet.slots}
            for one in asked:
                records.append(self._admission.admit(one, waiting + records, at, self._order))
            await self._ledger.add(records)
        self._counts.admitted += len(records)
        self._waiting += records
        self._pump()
        return records[0].job

    def job(self, job_id: str) -> Job | None:
        """Return a job from memory; None if there is none (or it was deleted)."""
        record = self._records.get(job_id)
        return record.job if record else None

    def jobs(self, *, owner: str | None = None) -> list[Job]:
        """Return jobs that are kept, newest first, of one owner or all."""
        kept = (r.job for r in self._records.values() if not r.is_warmup)
        return [job for job in kept if owner in (None, job.submission.owner)][::-1]

    def queue_position(self, job_id: str) -> int | None:
        """Return how many jobs will be dispatched before it; None once it was dispatched."""
        if self._positions is None:
            ordered = self._order(self._queued())
            self._positions = {record.id: place for place, record in enumerate(ordered)}
        return self._positions.get(job_id)

    def eta_s(self, job_id: str) -> float | None:
        """Return about how many seconds until the end; None if nothing is known of its shape."""
        record = self._records[job_id]
        clip_s = None if record.is_over else self._book.clip_s(record.model, record.total)
        if clip_s is None:
            return None
        at_once = min(pools.num_workers(self.config.worker, record.model, record.row))
        ahead = (self.queue_position(job_id) or 0) / at_once
        return clip_s * (ahead + 1 - record.job.progress)

    async def cancel(self, job_id: str) -> Job:
        """End a job as cancelled, and its work at the next step boundary of its worker."""
        record = self._ledger.open_record(job_id)
        await asyncio.shield(self._ledger.later(self._end(record, status="cancelled")))
        return record.job

    async def delete(self, job_id: str) -> None:
        """Cancel a job and forget it and its file; the journal keeps that it was cancelled."""
        await asyncio.shield(self._ledger.later(self._delete(self._ledger.open_record(job_id))))

    async def _delete(self, record: Record) -> None:
        await self._end(record, status="cancelled")
        await self._ledger.delete(record)

    async def events(self, job_id: str) -> AsyncIterator[JobEvent]:
        """Yield what happens to a job, its status first, until it has ended or the engine stops."""
        record = self._records[job_id]
        queue = record.read()
        if self._ledger.is_closing:
            record.close()  # nothing will happen any more
        try:
            while event := await queue.get():
                yield event
                if event.values.get("status") in TERMINAL:
                    return
        finally:
            record.readers.remove(queue)

    def stats(self) -> dict[str, Any]:
        """Return queue depths by class, running jobs, workers and counters, for metrics."""
        queued = dict.fromkeys(self._classes, 0)
        for record in self._queued():
            queued[record.job.slo_class] += 1
        running = sum(r.job.status == "in_progress" for r in self._records.values())
        found = {"queued": queued, "running": running, "workers": self._fleet.stats()}
        return {**found, **asdict(self._counts)}

    async def drain(self) -> None:
        """Accept nothing more, finish what was begun; what waits is for the next start."""
        self._is_draining = True
        while any(r.is_begun and not r.is_warmup for r in self._records.values()):
            await asyncio.sleep(_DRAIN_PAUSE_S)

    async def stop(self) -> None:
        """End all workers, close the journal."""
        self._is_draining = True
        if self._ready:
            self._ready.cancel()
        await self._fleet.stop()
        await self._ledger.close()
        for record in self._records.values():
            record.close()

    # Jobs come in

    async def _new(self, submission: Submission) -> list[Record]:
        own = {key.name: key.slo_class for key in self.config.key}.get(submission.owner)
        name = submission.slo_class or own or self.config.class_[0].name
        if name not in self._classes:
            hint, known = registry.did_you_mean(name, self._classes), ", ".join(self._classes)
            raise ValueError(f"slo_class {name!r} is unknown{hint} (known: {known})")
        pools.check(self.config.worker, submission, spec := await self._spec(submission.model))
        if self._is_draining:  # since the model was opened, too
            raise EngineStoppingError("the server is shutting down")
        ids = tuple(f"video_{secrets.token_hex(16)}" for _ in range(submission.count))
        same = partial(Job, slo_class=name, accepted_at_s=time.time(), clips=ids)
        each = zip(ids, submission.each(), strict=True)
        return [Record(same(own, one, notices=one.notices), spec) for own, one in each]

    async def _spec(self, model: str) -> Spec:
        if model not in self._specs:
            self._specs[model] = (await asyncio.to_thread(hub.open_model, model)).spec
        return self._specs[model]

    async def _restore(self, job: Job) -> None:
        """Take a job from the journal; requeue it, or fail it, if it had not ended."""
        if job.slo_class not in self._classes:  # the config has changed
            job = replace(job, slo_class=self.config.class_[0].name)
        self._records[job.id] = record = Record(job, is_over=job.status in TERMINAL)
        if record.is_over:
            record.ended.set()
            return
        self._ledger.path(record).unlink(missing_ok=True)  # published, and not committed
        try:
            record.known_spec = await self._spec(job.submission.model)
            pools.check(self.config.worker, job.submission, record.spec)
        except ValueError as error:
            self._fail(record, "invalid_request", str(error))
            return
        if job.deaths >= MOST_DEATHS:
            self._fail(record, "worker_died", f"{job.deaths} workers died of it")
            return
        if job.status == "in_progress" and self.config.interrupted == "fail":
            self._fail(record, "interrupted", "the server ended while the clip was made")
            return
        record.job = replace(job, status="queued", started_at_s=None, stage="", stage_seconds={})
        self._waiting.append(record)

    async def _warm_up(self) -> None:
        """Make tiny clips, as many at once as a stage has workers, behind all others."""
        model = self.config.worker[0].model or hub.DEFAULT_MODEL
        spec, made = await self._spec(model), []
        workers = self.config.worker
        for number in range(max(pools.num_workers(workers, model, spec.stages))):
            params = pools.tiny(model, spec, workers, seed=number)
            pools.check(workers, submission := Submission(model, params), spec)
            job = Job(f"warmup_{number}", submission, accepted_at_s=time.time() + _PATIENCE_S)
            made.append(Record(job, spec, is_warmup=True))
            self._records[made[-1].id] = made[-1]
        self._waiting += made
        self._pump()
        for record in made:
            await record.ended.wait()
            del self._records[record.id]
            if record.job.failure:
                raise ValueError(f"{model} made no clip: {record.job.failure.message}")

    def _skip_warm_up(self, model: str) -> None:
        """End waiting warm-ups: a clip was made, and others may keep the workers busy for long."""
        for record in [r for r in self._waiting if r.is_warmup and r.model == model]:
            self._waiting.remove(record)
            self._ledger.later(self._end(record, status="completed"))

    # Jobs go to workers

    def _pump(self) -> None:
        """Dispatch waiting jobs to idle workers, late stages first."""
        self._positions = None
        for record in self._waiting:
            found = self._cache.get(record.prompt_key) if record.index == 0 else None
            if found:
                record.index, (record.state, notices, _) = 1, found
                record.add_notices(*notices)
                record.add_seconds(ENCODE, 0.0)
        for slot in [slot for slot in reversed(self._fleet.slots) if slot.state == "idle"]:
            kept = [r for r in self._waiting if not (self._is_draining and r.is_queued)]
            ordered = self._order([r for r in kept if r.fits(slot.config)])
            if first := next((record for record in ordered if self._room(record, slot)), None):
                self._dispatch(first, slot)
        self._preempt()

    def _order(self, records: list[Record]) -> list[Record]:
        running = [record.job for slot in self._fleet.slots if (record := self._at(slot))]
        by_id = {record.id: record for record in records}
        jobs = self._policy.order([r.job for r in records], running, self._deadlines_s)
        return sorted((by_id[job.id] for job in jobs), key=lambda record: record.turn)

    def _room(self, record: Record, slot: Slot) -> bool:
        """Tell whether another state may wait for the stage that follows those of a worker.

        At most `in_flight` rivals wait, or as many as the pool has workers, which could not all
        run with fewer. Under a preemptive policy one place more is kept for the most urgent job.
        """
        end = record.index + len(record.run_on(slot.config))
        if end == len(record.row):
            return True
        rivals = self._rivals(record, slot, record.row[end])
        keeps = self._policy.PREEMPTS and not record.is_warmup
        places = max(self.config.in_flight, slot.config.count + keeps)
        if keeps and self._order([*rivals, record])[0] is not record:
            places -= 1
        return len(rivals) < places

    def _rivals(self, record: Record, slot: Slot, stage: str) -> list[Record]:
        """Return the states that wait for a stage, now or next, on workers that a job needs too."""
        states = [r for r in self._waiting if r.is_handed and r.next == stage]
        for other in self._fleet.slots:
            running = None if other is slot else self._at(other)
            if running and other.task and other.task.later[:1] == (stage,):
                states.append(running)
        needed = [pool for pool in self.config.worker if record.fits(pool, stage)]
        return [r for r in states if any(r.fits(pool, stage) for pool in needed)]

    def _dispatch(self, record: Record, slot: Slot) -> None:
        job, now = record.job, time.time()
        stages = record.run_on(slot.config)
        attempt, was_queued = job.attempt + 1, record.is_queued
        record.job = replace(job, status="in_progress", attempt=attempt, stage=stages[0])
        record.slot, record.is_handed = slot, False
        self._waiting.remove(record)
        self._counts.attempts += 1
        task = Task(
            job_id=job.id,
            attempt=attempt,
            submission=job.submission,
            notices=job.notices,
            stages=stages,
            later=record.row[record.index + len(stages) :],
            output=self._ledger.part(job.id, attempt),
            checkpoint_every=self.config.checkpoint_every,
            is_quiet=record.is_warmup,
            state=record.state,
        )
        self._fleet.assign(slot, task, work=record.work)
        if was_queued:
            record.job = replace(record.job, started_at_s=now)
            record.tell()
        if was_queued and not record.is_warmup:
            add(self._counts.queue_s, now - job.accepted_at_s)
            self._ledger.note(record)  # a restart knows of it

    def _preempt(self) -> None:
        """Stop a running job, at its next step boundary, for a waiting one that is more urgent."""
        for record in self._waiting if self._policy.PREEMPTS else ():
            for slot in self._fleet.slots:
                running = self._at(slot)
                if running and running.job.stage == "denoise" and record.fits(slot.config):
                    is_later = self._policy.preempts(record.job, running.job, self._deadlines_s)
                    if is_later and self._room(record, slot) and not self._is_draining:
                        self._fleet.stop_task(slot)
                        return

    def _at(self, slot: Slot) -> Record | None:
        """Return the job that a worker runs, if it is still to be run."""
        record = self._records.get(slot.task.job_id) if slot.task else None
        return record if record and record.slot is slot and not record.is_over else None

    # Workers report

    def _hear(self, slot: Slot, report: Report) -> None:
        record = self._records.get(report.job_id)
        is_current = record and (record.slot, record.job.attempt) == (slot, report.attempt)
        if record and is_current:
            self._take(record, report)
        elif report.kind == "finished":  # of a job that was cancelled
            self._ledger.discard(report.job_id, report.attempt)
        if report.kind in ("ready", *LAST):
            self._pump()

    def _take(self, record: Record, report: Report) -> None:
        values = report.values
        record.state = report.state or record.state
        if "transfer_s" in values:
            add(self._counts.transfer_s, values["transfer_s"])
            self._counts.transfer_bytes += values["num_bytes"]
        if report.kind in LAST:
            record.slot = None
        match report.kind:
            case "progress" if values["stage"] in record.row:
                self._take_progress(record, values["stage"], values["index"], values["total"])
            case "notice":
                record.add_notices(values["text"])
                record.tell("notice", **values)
            case "preview":
                record.tell("preview", **values)
            case "stage":
                self._take_stage(record, values)
            case "handed" | "stopped":
                record.count_seconds()
                record.is_handed = report.kind == "handed"
                self._waiting.append(record)
            case "finished":
                if not record.is_warmup:
                    self._skip_warm_up(record.model)
                record.is_over = True
                self._ledger.later(self._complete(record, values))
            case "failed":
                self._fail(record, values["code"], values["message"])

    def _take_progress(self, record: Record, stage: str, index: int, total: int) -> None:
        done = self._book.progress(record.model, record.row, record.index, index / total)
        progress = max(record.job.progress, done)
        record.note_stage(stage)
        record.job = replace(record.job, stage=stage, progress=progress)
        record.tell("progress", stage=stage, index=index, total=total, progress=progress)

    def _take_stage(self, record: Record, values: Mapping[str, Any]) -> None:
        stage, seconds = values["stage"], values["seconds"]
        add(self._counts.stage_s.setdefault(stage, [0, 0.0]), seconds)
        record.add_seconds(stage, seconds, values["load_s"])
        record.index = min(record.index + 1, len(record.row) - 1)  # a lost file is decoded again
        if stage == ENCODE and record.index == 1:
            notices = record.job.notices[len(record.job.submission.notices) :]
            self._cache.put(record.prompt_key, record.state, notices, values.get("num_bytes", 0))

    def _lost(self, slot: Slot, task: Task | None, reason: str) -> None:
        """Requeue the job of a dead worker from its last state; fail it at its second death."""
        self._counts.worker_deaths += 1
        if slot.failed_starts >= _MOST_STARTS:
            for warmup in [record for record in self._records.values() if record.is_warmup]:
                self._fail(warmup, "worker_died", f"worker {slot.name} does not start: {reason}")
        record = self._records.get(task.job_id) if task else None
        if record is None or record.slot is not slot or record.is_over:
            return
        record.count_seconds()
        stage = record.job.stage
        deaths = record.job.deaths + slot.has_begun  # else it was dead before it had the task
        record.job = replace(record.job, deaths=deaths)
        if not record.is_warmup:  # so that a job that kills the engine too is given up
            self._ledger.note(record)
        if deaths >= MOST_DEATHS:
            text = f"{deaths} workers died of it, the last one in {stage}: {reason}"
            self._fail(record, "worker_died", text)
            return
        self._ledger.discard(record.id, record.job.attempt)
        record.slot = None
        self._waiting.append(record)
        self._pump()

    # Jobs end, once

    async def _complete(self, record: Record, values: Mapping[str, Any]) -> None:
        """Publish a clip under the job's name, then commit its end."""
        if record.is_warmup:
            self._ledger.discard(record.id, record.job.attempt)
            await self._commit_end(record, status="completed")
            return
        seconds = {**record.job.stage_seconds, "save": values["save_s"]}
        try:
            path = await self._ledger.publish(record)
        except OSError as error:
            self._ledger.discard(record.id, record.job.attempt)
            failure = Failure("io_error", f"the clip cannot be published: {error.strerror}")
            await self._commit_end(record, status="failed", failure=failure)
            return
        self._book.note_clip(record.model, record.total, seconds)
        self._admission.note(record, seconds)
        made = {name: values[name] for name in ("frames_sha256", "recipe")}
        made |= {"path": path, "progress": 1.0, "stage_seconds": seconds}
        await self._commit_end(record, status="completed", **made)

    def _fail(self, record: Record, code: str, message: str) -> None:
        self._ledger.later(self._end(record, status="failed", failure=Failure(code, message)))

    async def _end(self, record: Record, **fields: Any) -> None:
        """End a job, unless its end is decided: then wait until that is committed."""
        if record.is_over:
            await record.ended.wait()
            return
        record.is_over = True
        if record in self._waiting:
            self._waiting.remove(record)
        if record.slot and fields["status"] == "cancelled":
            self._fleet.stop_task(record.slot)
        await self._commit_end(record, **fields)

    async def _commit_end(self, record: Record, **fields: Any) -> None:
        record.state = record.slot = None
        ended: Job = replace(record.job, finished_at_s=time.time(), **fields)
        if record.is_warmup:
            record.job = ended
        elif await self._ledger.commit_end(ended):
            record.job = ended
            self._counts.end(ended)
        record.ended.set()
        record.tell()
        self._pump()

    def _queued(self) -> list[Record]:
        return [record for record in self._waiting if record.is_queued and not record.is_warmup]
