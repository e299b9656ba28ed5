"""Video and image files: exact sizes, atomic writes, and a recipe that travels inside the file.

Frames are uint8 RGB, one frame H W 3 or a chunk T H W 3; files are H.264 yuv420p in mp4. Everything
goes through imageio's PyAV plugin, which keeps the size asked for (its ffmpeg plugin rescales).

Colours are tagged in stream and container, at every size alike: the matrix of BT.601, primaries and
transfer of BT.709, limited range. BT.601's matrix because readers that ignore tags assume it (PyAV
below 17), and because browsers without a GPU show BT.709's pure blue as 243. BT.709's primaries
because browsers with a GPU convert BT.601's, which moves colours by up to 70. Readers that ignore
tags and guess by the size are wrong from 720 lines on, as they were without tags.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from fastvideo import files

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Frames = npt.NDArray[np.uint8]

VIDEO_SUFFIXES = (".mp4",)
# Without use_metadata_tags the muxer drops every key that it does not know, without a word.
MOVFLAGS = {"movflags": "use_metadata_tags+faststart"}
# 17 is visually lossless for x264; the default 23 smears flat colours at small sizes.
X264 = {"crf": "17", "preset": "medium"}
# Code points of ITU-T H.273, and FFmpeg's for a range from 16 to 235.
BT709, BT601, LIMITED = 1, 6, 1
# As a filter, which heeds tags under every PyAV; without full chroma colours are read too dark, by
# 1.2 of 255 on average. Untagged files are BT.601, as our own older ones are at every size.
TO_RGB = [("scale", "flags=accurate_rnd+full_chroma_int+bitexact"), ("format", "rgb24")]


@dataclass(frozen=True)
class VideoFacts:
    """What a file says of its video stream; `duration_s` in seconds."""

    codec: str
    pixel_format: str
    width: int
    height: int
    num_frames: int
    fps: float
    duration_s: float


def write_video(
    path: str | Path,
    frames: Iterable[Frames],
    *,
    fps: float,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write frames (each H W 3 or T H W 3, uint8) as an mp4 that appears whole or not at all.

    Raises `ValueError` for a suffix, size or dtype that cannot be written, `FileExistsError` if the
    file exists and `overwrite` is off, `OSError` for a folder that refuses or a disk that is full.
    """
    path = check_output(path, overwrite=overwrite)
    if fps <= 0:
        raise ValueError(f"fps {fps} must be greater than 0")
    with files.atomic(path, overwrite=overwrite) as partial:
        _encode(partial, _single(frames), fps=fps, metadata=metadata or {})
    return path


def check_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """Return the path if its name is legal and free for `write_video`; raise as it would."""
    path = Path(path)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        legal = ", ".join(VIDEO_SUFFIXES)
        raise ValueError(f"output {str(path)!r} must end in one of: {legal}")
    files.check_free(path, overwrite=overwrite)
    return path


def read_video(path: str | Path) -> tuple[Frames, float]:
    """Return all frames (T H W 3 uint8) and the frames per second of a file."""
    import numpy as np

    with _opened(path) as file:
        frames = list(file.iter(filter_sequence=TO_RGB))
        _require_frames(frames)
        fps = float(file.metadata()["fps"])
    return np.stack(frames), fps


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the container's tags; raise a one-line `ValueError` if the file holds no video."""
    with _opened(path) as file:
        return {str(k): str(v) for k, v in file.container_metadata.items()}


def read_facts(path: str | Path) -> VideoFacts:
    """Return size, length and codec of a file, its frames counted rather than believed."""
    with _opened(path) as file:
        meta: dict[str, Any] = file.metadata()
        shapes = [frame.shape for frame in file.iter()]
        _require_frames(shapes)
    height, width = shapes[0][:2]
    return VideoFacts(
        codec=str(meta["codec"]),
        pixel_format=str(meta["video_format"]),
        width=int(width),
        height=int(height),
        num_frames=len(shapes),
        fps=float(meta["fps"]),
        duration_s=len(shapes) / float(meta["fps"]),
    )


