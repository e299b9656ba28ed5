"""Files of prompts: a prompt a line, or a request a line."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastvideo_inference import prompts


def test_text_files_hold_a_prompt_a_line(tmp_path: Path):
    path = tmp_path / "p.txt"
    path.write_text("# title\n a red ball \n\n  # more\na blue ball\n")
    rows = [(f"{path}:2", {"prompt": "a red ball"}), (f"{path}:5", {"prompt": "a blue ball"})]
    assert prompts.read_prompts(path) == rows


def test_only_line_feeds_end_a_line_and_a_mark_of_byte_order_is_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text("\ufeffa red\u2028ball\r\na cube", encoding="utf-8")
    assert [row["prompt"] for _, row in prompts.read_prompts(tmp_path / "a.txt")] == [
        "a red\u2028ball",
        "a cube",
    ]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\u2028b"}', encoding="utf-8")
    assert prompts.read_prompts(tmp_path / "a.jsonl")[0][1] == {"prompt": "a\u2028b"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_prompts_are_read_in_every_encoding_with_a_mark_and_split_at_line_feeds_alone(
    tmp_path: Path, encoding: str, end: str
):
    odd = "a\u2028red\x85ball\x0cat\x1cnight"
    text = f"{odd}{end}{end}caf\xe9 at night{end}"
    raw = b"\xff\xfe" + text.encode("utf-16-le") if "le" in encoding else text.encode(encoding)
    (tmp_path / "P.TXT").write_bytes(raw)
    rows = prompts.read_prompts(tmp_path / "P.TXT")
    assert rows == [
        (f"{tmp_path / 'P.TXT'}:1", {"prompt": odd}),
        (f"{tmp_path / 'P.TXT'}:3", {"prompt": "caf\xe9 at night"}),
    ]


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"a ball\ncaf\xe9\n", "p.txt line 2 is not UTF-8 text"),
        ("a ball".encode("utf-16-le"), "zero bytes: binary, or UTF-16 without a byte order mark"),
    ],
)
def test_a_prompt_file_that_is_no_text_names_the_line(tmp_path: Path, raw: bytes, error: str):
    (tmp_path / "p.txt").write_bytes(raw)
    with pytest.raises(ValueError, match=error):
        prompts.read_prompts(tmp_path / "p.txt")


def test_json_lines_hold_a_request_a_line(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x", "seed": 4}\n')
    assert prompts.read_prompts(path) == [(f"{path}:1", {"prompt": "x", "seed": 4})]


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("p.jsonl", '{"prompt": "x"}\nnope', "p.jsonl:2 is not valid JSON"),
        ("p.jsonl", '["x"]', "p.jsonl:1 must be an object"),
        ("p.txt", "# nothing\n", "holds no prompt"),
        ("p.csv", "x", "must end in one of: .txt, .jsonl"),
    ],
)
def test_wrong_prompt_files_are_refused_by_line(tmp_path: Path, name: str, text: str, error: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=error):
        prompts.read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        prompts.read_prompts(tmp_path / "none.txt")
