"""Choosing a backend: by name, by itself, and with reasons when none serves."""

from __future__ import annotations

import logging

import pytest
import torch

from fastvideo import registry
from fastvideo.attention import Dense, Vsa, choose, parse, plan, select, table
from fastvideo.attention.choice import PACKAGE
from fastvideo.attention.order import ORDER
from fastvideo.shapes import TokenGrid

SMALL, LARGE = (plan(Dense(), TokenGrid(21, n, n)) for n in (8, 30))
COMMON = {"dtype": torch.bfloat16, "device": "cpu", "head_dim": 96}


def name_of(backend) -> str:
    return backend.__name__.rpartition(".")[2]


@pytest.fixture(params=[True, False], ids=["amx", "no amx"])
def has_amx(request, monkeypatch) -> bool:
    """Whichever processor this is, one with AMX tiles and one without."""
    abilities = {"amx_tile": request.param}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)
    return request.param


def test_short_sequences_take_bmm_on_a_cpu_with_amx_only_to_train_the_shortest(has_amx):
    few = plan(Dense(), TokenGrid(5, 4, 4))
    wanted = [
        (few, True, "bmm"),
        (few, False, "sdpa" if has_amx else "bmm"),
        (SMALL, True, "sdpa" if has_amx else "bmm"),
        (LARGE, True, "sdpa"),
    ]
    for layout, needs_grad, name in wanted:
        assert name_of(choose(layout=layout, needs_grad=needs_grad, **COMMON)) == name


def test_float32_on_a_cpu_is_left_to_sdpa():
    whole = {**COMMON, "dtype": torch.float32}
    assert name_of(choose(layout=SMALL, needs_grad=True, **whole)) == "sdpa"


def test_a_named_backend_is_taken_or_its_reason_is_quoted():
    assert name_of(choose("sdpa", layout=SMALL, needs_grad=False, **COMMON)) == "sdpa"
    with pytest.raises(ValueError, match=r"asked for 'flash'.*flash: needs an NVIDIA GPU, not cpu"):
        choose("flash", layout=SMALL, needs_grad=False, **COMMON)
    with pytest.raises(ValueError, match=r"bmm: .*at most 2048 keys, not 18900"):
        choose("bmm", layout=LARGE, needs_grad=True, **COMMON)


def test_if_none_serves_every_reason_is_quoted(monkeypatch):
    for name in registry.names(PACKAGE):
        module = registry.module(PACKAGE, name)
        monkeypatch.setattr(module, "unsupported", lambda need, name=name: f"{name} is tired")
    with pytest.raises(
        ValueError, match=r"bmm: bmm is tired; flash: flash is tired; .*sdpa: sdpa is"
    ):
        choose(layout=SMALL, needs_grad=False, **COMMON)


def test_an_unknown_backend_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'sdpa'"):
        choose("spda", layout=SMALL, needs_grad=False, **COMMON)


def test_the_decision_is_logged_with_what_was_passed_over(caplog):
    with caplog.at_level(logging.INFO, logger="fastvideo"):
        choose(layout=LARGE, needs_grad=False, **COMMON)
    assert "18900 keys, head 96, bfloat16, cpu, inference: sdpa" in caplog.text
    assert "not flash: needs an NVIDIA GPU" in caplog.text


def test_a_sparse_decision_is_logged_with_what_is_computed_and_what_was_outranked(caplog):
    layout = plan(Vsa(sparsity=0.75, tile=(2, 4, 4)), TokenGrid(4, 8, 8))
    with caplog.at_level(logging.INFO, logger="fastvideo"):
        best = name_of(choose(layout=layout, needs_grad=False, **COMMON))
    text = "vsa(sparsity=0.75, tile=[2, 4, 4]), 8 tiles, 2 seen by each, 256 keys, head 96"
    assert text in caplog.text
    *_, slower = caplog.text.partition("expected slower: ")
    rows = dict(table(layout.pattern, grid=layout.grid))
    usable = {name for name, word in rows.items() if word in ("usable", "chosen")} - {best}
    assert usable and set(slower.partition(";")[0].split(", ")) == usable
    assert "not flash: " in slower


def test_windows_are_logged_with_their_tiles(caplog):
    layout = plan(parse("sta", {"windows": [1, 3, 3], "tile": [2, 2, 2]}), TokenGrid(4, 8, 8))
    with caplog.at_level(logging.INFO, logger="fastvideo"):
        choose(layout=layout, needs_grad=False, **COMMON)
    assert "sta(windows=[[1, 3, 3]], tile=[2, 2, 2]), 32 tiles, 256 keys" in caplog.text


def test_self_and_cross_attention_are_chosen_apart():
    both = select(layout=LARGE, num_text_tokens=32, needs_grad=True, **COMMON)
    assert (name_of(both.self_backend), name_of(both.cross_backend)) == ("sdpa", "bmm")
    q, text = torch.randn(1, 5, 2, 8), torch.randn(1, 3, 2, 8)
    assert both(q, text, text).shape == q.shape


def test_the_table_lists_every_backend_with_a_word_on_it():
    rows = dict(table())
    assert rows.keys() == set(registry.names(PACKAGE))
    assert {rows["sdpa"], rows["bmm"]} == {"usable", "chosen"}
    assert rows["gather"] == "serves sparse patterns only"
    assert rows["flash"] == "needs an NVIDIA GPU, not cpu"


def test_the_table_of_a_sparse_pattern_marks_the_one_that_auto_takes():
    rows = dict(table(Vsa(sparsity=0.8)))
    assert [name for name, word in rows.items() if word == "chosen"] == ["gather"]
    assert rows["sdpa"] == "serves dense patterns only"


def test_a_missing_flash_package_says_what_to_install(monkeypatch):
    flash = registry.module(PACKAGE, "flash")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    if any(callable(flash._probe(n)) for n in flash._PACKAGES):
        pytest.skip("flash-attn is installed here")
    reasons = dict(table(device="cuda"))
    assert reasons["flash"] == "not installed: pip install -e '.[flash]'"


def test_a_pattern_is_parsed_by_name_and_refuses_what_it_does_not_know():
    assert parse("dense", {}) == Dense()
    with pytest.raises(ValueError, match="did you mean 'dense'"):
        parse("dens", {})
    with pytest.raises(ValueError, match="no argument 'tile'"):
        parse("dense", {"tile": 4})


def test_a_backend_that_is_named_for_a_sparse_pattern_leaves_cross_attention_to_another(has_amx):
    layout = plan(Vsa(sparsity=0.5), TokenGrid(4, 8, 8))
    how = {"layout": layout, "num_text_tokens": 32, **COMMON}
    for needs_grad, cross in ((True, "bmm"), (False, "sdpa" if has_amx else "bmm")):
        attend = select("gather", needs_grad=needs_grad, **how)
        assert name_of(attend.self_backend) == "gather"
        assert name_of(attend.cross_backend) == cross


def test_every_backend_has_its_line_in_the_order_and_every_line_a_backend():
    assert {line.backend for line in ORDER} == set(registry.names("fastvideo.attention.backends"))
    assert all(line.why for line in ORDER)