def thumbnail(path: str | Path) -> bytes:
    """Return the first frame of a file as a WebP image."""
    from PIL import Image

    with _opened(path) as file:
        frames = [next(file.iter(filter_sequence=TO_RGB))]
    image = io.BytesIO()
    Image.fromarray(frames[0]).save(image, "WEBP", quality=90)
    return image.getvalue()


def contact_sheet(
    clips: Sequence[Frames],
    *,
    labels: Sequence[str] | None = None,
    num_columns: int = 6,
    gap: int = 4,
) -> Frames:
    """Lay clips (each T H W 3) out as rows of `num_columns` evenly spaced frames; return H W 3."""
    import numpy as np

    if not clips:
        raise ValueError("a contact sheet needs at least one clip")
    if labels is not None and len(labels) != len(clips):
        raise ValueError(f"{len(labels)} labels were given for {len(clips)} clips")
    rows = []
    for index, clip in enumerate(clips):
        picks = np.linspace(0, len(clip) - 1, num_columns).round().astype(int)
        padded = np.pad(clip[picks], ((0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255)
        row = np.concatenate(list(padded), axis=1)
        rows.append(row if labels is None else np.concatenate([_label(labels[index], row), row]))
    width = max(row.shape[1] for row in rows)
    fill = [((0, 0), (0, width - row.shape[1]), (0, 0)) for row in rows]
    return np.concatenate(
        [np.pad(r, f, constant_values=255) for r, f in zip(rows, fill, strict=True)]
    )


def png(image: Frames) -> bytes:
    """Encode one image (H W 3 uint8) as a PNG."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(_checked(image)).save(data, format="PNG")
    return data.getvalue()


def write_png(path: str | Path, image: Frames, *, overwrite: bool = False) -> Path:
    """Write one image (H W 3 uint8) as a PNG that appears whole or not at all."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"image {path} must end in .png")
    data = png(image)
    with files.atomic(path, overwrite=overwrite) as partial:
        partial.write_bytes(data)
    return path


def mosaic(clips: Sequence[Frames], *, num_columns: int = 4, gap: int = 4) -> Frames:
    """Lay clips of one size (each T H W 3) side by side, to be watched at once; return T H W 3."""
    import numpy as np

    if len({clip.shape for clip in clips}) != 1:
        raise ValueError(f"a mosaic needs clips of one size, not {[c.shape for c in clips]}")
    padded = [np.pad(c, ((0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255) for c in clips]
    padded += [np.full_like(padded[0], 255)] * (-len(clips) % num_columns)
    rows = [padded[i : i + num_columns] for i in range(0, len(padded), num_columns)]
    return np.concatenate([np.concatenate(row, axis=2) for row in rows], axis=1)


def write_webp(
    path: str | Path, frames: Frames, *, fps: float, quality: int = 60, overwrite: bool = False
) -> Path:
    """Write frames (T H W 3 uint8) as an animation for web pages, repeated for ever."""
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() != ".webp":
        raise ValueError(f"animation {path} must end in .webp")
    if not len(frames):
        raise ValueError(f"animation {path} needs at least one frame")
    first, *rest = (Image.fromarray(_checked(frame)) for frame in frames)
    ends_ms = [round(1000 * i / fps) for i in range(len(frames) + 1)]  # whole ms, without drift
    with files.atomic(path, overwrite=overwrite) as partial:
        first.save(
            partial,
            format="WEBP",
            save_all=True,
            append_images=rest,
            duration=[end - start for start, end in itertools.pairwise(ends_ms)],
            loop=0,
            quality=quality,
            method=6,
        )
    return path


class _PatientFile(io.FileIO):
    """A file that keeps its first error for later; the muxer would lose it and fail to close."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data) if self.error is None else len(data)
        except OSError as error:
            self.error = error
            return len(data)


def _encode(
    path: Path, frames: Iterator[Frames], *, fps: float, metadata: Mapping[str, str]
) -> None:
    """Encode in a thread: signal handlers run in the main one, and the muxer would lose errors."""
    stop = Event()
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(_write, path, frames, stop, fps=fps, metadata=metadata).result()
        finally:
            stop.set()  # after an interrupt, the thread ends with the frame that it is at


def _write(
    path: Path, frames: Iterator[Frames], stop: Event, *, fps: float, metadata: Mapping[str, str]
) -> None:
    import av

    first = next(frames, None)
    if first is None:
        raise ValueError("there are no frames to write")
    with _PatientFile(path, "w+") as target:
        try:
            _mux(target, first, frames, stop, fps=fps, metadata=metadata)
        except av.FFmpegError as error:
            raise target.error or OSError(error.errno, error.strerror) from error
        if target.error is not None:
            raise target.error


def _mux(
    target: _PatientFile,
    first: Frames,
    frames: Iterator[Frames],
    stop: Event,
    *,
    fps: float,
    metadata: Mapping[str, str],
) -> None:
    import imageio.v3 as iio

    imopen: Any = iio.imopen  # its overloads omit what the plugin passes on to PyAV
    with imopen(target, "w", extension=".mp4", plugin="pyav", options=MOVFLAGS) as file:
        file.container_metadata.update(metadata)
        file.init_video_stream("libx264", fps=float(fps), pixel_format="yuv420p")
        _set_up(file._video_stream)  # the plugin's public face has no encoder options
        file.write_frame(first)
        for frame in frames:
            if frame.shape != first.shape:
                raise ValueError(f"frame {frame.shape} differs from the first {first.shape}")
            if target.error is not None or stop.is_set():
                file._video_stream = None  # else all that waits in the encoder is encoded
                break
            file.write_frame(frame)


def _set_up(stream: Any) -> None:
    """Set quality and colour tags of a new stream; frames become BT.601 by swscale's default."""
    stream.options = X264
    context = stream.codec_context
    context.colorspace, context.color_range = BT601, LIMITED
    context.color_primaries = context.color_trc = BT709


def _single(frames: Iterable[Frames]) -> Iterator[Frames]:
    for item in frames:
        for frame in [item] if item.ndim == 3 else item:
            height, width = _checked(frame).shape[:2]
            if height % 2 or width % 2:
                near = f"{width - width % 2}x{height - height % 2}"
                raise ValueError(
                    f"frame size {width}x{height} cannot be written: H.264 in yuv420p needs even"
                    f" sides; nearest: {near}, {width + width % 2}x{height + height % 2}"
                )
            yield frame


def _checked(image: Frames) -> Frames:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype.name != "uint8":
        raise ValueError(f"a frame must be H W 3 uint8, not {image.shape} {image.dtype.name}")
    return image


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    import av
    import imageio.v3 as iio

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    if what := files.stand_in(path):
        raise ValueError(f"{path} is {what}")
    try:
        imopen: Any = iio.imopen  # as above; tags need not be UTF-8
        with imopen(path, "r", plugin="pyav", metadata_errors="replace") as file:
            stream: Any = file._video_stream
            if stream.codec_context is None:  # which the plugin does not expect
                raise IndexError("there is no decoder for the file's codec")
            yield file
    except (av.FFmpegError, IndexError, StopIteration, ValueError) as error:
        raise ValueError(f"{path} is not a video that can be read: {_reason(error)}") from None
    except OSError as error:  # imageio's InitializationError is one, without an errno
        if error.errno is not None:
            raise
        raise ValueError(f"{path} is not a video that can be read: {_reason(error)}") from None


def _require_frames(found: Sequence[Any]) -> None:
    if not found:  # a whole header before nothing: `_opened` explains it
        raise IndexError("the file has no frames")


def _reason(error: BaseException) -> str:
    known = isinstance(error, OSError) and error.strerror
    return str(known) if known else "it is empty, cut short or another kind of file"


def _label(text: str, row: Frames) -> Frames:
    import numpy as np
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (row.shape[1], 16), "white")
    with suppress(UnicodeEncodeError):  # Pillow's built-in font is Latin only
        ImageDraw.Draw(strip).text((4, 3), text, fill="black")
    return np.asarray(strip)
