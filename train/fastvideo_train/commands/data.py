"""`fastvideo data`: look at a world's clips or a folder of videos, and encode them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastvideo import capacity, files, hub, media, sampling
from fastvideo.errors import OK, refusing
from fastvideo.resolve import check_clip
from fastvideo.shapes import Compression, PixelShape, parse_size
from fastvideo.spec import FILE_NAME, Spec
from fastvideo.worlds import World, open_world, whole_fps
from fastvideo_train.commands import _videos
from fastvideo_train.commands._progress import progress
from fastvideo_train.lock import locked

data = typer.Typer(
    help="Check, look at and encode training data: a folder of videos, or a world.",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
)

WorldName = Annotated[str, typer.Option(help="A world: a file under fastvideo/worlds/.")]
WORLD_SIZE = "128x128"

Size = Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels, such as 224x128.")]
NumFrames = Annotated[int, typer.Option("--frames", min=1, help="Number of frames, 4k+1.")]
Folder = Annotated[Path, typer.Argument(help="A folder of videos with captions.")]
Videos = Annotated[
    Path | None, typer.Argument(help="A folder of videos with captions; else clips of a world.")
]
Captions = Annotated[
    Path | None, typer.Option(help="A jsonl, csv or parquet file; default: found in the folder.")
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--size", help="WIDTHxHEIGHT; of videos the budget of all shapes, or the model's."
    ),
]
Lengths = Annotated[
    str | None, typer.Option("--frames", help="Number of frames, 4k+1; of videos also 17,81.")
]
Rate = Annotated[
    str | None, typer.Option("--fps", help=f"{sampling.FPS.help}. [the model's, or 16]")
]
ModelName = Annotated[str | None, typer.Option(help="A model: its size, length, rate, tokenizer.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="A rule for videos: max_upscale=1.5, min_kept=0.5. Repeatable."),
]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that decode or render ahead.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Seed = Annotated[int, typer.Option(min=0, help="Another seed is another set of clips.")]
Split = Annotated[str, typer.Option(help="train, or heldout: combinations never trained on.")]


@data.command()
def validate(
    videos: Folder,
    captions: Captions = None,
    model: ModelName = None,
    size: Budget = None,
    frames: Lengths = None,
    fps: Rate = None,
    sets: Sets = None,
    workers: Workers = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Read every packet, decode only first frames.")
    ] = False,
    as_json: Json = False,
) -> int:
    """List the files of a folder that cannot be used, and why; exit code 1 if any is bad."""
    asked = _asked(**locals())
    return _videos.validate(asked, quick=quick, as_json=as_json)


@data.command()
def stats(
    videos: Folder,
    captions: Captions = None,
    model: ModelName = None,
    size: Budget = None,
    frames: Lengths = None,
    fps: Rate = None,
    sets: Sets = None,
    workers: Workers = None,
    as_json: Json = False,
) -> int:
    """Print durations, sizes, rates, caption lengths and buckets of a folder of videos."""
    asked = _asked(**locals())
    return _videos.stats(asked, as_json=as_json)


@data.command()
def preview(
    output: Annotated[Path, typer.Option("--output", "-o", help="The .png to write.")],
    videos: Videos = None,
    world: WorldName = "shapes",
    count: Annotated[int, typer.Option(min=1, help="Number of clips, of each bucket.")] = 8,
    captions: Captions = None,
    model: ModelName = None,
    size: Budget = None,
    frames: Lengths = None,
    fps: Rate = None,
    sets: Sets = None,
    workers: Workers = None,
    seed: Seed = 0,
    split: Split = "train",
) -> int:
    """Write a contact sheet of clips with their captions, as training would see them.

    Of a folder of videos one for each bucket; of a world with what the parser read in its clips.
    """
    if videos is not None:
        asked = _asked(**locals())
        return _videos.preview(asked, output, count)
    with refusing():
        _refuse(captions=captions, model=model, sets=sets)
        opened = _open(world, size or WORLD_SIZE, *_length_and_rate(frames, fps))
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
    fps: Rate = None,
    seed: Seed = 0,
    split: Split = "train",
) -> int:
    """Write clips as mp4 files, and captions.jsonl with their captions and truths.

    Files that are there already are kept, so that the same command finishes what a kill left.
    """
    with refusing():
        rate = _rate(fps)
        opened = _open(world, size, frames, rate)
        opened.clip(seed, 0, split)
        output.mkdir(parents=True, exist_ok=True)
        paths = {
            output / f"{index:06d}.mp4": f"{world} {split} seed {seed} index {index},"
            f" {size} x {frames}, {rate} fps"
            for index in range(count)
        }
        for path, clip_id in paths.items():
            if path.exists() and (found := media.read_metadata(path).get("clip")) != clip_id:
                raise ValueError(f"{path} holds {found}, not {clip_id}; use another folder")
    lines = []
    with progress("render") as report:
        for index, (path, clip_id) in enumerate(paths.items()):
            clip = opened.clip(seed, index, split)
            if not path.exists():
                metadata = {"caption": clip.caption, "clip": clip_id}
                media.write_video(path, [clip.frames_THWC], fps=rate, metadata=metadata)
            line = {"file": path.name, "caption": clip.caption, "truth": clip.truth}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            report(index + 1, count)
    files.write_text(output / "captions.jsonl", "".join(lines), overwrite=True)
    print(f"{output}: {count} clips and captions.jsonl")
    return OK


@data.command()
def encode(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    model: Annotated[
        str,
        typer.Option("--model", "--vae", help="A model; for a world a folder with a vae/ will do."),
    ],
    videos: Videos = None,
    world: WorldName = "shapes",
    clips: Annotated[int, typer.Option(min=1, help="Number of a world's clips.")] = 1024,
    captions: Captions = None,
    size: Budget = None,
    frames: Lengths = None,
    fps: Rate = None,
    sets: Sets = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Store its text state beside the captions. Repeatable.")
    ] = None,
    seed: Seed = 0,
    split: Split = "train",
    batch: Annotated[int | None, typer.Option(min=1, help="Clips encoded at once.")] = None,
    shard: Annotated[int, typer.Option(min=1, help="Clips a file; a multiple of batch.")] = 256,
    workers: Workers = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Type to compute in: float32, bfloat16.")] = "bfloat16",
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Four videos and the shortest clips, in OUTPUT-smoke.")
    ] = False,
) -> int:
    """Encode clips into shards of latents, which `data.folder` of a recipe names.

    Of a folder of videos also the text states of their captions. The same command resumes after a
    kill; a larger --clips adds a world's clips to the folder.
    """
    if videos is not None:
        asked = _asked(**locals())
        place: dict[str, Any] = {"device": device, "dtype": dtype, "threads": threads}
        place |= {"shard": shard, "batch": batch or 1}
        return _videos.encode(asked, output, prompts=prompt or [], smoke=smoke, **place)
    with refusing():
        _refuse(captions=captions, sets=sets, prompt=prompt, smoke=smoke)
        num_frames, rate = _length_and_rate(frames, fps)
        width, height = parse_size(size or WORLD_SIZE)
        chosen: dict[str, Any] = {"num_frames": num_frames, "height": height, "width": width}
        clip, spec = PixelShape(num_frames, height, width), _spec(model)
        capacity.check(clip, spec)
        if spec is not None:
            check_clip(clip, spec)
        open_world(world, fps=rate, **chosen).clip(seed, 0, split)
        net = _load_vae(model, clip, device, dtype)
    chosen |= {"seed": seed, "fps": rate, "split": split, "shard_size": shard, "batch": batch or 4}
    return _encode_world(net, world, output, clips, chosen, workers=workers or 0, threads=threads)


def _spec(model: str) -> Spec | None:
    """Return what a model says of itself; None for a folder with a `vae/` alone."""
    has_spec = Path(model, FILE_NAME).is_file() or not Path(model).is_dir()
    return hub.open_spec(model)[0] if has_spec else None


def _load_vae(model: str, clip: PixelShape, device: str, dtype: str) -> Any:
    """Load a VAE; `ValueError` if it cannot encode clips of this size."""
    # here, after what can be refused without torch
    from fastvideo.model import pick_device, pick_dtype
    from fastvideo_train.bundle import load_vae

    place = pick_device(device)
    net = load_vae(model, dtype=pick_dtype(dtype, place)).to(place)
    clip.latent(Compression(net.config.temporal_stride, net.config.spatial_stride, (1, 1, 1)))
    return net


def _encode_world(
    vae: Any,
    world: str,
    output: Path,
    count: int,
    chosen: dict[str, Any],
    *,
    workers: int,
    threads: int | None,
) -> int:
    import torch

    from fastvideo_train.data.latents import encode_world

    if threads:
        torch.set_num_threads(threads)
    with refusing():
        output.mkdir(parents=True, exist_ok=True)
    with locked(output, "encodes into", hint=_videos.HINT), progress("encode") as report:
        manifest = encode_world(
            vae, world, output, num_clips=count, workers=workers, report=report, **chosen
        )
    print(f"{output}: {manifest.count} clips in {manifest.num_shards} shards")
    return OK


def _asked(**typed: Any) -> _videos.Asked:
    """Return the options of a command on videos, among all that were typed."""
    own = {name: typed[name] for name in _videos.Asked.__dataclass_fields__}
    return _videos.Asked(**own)


def _refuse(**given: object) -> None:
    """Refuse options that mean nothing to a world."""
    for name, value in given.items():
        if value:
            word = "set" if name == "sets" else name
            raise ValueError(f"--{word} is for a folder of videos, and none was given")


def _length_and_rate(frames: str | None, fps: str | None) -> tuple[int, int]:
    """Return a world's one length and whole rate."""
    length, *others = _videos.lengths(frames or "81")
    if others or length < 1:
        raise ValueError(f"--frames {frames} must be one number, at least 1, for clips of a world")
    return length, _rate(fps)


def _rate(fps: str | None) -> int:
    """Return a world's frame rate, which is whole."""
    try:
        return whole_fps(16 if fps is None else sampling.read_fps(fps))
    except ValueError as error:
        raise ValueError(f"--fps {fps}: {error}") from None


def _open(world: str, size: str, num_frames: int, fps: int) -> World:
    width, height = parse_size(size)
    return open_world(world, height=height, width=width, num_frames=num_frames, fps=fps)
