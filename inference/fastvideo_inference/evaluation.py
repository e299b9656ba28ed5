"""A model measured against a world: held-out prompts made and read back, beside their ceilings.

plan = Evaluation.plan("wan-nano", prompts=256, output="eval")   # torch-free, refuses what is wrong
for done, total in plan.run(): ...                               # resumes where a kill left it
table = plan.report()

The folder keeps every clip and one line of results for each, under the hash of weights, request,
world, classifier, versions and device; the same command after a kill makes only what is missing.
Code that was edited without a new version is not in the hash: use another folder then.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fastvideo import files, hub, media, rng
from fastvideo.config import Source
from fastvideo.hub import OpenModel
from fastvideo.log import warned
from fastvideo.resolve import notices, resolve
from fastvideo.sampling import GenerateRequest, SamplingParams, read_with_origins
from fastvideo.spec import Scheduler, Spec
from fastvideo.worlds import World, attributes, classifier, fit, generator_version, open_world
from fastvideo_inference import scores, sheets
from fastvideo_inference.recipe import DecoderId, decoder_id, fingerprint, versions
from fastvideo_inference.scores import Fits, Record, Records, Table

if TYPE_CHECKING:
    from fastvideo.measure import Rendered, Scorer
    from fastvideo.model import Model
    from fastvideo.worlds import Frames

SPLIT = "heldout"
SEED = 0  # of the world's clips; training's validation looks at seed 1
REPEAT_STRIDE = 1_000_000  # repeat r of prompt i: noise of seed + i + r * REPEAT_STRIDE


@dataclass(frozen=True)
class _Part:
    """Clips to make: how many, at most how many at once, where their results go, and by what."""

    records: Records
    count: int
    batch: int
    make: Callable[[_Tools, list[int]], list[Record]]


@dataclass(frozen=True)
class _Tools:
    """What is loaded once, when anything is missing."""

    model: Model
    world: World
    scorer: Scorer | None


@dataclass(frozen=True)
class Evaluation:
    """Everything that decides an evaluation's numbers, and where they are kept."""

    model: str
    found: OpenModel
    how: SamplingParams
    scheduler: Scheduler
    has_own_steps: bool
    """Whether the scheduler is the model's."""
    output: Path
    prompts: int
    reconstructions: int
    repeats: int
    diverse: int
    world: str
    device: str
    dtype: str
    batch: int
    decoder: DecoderId | None = None

    @classmethod
    def plan(
        cls,
        model: str | OpenModel,
        *,
        output: str | Path,
        prompts: int = 256,
        reconstructions: int | None = None,
        repeats: int = 4,
        diverse: int | None = None,
        world: str = "shapes",
        device: str = "auto",
        dtype: str = "auto",
        batch: int = 4,
        decoder: str | None = None,
        sigmas: Sequence[float] | None = None,
        source: Source = "the call",
        **request: Any,
    ) -> Evaluation:
        """Check everything that can be checked without torch; `ValueError` if anything is wrong.

        The first `diverse` prompts (16, or all) are made `repeats` times; 0 or 1 measures no
        diversity. `reconstructions` is 64, or all prompts. `sigmas` are other steps for a model of
        few. `request` holds fields that `source` gave; None is the model's default, the seed's 0.
        """
        reconstructions = min(64, prompts) if reconstructions is None else reconstructions
        diverse = min(16, prompts) if diverse is None else diverse
        _check_counts(prompts, batch, repeats, reconstructions=reconstructions, diverse=diverse)
        found = model if isinstance(model, OpenModel) else hub.open_model(model, weights=True)
        spec = found.spec
        given = {k: v for k, v in request.items() if v is not None}
        own = {"seed": 0, "prompt": "held-out prompts of a world"}
        own |= {"steps": len(sigmas)} if sigmas else {}
        asked, origin = read_with_origins(("the call", own), (source, given))
        scheduler = spec.scheduler if sigmas is None else _other_steps(spec, asked, sigmas)
        how = resolve(asked, spec.model_copy(update={"scheduler": scheduler}), origin=origin)
        made = cls(
            model=spec.name,
            found=found,
            how=how,
            scheduler=scheduler,
            has_own_steps=scheduler == spec.scheduler,
            output=Path(output),
            prompts=prompts,
            reconstructions=reconstructions,
            repeats=repeats,
            diverse=diverse,
            world=world,
            device=device,
            dtype=dtype,
            batch=batch,
            decoder=decoder_id(decoder, spec, found.folder),
        )
        made._open_world()
        warned(notices(asked, how, spec))
        return made

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return self.found.folder

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Return what decides one clip's result, of a size that does not grow with the prompts.

        "auto" is resolved, which needs torch; `ValueError` for a device that is not there.
        """
        return {
            "versions": versions(),
            "weights": fingerprint(self.folder),
            "world": self.world,
            "generator_version": generator_version(self.world),
            "classifier": self._scorer_identity(),
            "split": SPLIT,
            "request": self.how.without_newer_defaults(exclude={"prompt"}),
            **({"decoder": self.decoder.model_dump()} if self.decoder else {}),
            **({} if self.has_own_steps else {"scheduler": self.scheduler.model_dump()}),
            **self._place,
        }

    @cached_property
    def results(self) -> Path:
        """Folder of the clips and results of this recipe."""
        text = json.dumps(self.recipe, sort_keys=True)
        return self.output / hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def run(self) -> Iterator[tuple[int, int]]:
        """Make what is missing; yield (clips done, clips in all) after every batch.

        Raises `ValueError` while another process makes the same.
        """
        with files.claimed(self.results / "made.jsonl") as is_ours:
            if not is_ours:
                raise ValueError(f"another process writes into {self.results}; wait for it")
            yield from self._run(self.results)

    def _run(self, results: Path) -> Iterator[tuple[int, int]]:
        files.write_text(
            results / "recipe.json", json.dumps(self.recipe, indent=2) + "\n", overwrite=True
        )
        parts = self._parts()
        total = sum(part.count for part in parts)
        todo = [
            (part, *lack) for part in parts for lack in part.records.missing(part.count, part.batch)
        ]
        done = total - sum(lacking for _, _, lacking in todo)
        yield done, total
        if not todo:
            return
        tools = self._load()
        for part, indices, lacking in todo:
            part.records.add(part.make(tools, indices))
            done += lacking
            yield done, total

    def report(self) -> Table:
        """Read the results back and write `table.json`, `sheet.png` and `clips.webp`.

        Raises `ValueError` if the model's weights were replaced in the meantime.
        """
        made, kept, *again = self.records()
        legal, name = attributes(self.world), classifier(self.world)
        table = Table(
            model=self.model,
            recipe=self.recipe,
            combinations=len({tuple(sorted(m["truth"].items())) for m in made}),
            lines=scores.lines(made, kept=kept, legal=legal),
            num_reconstructions=len(kept),
            psnr=fmean(k["psnr"] for k in kept),
            ssim=fmean(k["ssim"] for k in kept),
            flicker=scores.mean(made, "flicker"),
            flicker_truth=scores.mean(made, "flicker_truth"),
            fits=_fits(made, kept),
            features=scores.features(made, kept=kept, again=again, classifier=name, legal=legal)
            if name
            else None,
        )
        files.write_text(self.results / "table.json", table.to_json() + "\n", overwrite=True)
        shown = made[:16]
        clips = [media.read_video(self.clip_path(m["index"]))[0] for m in shown]
        sheets.of_model(self.results, clips, shown, fps=self.how.fps)
        return table

    def records(self) -> list[list[Record]]:
        """Return the results of made clips, reconstructions, and of each later repeat.

        Raises `ValueError` if the model's weights were replaced since `run`.
        """
        if fingerprint(self.folder) != self.recipe["weights"]:
            raise ValueError(f"{self.folder} was replaced while it was evaluated; evaluate again")
        return [part.records.first(part.count) for part in self._parts()]

    def load_model(self) -> Model:
        """Load the model, with the steps that are evaluated."""
        from fastvideo.model import load

        decoder = self.decoder.name_or_path if self.decoder else None
        model = load(self.found, **self._place, decoder=decoder)
        return replace(model, spec=model.spec.model_copy(update={"scheduler": self.scheduler}))

    def clip_path(self, index: int, repeat: int = 0) -> Path:
        """Return where the clip of a prompt, or a later repeat of it, is kept."""
        return self.results / "clips" / (f"{index:05d}" + (f"-{repeat}" if repeat else "") + ".mp4")

    def clip_seed(self, index: int, repeat: int = 0) -> int:
        """Return the seed of a clip's noise."""
        return self.how.seed + index + repeat * REPEAT_STRIDE

    def request(self, index: int, prompt: str, *, repeat: int = 0) -> SamplingParams:
        """Return what makes the clip of a prompt, or a later repeat of it."""
        own = {"prompt": prompt, "seed": self.clip_seed(index, repeat)}
        return self.how.model_copy(update=own)

    @cached_property
    def _place(self) -> dict[str, str]:
        """Device and dtype: a resumed run that chose others would mix two kinds of clips."""
        from fastvideo.model import pick_device, pick_dtype

        device = pick_device(self.device)
        dtype = str(pick_dtype(self.dtype, device)).removeprefix("torch.")
        return {"device": str(device), "dtype": dtype}

    def _open_world(self) -> World:
        sizes = {"height": self.how.height, "width": self.how.width}
        return open_world(self.world, **sizes, num_frames=self.how.num_frames, fps=self.how.fps)

    @property
    def _scorer_folder(self) -> Path | None:
        name = classifier(self.world)
        return hub.ZOO / name if name else None

    def _scorer_identity(self) -> dict[str, Any] | None:
        """Return what decides the features: weights, and the version of the code that runs them."""
        if self._scorer_folder is None:
            return None
        from fastvideo.models.classifier import family

        version = family(self._scorer_folder).VERSION
        return {"weights": fingerprint(self._scorer_folder), "version": version}

    def _parts(self) -> list[_Part]:
        """List made clips, reconstructions, and the later repeats of the first prompts."""
        at = self.results
        again = range(1, self.repeats) if self._scorer_folder else ()
        return [
            _Part(Records(at / "made.jsonl"), self.prompts, self.batch, self._make),
            _Part(Records(at / "reconstructed.jsonl"), self.reconstructions, 1, self._reconstruct),
            *(
                _Part(Records(at / f"take-{r}.jsonl"), self.diverse, self.batch, make)
                for r, make in ((repeat, partial(self._make_again, repeat)) for repeat in again)
            ),
        ]

    def _load(self) -> _Tools:
        from fastvideo.measure import Scorer  # torch comes in here

        scorer = Scorer(self._scorer_folder) if self._scorer_folder else None
        return _Tools(self.load_model(), self._open_world(), scorer)

    def _render(self, tools: _Tools, indices: Sequence[int], repeat: int) -> list[Rendered]:
        from fastvideo import measure

        clips = [tools.world.clip(SEED, i, SPLIT) for i in indices]
        asked = zip(indices, clips, strict=True)
        requests = [self.request(i, clip.caption, repeat=repeat) for i, clip in asked]
        made = measure.rendered(tools.model, tools.world, clips, requests)
        for index, one in zip(indices, made, strict=True):
            tags = {"prompt": one.prompt, "seed": str(self.clip_seed(index, repeat))}
            path = self.clip_path(index, repeat)
            media.write_video(path, [one.frames], fps=self.how.fps, metadata=tags, overwrite=True)
        return made

    def _make(self, tools: _Tools, indices: Sequence[int]) -> list[Record]:
        from fastvideo.measure import clip_flicker

        records = []
        for index, one in zip(indices, self._render(tools, indices, 0), strict=True):
            true = tools.world.clip(SEED, index, SPLIT).frames_THWC
            record: Record = {
                "index": index,
                "prompt": one.prompt,
                "truth": one.truth,
                "seen": tools.world.parse(true),
                "parse": one.parse,
                "flicker": _number(one.flicker),
                "flicker_truth": _number(clip_flicker(true)),
                "fit": self._fit(one.frames, one.truth),
                "fit_truth": self._fit(true, one.truth),
            }
            if tools.scorer:
                record["features"], _ = tools.scorer(one.frames)
                record["truth_features"], record["labels"] = tools.scorer(true)
                record["reference_features"] = self._drawn_anew(tools, one.truth, index, 0)
            records.append(record)
        return records

    def _make_again(self, repeat: int, tools: _Tools, indices: Sequence[int]) -> list[Record]:
        """Make prompts again from other noise; the world draws their truth again too."""
        assert tools.scorer is not None, "repeats are made for their features"
        records = []
        for index, one in zip(indices, self._render(tools, indices, repeat), strict=True):
            features, _ = tools.scorer(one.frames)
            true = self._drawn_anew(tools, one.truth, index, repeat)
            records.append({"index": index, "features": features, "truth_features": true})
        return records

    def _fit(self, frames: Frames, truth: dict[str, str]) -> dict[str, float] | None:
        """Return how well the object fits its shape, of a world that can tell; None if unseen."""
        to_fit = fit(self.world)
        found = to_fit(frames, truth) if to_fit else None
        return None if found is None else asdict(found)

    def _drawn_anew(
        self, tools: _Tools, truth: dict[str, str], index: int, repeat: int
    ) -> list[float]:
        """Return the features of another true clip of the same prompt."""
        assert tools.scorer is not None, "features need a classifier"
        draw = rng.numpy_generator(SEED, f"evaluation/{SPLIT}/take {repeat}", index)
        features, _ = tools.scorer(tools.world.render(truth, draw))
        return features

    def _reconstruct(self, tools: _Tools, indices: Sequence[int]) -> list[Record]:
        from fastvideo import measure

        records = []
        for index in indices:
            clip = tools.world.clip(SEED, index, SPLIT)
            vae, decoder = tools.model.vae, tools.model.decoder
            one = measure.reconstructed(vae, tools.world, clip, decoder=decoder)
            record: Record = {
                "index": index,
                "truth": one.truth,
                "parse": one.parse,
                "psnr": min(one.psnr, 100.0),  # JSON has no infinity
                "ssim": one.ssim,
                "fit": self._fit(one.frames, one.truth),
            }
            if tools.scorer:
                record["features"], record["labels"] = tools.scorer(one.frames)
            records.append(record)
        return records


