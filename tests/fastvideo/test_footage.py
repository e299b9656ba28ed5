"""Videos of others: seen upright and in time, or refused with a reason; real files throughout."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_videos import (
    COLOURS,
    SIZE,
    Picture,
    flat,
    levels,
    truncated,
    write,
    write_flat,
    write_sound,
)
from PIL import Image

from fastvideo import footage, media
from fastvideo.footage import UnusableError, View

WHOLE = View(SIZE, 0, 0, *SIZE)


def read(path: Path, *, fps: float = 16, count: int = 16, view: View = WHOLE) -> np.ndarray:
    return footage.read(path, fps=fps, num_frames=count, view=view)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9")]
)
def test_at_its_own_rate_a_video_gives_each_frame_once(tmp_path, name, codec):
    path = write(tmp_path / name, codec)
    facts = footage.probe(path, decode=True)
    assert (facts.width, facts.height, facts.num_frames) == (48, 32, 16)
    assert not (facts.is_variable or facts.is_turned or facts.has_alpha or facts.has_audio)
    assert footage.num_frames_at(facts.duration_s, 16) == 16
    assert levels(read(path)) == list(range(16))


@pytest.mark.parametrize("fps", [4, 8])
def test_a_lower_rate_takes_frames_at_even_times(tmp_path, fps):
    path = write(tmp_path / "a.webm", "libvpx-vp9")  # its times are rounded to milliseconds
    count = footage.num_frames_at(footage.probe(path).duration_s, fps)
    assert levels(read(path, fps=fps, count=count)) == list(range(0, 16, 16 // fps))


def test_a_higher_rate_repeats_frames(tmp_path):
    path = write(tmp_path / "a.mp4", count=4)
    assert levels(read(path, fps=32, count=8)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_frames_at_a_variable_rate_are_those_on_screen_at_their_times(tmp_path):
    times = [0, 40, 80, 500, 520, 900, 1400, 1450]
    path = write(tmp_path / "a.mp4", times_ms=times, count=len(times))
    facts = footage.probe(path)
    assert facts.is_variable
    count = footage.num_frames_at(facts.duration_s, 8)
    shown = [max(i for i, t in enumerate(times) if t <= 125 * k) for k in range(count)]
    assert levels(read(path, fps=8, count=count)) == shown
    assert count >= 12 and shown[2:4] == [2, 2]


def corner(index: int) -> np.ndarray:
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:8, :16] = (255, 0, 0)
    picture[-8:, :16] = (0, 255, 0)
    return picture


ORIENTATIONS = {
    (1, 0, 0, 1): lambda x: x,
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),  # a phone held upright
    (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, -1, 1, 0): lambda x: np.rot90(x, 1),
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (0, 1, 1, 0): lambda x: x.swapaxes(0, 1),
    (0, -1, -1, 0): lambda x: np.rot90(x, 2).swapaxes(0, 1),
}


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_a_turned_video_is_upright_whatever_its_display_matrix(tmp_path, matrix):
    path = write(tmp_path / "a.mov", "png", "rgb24", picture=corner, matrix=matrix, count=2)
    expected = ORIENTATIONS[matrix](corner(0))
    height, width = expected.shape[:2]
    facts = footage.probe(path)
    assert (facts.width, facts.height) == (width, height)
    assert facts.is_turned == (matrix != (1, 0, 0, 1))
    seen = read(path, count=1, view=View((width, height), 0, 0, width, height))
    assert np.array_equal(seen[0], expected)


def test_a_slanted_display_matrix_is_refused(tmp_path):
    path = write(tmp_path / "a.mov", "png", "rgb24", matrix=(1, 1, -1, 1), count=2)
    with pytest.raises(UnusableError, match="no multiple of 90"):
        footage.probe(path)


def see_through(index: int) -> np.ndarray:
    picture = np.zeros((32, 48, 4), np.uint8)
    picture[:, :24] = (200, 100, 50, 128)
    picture[:, 24:] = (200, 100, 50, 0)
    return picture


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "tolerance"),
    [
        ("a.mov", "qtrle", "argb", 0),
        ("a.mov", "png", "rgba", 0),
        ("a.webm", "libvpx-vp9", "yuva420p", 6),
    ],
)
def test_what_is_transparent_is_laid_over_black(tmp_path, name, codec, pixels, tolerance):
    path = write(tmp_path / name, codec, pixels, picture=see_through, count=2)
    assert footage.probe(path).has_alpha
    seen = read(path, count=1)[0].astype(int)
    assert np.abs(seen[:, 2:20] - [100, 50, 25]).max() <= tolerance
    assert seen[:, 28:46].max() <= tolerance


@pytest.mark.parametrize(("transfer", "name"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
def test_hdr_is_refused_by_name(tmp_path, transfer, name):
    options = {"x264-params": f"transfer={transfer}:colorprim=bt2020:colormatrix=bt2020nc"}
    path = write(tmp_path / "a.mp4", options=options, count=2)
    with pytest.raises(UnusableError, match=f"HDR .{name}. is not converted"):
        footage.probe(path)


def test_wide_pixels_become_square_ones(tmp_path):
    path = write(tmp_path / "a.mp4", aspect=Fraction(2), count=2)
    facts = footage.probe(path)
    assert (facts.width, facts.height) == (96, 32)
    assert read(path, count=1, view=View((96, 32), 8, 0, 80, 32)).shape == (1, 32, 80, 3)


def test_a_view_scales_and_then_cuts(tmp_path):
    path = write(tmp_path / "a.mov", "png", "rgb24", picture=corner, count=1)
    seen = read(path, count=1, view=View((96, 64), 0, 48, 16, 16))[0]  # the green corner, doubled
    assert np.abs(seen[4:].astype(int) - [0, 255, 0]).max() <= 8


HD, SD = (1280, 720), (96, 64)


@pytest.mark.parametrize(
    ("codec", "pixels", "size", "matrix", "tag", "full"),
    [
        ("libx264", "yuv420p", SD, 1, 1, False),
        ("libx264", "yuv420p", HD, 6, 6, False),
        ("libx264", "yuv444p", SD, 9, 9, False),
        ("libx264", "yuv420p", HD, 1, 1, True),
        ("libx264", "yuvj420p", SD, 6, 6, True),
        ("libx264", "yuvj420p", HD, 1, 2, True),  # from here on without a tag that tells a matrix
        ("libx264", "yuv420p", SD, 6, 2, False),
        ("libx264", "yuv420p", HD, 1, 2, False),
        ("libx264", "yuv420p", HD, 1, 0, False),
        ("libvpx-vp9", "yuva420p", HD, 1, 2, False),
    ],
)
def test_colours_are_those_of_the_tags_or_of_the_size_s_convention(
    tmp_path, codec, pixels, size, matrix, tag, full
):
    name = "a.mp4" if codec == "libx264" else "a.webm"
    path = write_flat(tmp_path / name, codec, pixels, size, matrix, tag=tag, full=full)
    seen = read(path, count=len(COLOURS), view=View(size, 0, 0, 16, 16))
    error = seen - flat((16, 16)).astype(int)
    assert np.abs(error).max() <= 2
    assert np.abs(error.mean((0, 1, 2))).max() < 0.6  # neither darker nor tinted


def test_matrices_that_are_not_converted_are_refused_with_those_that_are(tmp_path):
    path = write_flat(tmp_path / "a.mp4", "libx264", "yuv420p", SD, 1, tag=8, full=False)
    with pytest.raises(UnusableError, match=r"colour matrix 8; supported: BT\.709, .*BT\.2020$"):
        footage.probe(path)


def test_sound_is_ignored(tmp_path):
    path = write(tmp_path / "a.mp4", audio=True)
    assert footage.probe(path).has_audio and levels(read(path)) == list(range(16))


def test_files_that_are_no_videos_are_refused_with_their_reason(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello " * 100)
    Image.new("RGB", SIZE).save(tmp_path / "picture.png")
    (tmp_path / "picture.png").rename(tmp_path / "picture.mp4")
    write(tmp_path / "other.webm", "libvpx-vp9").rename(tmp_path / "other.mp4")
    write_sound(tmp_path / "sound.mp4")
    (tmp_path / "folder.mp4").mkdir()
    codec = write(tmp_path / "codec.webm", "libvpx-vp9")
    codec.write_bytes(codec.read_bytes().replace(b"V_VP9", b"V_VP0"))
    reasons = {}
    for path in tmp_path.iterdir():
        with pytest.raises(UnusableError) as caught:
            footage.probe(path)
        reasons[path.stem] = str(caught.value)
        assert "\n" not in reasons[path.stem]
    assert reasons == {
        "empty": "is empty: zero bytes",
        "text": "cannot be read: truncated, or not a video",
        "picture": "wrong extension: .mp4 holds png_pipe",
        "other": "wrong extension: .mp4 holds matroska",
        "sound": "has no video track",
        "folder": "cannot be read: Is a directory",
        "codec": "unknown codec: there is no decoder for it",
    }


# What changes inside a file


def joined(path: Path, codec: str, pictures: Sequence[Picture], count: int = 6) -> Path:
    """Write a stream made by one encoder after another."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=16)
        for part, picture in enumerate(pictures):
            first = picture(0)
            encoder = av.CodecContext.create(codec, "w") if part else stream.codec_context
            encoder.width, encoder.height = first.shape[1], first.shape[0]
            encoder.pix_fmt, encoder.time_base, encoder.framerate = "yuv420p", Fraction(1, 16), 16
            encoder.max_b_frames = 0
            frames = [av.VideoFrame.from_ndarray(picture(i), "rgb24") for i in range(count)]
            for i, frame in enumerate(frames):
                frame.pts, frame.time_base = part * count + i, Fraction(1, 16)
            for packet in [p for frame in [*frames, None] for p in encoder.encode(frame)]:
                packet.stream, packet.time_base = stream, Fraction(1, 16)
                file.mux(packet)
    return path


