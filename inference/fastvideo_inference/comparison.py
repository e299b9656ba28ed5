"""Settings of models compared: one evaluation each, paired by prompt and noise, and timed in turn.

plan = Comparison.plan(read("configs/bench/nano-compare.toml"), output="eval")   # torch-free
for done, total in plan.run(): ...        # resumes after a kill; finished rows are reused
table = plan.report()

Every row is kept as `fastvideo eval` keeps it, so that either finds what the other has made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, AliasGenerator, ConfigDict, Field, PrivateAttr

from fastvideo import files, hub, media, sampling, timing
from fastvideo.config import (
    Keys,
    Source,
    Strict,
    merge,
    parse,
    read_toml,
    set_word,
    toml_line,
    where,
)
from fastvideo.hub import OpenModel
from fastvideo.registry import did_you_mean
from fastvideo.stages import make
from fastvideo.worlds import attributes
from fastvideo_inference import contrast, sheets
from fastvideo_inference.contrast import Contrast, Made, Sampler
from fastvideo_inference.evaluation import Evaluation
from fastvideo_inference.recipe import versions
from fastvideo_inference.scores import Record, Records, mean

if TYPE_CHECKING:
    from fastvideo.model import Model

SHARED = ("num_frames", "height", "width", "fps", "seed")  # else the noise is not the same


def _full_name(short: str) -> str | None:
    named = sampling.settings(sampling.EVAL).items()
    return next((full for full, setting in named if setting.alias == short), None)


def _either_name(short: str) -> str | AliasChoices:
    full = _full_name(short)
    return AliasChoices(short, full) if full else short


class Table(Strict):
    """A table of a comparison file: sampling fields have their short names or their full ones."""

    model_config = ConfigDict(alias_generator=AliasGenerator(validation_alias=_either_name))


class Row(Table):
    """One setting; what is not given is the model's default, for prompts the table's.

    `sigmas` are the steps of a model of few, in the place of its own and of `steps`.
    """

    name: str = Field(min_length=1)
    model: str = Field(min_length=1, description="a name in [models], bundled, a folder, a hub id")
    prompts: sampling.Whole | None = Field(default=None, ge=1)
    steps: sampling.NumSteps | None = None
    sigmas: tuple[float, ...] | None = None
    guidance: sampling.GuidanceScale | None = None
    negative: sampling.NegativePrompt | None = None
    attention: sampling.AttentionText | None = None
    backend: sampling.Backend | None = None
    drop_gates: sampling.DropGates | None = None
    decoder: str | None = None


class Settings(Table):
    """A comparison as a file says it."""

    base: str = Field(description="name of the row that the others are held against")
    rows: tuple[Row, ...] = Field(min_length=1)
    models: dict[str, str] = Field(default_factory=dict)
    prompts: sampling.Whole = Field(default=256, ge=1)
    repeats: sampling.Whole = Field(default=4, ge=0)
    diverse: sampling.Whole = Field(
        default=16, ge=1, description="prompts, or all of a row that has fewer"
    )
    seed: sampling.OwnSeed = 0
    world: str = "shapes"
    batch: sampling.Whole = Field(default=4, ge=1)
    size: str | None = None
    height: sampling.Height | None = None
    width: sampling.Width | None = None
    frames: sampling.NumFrames | None = None
    timed: sampling.Whole = Field(default=3, ge=0, description="rounds of one clip for each row")
    shown: sampling.Whole = Field(default=4, ge=1, description="prompts on the contact sheet")
    _source: Source = PrivateAttr("--compare")

    def row_source(self, index: int) -> Source:
        """Return what names the place that gave a sampling field of a row, or of all rows."""

        def place(keys: Keys) -> str:
            own = keys[0] in Row.model_fields
            return where(self._source, ["rows", index, *keys] if own else keys)

        return place


@dataclass(frozen=True)
class Entry:
    """A row and its evaluation."""

    name: str
    evaluation: Evaluation


def read(
    path: str | Path, *, changes: Mapping[str, Any] | None = None, at_most: int | None = None
) -> Settings:
    """Read a comparison; `changes` lie on top, and no row has more than `at_most` prompts."""
    tree = merge(read_toml(path), changes or {})

    def source(keys: Keys) -> str:
        keys = _as_written(tree, keys)
        return set_word(changes or {}, keys) or toml_line(path, keys)

    found = parse(Settings, tree, source=source)
    found._source = source
    if at_most is None:
        return found
    if at_most < 1:
        raise ValueError(f"prompts {at_most} must be at least 1")
    rows = [
        row.model_copy(update={"prompts": min(at_most, row.prompts or found.prompts)})
        for row in found.rows
    ]
    return found.model_copy(update={"rows": tuple(rows)})


def _as_written(tree: Any, keys: Keys) -> Keys:
    """Return the path of a field with its full name, if that is the one in the tree."""
    *path, name = keys or [""]
    for key in path:
        tree = tree[key]
    full = _full_name(str(name))
    return [*path, full] if full and name not in tree and full in tree else keys


@dataclass(frozen=True)
class Comparison:
    """Everything that decides a comparison, checked."""

    settings: Settings
    entries: tuple[Entry, ...]
    output: Path

    @classmethod
    def plan(
        cls, settings: Settings, *, output: str | Path, device: str = "auto", dtype: str = "auto"
    ) -> Comparison:
        """Check what can be checked without torch; `ValueError` names the row that is wrong."""
        names = [row.name for row in settings.rows]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rows are named {name!r}; names tell them apart")
        if settings.base not in names:
            hint = did_you_mean(settings.base, names)
            raise ValueError(f"base {settings.base!r} is no row{hint} (rows: {', '.join(names)})")
        place = {"output": output, "device": device, "dtype": dtype}
        opened: dict[str, OpenModel] = {}
        while True:
            entries = tuple(
                Entry(row.name, _evaluation(row, settings, opened, settings.row_source(i), **place))
                for i, row in enumerate(settings.rows)
            )
            made = cls(settings, entries, Path(output))
            made._check_pairs()
            if all(model.has_weights for model in opened.values()):
                return made
            opened = {name: hub.fetched(model) for name, model in opened.items()}

    def check(self) -> None:
        """Check the rest, which needs torch, before any clip is made: steps, and rows alike."""
        from fastvideo import schedulers

        for entry in self.entries:
            scheduler = entry.evaluation.scheduler
            try:
                own = schedulers.create(scheduler.name, scheduler.args)
                own.grid(entry.evaluation.how.num_inference_steps)
            except ValueError as error:
                raise ValueError(f"row {entry.name!r}: {error}") from None
        for one, other in combinations(self.entries, 2):
            if one.evaluation.results == other.evaluation.results:
                raise ValueError(f"rows {one.name!r} and {other.name!r} are the same setting")

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Return what decides the table: the rows' evaluations, and the machine of the seconds."""
        rows = [
            {"name": e.name, "prompts": e.evaluation.prompts, "made": e.evaluation.results.name}
            for e in self.entries
        ]
        keys = {"base", "repeats", "diverse", "timed", "shown"}
        return {
            "rows": rows,
            **self.settings.model_dump(include=keys),
            "machine": timing.machine(),
        }

    @cached_property
    def results(self) -> Path:
        """Folder of the table; the clips lie in the rows' own folders beside it."""
        text = json.dumps(self.recipe, sort_keys=True)
        key = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        return self.output / f"compare-{key}"

    def run(self) -> Iterator[tuple[int, int]]:
        """Make what is missing, row by row, then time; yield (clips done, clips in all)."""
        runs = [entry.evaluation.run() for entry in self.entries]
        at = [next(run) for run in runs]
        rounds = self._rounds()
        total = sum(whole for _, whole in at) + self.settings.timed * len(runs)
        lacking = sum(count for _, count in rounds.missing(self.settings.timed, 1))
        done = [now for now, _ in at] + [(self.settings.timed - lacking) * len(runs)]
        yield sum(done), total
        for i, run in enumerate(runs):
            for done[i], _ in run:
                yield sum(done), total
        for _ in self._time(rounds):
            done[-1] += len(runs)
            yield sum(done), total

    def report(self) -> Contrast:
        """Write `table.json`, `table.md`, `sheet.png` and `clips.webp`, and return the table."""
        made = [self._made(entry) for entry in self.entries]
        (base,) = (m for m in made if m.name == self.settings.base)
        rounds = [r["seconds"] for r in self._rounds().first(self.settings.timed)]
        legal = attributes(self.settings.world)
        truth = contrast.spreads(base.repeats, "truth_features")
        table = Contrast(
            base=base.name,
            rows=tuple(contrast.found(m, base, rounds, legal=legal) for m in made),
            truth={
                "diversity": sum(truth) / len(truth) if truth else None,
                "flicker": mean(base.repeats[0], "flicker_truth"),
            },
            seed=self.settings.seed,
            world=self.settings.world,
            machine=timing.machine(),
            versions={k: v for k, v in versions().items() if k not in timing.machine()},
        )
        self.results.mkdir(parents=True, exist_ok=True)
        write = {"recipe.json": json.dumps(self.recipe, indent=2), "table.json": table.to_json()}
        for name, text in {**write, "table.md": contrast.markdown(table)}.items():
            files.write_text(self.results / name, text + "\n", overwrite=True)
        self._sheets()
        return table

    def _check_pairs(self) -> None:
        (base,) = (e for e in self.entries if e.name == self.settings.base)
        for entry in self.entries:
            for key in SHARED:
                mine, its = (getattr(e.evaluation.how, key) for e in (entry, base))
                if mine != its:
                    raise ValueError(
                        f"row {entry.name!r} has {key} {mine}, the base {base.name!r} {its}: they"
                        " would not start from the same noise; set size and frames of the table"
                    )

    def _made(self, entry: Entry) -> Made:
        e = entry.evaluation
        first, _, *again = e.records()
        how = e.how
        return Made(
            name=entry.name,
            model=e.model,
            sampler=Sampler(
                scheduler=e.scheduler.name,
                steps=how.num_inference_steps,
                guidance=how.guidance_scale,
                attention=how.attention,
                sigmas=_few_steps(e),
                own=e.has_own_steps,
                decoder=e.decoder.name_or_path if e.decoder else None,
            ),
            evaluation=e.results.name,
            repeats=[first, *again],
        )

    def _rounds(self) -> Records:
        return Records(self.results / "seconds.jsonl")

    def _time(self, rounds: Records) -> Iterator[None]:
        """Time one clip of every row in each missing round, the order rotated, after a warm-up."""
        todo = [i for (i,), _ in rounds.missing(self.settings.timed, 1)]
        if not todo:
            return
        self.results.mkdir(parents=True, exist_ok=True)
        loaded: dict[Any, Model] = {}
        entries = {entry.name: entry.evaluation for entry in self.entries}
        for evaluation in entries.values():
            if _parts(evaluation) not in loaded:
                loaded[_parts(evaluation)] = evaluation.load_model()
                _seconds(evaluation, loaded[_parts(evaluation)], 0)
        for i in todo:
            seconds = {
                name: _seconds(entries[name], loaded[_parts(entries[name])], i)
                for name in timing.in_turn(list(entries), i)
            }
            rounds.add([{"index": i, "seconds": seconds}])
            yield

    def _sheets(self) -> None:
        evaluations = [entry.evaluation for entry in self.entries]
        count = min(self.settings.shown, *(e.prompts for e in evaluations))
        clips = [[media.read_video(e.clip_path(i))[0] for i in range(count)] for e in evaluations]
        labels = [entry.name for entry in self.entries]
        sheets.of_settings(self.results, clips, labels, fps=evaluations[0].how.fps)


