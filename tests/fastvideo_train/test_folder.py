"""Videos and their captions: found in every form, and every odd one named with its reason."""

from __future__ import annotations

import csv
import json
import os
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
        "deep/c.mp4": "unreadable caption: c.txt line 1 is not UTF-16 text",
        "e.mp4": "duplicate name: e.mp4, e.webm",
        "e.webm": "duplicate name: e.mp4, e.webm",
    }


def test_every_file_is_a_video_or_bad_or_counted_and_what_belongs_to_one_is_not(
    clips, tmp_path_factory
):
    _text(clips, list(CAPTIONS.items()))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("clip.pdf", "old.PDF", "README", ".DS_Store", "a.srt"):
        (clips / name).touch()
    for name in ("clip.txt", "deep/gone.txt", ".hidden.txt"):
        (clips / name).write_text("of nothing")
    (clips / "more").symlink_to(elsewhere)
    (clips / ".cache").mkdir()
    (clips / ".cache" / "x.mp4").touch()
    found = find(clips)
    assert [v.name for v in found.videos] == list(NAMES) and not found.bad
    assert found.others == {".pdf": 2, "README": 1, ".srt": 1, "links to folders": 1}
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
        "captions.jsonl line 6": "unreadable caption: not valid JSON: Expecting property name"
        " enclosed in double quotes: line 1 column 2 (char 1)",
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
        ("l.csv", b"file,caption\n\xff\xfe,x\n", "line 2 is not UTF-8 text"),
        ("l.parquet", b"nothing", "is not a parquet file"),
        ("l.xml", b"", r"must end in one of: .jsonl, .csv, .tsv, .parquet"),
        ("missing.csv", None, "does not exist"),
        ("l.csv", b'file,caption\na.mp4,"open\nb.mp4,x\n', r"line 2: .*open quote"),
        ("l.csv", b'file,caption\n\na.mp4,"open\nb.mp4,x\nc.mp4,y"\n', "line 3: .* line 4"),
        ("l.csv", b'caption,file\n"open,a.mp4\nx,b.mp4\ny",c.mp4\n', "line 2: .* line 3"),
        ("l.csv", b'file,caption\na.mp4,"big" ball\n', "line 2: "),
        ("l.jsonl", '{"file": "a.mp4"}'.encode("utf-16-le"), "holds zero bytes"),
    ],
)
def test_a_file_that_is_no_listing_is_refused_in_one_line(clips, name, content, message):
    if content is not None:
        (clips / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        find(clips, clips / name)
    assert "\n" not in str(caught.value)


def test_an_unquoted_delimiter_in_a_caption_is_an_error_of_its_line_alone(clips):
    (clips / "l.csv").write_text('file,caption\na.mp4,a ball, red\nb.mp4,"a cube, red",\n')
    found = find(clips)
    assert [v.caption for v in found.videos] == ["a cube, red"]
    wrong = "unreadable caption: it has 3 fields, the header 2; quote a ','"
    assert reasons(found)["l.csv line 2"] == wrong


ODD = "a red\u2028ball\x0cat\x85night"
SPELLINGS = {
    "semicolon.csv": 'File;Caption\r\na.mp4;"{}"\r\nb.mp4;"two\r\nlines"\r\n',
    "tabs.csv": "\nfile_name\tscore\ttext\na.mp4\t1\t{}\nb.mp4\t2\ttwo lines\n",
    "tabs.tsv": "PATH\tPrompt\na.mp4\t{}\nb.mp4\ttwo lines",
    "bars.csv": "video|caption\na.mp4|{}\nb.mp4|two lines\n",
    "comma.csv": ' VIDEO , "Text"\na.mp4, "{}"\nb.mp4,two lines\n',
    "lines.jsonl": '{{"file": "a.mp4", "text": "{}"}}\r\n{{"File": "b.mp4", "TEXT": "two lines"}}',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_listing_is_read_in_every_spelling_and_only_line_feeds_end_its_rows(
    clips, name, encoding
):
    odd = ODD.replace("\x0c", " ") if name.endswith("jsonl") else ODD  # JSON escapes form feeds
    text = SPELLINGS[name].format(odd)
    (clips / name).write_bytes(text.encode(encoding))
    captions = [v.caption for v in find(clips).videos]
    assert captions == ["a red ball at night", "two lines"]


@pytest.mark.parametrize(
    "text",
    [
        'caption,file\n"A cat\nsits",a.mp4\ntwo,b.mp4\n',
        'caption,file\n"A cat\nsits","a.mp4"\ntwo,b.mp4\n',
        'id,file,caption\n1,a.mp4,"A cat\nsits, b.mp4, three"\n2,b.mp4,two\n',
    ],
)
def test_a_quoted_caption_of_several_lines_is_one_wherever_its_file_stands(clips, text):
    (clips / "l.csv").write_text(text)
    first, second = find(clips).videos
    assert (first.name, second.caption) == ("a.mp4", "two")
    assert first.caption.startswith("A cat sits")


def test_links_to_one_file_are_videos_of_their_own(tmp_path, tmp_path_factory, video):
    blob = tmp_path_factory.mktemp("blobs") / "blob"
    blob.write_bytes(video)
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).symlink_to(blob)
    rows = [(str(tmp_path / "a.mp4"), "one"), (str(tmp_path / "b.mp4"), "two")]
    _jsonl(tmp_path, rows)
    assert [(v.name, v.caption) for v in find(tmp_path).videos] == [
        ("a.mp4", "one"),
        ("b.mp4", "two"),
    ]
    _jsonl(tmp_path, rows[:1])
    assert [v.name for v in find(tmp_path).videos] == ["a.mp4"]


@pytest.mark.parametrize("odd", ["\\u0000", "\\ud83d"])
@pytest.mark.parametrize("place", ["file", "text"])
def test_a_row_with_half_a_character_or_a_nul_is_bad_alone(clips, odd, place):
    row = {"file": "a.mp4", "text": "a", place: f"a{odd}.mp4"}
    text = json.dumps(row).replace("\\\\u", "\\u")
    (clips / "l.jsonl").write_text(text + '\n{"file": "b.mp4", "text": "two"}\n')
    found = find(clips)
    assert [v.name for v in found.videos] == ["b.mp4"]
    assert "half a character" in reasons(found)["l.jsonl line 1"]


@pytest.mark.parametrize("content", ["a\tb\n1\t2\n", "file\tcaption\na.mp4\tno\n"])
def test_a_tsv_of_another_purpose_is_no_listing(clips, content):
    _csv(clips, list(CAPTIONS.items()))
    (clips / "metadata.tsv").write_text(content)
    assert len(find(clips).videos) == len(CAPTIONS)
    (clips / "list.csv").unlink()
    if "file" not in content:
        (clips / "a.txt").write_text("a ball")
        assert [v.caption for v in find(clips).videos] == ["a ball"]


def test_a_long_name_and_a_caption_that_looks_like_a_page_are_read(tmp_path, video):
    stem = "n" * 250
    (tmp_path / f"{stem}.mp4").write_bytes(video)
    (tmp_path / f"{stem}.txt").write_text("<html> on a sign in a street")
    assert [v.caption for v in find(tmp_path).videos] == ["<html> on a sign in a street"]


def test_a_listing_of_old_line_ends_is_refused_by_name(clips):
    (clips / "l.csv").write_bytes(b"file,caption\ra.mp4,one\r")
    with pytest.raises(ValueError, match=r"captions .*l\.csv line 1: .*LF or CRLF"):
        find(clips)


def test_captions_beside_videos_may_differ_in_case_of_suffix_encoding_and_composition(clips, video):
    for name in ("e\u0301.mp4", "f.mp4", "G.mp4", "h.mp4"):
        (clips / name).write_bytes(video)
    (clips / "a.TXT").write_text("one")
    (clips / "b.txt").write_bytes("two".encode("utf-16"))
    (clips / "deep" / "c.Txt").write_bytes(b"\xef\xbb\xbfthree")
    (clips / "\xe9.txt").write_text("four")
    (clips / "f.txt").write_bytes(b"\n caf\xe9")
    (clips / "g.txt").write_text("of another case")
    (clips / "h.TXT").write_text("both")
    (clips / "h.Txt").write_text("both")
    found = find(clips)
    assert [v.caption for v in found.videos] == ["one", "two", "three", "four"]
    assert reasons(found) == {
        "G.mp4": "missing caption: there is no G.txt; rename g.txt",
        "f.mp4": "unreadable caption: f.txt line 2 is not UTF-8 text",
        "h.mp4": "duplicate caption: h.TXT, h.Txt",
    }
    assert found.lone == ("g.txt",)


def test_a_listing_s_names_mean_one_file_in_every_spelling_or_the_near_miss_is_named(
    clips, video, tmp_path_factory
):
    (clips / "e\u0301.mp4").write_bytes(video)
    (clips / "D.mp4").write_bytes(video)
    link = tmp_path_factory.mktemp("links") / "link"
    link.symlink_to(clips)
    names = (str(link / "a.mp4"), "./deep/../b.mp4", "deep\\c.mp4", "\xe9.mp4", "d.mp4", "c.mp4")
    _jsonl(clips, [(name, f"text {i}") for i, name in enumerate(names)])
    for folder in (clips, link):
        found = find(folder)
        assert {v.name: v.caption for v in found.videos} == {
            "a.mp4": "text 0",
            "b.mp4": "text 1",
            "deep/c.mp4": "text 2",
            "e\u0301.mp4": "text 3",
        }
        assert reasons(found) == {
            "D.mp4": "missing caption: metadata.jsonl does not name it",
            "c.mp4": "missing file: metadata.jsonl line 6 names it; did you mean deep/c.mp4?",
            "d.mp4": "missing file: metadata.jsonl line 5 names it; did you mean D.mp4?",
        }


def test_a_file_name_that_is_not_utf8_is_bad_alone(clips, video):
    for name in (b"x\xff.mp4", b"y\xfe.mp4"):
        (clips / os.fsdecode(name)).write_bytes(video)
    for name in (b"x\xff.txt", b"lone\xff.txt"):
        (clips / os.fsdecode(name)).write_text("a ball")
    _text(clips, list(CAPTIONS.items()))
    found = find(clips)
    assert len(found.videos) == 3 and found.lone == (r"lone\xff.txt",)
    reason = "file name is not UTF-8: rename it"
    assert reasons(found) == {r"x\xff.mp4": reason, r"y\xfe.mp4": reason}


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


@pytest.mark.parametrize("how", ["in place", "by another"])
def test_a_file_of_other_content_but_the_same_size_and_time_is_looked_at_again(clips, how):
    _text(clips, list(CAPTIONS.items()))
    (clips / "deep" / "c.mp4").rename(clips / "deep" / "c\u2028.mp4")
    (clips / "deep" / "c.txt").rename(clips / "deep" / "c\u2028.txt")
    videos, path = find(clips).videos, clips / "a.mp4"
    first = list(scan(videos))
    journal = "".join(map(to_line, first))
    assert len(from_lines(journal, videos)) == 3
    before = path.stat()
    other = path if how == "in place" else clips / "other"
    other.write_bytes(path.read_bytes()[:-1] + b"?")
    other.replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    known = from_lines(journal, videos)
    assert set(known) == {"b.mp4", "deep/c\u2028.mp4"}
    assert next(scan(videos, known=known)).digest != first[0].digest