def of_size(width: int, height: int) -> Picture:
    return lambda index: np.full((height, width, 3), 12 * index, np.uint8)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.webm", "libvpx-vp9"), ("a.webm", "libvpx"), ("a.mkv", "libx264"), ("a.mp4", "mpeg4")],
)
@pytest.mark.parametrize("size", [(64, 64), (32, 48), (96, 64)])
def test_a_frame_size_that_changes_is_refused_by_name_and_stretches_no_frame(
    tmp_path, name, codec, size
):
    path = joined(tmp_path / name, codec, [of_size(48, 32), of_size(*size)])
    reason = f"frame size changes: 48x32 to {size[0]}x{size[1]} at 0.3[78] s"
    with pytest.raises(UnusableError, match=reason):
        footage.probe(path, decode=True)
    with pytest.raises(UnusableError, match=reason):
        read(path, count=8)
    assert levels(read(path, count=5)) == list(range(5))  # which do not reach the change


@pytest.mark.parametrize("suffix", [".ts", ".mpg"])
def test_files_that_were_joined_are_refused_by_what_differs_or_by_their_times(tmp_path, suffix):
    codec = "libx264" if suffix == ".ts" else "mpeg1video"
    pictures = {"a": of_size(48, 32), "b": of_size(64, 32)}
    parts = {
        name: write(tmp_path / f"{name}{suffix}", codec, fps=25, picture=picture).read_bytes()
        for name, picture in pictures.items()
    }
    (tmp_path / f"ab{suffix}").write_bytes(parts["a"] + parts["b"])
    (tmp_path / f"aa{suffix}").write_bytes(parts["a"] * 2)
    with pytest.raises(UnusableError, match="frame size changes: 48x32 to 64x32"):
        footage.probe(tmp_path / f"ab{suffix}", decode=True)
    with pytest.raises(
        UnusableError, match=r"parts of its stream are lost|times start again after"
    ):
        footage.probe(tmp_path / f"aa{suffix}", decode=True)


