"""Videos and their captions: found in every form, and every odd one named with its reason."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from fastvideo_train.data import folder as folders
from fastvideo_train.data.folder import find, from_lines, scan, to_line
from odd_videos import truncated, write

NAMES = ("a.mp4", "b.mp4", "deep/c.mp4")
CAPTIONS = {"a.mp4": "a red ball", "b.mp4": "a blue, “big” square", "deep/c.mp4": "day\nand night"}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("one") / "a.mp4", count=4).read_bytes()


@pytest.fixture
def clips(tmp_path: Path, video: bytes) -> Path:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(video)
    return tmp_path


def reasons(found: folders.Found) -> dict[str, str]:
    return {bad.name: bad.reason for bad in found.bad}


def _jsonl(folder: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows]
    (folder / "metadata.jsonl").write_text("".join(lines))


def _csv(folder: Path, rows: list[tuple[str, str]]) -> None:
    with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("video", "caption", "score"), *((*r, "1") for r in rows)])


def _parquet(folder: Path, rows: list[tuple[str, str]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names, texts = zip(*rows, strict=True)
    table = pyarrow.table({"path": names, "prompt": texts, "other": [{"a": 1}] * len(rows)})
    parquet.write_table(table, folder / "list.parquet")


def _text(folder: Path, rows: list[tuple[str, str]]) -> None:
    for name, text in rows:
        (folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")


FORMS = {"txt": _text, "jsonl": _jsonl, "csv": _csv, "parquet": _parquet}


@pytest.mark.parametrize("form", FORMS)
def test_captions_are_found_in_every_form(clips, form):
    FORMS[form](clips, list(CAPTIONS.items()))
    found = find(clips)
    read = {v.name: v.caption for v in found.videos}
    assert read == {name: " ".join(text.split()) for name, text in CAPTIONS.items()}
    assert list(read) == sorted(read) and not found.bad and found.others == {}
    assert all(v.path.is_file() for v in found.videos)


def test_a_listing_may_be_named_and_lie_elsewhere(clips, tmp_path_factory):
    other = tmp_path_factory.mktemp("lists")
    _csv(other, [(str(clips / "a.mp4"), "a"), ("./b.mp4", "b"), ("deep/c.mp4", "c")])
    assert [v.caption for v in find(clips, other / "list.csv").videos] == ["a", "b", "c"]


def test_odd_captions_beside_videos_are_named_with_their_reason(clips, video):
    _text(clips, [("a.mp4", "good"), ("b.mp4", " \n")])
    (clips / "deep" / "c.txt").write_bytes(b"\xff\xfe\xff")
    for name in ("d.mp4", "e.mp4", "e.webm", ".hidden.mp4"):
        (clips / name).write_bytes(video)
    (clips / "e.txt").write_text("two of them")
    (clips / "notes.md").touch()
    found = find(clips)
    assert [v.name for v in found.videos] == ["a.mp4"] and found.others == {".md": 1}
    assert reasons(found) == {
        "b.mp4": "missing caption: b.txt is empty",
        "d.mp4": "missing caption: there is no d.txt",
        "deep/c.mp4": "unreadable caption: c.txt is not UTF-8 text",
        "e.mp4": "duplicate name: e.mp4, e.webm",
        "e.webm": "duplicate name: e.mp4, e.webm",
    }


def test_every_file_is_a_video_or_bad_or_counted_and_what_belongs_to_one_is_not(
    clips, tmp_path_factory
):
    _text(clips, list(CAPTIONS.items()))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("clip.rm", "old.RM", "README", ".DS_Store", "a.srt"):
        (clips / name).touch()
    for name in ("clip.txt", "deep/gone.txt", ".hidden.txt"):
        (clips / name).write_text("of nothing")
    (clips / "more").symlink_to(elsewhere)
    (clips / ".cache").mkdir()
    (clips / ".cache" / "x.mp4").touch()
    found = find(clips)
    assert [v.name for v in found.videos] == list(NAMES) and not found.bad
    assert found.others == {".rm": 2, "README": 1, ".srt": 1, "links to folders": 1}
    assert found.lone == ("clip.txt", "deep/gone.txt")
    _jsonl(clips, list(CAPTIONS.items()))  # now texts are no captions
    listed = find(clips)
    assert listed.others == {**found.others, ".txt": 2} and listed.lone == () and not listed.bad


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_a_broken_link_is_bad_with_its_own_reason_alone(clips, form):
    for name in ("dangling.mp4", "bare.mp4"):
        (clips / name).symlink_to("/nowhere/x.mp4")
    (clips / "kept.mp4").symlink_to(clips / "a.mp4")
    rows = {**CAPTIONS, "dangling.mp4": "a caption", "kept.mp4": "another"}
    FORMS[form](clips, list(rows.items()))
    found = find(clips)
    reason = "broken link: /nowhere/x.mp4 is not there"
    assert reasons(found) == {"dangling.mp4": reason, "bare.mp4": reason} and len(found.bad) == 2
    assert [v.name for v in found.videos] == ["a.mp4", "b.mp4", "deep/c.mp4", "kept.mp4"]
    assert all(one.footage for one in scan(found.videos))


def test_odd_lines_of_a_listing_are_named_with_their_reason(clips):
    rows = [
        {"file": "a.mp4", "caption": "one"},
        {"file": "a.mp4", "caption": "two"},
        {"file": "b.mp4"},
        {"file": "gone.mp4", "caption": "x"},
        {"caption": "of nothing"},
    ]
    lines = [json.dumps(row) for row in rows] + ["{not json", ""]
    (clips / "captions.jsonl").write_text("\n".join(lines))
    found = find(clips)
    assert not found.videos
    assert reasons(found) == {
        "a.mp4": "duplicate name: captions.jsonl names it 2 times",
        "b.mp4": "missing caption: captions.jsonl line 3 has none",
        "captions.jsonl line 5": "unreadable caption: the line names no file",
        "captions.jsonl line 6": "unreadable caption: the line names no file",
        "deep/c.mp4": "missing caption: captions.jsonl does not name it",
        "gone.mp4": "missing file: captions.jsonl line 4 names it",
    }


def test_a_folder_without_videos_or_with_several_listings_is_refused(clips, tmp_path_factory):
    with pytest.raises(ValueError, match="is not a folder"):
        find(clips / "nowhere")
    with pytest.raises(ValueError, match=r"holds no videos; looked for .mp4"):
        find(tmp_path_factory.mktemp("bare"))
    _csv(clips, [("a.mp4", "a")])
    _jsonl(clips, [("a.mp4", "a")])
    with pytest.raises(ValueError, match=r"several listings .list.csv, metadata.jsonl.; choose"):
        find(clips)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.csv", b"name,words\na.mp4,x\n", "names no file; looked for: file, file_name"),
        ("l.csv", b"file,caption\n\xff\xfe,x\n", "is not UTF-8 text"),
        ("l.parquet", b"nothing", "is not a parquet file"),
        ("l.xml", b"", r"must end in one of: .jsonl, .csv, .parquet"),
        ("missing.csv", None, "does not exist"),
    ],
)
def test_a_file_that_is_no_listing_is_refused_in_one_line(clips, name, content, message):
    if content is not None:
        (clips / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        find(clips, clips / name)
    assert "\n" not in str(caught.value)


def test_parquet_without_its_package_names_the_extra(clips, monkeypatch):
    (clips / "l.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[data\]'"):
        find(clips)


def test_a_scan_gives_facts_or_a_reason_in_order_however_many_look(clips):
    _text(clips, list(CAPTIONS.items()))
    truncated(clips / "b.mp4", clips / "b2.mp4", 0.5)
    (clips / "b2.mp4").replace(clips / "b.mp4")
    videos = find(clips).videos
    alone, together = (list(scan(videos, workers=n)) for n in (0, 2))
    assert alone == together and [s.video for s in alone] == list(videos)
    assert [s.footage is None for s in alone] == [False, True, False]
    assert "truncated" in alone[1].reason and not alone[0].reason
    assert alone[0].digest == alone[2].digest != ""


def test_a_journal_spares_files_that_have_not_changed(clips, monkeypatch):
    _text(clips, list(CAPTIONS.items()))
    videos = find(clips).videos
    first = list(scan(videos))
    journal = "".join(map(to_line, first)) + '{"name": "cut'
    looked = []
    probe = folders.probe
    monkeypatch.setattr(folders, "probe", lambda p, **k: looked.append(p.name) or probe(p, **k))
    assert list(scan(videos, known=from_lines(journal, videos))) == first and looked == []
    write(clips / "b.mp4", count=5)
    again = list(scan(videos, known=from_lines(journal, videos)))
    assert looked == ["b.mp4"] and again[1].footage.num_frames == 5 and again[0] == first[0]
