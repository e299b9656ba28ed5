from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fastvideo import registry
from fastvideo.metrics.diversity import diversity
from fastvideo.metrics.faithfulness import faithfulness, rates, wilson
from fastvideo.metrics.flicker import flicker
from fastvideo.metrics.frechet import frechet
from fastvideo.metrics.psnr import psnr
from fastvideo.metrics.ssim import SIGMA, WINDOW, ssim
from fastvideo.worlds.shapes import ATTRIBUTES, World

CLIP = World(height=64, width=96, num_frames=9).clip(0, 3)
CLEAN = CLIP.frames_THWC


def noisy(strength: float, seed: int = 0):
    noise = np.random.default_rng(seed).normal(0, strength, CLEAN.shape)
    return np.clip(CLEAN + noise, 0, 255).round().astype(np.uint8)


def read_right(strength: float) -> float:
    world = World(height=64, width=96, num_frames=9)
    parses = [world.parse(noisy(strength, seed)) for seed in range(3)]
    return sum(rates(faithfulness([CLIP.truth] * 3, parses, legal=ATTRIBUTES)).values())


def features(count: int = 40, seed: int = 0):
    return np.random.default_rng(seed).normal(0, 1, (count, 3))


# metric: (its value at a strength of noise, whether more is better)
UNDER_NOISE = {
    "psnr": (lambda s: psnr(noisy(s), CLEAN), True),
    "ssim": (lambda s: ssim(noisy(s), CLEAN), True),
    "flicker": (lambda s: flicker(noisy(s)), False),
    "faithfulness": (read_right, True),
    "frechet": (lambda s: frechet(features() + s * features(seed=1), features()), False),
    # noise that drowns what differs: each clip keeps less of what is its own
    "diversity": (lambda s: diversity([features() / (1 + s)]), True),
}


def test_every_metric_has_a_row_here():
    assert sorted(UNDER_NOISE) == registry.names("fastvideo.metrics")


@pytest.mark.parametrize("name", sorted(UNDER_NOISE))
def test_a_metric_gets_worse_with_noise(name):
    value, more_is_better = UNDER_NOISE[name]
    values = [value(s) if more_is_better else -value(s) for s in (0, 5, 20, 80, 250)]
    if name == "faithfulness":  # a rate of a few clips: it cannot fall at every step
        assert values[0] == max(values) and values[0] > 2 * values[-1]
    else:
        assert all(a > b for a, b in itertools.pairwise(values))


def test_psnr_of_a_constant_offset_is_its_formula():
    grey = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(grey + np.uint8(10), grey) == pytest.approx(20 * math.log10(25.5))
    assert psnr(grey, grey) == math.inf
    one = grey.copy()
    one[0, 0, 0, 0] = 0
    assert psnr(one, grey) == pytest.approx(10 * math.log10(255**2 / (100**2 / grey.size)))


def test_psnr_does_not_wrap_bytes_around():
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert psnr(black, white) == psnr(white, black) == 0


def test_ssim_of_flat_frames_is_its_luminance_term():
    a, b = (np.full((2, 16, 16, 3), v, np.uint8) for v in (100, 160))
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 160 + c1) / (100**2 + 160**2 + c1)
    assert ssim(a, b) == pytest.approx(expected, abs=1e-4)
    assert ssim(CLEAN, CLEAN) == pytest.approx(1, abs=1e-6)


def test_ssim_equals_the_paper_summed_window_by_window():
    draw = np.random.default_rng(0)
    x, y = (draw.integers(0, 256, (1, 13, 12, 3), np.uint8) for _ in range(2))
    at = np.arange(WINDOW) - WINDOW // 2
    line = np.exp(-(at**2) / (2 * SIGMA**2))
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for i, j, c in itertools.product(range(3), range(2), range(3)):
        p = x[0, i : i + WINDOW, j : j + WINDOW, c].astype(float)
        q = y[0, i : i + WINDOW, j : j + WINDOW, c].astype(float)
        mp, mq = (window * p).sum(), (window * q).sum()
        vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
        cov = (window * (p - mp) * (q - mq)).sum()
        top = (2 * mp * mq + c1) * (2 * cov + c2)
        values.append(top / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(x, y) == pytest.approx(np.mean(values), abs=1e-5)


def test_clips_of_different_sizes_are_refused():
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="differ in size"):
            metric(CLEAN, CLEAN[:5])
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(CLEAN[:, :8], CLEAN[:, :8])


