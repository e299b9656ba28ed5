"""Video files: exact sizes, tags that survive, and no half or lost file whatever happens."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from odd_videos import flat, write_flat

from fastvideo import footage, media

TAGS = {"comment": json.dumps({"prompt": 'größer "than" {life}; \\n'}), "recipe": "own key"}


def clip(frames: int = 9, height: int = 34, width: int = 90) -> np.ndarray:
    """Return a smooth moving gradient, which H.264 keeps nearly as it is."""
    t, y, x = np.mgrid[:frames, :height, :width]
    return np.stack([x * 2 + t, y * 5, 128 + 0 * x], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return media.write_video(tmp_path / "a.mp4", clip(), fps=16, metadata=TAGS)


def test_size_length_and_rate_come_back_exactly(written: Path):
    facts = media.read_facts(written)
    assert (facts.width, facts.height, facts.num_frames, facts.fps) == (90, 34, 9, 16.0)
    assert (facts.codec, facts.pixel_format) == ("h264", "yuv420p")
    assert facts.duration_s == pytest.approx(9 / 16)


def test_frames_come_back_close_to_what_was_written(written: Path):
    frames, fps = media.read_video(written)
    assert (frames.dtype, frames.shape, fps) == (np.uint8, (9, 34, 90, 3), 16.0)
    assert np.abs(frames.astype(int) - clip().astype(int)).mean() < 4


@pytest.mark.parametrize(
    ("shape", "step"),
    [((32, 48), 1), ((34, 90), 1), ((480, 854), 2), ((1280, 720), 4), ((1080, 1920), 4)],
)
def test_colours_come_back_in_every_reader(tmp_path: Path, shape: tuple, step: int):
    shown = flat(shape)[::step]
    path = media.write_video(tmp_path / "a.mp4", shown, fps=16)
    view = footage.View(shape[::-1], 0, 0, *shape[::-1])
    with av.open(str(path)) as file:
        plain = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    for frames, most in [
        (media.read_video(path)[0], 2),
        (footage.read(path, fps=16, num_frames=len(shown), view=view), 2),
        (np.stack(plain), 3),
    ]:
        assert np.abs(frames - shown.astype(np.int16)).max() <= most


@pytest.mark.parametrize("shape", [(34, 90), (720, 1280)])
def test_colours_are_tagged_in_the_container_and_in_the_stream(tmp_path: Path, shape: tuple):
    path = media.write_video(tmp_path / "a.mp4", flat(shape)[:1], fps=16)
    data = path.read_bytes()
    assert b"colrnclx" + struct.pack(">HHHB", 1, 1, 6, 0) in data  # as in ITU-T H.273
    path.write_bytes(data.replace(b"colrnclx", b"freenclx"))  # what the stream itself says is left
    with av.open(str(path)) as file:
        said = file.streams.video[0].codec_context
        assert (said.color_primaries, said.color_trc) == (1, 1)
        assert (said.colorspace, said.color_range) == (6, 1)


@pytest.mark.parametrize(("tag", "full"), [(1, False), (6, True), (2, False)])
def test_files_of_others_are_read_by_their_tags(tmp_path: Path, tag: int, full: bool):
    matrix = 6 if tag == 2 else tag  # untagged as our own older files
    size = (1280, 720) if tag == 2 else (96, 64)
    path = tmp_path / "a.mp4"
    write_flat(path, "libx264", "yuv420p", size, matrix, tag=tag, full=full)
    error = media.read_video(path)[0] - flat(size[::-1]).astype(int)
    assert np.abs(error).max() <= 2
    assert np.abs(error.mean((0, 1, 2))).max() < 0.6


def test_tags_come_back_word_for_word(written: Path):
    tags = media.read_metadata(written)
    assert {key: tags[key] for key in TAGS} == TAGS


def test_the_index_comes_first_so_that_players_start_at_once(written: Path):
    data = written.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_single_frames_and_chunks_make_the_same_file(tmp_path: Path, monkeypatch):
    # lossless, as x264 writes other bytes of the same frames now and then, with one thread too
    monkeypatch.setattr(media, "X264", {"qp": "0"})
    frames = clip()
    parts = {"whole": [frames], "mixed": [frames[0], frames[1:4], frames[4:]]}
    whole, mixed = (
        media.write_video(tmp_path / f"{name}.mp4", iter(given), fps=16, metadata=TAGS)
        for name, given in parts.items()
    )
    assert np.array_equal(media.read_video(mixed)[0], media.read_video(whole)[0])
    assert media.read_facts(mixed) == media.read_facts(whole)
    assert media.read_metadata(mixed) == media.read_metadata(whole)


def test_a_file_that_exists_is_never_overwritten_unless_asked(written: Path):
    before = written.read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        media.write_video(written, clip(5), fps=16)
    assert written.read_bytes() == before
    media.write_video(written, clip(5), fps=16, overwrite=True)
    assert media.read_facts(written).num_frames == 5


def test_a_name_that_is_taken_while_writing_is_not_overwritten(tmp_path: Path):
    path = tmp_path / "a.mp4"

    def frames():
        yield clip()
        path.write_text("mine")

    with pytest.raises(FileExistsError):
        media.write_video(path, frames(), fps=16)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: BaseException):
    def frames():
        yield clip()
        raise error

    with pytest.raises(type(error)):
        media.write_video(tmp_path / "a.mp4", frames(), fps=16)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path):
    script = (
        "import resource, signal, sys, numpy as np\n"
        "from fastvideo import media\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8)\n"
        "try:\n    media.write_video(sys.argv[1], noise, fps=16)\n"
        "except OSError as error:\n    print(error.errno, error.filename, error.strerror)\n"
    )
    path = tmp_path / "a.mp4"
    run = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"27 {path} File too large\n"
    assert run.stderr == ""
    assert list(tmp_path.iterdir()) == []
    assert signal.SIGXFSZ


@pytest.mark.parametrize(("height", "width"), [(33, 90), (34, 91), (33, 91)])
def test_odd_sizes_are_refused_with_the_nearest_even_ones(tmp_path: Path, height: int, width: int):
    with pytest.raises(ValueError, match=r"needs even sides; nearest: 90x\d+, 9[02]x34"):
        media.write_video(tmp_path / "a.mp4", clip(2, height, width), fps=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([], "no frames"),
        ([clip().astype(np.float32)], "uint8, not"),
        ([clip()[..., :1]], "must be H W 3"),
        ([clip(), clip(width=92)], "differs from the first"),
    ],
)
def test_frames_that_cannot_be_written_are_refused(tmp_path: Path, frames: list, text: str):
    with pytest.raises(ValueError, match=text):
        media.write_video(tmp_path / "a.mp4", frames, fps=16)
    assert list(tmp_path.iterdir()) == []


def test_other_suffixes_are_refused_with_the_legal_ones(tmp_path: Path):
    with pytest.raises(ValueError, match=r"must end in one of: \.mp4"):
        media.write_video(tmp_path / "a.avi", clip(), fps=16)


@pytest.mark.parametrize("place", ["file/a.mp4", "dangling.mp4", "folder.mp4"])
def test_an_output_that_cannot_be_had_is_refused(tmp_path: Path, place: str):
    (tmp_path / "file").touch()
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OSError, match=place):
        media.write_video(tmp_path / place, clip(), fps=16, overwrite=place == "folder.mp4")
    assert len(list(tmp_path.iterdir())) == 3


def test_checking_an_output_makes_nothing(tmp_path: Path):
    assert media.check_output(str(tmp_path / "new" / "a.mp4")) == tmp_path / "new" / "a.mp4"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_anywhere_in_the_encoder_is_raised_and_leaves_nothing(tmp_path: Path):
    script = (
        "import os, signal, sys, threading, numpy as np\nfrom fastvideo import files, media\n"
        "noise = np.random.default_rng(0).integers(0, 255, (24, 96, 96, 3), dtype=np.uint8)\n"
        "media.write_video(sys.argv[1], noise, fps=16)\n"
        "for k in range(12):\n"
        "    clock = threading.Timer(0.02 * k, os.kill, [os.getpid(), signal.SIGINT])\n"
        "    try:\n        clock.start()\n"
        "        media.write_video(sys.argv[1], noise, fps=16, overwrite=True)\n"
        "        clock.join()\n"
        "    except KeyboardInterrupt:\n        print('interrupted')\n"
        "files.leave()\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "a.mp4")]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == (12 * "interrupted\n", "")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["text", "empty", "head", "codec"])
def test_a_file_that_is_no_video_is_a_one_line_value_error(
    tmp_path: Path, written: Path, damage: str
):
    whole = written.read_bytes()
    codec = whole.replace(b"avc1", b"zzz1")
    data = {"text": b"hello " * 99, "empty": b"", "head": whole[:300], "codec": codec}[damage]
    path = tmp_path / "bad.mp4"
    path.write_bytes(data)
    for read in (media.read_metadata, media.read_facts, media.read_video):
        with pytest.raises(ValueError, match=r"bad\.mp4 is not a video that can be read") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_video_cut_short_is_noticed_when_its_frames_are_read(tmp_path: Path, written: Path):
    data = written.read_bytes()
    for kept in (0, 4, 60):
        (tmp_path / "cut.mp4").write_bytes(data[: data.index(b"mdat") + kept])
        for read in (media.read_facts, media.read_video):
            with pytest.raises(ValueError, match=r"cut\.mp4 is not a video that can be read"):
                read(tmp_path / "cut.mp4")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"none\.mp4 does not exist"):
        media.read_metadata(tmp_path / "none.mp4")


def test_a_contact_sheet_shows_first_and_last_frames_in_order(tmp_path: Path):
    dark, light = clip(1) * 0, clip(1) * 0 + 200
    sheet = media.contact_sheet([np.concatenate([dark, light])], num_columns=2, gap=2)
    assert sheet.shape == (36, 2 * 92, 3)
    assert (sheet[10, 10] == 0).all()
    assert (sheet[10, 92 + 10] == 200).all()


def test_a_contact_sheet_of_several_labelled_clips_has_a_row_for_each(tmp_path: Path):
    sheet = media.contact_sheet([clip(), clip(5)], labels=["one", "two"], num_columns=3, gap=4)
    assert sheet.shape == (2 * (16 + 38), 3 * 94, 3)
    with pytest.raises(ValueError, match="1 labels were given for 2 clips"):
        media.contact_sheet([clip(), clip()], labels=["one"])


def test_a_png_comes_back_exactly_and_is_not_overwritten(tmp_path: Path):
    from PIL import Image

    path = media.write_png(tmp_path / "a.png", clip()[0])
    assert (np.asarray(Image.open(path)) == clip()[0]).all()
    with pytest.raises(FileExistsError):
        media.write_png(path, clip()[1])
    assert list(tmp_path.iterdir()) == [path]


def test_a_mosaic_plays_clips_side_by_side_as_an_animation(tmp_path: Path):
    from PIL import Image

    dark, light = clip(3) * 0, clip(3) * 0 + 200
    frames = media.mosaic([dark, light, light], num_columns=2, gap=2)
    assert frames.shape == (3, 2 * 36, 2 * 92, 3)
    assert (frames[:, 10, 10] == 0).all()
    assert (frames[:, 10, 92 + 10] == 200).all()
    assert (frames[:, 36 + 10, 92 + 10] == 255).all()
    with pytest.raises(ValueError, match="clips of one size"):
        media.mosaic([clip(3), clip(2)])
    moving = np.stack([np.full((16, 16, 3), level, np.uint8) for level in (10, 120, 240)])
    path = media.write_webp(tmp_path / "a.webp", moving, fps=10, quality=90)
    with Image.open(path) as stored:
        assert (stored.n_frames, stored.info["loop"]) == (3, 0)
        for index, level in enumerate((10, 120, 240)):
            stored.seek(index)
            assert abs(int(np.asarray(stored.convert("RGB")).mean()) - level) < 4
            assert stored.info["duration"] == 100
    with pytest.raises(ValueError, match=r"must end in \.webp"):
        media.write_webp(tmp_path / "a.gif", moving, fps=10)
