"""Videos made by others: what a file holds, and its frames as they are meant to be seen.

Upright, in square pixels, over black where they are transparent, and chosen by their times: frame k
is what is on screen k / fps seconds after the first. Audio is ignored; HDR, interlaced frames, and
frames that change in size or orientation are refused by name. Matrix and range are those of a
file's tags; primaries and SDR transfers are not converted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo import files
from fastvideo.extent import least_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Frames = npt.NDArray[np.uint8]

# FFmpeg's name of a container: the suffixes that promise it.
_SUFFIXES = {
    "mov": (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mj2"),
    "matroska": (".mkv", ".mk3d"),
    "webm": (".webm",),
    "avi": (".avi", ".divx"),
    "mpeg": (".mpg", ".mpeg", ".mpe", ".vob"),
    "mpegvideo": (".m1v", ".m2v"),
    "mpegts": (".ts", ".m2ts", ".mts", ".m2t"),
    "flv": (".flv",),
    "asf": (".wmv", ".asf"),
    "ogg": (".ogv", ".ogm"),
    "gif": (".gif",),
    "rm": (".rm", ".rmvb"),
    "swf": (".swf",),
    "mxf": (".mxf",),
    "dv": (".dv",),
    "ivf": (".ivf",),
}
CONTAINERS = {suffix: name for name, suffixes in _SUFFIXES.items() for suffix in suffixes}
# Code points of ITU-T H.273: transfer characteristics, and matrices from RGB to YUV.
HDR = {16: "PQ", 18: "HLG"}
MATRICES = {1: "BT.709", 4: "FCC", 5: "BT.601", 6: "BT.601", 7: "SMPTE 240M", 9: "BT.2020"}
UNTAGGED = {0, 2, 3}  # RGB itself, unspecified and reserved, none of which says what YUV is
HD_LINES = 720  # from here on untagged colours are BT.709 by convention, below BT.601
# Matroska rounds times to milliseconds: a frame counts as on screen this much before its time.
EARLY_S = Fraction(2, 1000)
RESTART_S = Fraction(1, 4)  # times of decoding may go back by less, where writers rounded them
UNTIMED = "mpegvideo"  # a bare stream: frames at an even rate, whose times FFmpeg guesses
AVI_UNKNOWN = 1 << 30  # what FFmpeg writes for a number of frames that it cannot correct
# A VP8 or VP9 stream hides its alpha in a second stream that only libvpx decodes.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


class UnusableError(ValueError):
    """Why a file is no video that can be used; the text does not name the file."""


@dataclass(frozen=True)
class Footage:
    """What a file says of its video; width and height are those of the upright picture."""

    codec: str
    width: int
    height: int
    duration_s: float
    num_frames: int
    is_variable: bool
    is_turned: bool
    has_alpha: bool
    has_audio: bool

    @property
    def fps(self) -> float:
        """Frames per second, on average."""
        return self.num_frames / self.duration_s


@dataclass(frozen=True)
class View:
    """How an upright picture becomes a frame: scaled to a size, then a box is cut out of it."""

    scaled: tuple[int, int]
    """Width and height."""
    left: int
    top: int
    width: int
    height: int


def probe(path: str | Path, *, decode: bool = False) -> Footage:
    """Read every packet of a file and decode its first frame, or with `decode` every frame.

    Raises `UnusableError` with the reason for whatever cannot be trained on. A file that was cut is
    seen by its index, its structure (`fastvideo.extent` says where that tells nothing) or its
    length, of which the last two frames may be missing.
    """
    path = Path(path)
    with _opened(path) as (container, stream):
        _check_whole(stream, path)
        is_timed = container.format.name != UNTIMED
        packets = [_Packet.of(p, is_timed) for p in container.demux(stream) if p.size]
        times = _times(packets, stream)
        _check_length(packets, times, container, stream)
    with _opened(path) as (container, stream):
        frames = _checked(container, stream)
        first = next(frames, None)
        if first is None:
            raise UnusableError("holds no frame that can be decoded")
        is_transposed, *mirrors = _orientation(first)
        if decode:
            deque(frames, maxlen=0)
        _check_joints(packets, stream)
        width, height = _square(first, stream)
        return Footage(
            codec=stream.codec_context.codec.canonical_name,
            width=height if is_transposed else width,
            height=width if is_transposed else height,
            duration_s=float(times.end - times.starts[0]),
            num_frames=len(times.starts),
            is_variable=times.is_variable,
            is_turned=is_transposed or any(mirrors),
            has_alpha=_has_alpha(first),
            has_audio=bool(container.streams.audio),
        )


def num_frames_at(duration_s: float, fps: float) -> int:
    """Return how many frames a video of this length gives at a rate."""
    spans = (Fraction(duration_s).limit_denominator(1_000_000) - EARLY_S) * Fraction(fps)
    return max(1, -(-spans.numerator // spans.denominator))


def read(path: str | Path, *, fps: float, num_frames: int, view: View) -> Frames:
    """Return the first `num_frames` frames at a constant rate, uint8 (T, H, W, 3).

    Raises `UnusableError` if the file is damaged, or shorter than it says.
    """
    import numpy as np

    out = np.empty((num_frames, view.height, view.width, 3), np.uint8)
    done, start, last = 0, None, None
    with _opened(Path(path)) as (container, stream):
        for frame in _checked(container, stream):
            time = _time(frame, stream)
            start = time if start is None else start
            stop = min(_first_shown(time - start, fps), num_frames)
            if stop > done and last is not None:
                out[done:stop] = _picture(last, stream, view)
                done = stop
            last = frame
            if done == num_frames:
                return out
        if last is None or start is None:
            raise UnusableError("holds no frame that can be decoded")
        end = _time(last, stream) - start + _span(last, stream)
        if num_frames_at(float(end), fps) < num_frames:
            raise UnusableError(f"ends after {float(end):.2f} s, before frame {num_frames}")
        out[done:] = _picture(last, stream, view)
    return out


def _first_shown(time: Fraction, fps: float) -> int:
    """Return the first k for which k / fps is not before a frame's time, 0 for the first frame."""
    k = (time - EARLY_S) * Fraction(fps)
    return max(0, -(-k.numerator // k.denominator))


@dataclass(frozen=True)
class _Packet:
    """What is kept of a packet: the data of all of them may not fit into memory."""

    stamp: int | None
    decoded: int | None
    duration: int
    is_corrupt: bool
    is_discard: bool

    @classmethod
    def of(cls, packet: Any, is_timed: bool) -> _Packet:
        stamp = packet.pts if is_timed and packet.pts is not None else packet.dts
        return cls(stamp, packet.dts, packet.duration or 0, packet.is_corrupt, packet.is_discard)


@dataclass(frozen=True)
class _Times:
    starts: list[Fraction]
    end: Fraction

    @property
    def is_variable(self) -> bool:
        """Tell whether steps differ by more than the rounding of milliseconds."""
        steps: list[Fraction] = [b - a for a, b in zip(self.starts, self.starts[1:], strict=False)]
        steps.sort()
        return bool(steps) and steps[-1] - steps[0] > EARLY_S


def _times(packets: list[_Packet], stream: Any) -> _Times:
    shown = [(p.stamp, p.duration) for p in packets if not p.is_discard]
    if not shown:
        raise UnusableError("holds no frames")
    stamps: list[tuple[int, int]] = sorted((a, b) for a, b in shown if a is not None)
    if len(stamps) < len(shown):
        raise UnusableError("has frames without times")
    base: Fraction = stream.time_base
    starts: list[Fraction] = [stamp * base for stamp, _ in stamps]
    step = (starts[-1] - starts[0]) / (len(starts) - 1) if len(starts) > 1 else Fraction(1, 25)
    return _Times(starts, starts[-1] + (stamps[-1][1] * base or step))


def _check_whole(stream: Any, path: Path) -> None:
    """Refuse a file that ends before its structure does, or the last frame of its index."""
    need = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    need = max(need, least_bytes(path, CONTAINERS[path.suffix.lower()]))
    have = path.stat().st_size
    if need > have:
        raise UnusableError(f"truncated: {have:,} of at least {need:,} bytes")


def _check_length(packets: list[_Packet], times: _Times, container: Any, stream: Any) -> None:
    if packets[-1].is_corrupt:
        raise UnusableError("truncated: its last frame is cut")
    says = _says_s(container, stream)
    has = float(times.end - min(times.starts[0], Fraction(0)))
    if says is not None and says - has > 2.5 * has / len(times.starts):
        raise UnusableError(f"truncated: {has:.2f} of {says:.2f} s")


def _check_joints(packets: list[_Packet], stream: Any) -> None:
    """Refuse recordings in a row, whose times start again, and a stream of which parts are lost."""
    last: int | None = None
    for packet in packets:
        now = packet.decoded
        if now is not None and last is not None and (last - now) * stream.time_base > RESTART_S:
            at = float(last * stream.time_base)
            raise UnusableError(f"joined files: its times start again after {at:.2f} s")
        if packet.is_corrupt:
            raise UnusableError("damaged: parts of its stream are lost")
        last = now if now is not None else last


def _says_s(container: Any, stream: Any) -> float | None:
    """Return how long a file says its video is, None if it does not."""
    if container.format.name == "asf":
        return None  # it says how long the longest of its tracks is
    if container.format.name == "avi":
        is_known = 0 < stream.frames < AVI_UNKNOWN
        return float(stream.frames / stream.average_rate) if is_known else None
    if "DURATION" in stream.metadata:  # Matroska's, as hours:minutes:seconds
        try:
            h, m, s = (float(part) for part in stream.metadata["DURATION"].split(":"))
        except ValueError:
            return None
        return 3600 * h + 60 * m + s
    return float(stream.duration * stream.time_base) if stream.duration else None


def _checked(container: Any, stream: Any) -> Iterator[Any]:
    """Yield frames in the order of showing, all of one shape, or refuse the file by name."""
    legal = ", ".join(dict.fromkeys(MATRICES.values()))
    first = None
    for frame in _decoded(container, stream):
        if frame.is_corrupt:
            raise UnusableError(f"damaged: {_at(frame)}")
        if transfer := HDR.get(frame.color_trc):
            raise UnusableError(f"HDR ({transfer}) is not converted; make an SDR version of it")
        if frame.colorspace not in MATRICES.keys() | UNTAGGED:
            raise UnusableError(f"unsupported colour matrix {frame.colorspace}; supported: {legal}")
        if frame.interlaced_frame:
            raise UnusableError(
                f"interlaced: {_at(frame)}; deinterlace it, as by ffmpeg -i IN -vf bwdif OUT"
            )
        shape = (*_square(frame, stream), *_orientation(frame))
        first = shape if first is None else first
        if shape != first:
            raise UnusableError(
                f"frame size changes: {_named(first)} to {_named(shape)} {_at(frame)}"
            )
        yield frame


def _named(shape: tuple[int, int, bool, bool, bool]) -> str:
    width, height, *orientation = shape
    return f"{width}x{height}" + (" turned" if any(orientation) else "")


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Yield frames in the order of showing; say where decoding failed."""
    import av

    time = 0.0
    try:
        for index, frame in enumerate(_frames(container, stream)):
            if container.format.name == UNTIMED:
                frame.pts, frame.duration = index, 1
                frame.time_base = 1 / Fraction(stream.average_rate)
            time = float(frame.time or 0)
            yield frame
    except av.FFmpegError as error:
        raise UnusableError(f"cannot be decoded: {error.strerror} after {time:.2f} s") from None


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    import av

    name = stream.codec_context.codec.canonical_name
    if stream.metadata.get("alpha_mode") != "1" or name not in ALPHA_DECODERS:
        yield from container.decode(stream)
        return
    context: Any = av.CodecContext.create(ALPHA_DECODERS[name], "r")
    for packet in container.demux(stream):
        yield from context.decode(packet if packet.size else None)


def _picture(frame: Any, stream: Any, view: View) -> Frames:
    """Return a frame as it is seen (H W 3): over black, scaled, upright, cut."""
    import av
    import numpy as np

    is_transposed, flip_x, flip_y = _orientation(frame)
    width, height = reversed(view.scaled) if is_transposed else view.scaled
    if _has_alpha(frame):
        rgba = _rgb(frame, "rgba").to_ndarray().astype(np.uint16)
        over_black = (rgba[..., :3] * rgba[..., 3:] + 127) // 255
        frame = av.VideoFrame.from_ndarray(over_black.astype(np.uint8), format="rgb24")
    rgb = _rgb(frame, "rgb24", width, height).to_ndarray()
    rgb = rgb.swapaxes(0, 1) if is_transposed else rgb
    rgb = rgb[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
    cut: Frames = rgb[view.top : view.top + view.height, view.left : view.left + view.width]
    return cut


def _rgb(frame: Any, pixels: str, width: int | None = None, height: int | None = None) -> Any:
    """Return a frame in RGB, by the matrix and range of its tags, or a size's convention."""
    from av.video.reformatter import Colorspace, Interpolation

    space = None
    if frame.colorspace in UNTAGGED:
        is_hd = min(frame.width, frame.height) >= HD_LINES
        space = Colorspace.ITU709 if is_hd else Colorspace.ITU601
    # bicubic widens when it shrinks; the flags give the same bytes on every machine, and without
    # full chroma colours come out darker than they are, by 1.3 of 255 on average
    exact = Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
    return frame.reformat(
        width=width,
        height=height,
        format=pixels,
        src_colorspace=space,
        interpolation=Interpolation.BICUBIC | exact,
        threads=1,
    )


def _orientation(frame: Any) -> tuple[bool, bool, bool]:
    """Return what makes a frame upright: whether to transpose it, then to flip x, then y.

    A display matrix (a b u, c d v, x y w) sends (x, y) to (a x + c y, b x + d y).
    """
    import numpy as np
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return False, False, False
    a, b, _, c, d = (int(v) for v in np.frombuffer(bytes(data), np.int32)[:5])
    if bool(a) == bool(b) or bool(a) != bool(d) or bool(b) != bool(c):
        raise UnusableError(f"is turned by {frame.rotation} degrees, no multiple of 90")
    is_transposed = a == 0
    return is_transposed, (c if is_transposed else a) < 0, (b if is_transposed else d) < 0


def _square(frame: Any, stream: Any) -> tuple[int, int]:
    """Return width and height of a frame before it is turned, in square pixels."""
    own = stream.codec_context.sample_aspect_ratio  # of the frame decoded last
    ratio = stream.sample_aspect_ratio or own
    return max(1, round(frame.width * (ratio or 1))), frame.height


def _has_alpha(frame: Any) -> bool:
    return any(component.is_alpha for component in frame.format.components)


def _time(frame: Any, stream: Any) -> Fraction:
    stamp = frame.pts if frame.pts is not None else frame.dts
    if stamp is None:
        raise UnusableError("has frames without times")
    time: Fraction = stamp * (frame.time_base or stream.time_base)
    return time


def _span(frame: Any, stream: Any) -> Fraction:
    """Return how long the last frame is shown."""
    if frame.duration:
        span: Fraction = frame.duration * (frame.time_base or stream.time_base)
        return span
    return 1 / Fraction(stream.average_rate or 25)


def _at(frame: Any) -> str:
    return f"at {float(frame.time or 0):.2f} s"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file's first video stream; every reason against it is an `UnusableError`."""
    import av

    promised = CONTAINERS.get(path.suffix.lower())
    if promised is None:
        legal = ", ".join(CONTAINERS)
        raise UnusableError(f"unsupported video container {path.suffix!r}; supported: {legal}")
    try:
        if not path.stat().st_size:
            raise UnusableError("is empty: zero bytes")
        if what := files.stand_in(path):
            raise UnusableError(f"is {what}")
        with av.open(str(path), metadata_errors="replace") as container:
            names = container.format.name.split(",")
            if promised not in names:
                raise UnusableError(f"wrong extension: {path.suffix} holds {names[0]}")
            if not container.streams.video:
                raise UnusableError("has no video track")
            stream: Any = container.streams.video[0]
            if stream.codec_context is None:
                raise UnusableError("unknown codec: there is no decoder for it")
            yield container, stream
    except av.FFmpegError as error:
        reason = "truncated, or not a video" if (error.errno or 0) > 1000 else error.strerror
        raise UnusableError(f"cannot be read: {reason}") from None
    except (IndexError, UnicodeError) as error:
        raise UnusableError(f"cannot be read: {error}") from None
    except OSError as error:
        raise UnusableError(f"cannot be read: {error.strerror}") from None