def test_flicker_forgives_steady_change_and_small_moving_things():
    ramp = np.arange(0, 90, 10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3))
    moving = np.zeros((9, 16, 16, 3), np.uint8)
    for t in range(9):
        moving[t, t, :4] = 255
    assert flicker(ramp.astype(np.uint8)) == 0 and flicker(moving) == 0
    blinking = np.zeros((9, 8, 8, 3), np.uint8)
    blinking[::2] = 10
    assert flicker(blinking) == 20
    with pytest.raises(ValueError, match="at least 3 frames"):
        flicker(CLEAN[:2])


def test_faithfulness_counts_each_attribute_and_all_of_them_together():
    legal = {"a": ("x", "y"), "b": ("p", "q", "r", "s")}
    truths = [{"a": "x", "b": "p"}, {"a": "y", "b": "q"}, {"a": "x", "b": "r"}]
    parses = [{"a": "x", "b": "p"}, {"a": "y", "b": "unknown"}, {"a": "y"}]
    rows = faithfulness(truths, parses, legal=legal)
    assert [(r.attribute, r.right, r.n, r.chance) for r in rows] == [
        ("a", 2, 3, 2 / 3),
        ("b", 1, 3, 1 / 3),
        ("all", 1, 3, 1 / 3),
    ]
    assert rates(rows)["a"] == pytest.approx(2 / 3) and rows[0].interval == wilson(2, 3)
    with pytest.raises(ValueError, match="2 parses for 3 truths"):
        faithfulness(truths, parses[:2], legal=legal)


def test_faithfulness_counts_each_of_several_things_for_itself():
    legal = {"shape": ("red ball", "red star", "blue ball", "blue star")}
    truths = [{"shape": "red ball+blue star"}, {"shape": "red ball"}]
    parses = [{"shape": "blue star+red star"}, {"shape": "red ball+blue ball"}]
    each, whole = faithfulness(truths, parses, legal=legal)
    assert (each.right, each.n, each.chance) == (2, 3, 2 / 3)
    assert (whole.right, whole.n) == (0, 2), "one too many is not the clip that was asked for"


def test_wilsons_interval_has_its_published_values_and_stays_within_bounds():
    assert wilson(10, 100) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20) == (pytest.approx(0.8389, abs=1e-4), 1.0)


def test_the_frechet_distance_of_a_set_to_itself_is_zero_and_a_shift_adds_its_square():
    x = features()
    assert frechet(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet(x, x + np.array([1.0, 2.0, -2.0])) == pytest.approx(9)
    assert frechet(x, x[::-1]) == pytest.approx(0, abs=1e-12)


def test_the_frechet_distance_of_gaussians_is_its_closed_form():
    x = features(50)
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T  # exactly white
    turn, _ = np.linalg.qr(features(3, seed=2))
    a, b = np.array([1.0, 2.0, 3.0]), np.array([3.0, 1.0, 0.0])
    assert frechet(x * a, x * b) == pytest.approx(((a - b) ** 2).sum())
    assert frechet(x * a @ turn, x * b @ turn) == pytest.approx(((a - b) ** 2).sum())
    one, two = x * a, x * b @ turn  # covariances that do not commute, by roots of matrices
    c, d = np.cov(one.T), np.cov(two.T)
    values, vectors = np.linalg.eigh(c)
    root = vectors * np.sqrt(values) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ d @ root).clip(0)).sum()
    assert frechet(one, two) == pytest.approx(np.trace(c) + np.trace(d) - 2 * shared)
    assert frechet(one, two) == pytest.approx(frechet(two, one))


def test_too_few_samples_for_a_covariance_are_refused():
    assert frechet(features(4), features(9)) >= 0
    with pytest.raises(ValueError, match=r"3 samples of 3 features are too few.*4 are the least"):
        frechet(features(9), features(3))
    with pytest.raises(ValueError, match="shapes"):
        frechet(features(9), features(9)[:, :2])


def test_diversity_is_the_mean_distance_within_groups_alone():
    triangle = [[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]
    assert diversity([triangle]) == pytest.approx(4)
    collapsed = [[9.0, 9.0]] * 3
    assert diversity([collapsed]) == 0 and diversity([triangle, collapsed]) == pytest.approx(2)
    for wrong in ([], [[[1.0, 2.0]]], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match=r"diversity needs|no two features"):
            diversity(wrong)
