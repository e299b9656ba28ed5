"""From records to the rows of a comparison, with records made up for the purpose."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fastvideo_inference.contrast import Contrast, Made, Sampler, against, found, markdown

LEGAL = {"shape": ("ball", "star"), "colour": ("red", "blue")}
TRUTHS = ["ball red", "ball red", "star red", "star blue"]  # the first two are one combination
SAMPLER = Sampler("unipc", 25, 4.0, "dense")
FEW = Sampler("few_step", 2, 1.0, "dense", sigmas=(1.0, 0.714286), own=False)


def values(words: str) -> dict[str, str]:
    return dict(zip(LEGAL, words.split(), strict=True))


def made(name: str, *parses: str, takes: tuple[float, ...] = (), sampler=SAMPLER) -> Made:
    """Return a setting whose later take of prompt i is `takes[i]` away from the first."""
    first: list[dict[str, Any]] = [
        {
            "index": i,
            "prompt": f"a {TRUTHS[i]}",
            "truth": values(TRUTHS[i]),
            "parse": values(parse),
            "flicker": float(i),
            "features": [0.0, 0.0],
            "truth_features": [0.0, 0.0],
            "reference_features": [0.0, 0.0],
        }
        for i, parse in enumerate(parses)
    ]
    again = [{"index": i, "features": [0.0, far]} for i, far in enumerate(takes)]
    return Made(name, "model", sampler, "hash", [first, again] if takes else [first])


BASE = made("base", "ball red", "ball red", "star blue", "ball red", takes=(2.0, 4.0))
STUDENT = made(
    "few", "ball blue", "star red", "star red", "star blue", takes=(1.0, 2.0), sampler=FEW
)


def test_rates_and_their_mean_are_counted():
    row = found(STUDENT, BASE, [], legal=LEGAL)
    assert {k: r.value for k, r in row.rates.items()} == {"shape": 0.75, "colour": 0.75, "all": 0.5}
    assert (row.mean, row.n, row.combinations, row.flicker) == (0.75, 4, 3, 1.5)
    assert row.distance is not None and row.seconds is None


def test_a_paired_difference_is_what_one_computes_by_hand():
    # shares right: student .5 .5 1 1, base 1 1 .5 0; by combination -1 (of two prompts), .5, 1
    row = against(STUDENT, BASE, legal=LEGAL)
    value = (-1.0 + 0.5 + 1.0) / 4
    squares = (-1.0 - 2 * value) ** 2 + (0.5 - value) ** 2 + (1.0 - value) ** 2
    half = 4.302653 * math.sqrt(3 / 2 * squares) / 4
    assert row.prompts == 4
    assert (row.mean.value, row.mean.low, row.mean.high) == pytest.approx(
        (value, value - half, value + half), abs=1e-6
    )
    assert row.all.value == pytest.approx((0 + 0 + 1 + 1 - 1 - 1 - 0 - 0) / 4)


@pytest.mark.parametrize(
    ("parse", "mean", "whole"),
    [("ball+star", 0.0, 0.0), ("ball", -0.25, -1.0), ("ball+star+cube", 0.0, -1.0)],
)
def test_each_of_several_things_counts_and_all_only_without_another(parse, mean, whole):
    base, other = made("base", "ball red"), made("other", "ball red")
    for one, shapes in ((base, "ball+star"), (other, parse)):
        one.repeats[0][0]["truth"] = {"shape": "ball+star", "colour": "red"}
        one.repeats[0][0]["parse"] = {"shape": shapes, "colour": "red"}
    row = against(other, base, legal=LEGAL)
    assert (row.mean.value, row.all.value) == (mean, whole)


def test_diversity_is_a_share_of_the_bases_over_the_prompts_of_both():
    row = against(STUDENT, BASE, legal=LEGAL)
    assert row.diversity.value == pytest.approx(3.0 / 6.0)
    fewer = made("fewer", "ball red", "ball red", takes=(1.0,))
    assert against(fewer, BASE, legal=LEGAL).diversity.value == pytest.approx(1.0 / 2.0)


def test_only_prompts_of_both_are_compared():
    short = made("short", "ball red", "star blue")
    row = against(short, BASE, legal=LEGAL)
    assert (row.prompts, row.mean.value, row.diversity) == (2, pytest.approx(-0.5), None)
    turned = against(BASE, short, legal=LEGAL)
    assert (turned.prompts, turned.mean.value) == (2, pytest.approx(0.5))


def test_other_prompts_are_not_compared():
    other = made("other", "ball red")
    other.repeats[0][0]["prompt"] = "a big blue star"
    with pytest.raises(ValueError, match="other was asked 'a big blue star', not 'a ball red'"):
        against(other, BASE, legal=LEGAL)


def test_the_card_says_differences_sigmas_and_seconds():
    rounds = [
        {"base": {"denoise": 8.0, "decode": 1.0}, "few": {"denoise": 0.5, "decode": 1.0}},
        {"base": {"denoise": 9.0, "decode": 1.0}, "few": {"denoise": 1.0, "decode": 1.0}},
        {"base": {"denoise": 7.0, "decode": 1.0}, "few": {"denoise": 0.6, "decode": 1.0}},
    ]
    rows = tuple(found(m, BASE, rounds, legal=LEGAL) for m in (BASE, STUDENT))
    machine, none = {"cpu": "a processor", "gpu": None}, {"diversity": None, "flicker": 0.1}
    text = markdown(Contrast("base", rows, none, 7, "shapes", machine, {"numpy": "2"}))
    lines = text.splitlines()
    assert lines[2] == "| base | 25 unipc | 4 | 4 | 75.0 | 50.0 | 50.0 | 62.5 | base | base |"
    few = "| few | 2: 1, 0.7143 * | 1 | 4 | 75.0 | 75.0 | 50.0 | 75.0 | +12.5 (-"
    assert lines[3].startswith(few) and lines[3].endswith(") |")
    assert "| few | 1.50 | 50 % | 1.50 |" in text
    assert "| 1.60 | 1.50 - 2.00 | 0.60 | 5.00 | 5.00 - 6.00 |" in text
    assert "`*`: sigmas given by hand" in text and "3 rounds in turn" in text
    assert text.endswith("Machine: cpu a processor, numpy 2.")
