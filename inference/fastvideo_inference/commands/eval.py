"""`fastvideo eval MODEL`: how faithfully a model follows prompts that it never saw."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from fastvideo import hub, sampling
from fastvideo.config import assignments
from fastvideo.errors import OK, refusing
from fastvideo_inference.commands.generate import Attention, Backend, DropGates
from fastvideo_inference.comparison import Comparison, read
from fastvideo_inference.contrast import Contrast, markdown
from fastvideo_inference.evaluation import Evaluation
from fastvideo_inference.goodput import quality as qualities
from fastvideo_inference.request import check_place, flag

if TYPE_CHECKING:
    from fastvideo_inference.scores import Distance, Features, Fits, Table


def evaluate(
    model: Annotated[
        str | None, Argument(help=f"Bundled name, folder or hub id. [{hub.DEFAULT_MODEL}]")
    ] = None,
    compare: Annotated[
        Path | None, Option(help="TOML file of settings to hold against each other.")
    ] = None,
    quality: Annotated[
        bool, Option("--quality", help="Write the rows' quality.toml beside their model.")
    ] = False,
    settings: Annotated[
        list[str] | None, Option("--set", help="key=value, over the comparison; repeatable.")
    ] = None,
    prompts: Annotated[
        int | None, Option(help="Held-out prompts to make clips of; of a row at most. [256]")
    ] = None,
    reconstructions: Annotated[
        int | None, Option(help="True clips to pass through the VAE. [64, or all prompts]")
    ] = None,
    repeats: Annotated[
        int | None, Option(help="Clips of each diverse prompt; 0 or 1 for none. [4]")
    ] = None,
    diverse: Annotated[
        int | None, Option(help="Prompts to measure diversity on. [16, or all prompts]")
    ] = None,
    steps: Annotated[int | None, Option(help=sampling.STEPS.help)] = None,
    guidance: Annotated[float | None, Option(help=sampling.GUIDANCE.help)] = None,
    negative: Annotated[str | None, Option(help=sampling.NEGATIVE.help)] = None,
    size: Annotated[str | None, Option(help="WIDTHxHEIGHT in pixels, such as 224x128")] = None,
    frames: Annotated[int | None, Option(help=sampling.FRAMES.help)] = None,
    fps: Annotated[str | None, Option(help=sampling.FPS.help)] = None,
    attention: Attention = None,
    backend: Backend = None,
    drop_gates: DropGates = None,
    decoder: Annotated[
        str | None, Option(help="A small decoder of the model, or its path. [the VAE's own]")
    ] = None,
    seed: Annotated[int | None, Option(min=0, help="Clip i starts from seed + i. [0]")] = None,
    world: Annotated[str | None, Option(help="The world that knows the truth. [shapes]")] = None,
    batch: Annotated[int | None, Option(help="Clips made at once. [4]")] = None,
    output: Annotated[Path, Option("--output", "-o", help="Folder, kept by recipe.")] = Path(
        "eval"
    ),
    as_json: Annotated[bool, Option("--json", help="The table as JSON on stdout.")] = False,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[str, Option(help="float32, bfloat16.")] = "auto",
) -> int:
    """Measure how faithfully a model follows its prompts, or compare settings of models.

    A stopped evaluation resumes with the same command; a finished one gives its table again.
    """
    typed = {k: v for k, v in locals().items() if v is not None and k not in _EVERYWHERE}
    place = {"output": output, "device": device, "dtype": dtype}
    with refusing():
        check_place(device, dtype)
        plan = (_comparison if compare else _evaluation)(typed, **place)
        if quality:
            qualities.folder_of(plan)
    return _carry_out(plan, as_json=as_json, quality=quality)


_EVERYWHERE = ("output", "as_json", "device", "dtype", "quality")


def _evaluation(typed: dict[str, Any], **place: Any) -> Evaluation:
    if "settings" in typed:
        raise ValueError("--set changes a comparison; give --compare FILE too")
    model, asked = hub.open_model(typed.pop("model", hub.DEFAULT_MODEL)), {**typed, **place}
    made = Evaluation.plan(model, **asked, source=flag)
    if model.has_weights:
        return made
    return Evaluation.plan(hub.fetched(model), **asked, source=flag)  # legal, so worth a download


def _comparison(typed: dict[str, Any], **place: Any) -> Comparison:
    path, words = typed.pop("compare"), typed.pop("settings", [])
    at_most = typed.pop("prompts", None)
    for name in typed:
        what = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
        raise ValueError(f"--compare takes no {what}: write it into {path}, or use --set")
    plan = Comparison.plan(read(path, changes=assignments(words), at_most=at_most), **place)
    plan.check()
    return plan


def _carry_out(plan: Evaluation | Comparison, *, as_json: bool, quality: bool) -> int:
    _run(plan.run())
    table, where = plan.report(), f"clips, table.json, sheet.png and clips.webp: {plan.results}"
    print(table.to_json() if as_json else f"{_text(table)}\n{where}")
    if quality:
        print(qualities.write(plan, table), file=sys.stderr)
    return OK


_SAY_EVERY_S = 60.0  # without a terminal


def _run(work: Iterator[tuple[int, int]]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("eval")
        due = time.monotonic()
        for done, total in work:
            progress.update(task, completed=done, total=total)
            if not console.is_terminal and (time.monotonic() >= due or done == total):
                console.print(f"eval: {done} of {total} clips", highlight=False)
                due = time.monotonic() + _SAY_EVERY_S


def _text(table: Table | Contrast) -> str:
    if isinstance(table, Contrast):
        return markdown(table)
    n = table.lines[0].n
    vae_n = f"VAE ({table.num_reconstructions})"
    names = [x.attribute if x.n == n else f"{x.attribute} (n={x.n})" for x in table.lines]
    w = max(map(len, [*names, " " * 9])) + 1
    head = (
        f"{'':<{w}}{f'made (n={n})':>14}{'95 % interval':>18}{vae_n:>10}{'truth':>8}{'chance':>8}"
    )
    rows = [
        f"{name:<{w}}{line.rate:>14.3f}{f'{line.low:.3f} - {line.high:.3f}':>18}"
        f"{line.vae:>10.3f}{line.truth:>8.3f}{line.chance:>8.3f}"
        for name, line in zip(names, table.lines, strict=True)
    ]
    small = table.recipe.get("decoder")
    what = f"VAE with decoder {small['name_or_path']}" if small else "VAE"
    vae = f"{what} on {table.num_reconstructions} held-out clips: {table.psnr:.2f} dB"
    known = [f"{x:.2f}" for x in (table.flicker, table.flicker_truth) if x is not None]
    flicker = [f"flicker: made {known[0]}, truth {known[1]}"] if known else []
    several = ["intervals count each object as a clip of its own, and are narrow for that"]
    ends = several if any(line.n != n for line in table.lines) else []
    ends += [f"{vae}, SSIM {table.ssim:.4f}", *flicker, *_fits(table.fits)]
    ends += _features(table.features)
    title = f"{table.model}: {n} prompts of {table.combinations} held-out combinations"
    return "\n".join([title, head, *rows, *ends])


def _fits(found: Mapping[str, Fits]) -> list[str]:
    """Return a line for each kind of clips, of how well objects fit their shapes."""
    return [
        f"overlap with the ideal shape, {name} (n={one.n}): {one.overlap:.3f}, worst tenth"
        f" {one.worst:.3f}, deviation {one.deviation:.3f}, edge {one.edge_px:.1f} px ("
        + ", ".join(f"{shape} {overlap:.3f}" for shape, overlap in one.shapes.items())
        + ")"
        for name, one in found.items()
    ]


def _features(found: Features | None) -> list[str]:
    if found is None:
        return ["no feature numbers: the world has no classifier"]
    lines = [
        f"feature distance to true clips: {_distance('made', found.made)}"
        f"; {_distance('VAE', found.vae)}",
    ]
    if found.spread:
        s = found.spread
        times = f"{s.repeats} clips of each of {s.prompts} prompts"
        lines.append(f"diversity, {times}: made {s.made:.3f}, truth {s.truth:.3f}")
    for where, right in (
        ("on true clips", found.classifier.truth),
        ("after the VAE", found.classifier.vae),
    ):
        rates = ", ".join(f"{key} {rate:.3f}" for key, rate in right.items())
        lines.append(f"{found.classifier.name} is right {where}: {rates}")
    return lines


def _distance(what: str, d: Distance | None) -> str:
    if d is None:
        return f"{what} not measured, too few clips"
    return f"{what} {d.value:.3f} (n={d.n}, floor {d.floor:.3f})"
