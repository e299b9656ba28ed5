"""`fastvideo data`: look at a world's clips, write them as files, encode them into latents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvideo import files, media
from fastvideo.cli import OK, refusing
from fastvideo.shapes import Compression, PixelShape, parse_size
from fastvideo.worlds import World, open_world

if TYPE_CHECKING:
    from fastvideo_train.data.latents import Report

data = typer.Typer(
    help="Render or encode training data.",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
)

WorldName = Annotated[str, typer.Option(help="A world: a file under fastvideo/worlds/.")]
Size = Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels, such as 224x128.")]
NumFrames = Annotated[int, typer.Option("--frames", min=1, help="Number of frames, 4k+1.")]
Fps = Annotated[int, typer.Option(min=1, help="Frames per second; speeds are per second.")]
Seed = Annotated[int, typer.Option(min=0, help="Another seed is another set of clips.")]
Split = Annotated[str, typer.Option(help="train, or heldout: combinations never trained on.")]


@data.command()
def preview(
    output: Annotated[Path, typer.Option("--output", "-o", help="The .png to write.")],
    world: WorldName = "shapes",
    count: Annotated[int, typer.Option(min=1, help="Number of clips.")] = 8,
    size: Size = "128x128",
    frames: NumFrames = 81,
    fps: Fps = 16,
    seed: Seed = 0,
    split: Split = "train",
) -> int:
    """Write a contact sheet of clips with their captions, and what the parser read in them."""
    with refusing():
        opened = _open(world, size, frames, fps)
        clips = [opened.clip(seed, index, split) for index in range(count)]
    wrong = 0
    for index, clip in enumerate(clips):
        seen = opened.parse(clip.frames_THWC)
        missed = [f"{k} read as {seen[k]}" for k, v in clip.truth.items() if seen[k] != v]
        wrong += bool(missed)
        print("; ".join([f"{index}: {clip.caption}", *missed]))
    shown = [clip.frames_THWC for clip in clips]
    media.write_png(output, media.contact_sheet(shown, labels=[c.caption for c in clips]))
    print(f"{output}: {count} clips, {count - wrong} read back without a mistake")
    return OK


@data.command()
def render(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    world: WorldName = "shapes",
    count: Annotated[int, typer.Option(min=1, help="Number of clips.")] = 16,
    size: Size = "128x128",
    frames: NumFrames = 81,
    fps: Fps = 16,
    seed: Seed = 0,
    split: Split = "train",
) -> int:
    """Write clips as mp4 files, and captions.jsonl with their captions and truths.

    Files that are there already are kept, so that the same command finishes what a kill left.
    """
    with refusing():
        opened = _open(world, size, frames, fps)
        opened.clip(seed, 0, split)
        output.mkdir(parents=True, exist_ok=True)
    lines = []
    with _progress("render") as report:
        for index in range(count):
            clip, path = opened.clip(seed, index, split), output / f"{index:06d}.mp4"
            metadata = {
                "caption": clip.caption,
                "clip": f"{world} {split} seed {seed} index {index}, {size} x {frames}, {fps} fps",
            }
            if not path.exists():
                media.write_video(path, [clip.frames_THWC], fps=fps, metadata=metadata)
            elif (found := media.read_metadata(path).get("clip")) != metadata["clip"]:
                raise ValueError(
                    f"{path} holds {found}, not {metadata['clip']}; use another folder"
                )
            line = {"file": path.name, "caption": clip.caption, "truth": clip.truth}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            report(index + 1, count)
    files.write_text(output / "captions.jsonl", "".join(lines), overwrite=True)
    print(f"{output}: {count} clips and captions.jsonl")
    return OK


@data.command()
def encode(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    vae: Annotated[str, typer.Option(help="Bundled name, or a model folder with a vae/.")],
    world: WorldName = "shapes",
    clips: Annotated[int, typer.Option(min=1, help="Number of clips.")] = 1024,
    size: Size = "128x128",
    frames: NumFrames = 81,
    fps: Fps = 16,
    seed: Seed = 0,
    split: Split = "train",
    batch: Annotated[int, typer.Option(min=1, help="Clips encoded at once.")] = 4,
    shard: Annotated[int, typer.Option(min=1, help="Clips a file; a multiple of batch.")] = 256,
    workers: Annotated[int, typer.Option(min=0, help="Processes that render ahead.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    dtype: Annotated[str, typer.Option(help="Type to compute in: float32, bfloat16.")] = "bfloat16",
) -> int:
    """Encode a world's clips into shards of latents, which `data.folder` of a recipe names.

    The same command goes on after a kill; a larger --clips adds to the folder.
    """
    with refusing():
        width, height = parse_size(size)
        _open(world, size, frames, fps).clip(seed, 0, split)
        import torch  # here, after what can be refused without it

        from fastvideo.model import pick_dtype
        from fastvideo_train.bundle import load_vae
        from fastvideo_train.data.latents import encode_world

        net = load_vae(vae, dtype=pick_dtype(dtype, torch.device("cpu")))
        strides = Compression(net.config.temporal_stride, net.config.spatial_stride, (1, 1, 1))
        PixelShape(frames, height, width).latent(strides)
    if threads:
        torch.set_num_threads(threads)
    with _progress("encode") as report:
        manifest = encode_world(
            net,
            world,
            output,
            num_clips=clips,
            seed=seed,
            num_frames=frames,
            height=height,
            width=width,
            fps=fps,
            split=split,
            shard_size=shard,
            batch=batch,
            workers=workers,
            report=report,
        )
    print(f"{output}: {manifest.count} clips in {manifest.num_shards} shards")
    return OK


def _open(world: str, size: str, num_frames: int, fps: int) -> World:
    width, height = parse_size(size)
    return open_world(world, height=height, width=width, num_frames=num_frames, fps=fps)


@contextmanager
def _progress(verb: str) -> Iterator[Report]:
    """Show a bar on a terminal, and a line for every tenth of the work elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    console = Console(stderr=True)
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeLeft())
    due = 1

    def say(done: int, total: int) -> None:
        nonlocal due
        if 10 * done >= due * total:
            console.print(f"{verb}: {done} of {total}")
            due = 10 * done // total + 1

    if not console.is_terminal:
        yield say
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(verb)
        yield lambda done, total: progress.update(task, completed=done, total=total)
