"""The part of `fastvideo data` that looks at folders of videos, and encodes them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo import hub, media
from fastvideo.config import assignments, merge, parse
from fastvideo.errors import FAILED, OK, refusing
from fastvideo.footage import UnusableError
from fastvideo.resolve import check_clip
from fastvideo.shapes import Compression, PixelShape, parse_size
from fastvideo.spec import Defaults, Spec
from fastvideo_train.commands._progress import progress
from fastvideo_train.data import folder as folders
from fastvideo_train.data import plan as plans
from fastvideo_train.data.buckets import Rules
from fastvideo_train.data.folder import Bad, Found
from fastvideo_train.data.plan import Plan
from fastvideo_train.data.stats import summary
from fastvideo_train.lock import locked

SMOKE_CLIPS = 4
MAX_WORKERS = 8
HINT = "wait for it or choose another folder"
NAMED = 3  # captions without a video that are told by name


@dataclass(frozen=True)
class Asked:
    """What every command on videos takes."""

    videos: Path
    captions: Path | None = None
    model: str | None = None
    size: str | None = None
    frames: str | None = None
    fps: str | None = None
    sets: Sequence[str] | None = None
    workers: int | None = None

    def find(self) -> tuple[Found, Rules]:
        """Return what names and captions tell, and the rules; `ValueError` for wrong words."""
        return folders.find(self.videos, self.captions), self.rules()

    def rules(self) -> Rules:
        """Return the rules: a model's own size, lengths, rate and multiples unless given."""
        spec = self.spec()
        defaults = spec.defaults if spec else Defaults()
        compression = spec.compression if spec else Compression()
        width, height = parse_size(self.size) if self.size else (defaults.width, defaults.height)
        values = {
            "width": width,
            "height": height,
            "frames": lengths(self.frames) if self.frames else (defaults.num_frames,),
            "fps": self.fps or defaults.fps,
            "multiple": compression.pixel_multiple,
            "temporal": compression.temporal,
        }
        rules = parse(
            Rules, merge(values, assignments(self.sets or ())), source="the rules for videos"
        )
        for bucket in rules.buckets:
            if spec is not None:
                check_clip(PixelShape(bucket.frames, bucket.height, bucket.width), spec)
        return rules

    def spec(self) -> Spec | None:
        """Return what the model says of itself, None without one."""
        return hub.open_spec(self.model)[0] if self.model is not None else None

    def num_workers(self) -> int:
        """Return how many processes look at files."""
        return min(MAX_WORKERS, os.cpu_count() or 1) if self.workers is None else self.workers


def lengths(text: str) -> tuple[int, ...]:
    """Read `17,81`; `ValueError` if it is no list of numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--frames {text!r} must be a number, or several such as 17,81")
    return tuple(int(part) for part in parts)


def validate(asked: Asked, *, quick: bool, as_json: bool) -> int:
    """List the files that cannot be used; exit code 1 if any is bad."""
    found, plan = look(asked, decode=not quick)
    counts = {"usable": len(plan.clips), "bad": len(plan.bad), "left_out": len(plan.unfit)}
    if as_json:
        listed = {"bad": plan.bad, "left_out": plan.unfit}
        rows = {key: [{"file": b.name, "reason": b.reason} for b in v] for key, v in listed.items()}
        unused = {"other_files": dict(found.others), "lone_captions": list(found.lone)}
        _print_json({"folder": str(asked.videos), "usable": counts["usable"], **rows, **unused})
    else:
        _print_bad("bad", plan.bad)
        _print_bad("left out", plan.unfit)
        for key, text in _unused(found).items():
            print(f"{key}: {text}")
        print(f"{asked.videos}: {_counts(counts)}")
    return FAILED if plan.bad else OK


def stats(asked: Asked, *, as_json: bool) -> int:
    """Print what the folder holds, in numbers."""
    found, plan = look(asked)
    values = summary(found, plan, num_tokens=_num_tokens(asked.model, plan))
    if as_json:
        _print_json(values)
        return OK
    print(f"{asked.videos}: {_counts(values)} (fastvideo data validate says why)")
    why = {"not used": _listed(values["reasons"])} if values["reasons"] else {}
    for key, text in (why | _facts(values) | _unused(found)).items():
        print(f"  {key:<12}{text}")
    return OK


def _facts(values: dict[str, Any]) -> dict[str, str]:
    """Return rows about the usable videos."""
    if not values["usable"]:
        return {}
    used = f"{values['total_s']:.1f} s in all, {values['used_s']:.1f} s used"
    rows = {
        "durations": f"{_range(values['duration_s'], ' s')}; {used}",
        "fps": f"{_range(values['fps'])}; variable in {values['variable_rate']}",
        "sizes": _listed(values["sizes"]),
        "codecs": _listed(values["codecs"]),
        "handled": f"turned upright {values['turned']}, alpha laid over black {values['alpha']},"
        f" audio ignored {values['audio']}",
        "captions": f"{values['captions']} distinct, {_range(values['caption_words'], ' words')}",
    }
    if "caption_tokens" in values:
        rows["tokens"] = _range(values["caption_tokens"], " of a caption")
    least = values["distinct_batch"]
    rows["batches"] = f"of more than {least} hold a clip of the smallest bucket more than once"
    for name, bucket in values["buckets"].items():
        rows[name] = f"{bucket['clips']} clips, {bucket['kept']:.0%} of the picture"
    return rows


def _unused(found: Found) -> dict[str, str]:
    """Return rows about files that are neither a video nor belong to one."""
    rows = {}
    if found.others:
        rows["not videos"] = f"{sum(found.others.values())} files: {_listed(found.others)}"
    if found.lone:
        named = ", ".join(found.lone[:NAMED]) + (" ..." if found.lone[NAMED:] else "")
        rows["no video"] = f"{len(found.lone)} captions without one: {named}"
    return rows


def preview(asked: Asked, output: Path, count: int) -> int:
    """Write contact sheets, one for each bucket, of what training would see."""
    _, plan = look(asked)
    if not plan.clips:
        raise ValueError(f"{asked.videos} has no usable video; fastvideo data validate says why")
    names = [bucket.name for bucket in plan.buckets()]
    for name in names:
        path = output if len(names) == 1 else output.with_stem(f"{output.stem}-{name}")
        shown, labels = [], []
        for clip in plan.of(name)[:count]:
            try:
                shown.append(clip.frames(plan.rules.fps))
                labels.append(f"{clip.video.name}: {clip.video.caption}")
            except UnusableError as error:
                _print_bad("bad", [Bad(clip.video.name, str(error))])
        if shown:
            sheet = media.contact_sheet(shown, labels=labels)
            media.write_png(path, sheet)
            print(f"{path}: {len(shown)} of {len(plan.of(name))} clips of {name}")
    return OK


def encode(
    asked: Asked,
    output: Path,
    *,
    shard: int,
    batch: int,
    device: str,
    dtype: str,
    threads: int | None,
    prompts: Sequence[str],
    smoke: bool,
) -> int:
    """Encode a folder's videos and captions; the same command resumes after a kill."""
    output = output.with_name(f"{output.name}-smoke") if smoke else output
    with refusing():
        found, rules = asked.find()
        if smoke:
            found, rules = _small(found, rules)
        output.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"shard": shard, "batch": batch, "prompts": prompts}
    settings |= {"device": device, "dtype": dtype}
    with locked(output, "encodes into", hint=HINT):
        return _encode(asked, found, rules, output, settings, threads=threads)