def combed(index: int) -> np.ndarray:
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[0::2, 8 + 2 * index :] = picture[1::2, 16 + 2 * index :] = 255
    return picture


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.vob", "mpeg2video", "yuv420p"),
        ("a.mov", "prores_ks", "yuv422p10le"),
        ("a.avi", "mpeg4", "yuv420p"),
    ],
)
def test_interlaced_frames_are_refused_by_name(tmp_path, name, codec, pixels):
    options = {"flags": "+ildct+ilme"} | ({"x264-params": "tff=1"} if codec == "libx264" else {})
    path = write(tmp_path / name, codec, pixels, fps=25, picture=combed, options=options, count=6)
    for look in (footage.probe, lambda path: read(path, count=2)):
        with pytest.raises(UnusableError, match=r"interlaced: at \d\.\d\d s; deinterlace it"):
            look(path)


@pytest.mark.parametrize("suffix", footage.CONTAINERS)
def test_every_container_that_is_listed_gives_each_frame_once(tmp_path, suffix):
    codecs = {"webm": "libvpx-vp9", "avi": "mpeg4", "mpegvideo": "mpeg1video", "ogg": "libvpx"}
    codecs |= {"mpeg": "mpeg2video", "asf": "wmv2", "flv": "flv", "swf": "flv", "rm": "rv10"}
    codecs |= {"mxf": "mpeg2video", "ivf": "libvpx-vp9", "gif": "gif"}
    container = footage.CONTAINERS[suffix]
    if container == "dv":
        pytest.skip("DV is interlaced")
    size = {"rm": (176, 144)}.get(container, SIZE)
    muxer = {".m1v": "mpeg1video", ".m2v": "mpeg2video", ".vob": "vob"}.get(suffix, container)
    path = write(
        tmp_path / f"a{suffix.upper()}",
        "mpeg2video" if suffix == ".m2v" else codecs.get(container, "libx264"),
        "rgb8" if suffix == ".gif" else "yuv420p",
        fps=25,
        picture=of_size(*size),
        format=muxer,
    )
    facts = footage.probe(path, decode=True)
    assert footage.num_frames_at(facts.duration_s, 25) == facts.num_frames == 16
    assert levels(read(path, fps=25)) == list(range(16))


