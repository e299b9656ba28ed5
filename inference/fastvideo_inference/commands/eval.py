"""`fastvideo eval MODEL`: how faithfully a model follows prompts that it never saw."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from fastvideo import hub
from fastvideo.cli import OK, refusing
from fastvideo.shapes import parse_size
from fastvideo_inference.commands._jobs import check_place
from fastvideo_inference.evaluation import Evaluation

if TYPE_CHECKING:
    from fastvideo_inference.scores import Distance, Features, Table


def evaluate(
    model: Annotated[str, Argument(help="Bundled name, folder or hub id.")] = hub.DEFAULT_MODEL,
    prompts: Annotated[int, Option(help="Held-out prompts to make clips of.")] = 256,
    reconstructions: Annotated[
        int | None, Option(help="True clips to pass through the VAE. [64, or all prompts]")
    ] = None,
    repeats: Annotated[
        int, Option(help="Clips of each diverse prompt, from different noise; 0 or 1 for none.")
    ] = 4,
    diverse: Annotated[
        int | None, Option(help="Prompts to measure diversity on. [16, or all prompts]")
    ] = None,
    steps: Annotated[int | None, Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, Option(help="Guidance scale; 1 is off.")] = None,
    size: Annotated[str | None, Option(help="WIDTHxHEIGHT in pixels, such as 224x128.")] = None,
    frames: Annotated[int | None, Option(help="Number of frames, 4k+1.")] = None,
    attention: Annotated[
        str | None, Option(help="Another pattern: dense, vsa(sparsity=0.8). [the model's]")
    ] = None,
    seed: Annotated[int, Option(min=0, help="Clip i starts from noise of seed + i.")] = 0,
    world: Annotated[str, Option(help="The world that knows the truth.")] = "shapes",
    batch: Annotated[int, Option(help="Clips made at once.")] = 4,
    output: Annotated[
        Path, Option("--output", "-o", help="Folder for clips and results, kept by recipe.")
    ] = Path("eval"),
    as_json: Annotated[bool, Option("--json", help="The table as JSON on stdout.")] = False,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[str, Option(help="float32, bfloat16.")] = "auto",
) -> int:
    """Measure how faithfully a model follows its prompts.

    A stopped evaluation goes on with the same command; a finished one gives its table again.
    """
    with refusing():
        check_place(device, dtype)
        width, height = (None, None) if size is None else parse_size(size)
        plan = Evaluation.plan(
            model,
            output=output,
            prompts=prompts,
            reconstructions=reconstructions,
            repeats=repeats,
            diverse=diverse,
            world=world,
            device=device,
            dtype=dtype,
            batch=batch,
            num_inference_steps=steps,
            attention=attention,
            guidance_scale=guidance,
            width=width,
            height=height,
            num_frames=frames,
            seed=seed,
        )
    _run(plan)
    table, where = plan.report(), f"clips, table.json, sheet.png and clips.webp: {plan.results}"
    print(table.to_json() if as_json else f"{_text(table)}\n{where}")
    return OK


_SAY_EVERY_S = 60.0  # without a terminal


def _run(plan: Evaluation) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("eval")
        due = time.monotonic()
        for done, total in plan.run():
            progress.update(task, completed=done, total=total)
            if not console.is_terminal and (time.monotonic() >= due or done == total):
                console.print(f"eval: {done} of {total} clips", highlight=False)
                due = time.monotonic() + _SAY_EVERY_S


def _text(table: Table) -> str:
    n = table.lines[0].n
    vae_n = f"VAE ({table.num_reconstructions})"
    head = f"{'':<10}{f'made (n={n})':>14}{'95 % interval':>18}{vae_n:>10}{'truth':>8}{'chance':>8}"
    rows = [
        f"{line.attribute:<10}{line.rate:>14.3f}{f'{line.low:.3f} - {line.high:.3f}':>18}"
        f"{line.vae:>10.3f}{line.truth:>8.3f}{line.chance:>8.3f}"
        for line in table.lines
    ]
    vae = f"VAE on {table.num_reconstructions} held-out clips: {table.psnr:.2f} dB"
    unrest = [f"{x:.2f}" for x in (table.flicker, table.flicker_truth) if x is not None]
    flicker = [f"flicker: made {unrest[0]}, truth {unrest[1]}"] if unrest else []
    ends = [f"{vae}, SSIM {table.ssim:.4f}", *flicker, *_features(table.features)]
    title = f"{table.model}: {n} prompts of {table.combinations} held-out combinations"
    return "\n".join([title, head, *rows, *ends])


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
