"""From records to the numbers of the table, with records made up for the purpose."""

from __future__ import annotations

import numpy as np
import pytest
from fastvideo_inference.scores import Fits, features, fits, mean

LEGAL = {"level": ("dark", "bright")}
F = 3


def records(count: int, *, shift: float = 0.0) -> list[dict[str, object]]:
    draw = np.random.default_rng(0)
    keys = ("features", "truth_features", "reference_features")
    return [
        {"truth": {"level": "dark"}, "labels": {"level": ("dark", "bright")[i % 4 == 0]}}
        | {key: (draw.normal(size=F) + shift * (key == "features")).tolist() for key in keys}
        for i in range(count)
    ]


def found(made, kept, again=()):
    return features(made, kept=kept, again=again, classifier="c", legal=LEGAL)


def test_a_distance_stands_beside_that_of_as_many_true_clips():
    near, far = (found(records(40, shift=s), records(20, shift=s)) for s in (0.0, 5.0))
    assert near.made.n == 40 and near.vae.n == 20
    assert near.made.floor == far.made.floor > 0
    assert far.made.value > 0.9 * F * 25 and near.made.value < 1
    assert near.vae.floor == far.vae.floor != near.made.floor, "each has the floor of its own n"


def test_true_clips_in_the_place_of_made_ones_reach_the_floor():
    made = records(40)
    true = [m | {"features": m["truth_features"]} for m in made]
    assert found(true, true[:20]).made.value == found(made, made).made.floor
    assert found(true, true[:20]).vae.value == found(true, true[:20]).vae.floor


def test_no_more_clips_than_features_give_no_distance():
    assert found(records(F), records(F)).made is None
    assert found(records(F + 1), records(F)).made is not None


def test_collapse_shows_as_no_diversity():
    made = records(8)
    others = records(10)[8:]
    take = [
        m | {"truth_features": r["truth_features"]} for m, r in zip(made[:2], others, strict=True)
    ]
    spread = found(made, made, [take]).spread
    assert (spread.prompts, spread.repeats) == (2, 2)
    assert spread.made == 0 and spread.truth > 0


def test_a_classifier_that_errs_shows_itself():
    judged = found(records(40), records(20)).classifier
    assert judged.name == "c" and judged.truth["level"] == pytest.approx(0.75)
    assert judged.vae["all"] == pytest.approx(0.75)


def test_a_mean_forgives_clips_without_the_number():
    assert mean([{"x": 1.0}, {"x": None}, {"x": 3.0}], "x") == 2
    assert mean([{"x": None}], "x") is None


def test_fits_are_of_the_clips_that_have_one_with_the_worst_tenth_apart():
    def record(shape: str, overlap: float) -> dict[str, object]:
        fit = {"overlap": overlap, "deviation": 1 - overlap, "edge_px": 2.0}
        return {"truth": {"shape": shape}, "fit": fit}

    made = [record("star", 0.5 + 0.04 * i) for i in range(10)] + [record("ball", 1.0)]
    made += [{"truth": {"shape": "ball"}, "fit": None}, {"truth": {"shape": "ball"}}]
    assert fits(made, "fit") == Fits(
        n=11,
        overlap=pytest.approx((10 * 0.68 + 1) / 11),
        worst=pytest.approx(0.52),  # two of eleven
        deviation=pytest.approx(1 - (10 * 0.68 + 1) / 11),
        edge_px=2.0,
        shapes={"ball": 1.0, "star": pytest.approx(0.68)},
    )
    assert fits(made[-2:], "fit") is None
