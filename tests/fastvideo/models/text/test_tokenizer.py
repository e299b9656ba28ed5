"""Cleaning, tokenising and encoding prompts against stock WanPipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvideo.model import load
from fastvideo.models.text import encode_prompts
from fastvideo.models.text.tokenizer import Tokenizer, build_word_tokenizer, clean

PROMPTS = [
    "a big red ball moving left",
    "",
    "   A  BIG\t red\n\nball ",
    "a &lt;red&gt; &amp;amp; blue ball&#33;",
    "Ã©tÃ© â€” a â€œredâ€\x9d ball \u200b\ufeff ﬁn",
    "球 🎈 a red ball \uff46\uff55ll width naïve e\u0301",
    "a red, blue; ball... (moving) 'left' \x00\x1c\x85\u2028",
    "▁a </s> <pad> <unk> <0x41> red",
    "ball " * 60,
    "unknownwordthatislong " * 9,
]


@pytest.fixture(scope="module")
def pipe(tiny_diffusers_folder: Path):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.WanPipeline.from_pretrained(tiny_diffusers_folder, torch_dtype=torch.float32)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_cleaning_is_that_of_wan_pipeline(prompt: str):
    module = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    assert clean(prompt) == module.prompt_clean(prompt)


@settings(deadline=None)
@given(st.text(max_size=40) | st.text("&#lt;ampx0123456789\x1c\x85 \u3000ÃÂ©â€", max_size=40))
def test_cleaning_is_that_of_wan_pipeline_for_any_text(prompt: str):
    module = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    assert clean(prompt) == module.prompt_clean(prompt)


@pytest.mark.parametrize("max_tokens", [16, 512])
def test_states_equal_those_of_wan_pipeline_row_by_row(pipe, tiny_folder: Path, max_tokens: int):
    model = load(tiny_folder, dtype="float32", parts=["text"])
    expected, _ = pipe.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, max_sequence_length=max_tokens
    )
    with torch.no_grad():
        got = encode_prompts(model.text, model.tokenizer, PROMPTS, max_tokens=max_tokens)
    assert got.shape == expected.shape == (len(PROMPTS), max_tokens, 32)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(got.any(-1), expected.any(-1)), "the same rows are zero"


def test_ids_equal_those_of_transformers_also_when_cut(pipe, tiny_folder: Path):
    tokenizer = Tokenizer.load(tiny_folder / "tokenizer")
    for length in (2, 5, 16):
        theirs = pipe.tokenizer(
            [clean(p) for p in PROMPTS],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = tokenizer(PROMPTS, length, pad_to=length)
        assert torch.equal(ids, theirs.input_ids)
        assert torch.equal(mask, theirs.attention_mask)


def test_a_prompt_alone_has_the_states_it_has_in_a_batch(tiny_folder: Path):
    model = load(tiny_folder, dtype="float32", parts=["text"])
    batch = encode_prompts(model.text, model.tokenizer, PROMPTS[:5], max_tokens=16)
    for i, prompt in enumerate(PROMPTS[:5]):
        alone = encode_prompts(model.text, model.tokenizer, [prompt], max_tokens=16)
        torch.testing.assert_close(alone[0], batch[i], rtol=1e-5, atol=1e-6)


def test_words_are_whole_ids_and_unknown_words_are_their_bytes(tmp_path: Path):
    tokenizer = build_word_tokenizer(["Red", "ball", ","], tmp_path)
    comma, ball, red = 260, 261, 262
    start, end = 259, 1
    ids, _ = tokenizer(["RED ball, reds é"], 99)
    spelled = [start, *(3 + b for b in b"reds"), start, *(3 + b for b in "é".encode())]
    assert ids.tolist() == [[red, ball, comma, *spelled, end]]
    assert tokenizer.vocab_size == 263


@settings(deadline=None)
@given(st.text(max_size=30))
def test_no_text_meets_the_unknown_token(tmp_path_factory, text: str):
    folder = tmp_path_factory.getbasetemp() / "words"
    known = (folder / "tokenizer.json").is_file()
    tokenizer = Tokenizer.load(folder) if known else build_word_tokenizer(["red"], folder)
    ids, _ = tokenizer([text.replace("<unk>", "")], 1000)
    assert 2 not in ids
    assert ids[0, -1] == 1


def test_decode_gives_words_back(tmp_path: Path):
    tokenizer = build_word_tokenizer(["red", "ball"], tmp_path)
    ids, _ = tokenizer(["red ball über"], 99)
    assert tokenizer.decode(ids[0].tolist()) == "red ball über"


def test_a_saved_tokenizer_is_the_same(tmp_path: Path):
    tokenizer = build_word_tokenizer(["red", "ball"], tmp_path / "a")
    tokenizer(["x"], 3)
    tokenizer.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


def test_a_folder_with_only_sentencepiece_says_what_is_needed(tmp_path: Path):
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; convert it once"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("damage", [b"{}", b"\xff\xfe"])
def test_a_broken_tokenizer_is_one_line(tmp_path: Path, damage: bytes):
    (tmp_path / "tokenizer.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_broken_tokenizer_config_is_named(tmp_path: Path):
    build_word_tokenizer(["red"], tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not a tokenizer's config"):
        Tokenizer.load(tmp_path)


def test_a_prompt_that_is_cut_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tokenizer = build_word_tokenizer(["red"], tmp_path)
    with caplog.at_level("WARNING", logger="fastvideo"):
        tokenizer(["red red"], 3)
        assert not caplog.records
        tokenizer(["red red", "red " * 9], 3)
    assert [r.getMessage() for r in caplog.records] == [
        "prompt of 10 tokens is cut to 3: " + repr("red " * 9) + "..."
    ]