def _encode(
    asked: Asked,
    found: Found,
    rules: Rules,
    output: Path,
    settings: dict[str, Any],
    *,
    threads: int | None,
) -> int:
    assert asked.model is not None, "the command demands one"
    with refusing():
        plan = plans.make(found, _scan(found, asked, journal=output / "scan.jsonl"), rules)
        import torch  # here, after what can be refused without it

        from fastvideo_train.data.videos import Job

        if threads:
            torch.set_num_threads(threads)
        job = Job.open(plan, asked.model, output, **settings)
    size = f"about {job.size_bytes / 1e6:.3g} MB"
    print(f"{output}: {len(plan.clips)} clips, {len(job.prompts)} prompts, {size}")
    with progress("text") as report:
        job.encode_text(report)
    with progress("clips") as report:
        damaged = job.encode_clips(report, workers=asked.num_workers())
    left = len(plan.bad) + len(plan.unfit) + len(damaged)
    _print_bad("bad", damaged)
    done = len(plan.clips) - len(damaged)
    print(
        f"{output}: {done} clips in {len(plan.buckets())} buckets; {left} left out (skipped.jsonl)"
    )
    return OK


def look(asked: Asked, *, decode: bool = True) -> tuple[Found, Plan]:
    """Look at every file and sort it."""
    with refusing():
        found, rules = asked.find()
    return found, plans.make(found, _scan(found, asked, decode=decode), rules)


def _scan(
    found: Found, asked: Asked, *, decode: bool = True, journal: Path | None = None
) -> list[folders.Scanned]:
    """Look at the files that the journal does not know, and note each as soon as it is done."""
    known: dict[str, folders.Scanned] = {}
    if journal is not None and journal.is_file():
        known = folders.from_lines(journal.read_text(encoding="utf-8"), found.videos)
    out = []
    with progress("scan") as report:
        for one in folders.scan(
            found.videos,
            workers=asked.num_workers() if len(known) < len(found.videos) else 0,
            decode=decode,
            known=known,
            report=report,
        ):
            out.append(one)
            if journal is not None and one.video.name not in known:
                with journal.open("a", encoding="utf-8") as file:
                    file.write(folders.to_line(one))
    return out


def _small(found: Found, rules: Rules) -> tuple[Found, Rules]:
    """Return the first videos and the shortest legal clips, for a look at the machinery."""
    few = Found(found.videos[:SMOKE_CLIPS], (), found.others, found.captions)
    return few, rules.model_copy(update={"frames": (rules.temporal + 1,)})


def _num_tokens(model: str | None, plan: Plan) -> list[int] | None:
    """Return the tokens of each clip's caption, before any cut to the model's limit."""
    if model is None or not plan.clips:
        return None
    from fastvideo import formats
    from fastvideo.models.text.tokenizer import Tokenizer

    _, source = hub.open_spec(model)
    tokenizer = Tokenizer.load(formats.find(source).tokenizer_folder(source))
    captions = [clip.video.caption for clip in plan.clips]
    longest = max(len(caption) for caption in captions)
    _, mask_BL = tokenizer(captions, 4 * longest + 2)  # a letter is at most four bytes, and tokens
    counts: list[int] = mask_BL.sum(1).tolist()
    return counts


def _print_bad(word: str, bad: Sequence[Bad]) -> None:
    for one in bad:
        print(f"{word}: {one.name}: {one.reason}")


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, indent=2, ensure_ascii=False))


def _counts(values: dict[str, Any]) -> str:
    return f"{values['usable']} usable, {values['bad']} bad, {values['left_out']} left out"


def _range(values: dict[str, float], unit: str = "") -> str:
    least, middle, most = (f"{values[key]:.4g}" for key in ("min", "median", "max"))
    return f"{least} to {most}{unit}, median {middle}"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())
