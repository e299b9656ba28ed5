"""How long a step may take, and how long a clip probably will."""

from __future__ import annotations

from pathlib import Path

from fastvideo_inference.engine.book import STEP_LIMIT_S, Book, Key, work

from fastvideo import hub
from tests.fastvideo_inference.engine.conftest import submission


def test_a_step_has_five_times_its_usual_time_scaled_to_its_size_and_half_a_minute_at_least():
    book, key = Book(), Key(0, "m", "denoise")
    assert book.limit_s(key, 100) is None
    book.note(key, 100, 0.1)
    assert book.limit_s(key, 100) == STEP_LIMIT_S
    book.note(key, 100, 20.0)
    assert book.limit_s(key, 100) == 100
    assert book.limit_s(key, 200) == 200
    assert book.limit_s(key, 50) == 50
    book.note(key, 100, 10.0)
    assert 50 < book.limit_s(key, 100) < 100  # a slow one is forgotten slowly
    assert book.limit_s(Key(0, "m", "decode"), 100) is None


def test_the_seconds_of_a_clip_and_its_progress_are_those_of_one_before():
    book, row = Book(), ("encode_text", "denoise", "decode")
    assert book.clip_s("m", 10) is None
    assert book.progress("m", row, 1, 0.5) == 0.5
    book.note_clip("m", 10, {"encode_text": 1.0, "denoise": 7.0, "decode": 2.0, "save": 1.0})
    assert book.clip_s("m", 10) == 11.0
    assert book.clip_s("m", 20) == 22.0
    assert book.clip_s("m", 1000) is None  # too unlike
    assert book.progress("m", row, 1, 1.0) == 0.8
    assert book.progress("m", row, 3, 0.0) == 1.0


def test_the_work_of_a_step_is_its_flop(tiny_folder: Path):
    def of(**fields: float) -> float:
        return work(submission(tiny_folder, **fields).params, spec)

    spec = hub.open_model(tiny_folder).spec
    assert 2 < of(width=96) / of(width=48) < 4  # attention alone grows with the square
    assert of(guidance_scale=3.0) == 2 * of(guidance_scale=1.0)
