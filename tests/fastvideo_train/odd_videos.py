"""Small real videos, plain and odd: each frame is told by its grey level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

STEP = 12  # grey levels from one frame to the next
SIZE = (48, 32)

# Primaries, extremes, greys, and what is neither.
COLOURS = np.array(
    [
        *[(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255), (128, 128, 128)],
        *[(200, 60, 20), (20, 60, 200), (16, 235, 90), (250, 5, 130)],
    ],
    np.uint8,
)
# Shares of red and blue in luma, by matrix of ITU-T H.273: BT.709, BT.601, BT.2020.
LUMA = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}

Picture = Callable[[int], np.ndarray]


def grey(index: int) -> np.ndarray:
    return np.full((SIZE[1], SIZE[0], 3), STEP * index, np.uint8)


def levels(frames: np.ndarray) -> list[int]:
    """Read back the indices of grey frames."""
    return [round(float(frame.mean()) / STEP) for frame in frames]


def write(
    path: Path,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    *,
    count: int = 16,
    fps: int = 16,
    times_ms: Sequence[int] | None = None,
    picture: Picture = grey,
    matrix: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    aspect: Fraction | None = None,
    audio: bool = False,
    format: str | None = None,
    tags: dict[str, str] | None = None,
) -> Path:
    """Write a video; `times_ms` shows frames at those times, `matrix` turns it when it is shown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=format, options=container or {}) as file:
        file.metadata.update(tags or {})
        stream: Any = file.add_stream(codec, rate=fps, options=options or {})
        first = picture(0)
        stream.width, stream.height, stream.pix_fmt = first.shape[1], first.shape[0], pixels
        if times_ms is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix is not None:
            a, b, c, d = (65536 * value for value in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        sound: Any = file.add_stream("aac", rate=16000, layout="mono") if audio else None
        for i in range(count):
            array = picture(i)
            frame = av.VideoFrame.from_ndarray(array, "rgba" if array.shape[2] == 4 else "rgb24")
            frame.pts = i if times_ms is None else times_ms[i]
            if times_ms is not None:
                frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if sound is not None:
            _silence(file, sound)
    return path


def flat(shape: tuple[int, int]) -> np.ndarray:
    """Return a clip (T H W 3) of which each frame is one of `COLOURS`."""
    return np.broadcast_to(COLOURS[:, None, None], (len(COLOURS), *shape, 3))


def write_flat(
    path: Path, codec: str, pixels: str, size: tuple[int, int], matrix: int, *, tag: int, full: bool
) -> Path:
    """Write `COLOURS` as YUV by the standard's own formulas; `tag` is the matrix that it names."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=16, options={"crf": "2"})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.colorspace = tag
        stream.codec_context.color_range = 1 + full
        for colour in COLOURS:
            frame = av.VideoFrame(*size, pixels)
            frame.colorspace, frame.color_range = tag, 1 + full
            for plane, value in zip(frame.planes, [*_yuv(colour, matrix, full), 255], strict=False):
                plane.update(bytes([value]) * plane.buffer_size)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def _yuv(colour: np.ndarray, matrix: int, full: bool) -> list[int]:
    (red, blue), (r, g, b) = LUMA[matrix], colour / 255
    luma = red * r + (1 - red - blue) * g + blue * b
    lift, scale, swing = (0, 255, 255) if full else (16, 219, 224)
    chroma = [(b - luma) / (1 - blue) / 2, (r - luma) / (1 - red) / 2]
    return [round(lift + scale * luma), *(min(255, round(128 + swing * c)) for c in chroma)]


def write_sound(path: Path) -> Path:
    """Write a file with an audio track alone."""
    with av.open(str(path), "w") as file:
        _silence(file, file.add_stream("aac", rate=16000, layout="mono"))
    return path


def truncated(source: Path, path: Path, share: float) -> Path:
    """Write the first part of a file."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def _silence(file: Any, stream: Any) -> None:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", layout="mono")
    frame.sample_rate = 16000
    file.mux(stream.encode(frame))
    file.mux(stream.encode())


def captioned(path: Path, caption: str) -> Path:
    """Put a caption beside a video."""
    path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return path
