"""What several processes start from: each reads its own rows, with the checks and bits of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastvideo_train.loop import Job
from fastvideo_train.recipe import Recipe
from rank_runs import held, opened, small, weights
from test_strategies import worst
from torch import Tensor

from fastvideo import weights as files
from fastvideo.models.dit.wan import KEEP_FLOAT32

FSDP2 = "run.strategy=fsdp2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The networks of two new runs, each as the part of a model folder that has no other."""
    root = tmp_path_factory.mktemp("model")
    nets: dict[str, Any] = {}
    for method in ("flow_matching", "vae"):
        job = Job.open(small(method), root / method)
        nets |= {role.kind: role.net for role in job.roles.values()}
    for kind, part in {"dit": "transformer", "text": "text_encoder", "vae": "vae"}.items():
        _write(root / kind / part, {n: w + 0.01 for n, w in nets[kind].state_dict().items()})
    return root


def _write(part: Path, tensors: dict[str, Tensor]) -> None:
    name = "model" if part.name == "text_encoder" else "diffusion_pytorch_model"
    files.save(part / f"{name}.safetensors", tensors)


def _from(folder: Path, method: str, *sets: str) -> Recipe:
    roles = small(method).roles.items()
    starts = [f"roles.{name}.from={folder / role.kind}" for name, role in roles]
    return small(method, *starts, *sets)


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ("folder", 2),
        ("run", 3),
        pytest.param("folder", 3, marks=pytest.mark.full),
        pytest.param("run", 2, marks=pytest.mark.full),
    ],
)
def test_a_process_never_holds_more_of_a_role_than_its_rows_and_one_tensor(
    source, size, folder, ranks, tmp_path
):
    """Rows that a run of two wrote are read again by three; the frozen role is in bfloat16."""
    if source == "run":
        _, wanted = ranks(2, weights, _from(folder, "flow_matching", FSDP2), str(tmp_path), 1)[0]
        wanted, origin = wanted["student/True"], tmp_path
        assert (tmp_path / "checkpoints/step-00000001/shards").is_dir()
    else:
        wanted = {n: t.numpy() for n, t in files.Checkpoint(folder / "dit/transformer").items()}
        origin = folder / "dit"
    starts = [f"roles.{name}.from={origin}" for name in ("student", "teacher")]
    recipe = small("dmd", FSDP2, *starts, "roles.teacher.dtype=bfloat16")
    for one in ranks(size, held, recipe, "teacher"):
        assert one["peak"] <= min(one["rows"] + one["largest"], 0.75 * one["whole"])
        for name, tensor in wanted.items():
            exact = torch.from_numpy(tensor)
            kept = exact if any(k in name for k in KEEP_FLOAT32) else exact.bfloat16().float()
            assert np.array_equal(one["weights"][name], kept.numpy())
    for one in ranks(size, held, recipe, "student"):  # masters, sums, two moments, an average
        assert one["peak"] <= 5 * one["rows"] + one["largest"] and one["end"] > 4 * one["rows"]


@pytest.mark.parametrize(
    ("method", "sets"),
    [
        ("dmd", []),
        ("vae", ["method.args.train_encoder=false"]),
        ("flow_matching", ['roles.student.lora={rank=2, alpha=4, targets=["attn1"]}']),
        (
            "flow_matching",
            [
                "roles.student.config.gate_compress=true",
                'roles.student.attention={pattern="vsa", args={sparsity=0.5, tile=[1,2,2]}}',
            ],
        ),
    ],
)
def test_what_starts_from_a_folder_trains_like_a_single_process(
    method, sets, folder, ranks, tmp_path
):
    """Also with a frozen part, which is saved whole; with maps beside frozen weights; with gates
    that the folder lacks.
    """
    single = _from(folder, method, *sets)
    wanted, before = weights(0, 1, single, str(tmp_path / "one"))
    got, after = ranks(2, weights, _from(folder, method, FSDP2, *sets), str(tmp_path / "two"))[0]
    assert worst(got, wanted) <= 1e-5
    for role, tensors in before.items():
        assert tensors.keys() == after[role].keys()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(after[role][name], tensor, rtol=1e-3, atol=1e-4)


def _refused(rank: int, size: int, recipe: Recipe, folder: str) -> str:
    try:
        opened(recipe, Path(folder), size)
    except ValueError as error:
        return str(error)
    return ""


def test_weights_that_do_not_fit_are_refused_in_the_words_of_a_single_process(
    folder, ranks, tmp_path
):
    tensors = dict(files.Checkpoint(folder / "dit/transformer"))
    tensors["more"] = tensors.pop("proj_out.bias")
    tensors["proj_out.weight"] = torch.zeros(3, 5)
    _write(tmp_path / "transformer", tensors)
    recipes = [
        small("flow_matching", f"run.strategy={s}", f"roles.student.from={tmp_path}")
        for s in ("single", "fsdp2")
    ]
    wanted = _refused(0, 1, recipes[0], str(tmp_path / "r"))
    assert "1 missing: proj_out.bias; 1 unexpected: more; 1 mis-shaped: proj_out.weight" in wanted
    assert ranks(2, _refused, recipes[1], str(tmp_path / "r")) == [wanted] * 2
