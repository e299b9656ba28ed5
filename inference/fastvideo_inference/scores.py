"""What an evaluation found: a line of JSON for each clip, and the table made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fastvideo.metrics.diversity import diversity
from fastvideo.metrics.faithfulness import Row, faithfulness, rates
from fastvideo.metrics.frechet import frechet

Record = dict[str, Any]
Legal = Mapping[str, Sequence[str]]


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
class Distance:
    """Fréchet distance of n clips from n true ones of the same prompts, drawn anew.

    `floor` is that of the n true clips themselves. In the features of the world's own classifier.
    """

    n: int
    value: float
    floor: float


@dataclass(frozen=True)
class Spread:
    """Mean distance in features of clips of one prompt: made, and true ones drawn anew."""

    prompts: int
    repeats: int
    made: float
    truth: float


@dataclass(frozen=True)
class Instrument:
    """How often the classifier itself names an attribute rightly, on true clips and after the VAE.

    Where these are low, its features and all that is made of them mean nothing.
    """

    name: str
    truth: Mapping[str, float]
    vae: Mapping[str, float]


@dataclass(frozen=True)
class Features:
    """What the classifier's features say; a distance is None for no more clips than features."""

    classifier: Instrument
    made: Distance | None
    vae: Distance | None
    spread: Spread | None


@dataclass(frozen=True)
class Fits:
    """How well objects fit their true shapes (`scenery/shapes_fit.py`), in the `n` clips with one.

    `overlap`: intersection over union, mean, worst tenth, and mean by shape; `deviation` from frame
    to frame; `edge_px`: the width of the edge in pixels.
    """

    n: int
    overlap: float
    worst: float
    deviation: float
    edge_px: float
    shapes: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """What an evaluation found. PSNR in dB and SSIM are the VAE's; flicker in grey levels."""

    model: str
    recipe: Mapping[str, Any]
    combinations: int
    """Different truths among the prompts; clips of one are not independent, as intervals assume."""
    lines: tuple[Line, ...]
    num_reconstructions: int
    psnr: float
    ssim: float
    flicker: float | None
    flicker_truth: float | None
    fits: Mapping[str, Fits]
    """Of made, VAE's and true clips; none in a world that cannot tell."""
    features: Features | None

    def to_json(self) -> str:
        """Return the table as JSON; the same evaluation gives the same text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)


class Records:
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

    def missing(self, count: int, batch: int) -> Iterator[tuple[list[int], int]]:
        """Yield the batches of 0 .. count - 1 that are not whole, and how many each lacks.

        A batch is always the same clips: others beside it could change a clip's last bits.
        """
        for first in range(0, count, batch):
            indices = list(range(first, min(first + batch, count)))
            lacking = sum(i not in self._lines for i in indices)
            if lacking:
                yield indices, lacking

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


def lines(made: Sequence[Record], *, kept: Sequence[Record], legal: Legal) -> tuple[Line, ...]:
    """Compare what the parser read in made, reconstructed and true clips with the truth."""
    found = (rows(made, "parse", legal), rows(kept, "parse", legal), rows(made, "seen", legal))
    return tuple(
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
        for row, vae, truth in zip(*found, strict=True)
    )


def features(
    made: Sequence[Record],
    *,
    kept: Sequence[Record],
    again: Sequence[Sequence[Record]],
    classifier: str,
    legal: Legal,
) -> Features:
    """Compare features; `again` holds, for each further seed, the records of the first prompts."""
    return Features(
        Instrument(
            classifier,
            truth=rates(rows(made, "labels", legal)),
            vae=rates(rows(kept, "labels", legal)),
        ),
        made=distance(made, made),
        vae=distance(kept, made),
        spread=_spread(made, again) if again else None,
    )


def fits(records: Sequence[Record], key: str) -> Fits | None:
    """Sum up how well objects fit; None if no record tells."""
    known = [(r["truth"]["shape"], r[key]) for r in records if r.get(key)]
    if not known:
        return None
    ordered = sorted(fit["overlap"] for _, fit in known)
    shapes = {shape: [f["overlap"] for s, f in known if s == shape] for shape, _ in known}
    return Fits(
        n=len(known),
        overlap=fmean(ordered),
        worst=fmean(ordered[: -(-len(ordered) // 10)]),
        deviation=fmean(fit["deviation"] for _, fit in known),
        edge_px=fmean(fit["edge_px"] for _, fit in known),
        shapes={shape: fmean(overlaps) for shape, overlaps in sorted(shapes.items())},
    )


def mean(records: Sequence[Record], key: str) -> float | None:
    """Return the mean of a number that some records may lack; None if all do."""
    known = [record[key] for record in records if record[key] is not None]
    return fmean(known) if known else None


def rows(records: Sequence[Record], key: str, legal: Legal) -> list[Row]:
    """Return how often each attribute in `key` is the truth."""
    return faithfulness([r["truth"] for r in records], [r[key] for r in records], legal=legal)


def distance(records: Sequence[Record], made: Sequence[Record]) -> Distance | None:
    """Return how far records are from true clips of their prompts; None for too few of them."""
    count = len(records)
    if count <= len(made[0]["reference_features"]):
        return None
    # The same prompts on both sides: else the luck of which were drawn outweighs all else.
    reference = [m["reference_features"] for m in made[:count]]
    truth = [m["truth_features"] for m in made[:count]]
    value = frechet([r["features"] for r in records], reference)
    return Distance(count, value, frechet(truth, reference))


def _spread(made: Sequence[Record], again: Sequence[Sequence[Record]]) -> Spread:
    count = len(again[0])
    repeats = [made[:count], *again]
    of = {
        key: diversity([[repeat[i][key] for repeat in repeats] for i in range(count)])
        for key in ("features", "truth_features")
    }
    return Spread(count, len(repeats), made=of["features"], truth=of["truth_features"])
