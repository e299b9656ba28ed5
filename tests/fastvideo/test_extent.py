"""Files cut anywhere are told from whole ones by their own structure, in every container."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from odd_videos import truncated, write
from PIL import Image

from fastvideo import footage
from fastvideo.extent import least_bytes
from fastvideo.footage import CONTAINERS, UnusableError

COUNT = 12
SHARES = (0.1, 0.3, 0.45, 0.6, 0.7, 0.9, 0.95, 0.97, 0.985, 0.995, 0.999)
CUT_BYTES = (9, 23, 47, 111)  # an AVI may lack 8
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}

# name: (encoder, pixels, options of the container)
KINDS = {
    "plain.mp4": ("libx264", "yuv420p", {}),
    "faststart.mp4": ("libx264", "yuv420p", {"movflags": "faststart"}),
    "fragmented.mp4": ("libx264", "yuv420p", FRAGMENTED),
    "quick.mov": ("libx264", "yuv420p", {}),
    "plain.mkv": ("libx264", "yuv420p", {}),
    "clusters.mkv": ("libx264", "yuv420p", {"cluster_time_limit": "200"}),
    "live.mkv": ("libx264", "yuv420p", {"live": "1"}),
    "plain.webm": ("libvpx-vp9", "yuv420p", {}),
    "live.webm": ("libvpx-vp9", "yuv420p", {"live": "1"}),
    "plain.avi": ("mpeg4", "yuv420p", {}),
    "plain.mpg": ("mpeg2video", "yuv420p", {}),
    "first.mpeg": ("mpeg1video", "yuv420p", {}),
    "plain.ts": ("libx264", "yuv420p", {}),
    "disc.ts": ("libx264", "yuv420p", {"mpegts_m2ts_mode": "1"}),
    "plain.flv": ("libx264", "yuv420p", {}),
    "plain.wmv": ("wmv2", "yuv420p", {}),
    "plain.ogv": ("libvpx", "yuv420p", {}),
    "plain.gif": ("gif", "rgb8", {}),
    "plain.swf": ("flv", "yuv420p", {}),
    "plain.rm": ("rv10", "yuv420p", {}),
    "plain.mxf": ("mpeg2video", "yuv420p", {}),
    "plain.ivf": ("libvpx-vp9", "yuv420p", {}),
}


def noise(index: int, shape: tuple[int, int] = (32, 48)) -> np.ndarray:
    drawn = np.random.default_rng(index).integers(0, 60, (*shape, 3))
    return drawn.astype(np.uint8) + np.uint8(3 * index)


def streamed(path: Path, codec: str, container: str) -> Path:
    """Write a video to a place that cannot be sought, such as a pipe."""

    class Pipe:
        def __init__(self) -> None:
            self.data = b""

        def write(self, data: bytes) -> int:
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with av.open(pipe, "w", format=container) as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(COUNT):
            frame = av.VideoFrame.from_ndarray(noise(i), "rgb24")
            frame.pts = i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    path.write_bytes(pipe.data)
    return path


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wholes")
    return {
        name: write(
            folder / name,
            codec,
            pixels,
            picture=partial(noise, shape=(96, 128)) if codec == "rv10" else noise,
            count=COUNT,
            fps=25,
            container=options,
        )
        for name, (codec, pixels, options) in KINDS.items()
    }


def need(path: Path) -> int:
    return least_bytes(path, CONTAINERS[path.suffix])


def test_every_container_is_swept():
    swept = {CONTAINERS[Path(name).suffix] for name in KINDS}
    assert swept == set(CONTAINERS.values()) - {"mpegvideo", "dv"}  # bare streams


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_file_has_all_the_bytes_that_it_asks_for(wholes, name):
    path = wholes[name]
    assert footage.probe(path, decode=True).num_frames == COUNT
    assert need(path) == path.stat().st_size - 8 * (path.suffix == ".avi")


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_cut_anywhere_is_refused(wholes, tmp_path, name):
    whole = wholes[name]
    size, cut = whole.stat().st_size, tmp_path / f"cut{whole.suffix}"
    passed = []
    for kept in sorted({int(size * share) for share in SHARES} | {size - n for n in CUT_BYTES}):
        truncated(whole, cut, (kept + 0.5) / size)
        assert cut.stat().st_size == kept
        try:
            passed.append((kept, footage.probe(cut).num_frames))
        except UnusableError as error:
            assert "\n" not in str(error)
    assert not passed


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.webm", "libvpx-vp9", "webm"),
        ("a.mkv", "libx264", "matroska"),
        ("a.avi", "mpeg4", "avi"),
        ("a.flv", "flv", "flv"),
        ("a.wmv", "wmv2", "asf"),
        ("a.ogv", "libvpx", "ogg"),
    ],
)
def test_what_was_streamed_and_never_closed_is_sound(tmp_path, name, codec, container):
    path = streamed(tmp_path / name, codec, container)
    assert footage.probe(path, decode=True).num_frames == COUNT


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.mov", "a.wmv"])
def test_frames_at_a_variable_rate_and_out_of_order_are_sound(tmp_path, name):
    codec = {".webm": "libvpx-vp9", ".wmv": "wmv2"}.get(Path(name).suffix, "libx264")
    options = {"bf": "3"} if codec == "libx264" else {}
    times = [0, 40, 80, 500, 520, 900, 1400, 1450]
    path = write(tmp_path / name, codec, times_ms=times, count=len(times), options=options)
    facts = footage.probe(path, decode=True)
    assert facts.num_frames == len(times) and facts.is_variable


@pytest.mark.parametrize("name", ["a.wmv", "a.mkv", "a.mp4"])
def test_sound_that_is_longer_than_the_picture_is_no_cut(tmp_path, name):
    codec = "wmv2" if name == "a.wmv" else "libx264"
    path = write(tmp_path / name, codec, count=4, fps=25, audio=True)  # 0.16 s and 0.5 s
    assert footage.probe(path).num_frames == 4


def test_gifs_by_others_are_sound_and_what_follows_their_end_does_not_matter(tmp_path):
    pictures = [Image.fromarray(noise(i)) for i in range(5)]
    path, options = tmp_path / "a.gif", {"duration": [20, 500, 70, 70, 90], "comment": b"by; hand"}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)
    size = path.stat().st_size
    assert need(path) == size and footage.probe(path).num_frames == 5
    for more in (bytes(100), b"\n"):
        path.write_bytes(path.read_bytes()[:size] + more)
        assert need(path) == size and footage.probe(path, decode=True).num_frames == 5
    path.write_bytes(path.read_bytes()[: size - 1])
    with pytest.raises(UnusableError, match=f"truncated: {size - 1:,} of at least {size:,} bytes"):
        footage.probe(path)


@pytest.mark.parametrize("name", [n for n in KINDS if not n.endswith((".gif", ".ts"))])
def test_bytes_behind_the_end_ask_for_nothing(wholes, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(wholes[name].read_bytes() + bytes(500))
    assert need(path) <= path.stat().st_size


@pytest.mark.parametrize("container", sorted(set(CONTAINERS.values())))
def test_bytes_without_a_structure_end_the_walk(tmp_path, container):
    for seed in range(20):
        path = tmp_path / "noise"
        path.write_bytes(np.random.default_rng(seed).bytes(seed + 1))
        assert least_bytes(path, container) >= 0
    path.write_bytes(bytes(4000))
    assert container == "gif" or least_bytes(path, container) <= 4000
