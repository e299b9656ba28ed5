"""The predicted costs of the published recipes against those that are known."""

from __future__ import annotations

import predict
import pytest
from fastvideo_train import flops
from fastvideo_train import recipe as recipes
from tiny_recipes import ROOT

from fastvideo.shapes import LatentShape

WAN = ROOT / "configs" / "train"
AT_480P, AT_720P, AT_448P = (
    LatentShape(21, 60, 104),
    LatentShape(21, 90, 160),
    LatentShape(16, 56, 104),
)


@pytest.mark.parametrize(
    ("name", "role", "clip", "known"),
    [
        ("wan-1.3b/dmd", "teacher", AT_480P, 283),
        ("wan-1.3b/sparse", "student", AT_480P, 149),
        ("wan-1.3b/vsa", "student", AT_480P, 120),
        ("wan-14b/dmd", "teacher", AT_480P, 1678),
        ("wan-14b/sparse", "student", AT_480P, 1000),
        ("wan-14b/vsa", "student", AT_720P, 2697),
    ],
)
def test_a_forward_pass_costs_the_known_tflops(name, role, clip, known):
    recipe = recipes.load(WAN / f"{name}.toml")
    assert flops.of_role(recipe, role, clip).total / 1e12 == pytest.approx(known, rel=0.01)


@pytest.mark.parametrize(("recompute", "known"), [("false", 713), ("true", 890)])
def test_a_sparse_distillation_step_costs_the_known_tflops_a_clip(recompute, known):
    recipe = recipes.load(WAN / "wan-1.3b/sparse.toml", sets=[f"run.recompute={recompute}"])
    work = flops.passes(recipe).items()
    total = sum(n * flops.of_role(recipe, role, AT_448P).total for role, n in work)
    assert total / 1e12 == pytest.approx(known, rel=0.02)


def test_eight_times_the_devices_take_an_eighth_of_the_arithmetic_and_what_is_too_large_is_said():
    machine = predict.Machine(rate=346.0, link=337.0, net=37.5)
    path = str(WAN / "wan-1.3b" / "sparse.toml")
    eight, many = (predict.row(path, n, machine).split("|")[6].split("+") for n in (8, 64))
    assert float(eight[0]) / float(many[0]) == pytest.approx(8, rel=0.02)
    assert "refused" in predict.row(str(WAN / "wan-14b" / "dmd.toml"), 1, machine)