def _evaluation(
    row: Row, settings: Settings, opened: dict[str, OpenModel], source: Source, **place: Any
) -> Evaluation:
    prompts, name = row.prompts or settings.prompts, settings.models.get(row.model, row.model)
    try:
        if name not in opened:
            opened[name] = hub.open_model(name)
        made = Evaluation.plan(
            opened[name],
            prompts=prompts,
            reconstructions=1,
            repeats=settings.repeats,
            diverse=min(settings.diverse, prompts),
            world=settings.world,
            batch=settings.batch,
            source=source,
            **row.model_dump(exclude={"name", "model", "prompts"}),
            **settings.model_dump(include={"size", "height", "width", "frames", "seed"}),
            **place,
        )
    except ValueError as error:
        raise ValueError(f"row {row.name!r}: {error}") from None
    return replace(made, reconstructions=0)  # what a VAE keeps is no part of this table


def _parts(evaluation: Evaluation) -> tuple[Path, Any]:
    """Return what is loaded once for all rows that share it."""
    return evaluation.folder, evaluation.decoder


def _few_steps(evaluation: Evaluation) -> tuple[float, ...] | None:
    """Return the sigmas of a few-step scheduler; None of another."""
    if evaluation.scheduler.name != "few_step":
        return None
    from fastvideo import schedulers

    made: Any = schedulers.create("few_step", evaluation.scheduler.args)
    return tuple(made.sigmas)


def _seconds(evaluation: Evaluation, model: Model, index: int) -> dict[str, float]:
    """Return the seconds of each stage for one clip of held-out prompt `index`."""
    spec = model.spec.model_copy(update={"scheduler": evaluation.scheduler})
    record: Record = evaluation.records()[0][index % evaluation.prompts]
    request = evaluation.request(record["index"], record["prompt"])
    done = make(replace(model, spec=spec), [request])
    return {name: round(seconds, 5) for name, seconds in done.timings.items()}
