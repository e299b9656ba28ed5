"""Tiny random model folders, shared by all tests; how many processes test, of how many threads."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch reads them, and for every process of a test: workers share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"

import torch

from fastvideo.formats import diffusers as layout
from fastvideo.log import logger
from fastvideo.model import Model, load
from fastvideo.models.dit.wan import WanConfig, WanDiT
from fastvideo.models.text.tokenizer import build_word_tokenizer
from fastvideo.models.text.umt5 import Umt5Config, Umt5Encoder
from fastvideo.models.vae.wan import WanVae, WanVaeConfig
from fastvideo.shapes import Compression
from fastvideo.spec import Attention, Defaults, Network, Scheduler, Spec
from tests.ranks import Ranks

WORDS = [
    "a",
    "big",
    "small",
    "red",
    "blue",
    "green",
    "ball",
    "square",
    "moving",
    "left",
    "right",
    "up",
    "down",
    "at",
    "night",
    "day",
]
TEXT_DIM, Z_DIM = 32, 4
MOST_WORKERS = 4  # each holds a gigabyte, and starts ranks of its own


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Test folders with a process per core, unless -n, -m or --pdb says otherwise.

    So does -p no:xdist. Files and single tests that are named stay in this process, as do the heavy
    proofs of `full`.
    """
    option = config.option
    is_worker = hasattr(config, "workerinput")
    is_asked = "numprocesses" not in option or option.numprocesses is not None or option.tx
    if is_worker or is_asked or option.usepdb or option.markexpr != "not full":
        return
    if all(Path(config.invocation_params.dir, word).is_dir() for word in config.args):
        is_linux = sys.platform == "linux"
        cores = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
        option.numprocesses = min(MOST_WORKERS, cores)
        option.dist = "worksteal"


def pytest_collection_finish() -> None:
    """Keep what is there from now on out of collections, which imageio runs twice a clip."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """Do so again with what a file leaves, such as compilers that were imported."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for functions that several ranks call together."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As many as ranks have, whatever a recipe of the test before set: other sums, other bits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def unconfigured_log() -> None:
    """As before any command, which sends the lines of its whole process elsewhere."""
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Have processes hear SIGINT, which a shell makes ignored for all that it starts behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of every real class, Wan2.2 VAE layout, stride 4x8x8, with our spec."""
    root = tmp_path_factory.mktemp("models")
    return layout.save(tiny_model(root / "tokenizer"), root / "tiny")


@pytest.fixture(scope="session")
def tiny_diffusers_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, loaded and saved again by stock diffusers: no spec, its own file names."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("stock") / "tiny"
    pipe = diffusers.WanPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    pipe.save_pretrained(folder)
    assert not (folder / "fastvideo.json").exists()
    return folder


@pytest.fixture(scope="session")
def gated_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with gates of some size, under VSA: without them it is `tiny_folder` again."""
    dense = load(tiny_folder, device="cpu", dtype="float32")
    dit = WanDiT(dataclasses.replace(dense.dit.config, gate_compress=True))
    lacking = dit.load_state_dict(dense.dit.state_dict(), strict=False)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, weight in dit.named_parameters():
            if "to_gate_compress" in name:
                weight.normal_(std=0.3)
    assert all("to_gate_compress" in name for name in lacking.missing_keys)
    own = {"pattern": "vsa", "args": {"sparsity": 0.5, "tile": [1, 2, 2]}}
    changes = {
        "name": "gated",
        "attention": Attention.model_validate(own),
        "dit": Network(family="wan", config=dataclasses.asdict(dit.config)),
    }
    spec = dense.spec.model_copy(update=changes)
    model = dataclasses.replace(dense, spec=spec, dit=dit.eval().requires_grad_(False))
    return layout.save(model, tmp_path_factory.mktemp("models") / "gated")


@pytest.fixture
def tiny_copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_folder` that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


def tiny_model(tokenizer_folder: Path) -> Model:
    """Build the tiny model in float32 from seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = build_word_tokenizer(WORDS, tokenizer_folder)
        dit = WanDiT(
            WanConfig(
                num_attention_heads=2,
                attention_head_dim=24,
                num_layers=2,
                ffn_dim=64,
                freq_dim=32,
                text_dim=TEXT_DIM,
                in_channels=Z_DIM,
                out_channels=Z_DIM,
            )
        )
        vae = WanVae(
            WanVaeConfig(
                base_dim=8,
                decoder_base_dim=8,
                z_dim=Z_DIM,
                dim_mult=(1, 2, 2),
                num_res_blocks=1,
                temperal_downsample=(True, True),
                latents_mean=(0.1, -0.2, 0.3, 0.0),
                latents_std=(1.1, 0.9, 1.3, 0.7),
                is_residual=True,
                in_channels=12,
                out_channels=12,
                patch_size=2,
            )
        )
        text = Umt5Encoder(
            Umt5Config(
                vocab_size=tokenizer.vocab_size,
                d_model=TEXT_DIM,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=2,
            )
        )
        text.init_weights()
        _randomise(dit)
    spec = Spec(
        name="tiny",
        dit=Network(family="wan"),
        vae=Network(family="wan"),
        text=Network(family="umt5"),
        compression=Compression(temporal=4, spatial=8, patch=(1, 2, 2)),
        scheduler=Scheduler(name="unipc", args={"shift": 3.0}),
        defaults=Defaults(
            num_frames=9,
            height=32,
            width=48,
            fps=8,
            num_inference_steps=2,
            guidance_scale=3.0,
            negative_prompt="a blue square",
            max_text_tokens=16,
        ),
    )
    networks = [module.eval().requires_grad_(False) for module in (dit, vae, text)]
    return Model(spec, *networks, tokenizer, torch.device("cpu"), torch.float32)


def _randomise(module: torch.nn.Module) -> None:
    """Replace constant starting values, behind which a mistake could hide."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() < 2 or parameter.std() < 1e-6:
                parameter += 0.1 * torch.randn_like(parameter)