def test_tags_that_are_not_utf8_make_no_video_unusable(tmp_path):
    path = write(tmp_path / "a.mp4", tags={"title": "cafe", "comment": "cafe"})
    path.write_bytes(path.read_bytes().replace(b"cafe", b"caf\xe9"))
    assert levels(read(path)) == list(range(16)) and footage.probe(path).num_frames == 16
    assert media.read_facts(path).num_frames == 16
    assert media.read_metadata(path)["title"] == "caf\ufffd"


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mp4", "libx264", {"movflags": "faststart"}),
        ("a.mp4", "libx264", {}),
        ("a.avi", "mpeg4", {}),
        ("a.webm", "libvpx-vp9", {}),
    ],
)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused_without_decoding_it(tmp_path, name, codec, container, share):
    whole = write(tmp_path / name, codec, container=container)
    reasons = r"truncated|holds no frame|cannot be read|no video track"
    with pytest.raises(UnusableError, match=reasons):
        footage.probe(truncated(whole, tmp_path / f"cut{whole.suffix}", share))


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("wholes")
    return [
        write(folder / "a.mp4", container={"movflags": "faststart"}, count=6),
        write(folder / "b.avi", "mpeg4", count=6),
        write(folder / "c.webm", "libvpx-vp9", count=6),
    ]


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_is_cut_or_flipped_gives_frames_or_a_reason_and_never_a_crash(
    wholes, tmp_path, data
):
    whole = data.draw(st.sampled_from(wholes))
    raw = bytearray(whole.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=4)):
        raw[place] ^= data.draw(st.integers(1, 255))
    del raw[data.draw(st.integers(len(raw) // 4, len(raw))) :]
    path = tmp_path / f"damaged{whole.suffix}"
    path.write_bytes(raw)
    try:
        facts = footage.probe(path, decode=True)
        count = min(4, footage.num_frames_at(facts.duration_s, 16))
        assert read(path, count=count).shape == (count, 32, 48, 3)
    except UnusableError as error:
        assert str(error) and "\n" not in str(error)