def _fits(made: Sequence[Record], kept: Sequence[Record]) -> dict[str, Fits]:
    """Return how well objects fit in made clips, after the VAE, and in true clips."""
    sources = (("made", made, "fit"), ("VAE", kept, "fit"), ("truth", made, "fit_truth"))
    found = {name: scores.fits(records, key) for name, records, key in sources}
    return {name: one for name, one in found.items() if one}


def _check_counts(prompts: int, batch: int, repeats: int, **of_prompts: int) -> None:
    for name, value, least in (("batch", batch, 1), ("repeats", repeats, 0)):
        if value < least:
            raise ValueError(f"{name} {value} must be at least {least}")
    if not 1 <= prompts <= REPEAT_STRIDE:
        raise ValueError(f"prompts {prompts} must be at least 1 and at most {REPEAT_STRIDE}")
    for name, value in of_prompts.items():
        if not 1 <= value <= prompts:
            raise ValueError(f"{name} {value} must be from 1 to {prompts}, the prompts")


def _other_steps(spec: Spec, asked: GenerateRequest, sigmas: Sequence[float]) -> Scheduler:
    """Return the model's few-step scheduler at other sigmas.

    A sigma of its own keeps the time that the network was told there, if all of them are.
    """
    own = spec.scheduler
    if own.name != "few_step":
        raise ValueError(
            f"sigmas {list(sigmas)} need a model of few steps; the scheduler of {spec.name} is"
            f" {own.name}: give steps"
        )
    if asked.num_inference_steps != len(sigmas):
        raise ValueError(f"{asked.num_inference_steps} steps cannot take {len(sigmas)} sigmas")
    if list(sigmas) == own.args.get("sigmas"):
        return own
    known = dict(zip(own.args.get("sigmas", ()), own.args.get("timesteps") or (), strict=False))
    times = [known[s] for s in sigmas] if known and set(sigmas) <= known.keys() else None
    return Scheduler(name=own.name, args={**own.args, "sigmas": list(sigmas), "timesteps": times})


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN
