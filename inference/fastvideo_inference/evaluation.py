"""A model measured against a world: held-out prompts made and read back, beside their ceilings.

plan = Evaluation.plan("wan-nano", prompts=256, output="eval")   # torch-free, refuses what is wrong
for done, total in plan.run(): ...                               # goes on where a kill left it
table = plan.report()

The folder keeps every clip and one line of results for each, under the hash of all that decides
them; the same command after a kill makes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fastvideo import files, hub, media
from fastvideo.metrics.faithfulness import Row, faithfulness
from fastvideo.worlds import World, attributes, generator_version, open_world
from fastvideo_inference.recipe import fingerprint, versions
from fastvideo_inference.request import Plan, read_layers

if TYPE_CHECKING:
    from fastvideo.model import Model

Record = dict[str, Any]
SPLIT = "heldout"


@dataclass(frozen=True)
class Line:
    """One attribute of the table: made clips, the two ceilings, and guessing."""

    attribute: str
    rate: float
    low: float
    high: float
    n: int
    vae: float
    truth: float
    chance: float


@dataclass(frozen=True)
class Table:
    """What an evaluation found. PSNR in dB and SSIM are the VAE's; flicker in grey levels."""

    model: str
    recipe: Mapping[str, Any]
    lines: tuple[Line, ...]
    num_reconstructions: int
    psnr: float
    ssim: float
    flicker: float | None

    def to_json(self) -> str:
        """Return the table as JSON; the same evaluation gives the same text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)


@dataclass(frozen=True)
class Evaluation:
    """Everything that decides an evaluation's numbers, and where they are kept."""

    model: str
    folder: Path
    how: Plan
    output: Path
    prompts: int
    reconstructions: int
    world: str
    device: str
    dtype: str
    batch: int

    @classmethod
    def plan(
        cls,
        model: str,
        *,
        output: str | Path,
        prompts: int = 256,
        reconstructions: int = 64,
        world: str = "shapes",
        device: str = "auto",
        dtype: str = "auto",
        batch: int = 4,
        **request: Any,
    ) -> Evaluation:
        """Check everything that can be checked without torch; `ValueError` if anything is wrong.

        `request` holds fields of `GenerateRequest`; None is the model's default, the seed's is 0.
        """
        for name, value in (("prompts", prompts), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if not 1 <= reconstructions <= prompts:
            raise ValueError(
                f"reconstructions {reconstructions} must be from 1 to {prompts}, the prompts"
            )
        spec, folder = hub.open_spec(model, weights=True)
        given = {"seed": 0} | {k: v for k, v in request.items() if v is not None}
        given["prompt"] = "held-out prompts of a world"
        how = read_layers(("the call", given)).resolve(spec)
        made = cls(
            model=spec.name,
            folder=folder,
            how=how,
            output=Path(output),
            prompts=prompts,
            reconstructions=reconstructions,
            world=world,
            device=device,
            dtype=dtype,
            batch=batch,
        )
        made._open_world()
        return made

    def recipe(self) -> dict[str, Any]:
        """Return what decides one clip's result, of a size that does not grow with the prompts.

        "auto" is resolved, which needs torch; `ValueError` for a device that is not there.
        """
        return {
            "versions": versions(),
            "weights": fingerprint(self.folder),
            "world": self.world,
            "generator_version": generator_version(self.world),
            "split": SPLIT,
            "request": self.how.model_dump(exclude={"prompt"}),
            **self._place,
        }

    @property
    def results(self) -> Path:
        """Folder of the clips and results of this recipe."""
        text = json.dumps(self.recipe(), sort_keys=True)
        return self.output / hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def run(self) -> Iterator[tuple[int, int]]:
        """Make what is missing; yield (clips done, clips in all) after every batch."""
        from fastvideo.model import load  # torch comes in here

        results, world, total = (
            self.results,
            self._open_world(),
            self.prompts + self.reconstructions,
        )
        results.mkdir(parents=True, exist_ok=True)
        files.write_text(
            results / "recipe.json", json.dumps(self.recipe(), indent=2) + "\n", overwrite=True
        )
        made = _Records(results / "made.jsonl")
        kept = _Records(results / "reconstructed.jsonl")
        todo = [i for i in range(self.prompts) if i not in made]
        again = [i for i in range(self.reconstructions) if i not in kept]
        done = total - len(todo) - len(again)
        yield done, total
        if not todo and not again:
            return
        model = load(self.folder, **self._place)
        for first in range(0, len(todo), self.batch):
            indices = todo[first : first + self.batch]
            made.add(self._make(model, world, indices))
            done += len(indices)
            yield done, total
        for index in again:
            kept.add([self._reconstruct(model, world, index)])
            done += 1
            yield done, total

    def report(self) -> Table:
        """Read the results back and write `table.json` and `sheet.png`."""
        made = _Records(self.results / "made.jsonl").first(self.prompts)
        kept = _Records(self.results / "reconstructed.jsonl").first(self.reconstructions)
        legal = attributes(self.world)
        rates = {
            "made": _rows(made, "parse", legal),
            "truth": _rows(made, "seen", legal),
            "vae": _rows(kept, "parse", legal),
        }
        lines = [
            Line(
                attribute=row.attribute,
                rate=row.rate,
                low=row.interval[0],
                high=row.interval[1],
                n=row.n,
                vae=vae.rate,
                truth=truth.rate,
                chance=row.chance,
            )
            for row, vae, truth in zip(*(rates[k] for k in ("made", "vae", "truth")), strict=True)
        ]
        flickers = [m["flicker"] for m in made if m["flicker"] is not None]
        table = Table(
            model=self.model,
            recipe=self.recipe(),
            lines=tuple(lines),
            num_reconstructions=len(kept),
            psnr=fmean(k["psnr"] for k in kept),
            ssim=fmean(k["ssim"] for k in kept),
            flicker=fmean(flickers) if flickers else None,
        )
        files.write_text(self.results / "table.json", table.to_json() + "\n", overwrite=True)
        self._sheet(made)
        return table

    def clip_path(self, index: int) -> Path:
        """Return where the clip of a prompt is kept."""
        return self.results / "clips" / f"{index:05d}.mp4"

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

    def _make(self, model: Model, world: World, indices: Sequence[int]) -> list[Record]:
        from fastvideo import measure

        how, clips = self.how, [world.clip(0, i, SPLIT) for i in indices]
        made = measure.rendered(
            model,
            world,
            clips,
            seeds=[how.seed + i for i in indices],
            num_steps=how.num_inference_steps,
            guidance_scale=how.guidance_scale,
            negative_prompt=how.negative_prompt,
            num_frames=how.num_frames,
            height=how.height,
            width=how.width,
        )
        records = []
        for index, clip, one in zip(indices, clips, made, strict=True):
            tags = {"prompt": one.prompt, "seed": str(how.seed + index)}
            path = self.clip_path(index)
            media.write_video(path, [one.frames], fps=how.fps, metadata=tags, overwrite=True)
            seen = world.parse(clip.frames_THWC)
            record = {"index": index, "prompt": one.prompt, "truth": one.truth, "seen": seen}
            flicker = None if math.isnan(one.flicker) else one.flicker
            records.append(record | {"parse": one.parse, "flicker": flicker})
        return records

    def _reconstruct(self, model: Model, world: World, index: int) -> Record:
        from fastvideo import measure

        one = measure.reconstructed(model.vae, world, world.clip(0, index, SPLIT))
        psnr = min(one.psnr, 100.0)  # JSON has no infinity
        return {
            "index": index,
            "truth": one.truth,
            "parse": one.parse,
            "psnr": psnr,
            "ssim": one.ssim,
        }

    def _sheet(self, made: Sequence[Record], count: int = 16) -> None:
        shown = made[:count]
        clips = [media.read_video(self.clip_path(m["index"]))[0] for m in shown]
        wrong = [{k: v for k, v in m["parse"].items() if m["truth"].get(k, v) != v} for m in shown]
        labels = [
            m["prompt"] + (f"  [{', '.join(w.values())}]" if w else "")
            for m, w in zip(shown, wrong, strict=True)
        ]
        sheet = media.contact_sheet(clips, labels=labels)
        media.write_png(self.results / "sheet.png", sheet, overwrite=True)


class _Records:
    """Results by index, one JSON line each; a line that a kill cut short does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[int, Record] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                record: Record = json.loads(line)
            except ValueError:
                continue
            self._lines[record["index"]] = record

    def __contains__(self, index: int) -> bool:
        return index in self._lines

    def add(self, records: Sequence[Record]) -> None:
        """Append results; whatever was cut short before ends with its own line."""
        torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        text = "".join(json.dumps(record) + "\n" for record in records)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + text)
        self._lines |= {record["index"]: record for record in records}

    def first(self, count: int) -> list[Record]:
        """Return the results of indices 0 to count - 1."""
        assert all(i in self._lines for i in range(count)), "run() has made all of them"
        return [self._lines[i] for i in range(count)]


def _rows(records: Sequence[Record], key: str, legal: Mapping[str, Sequence[str]]) -> list[Row]:
    return faithfulness([r["truth"] for r in records], [r[key] for r in records], legal=legal)
