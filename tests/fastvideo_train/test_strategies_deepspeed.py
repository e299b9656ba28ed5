"""DeepSpeed trains like one process, goes on as it was, and is refused where it cannot serve.

It keeps groups of processes in its module, so that every launch needs fresh ones; the first on a
machine without a GPU compiles a part of it for some minutes.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator

import pytest
from fastvideo_train import loop, strategies
from fastvideo_train.export import load_run
from rank_runs import losses, opened, small, weights
from tiny_recipes import tiny

from fastvideo.parallel.degrees import ParallelConfig
from tests.fastvideo_train.test_strategies import same, worst
from tests.ranks import Ranks

MISSING = [
    *([] if importlib.util.find_spec("deepspeed") else ["the package deepspeed"]),
    *([] if shutil.which("ninja") else ["ninja on the PATH"]),
    *([] if shutil.which("g++") or shutil.which("clang++") else ["a C++ compiler"]),
]
runs = [
    pytest.mark.full,
    pytest.mark.skipif(bool(MISSING), reason=f"DeepSpeed needs {', '.join(MISSING)}"),
]
FROZEN_TEXT = "roles.text.trainable=false"


@pytest.fixture
def fresh() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("size", "method", "args", "sets"),
    [
        pytest.param(2, "flow_matching", "{zero=1}", [FROZEN_TEXT], marks=runs),
        pytest.param(2, "flow_matching", "{zero=2, offload=true}", [FROZEN_TEXT], marks=runs),
        pytest.param(2, "dmd", "{zero=2}", [], marks=runs),
        pytest.param(2, "vae", "{zero=2}", [], marks=runs),
        pytest.param(2, "classify", "{zero=3}", ["data.workers=0"], marks=runs),
        pytest.param(1, "flow_matching", "{zero=2}", [FROZEN_TEXT], marks=runs),
        pytest.param(1, "dmd", "{zero=2}", [], marks=runs),
        pytest.param(1, "vae", "{zero=2}", [], marks=runs),
    ],
)
def test_losses_are_those_of_a_single_process_and_a_resumed_run_goes_on_bit_for_bit(
    size, method, args, sets, fresh, tmp_path
):
    """The processes of each part are killed before the next one begins."""
    wanted = losses(0, 1, small(method, *sets), str(tmp_path / "single"))
    recipe = small(method, *sets, "run.strategy=deepspeed", f"run.strategy_args={args}")
    straight, end = fresh(size, weights, recipe, str(tmp_path / "straight"))[0]
    assert worst(straight, wanted) <= 1e-5
    fresh.close()
    first, _ = fresh(size, weights, recipe, str(tmp_path / "stopped"), 1)[0]
    fresh.close()
    rest, resumed = fresh(size, weights, recipe, str(tmp_path / "stopped"))[0]
    assert [*first, *rest] == straight and same(end, resumed)
    trained = load_run(tmp_path / "stopped")
    assert trained.step == 3, "an export reads it"


@pytest.mark.parametrize("size", [pytest.param(1, marks=runs)])
def test_others_may_not_go_on_from_one_process(size, fresh, tmp_path):
    sets = ("run.strategy=deepspeed", FROZEN_TEXT)
    fresh(size, losses, small("flow_matching", *sets), str(tmp_path / "run"), 2)
    with pytest.raises(ValueError, match="was saved by ZeRO-2 on 1 processes; resume"):
        opened(small("flow_matching", FROZEN_TEXT), tmp_path / "run")
    fresh.close()
    with pytest.raises(AssertionError, match=r"by ZeRO-2 on 1 processes.*ZeRO-2 on 2 processes"):
        fresh(2, losses, small("flow_matching", *sets), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("method", "sets", "message"),
    [
        ("flow_matching", [], "'text' of kind 'text' learns by way of another; use strategy fsdp2"),
        ("dmd", ["run.strategy_args.zero=3"], "zero 3 cannot serve method dmd, in which student"),
        (
            "flow_matching",
            [FROZEN_TEXT, "run.strategy_args.zero=3"],
            "zero 3 cannot serve role 'student' of kind 'dit'.*nearest: zero = 2",
        ),
        ("vae", ["run.strategy_args.zero=4"], "zero 4.* in run.strategy_args"),
        ("dmd", ["run.dtype=bfloat16"], "norms must stay float32; set its dtype to 'float32'"),
        ("vae", ["run.compile=true"], "run.compile must be false under strategy 'deepspeed'"),
    ],
)
def test_what_it_cannot_serve_is_refused_before_a_process_joins(method, sets, message):
    recipe = small(method, "run.strategy=deepspeed", *sets)
    with pytest.raises(ValueError, match=message):
        loop.check(recipe, recipe.degrees(2))


def test_muon_is_refused_by_name():
    recipe = tiny("vae", "run.strategy=deepspeed")
    with pytest.raises(ValueError, match=r"muon of role 'vae' needs matrices; take \[optim\.muon"):
        loop.check(recipe, ParallelConfig())


def test_a_missing_package_is_refused_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr("fastvideo_train.strategies.deepspeed.deepspeed", None)
    recipe = small("vae", "run.strategy=deepspeed")
    with pytest.raises(ValueError, match=r"needs the package deepspeed; .*pip install -e '\.\["):
        strategies.find(recipe).check(recipe, ParallelConfig())
