"""What `one_step.py` times: this package's loop and a plain one around diffusers' model."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from fastvideo_train import flops, loop, memory
from fastvideo_train import recipe as recipes
from fastvideo_train.batches import stream
from fastvideo_train.methods import StepKey
from fastvideo_train.recipe import Recipe
from step_time import peer_model
from torch import Tensor

from fastvideo import attention, rng, weights
from fastvideo.attention import sparse
from fastvideo.config import merge, parse
from fastvideo.models.dit import wan
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.shapes import LatentShape

Draws = tuple[Tensor, Tensor]
"""Noise of the latents' shape, and levels (B, 1) between 0 and 1."""
PEER = "diffusers"
TINY_TEXT = {
    "vocab_size": 384,
    "d_model": 16,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 1,
    "d_ff": 32,
}
"""Never run: text states are given."""


@dataclass(frozen=True)
class Work:
    """Operations of a step: those that are executed, and those that the model needs."""

    executed: float
    model: float


class Row(Protocol):
    """A way to train.

    `net` returns the velocity, `work` is that of a step, `estimate` what `memory.py` expects. A
    dense row computes what diffusers does, a paired one also learns as it does.
    """

    net: Any
    work: Work
    says: str
    estimate: int | None
    is_dense: bool
    is_paired: bool

    def step(self, draws: Draws | None = None) -> float:
        """Take a step and return its loss; the first ones are told their noise."""


@dataclass(frozen=True)
class Case:
    """What all rows share."""

    recipe: Recipe
    config: wan.Config
    clip: LatentShape
    first: Mapping[str, Tensor]
    batch: Mapping[str, Any]
    text_BLC: Tensor
    draws: Draws

    @classmethod
    def of(cls, recipe: Recipe, args: argparse.Namespace) -> Case:
        """Give a recipe synthetic latents and new weights; draw what all rows start from."""
        student = recipe.roles.get("student")
        if recipe.method.name != "flow_matching" or student is None or student.lora:
            raise SystemExit(f"{args.recipe} must be of method flow_matching, without a lora")
        config = wan.Config.parse(student.config)
        recipe = parse(Recipe, _plain_tree(recipe, config, args), source=args.recipe)
        with stream(recipe, start=0) as batches:
            batch = next(batches)
        key, method = StepKey(recipe.run.seed, 0, recipe.run.steps), loop.make_method(recipe)
        noise = key.noise("flow/noise", tuple(batch["latents"].shape)).to(args.device)
        sigma_B1 = method.sigmas(key, args.batch).to(args.device)
        shape = (args.batch, recipe.method.args["max_text_tokens"], config.text_dim)
        return cls(
            recipe=recipe,
            config=config,
            clip=LatentShape(*args.size),
            first=random_weights(config, args.device),
            batch=batch,
            text_BLC=rng.noise(shape, seed=0, purpose="bench/text", step=0).to(args.device),
            draws=(noise, sigma_B1),
        )

    def rows(self, only: list[str]) -> dict[str, Callable[[], Row]]:
        """Return how each row is made; ours that cannot differ from others are left out."""
        ours = partial(Ours, self)
        rows: dict[str, Callable[[], Row]] = {PEER: partial(Plain, self), "ours": ours}
        if self.recipe.optim.muon:
            rows["ours, muon"] = partial(Ours, self, muon=True)
        if self.recipe.roles["student"].attention.pattern == "vsa":
            rows["ours, vsa"] = partial(Ours, self, vsa=True)
        unknown = set(only) - set(rows)
        if unknown:
            raise SystemExit(f"--only {sorted(unknown)} is not among {list(rows)}")
        return {name: make for name, make in rows.items() if not only or name in only}

    @property
    def num_tokens(self) -> int:
        """Tokens of all clips."""
        return len(self.text_BLC) * self.clip.tokens(self.config.patch_size).num_tokens

    def facts(self) -> dict[str, Any]:
        """Return what a record says of the case."""
        run = self.recipe.run
        more = {"text_tokens": self.text_BLC.shape[1], "average": self.recipe.decay_of("student")}
        return {"dtype": run.dtype, "recompute": run.recompute, "tokens": self.num_tokens} | more

    def work(self, *, pattern: attention.Pattern, executed: float, needed: float) -> Work:
        """Count a step; `executed` and `needed` are pairs of a query and a key of a head."""
        gated = isinstance(pattern, attention.Vsa)
        config = self.config if gated else _ungated(self.config)
        count = partial(
            flops.forward, config, self.clip, pattern, num_text_tokens=self.text_BLC.shape[1]
        )
        recompute, clips = self.recipe.run.recompute, len(self.text_BLC)
        return Work(
            clips * flops.learning(count(pairs=executed), recompute=recompute),
            clips * flops.learning(count(pairs=needed), recompute=False),
        )


class Ours:
    """This package's loop."""

    def __init__(self, case: Case, *, muon: bool = False, vsa: bool = False) -> None:
        tree = recipes.dump(case.recipe)
        student = tree["roles"]["student"]
        if not muon:
            tree["optim"].pop("muon", None)
        if not vsa:
            student["attention"] = {"pattern": "dense"}
            student["config"] = {**student["config"], "gate_compress": False}
        plan = parse(Recipe, tree, source=case.recipe.run.name)
        with tempfile.TemporaryDirectory() as folder:
            self.job = loop.Job.open(plan, Path(folder))
        self.job.strategy._trained["student"].assign(case.first)
        self.job.method.encode = lambda *_: case.text_BLC
        self.batch, role = case.batch, self.job.roles["student"]
        length = case.text_BLC.shape[1]
        chosen = role.attend(case.clip, num_text_tokens=length, step=0)
        layout, backend = chosen["layout"], chosen["attend"].self_backend
        executed, needed = sparse.pairs(layout, backend)
        self.net = role.net
        self.work = case.work(pattern=layout.pattern, executed=executed, needed=needed)
        self.says = f"{'Muon and AdamW' if muon else 'AdamW'}, {attention.write(layout.pattern)}"
        self.says += f" by {backend.__name__.rpartition('.')[2]}"
        self.estimate = memory.of(plan, ParallelConfig()).total
        self.is_dense, self.is_paired = not vsa, not (vsa or muon)

    def step(self, draws: Draws | None = None) -> float:
        """Take a step; it draws the noise of the run's first one, which `draws` repeats."""
        return float(loop._one_step(self.job, [self.batch])["loss"])


class Plain:
    """The loop that a user of diffusers writes."""

    estimate = None
    is_dense = is_paired = True

    def __init__(self, case: Case) -> None:
        from diffusers.training_utils import EMAModel

        run, optim = case.recipe.run, case.recipe.optim
        self.net = peer_model(case.config)
        self.net.load_state_dict({n: case.first[n] for n in self.net.state_dict()})
        self.net.to(run.device).train()
        if run.recompute:
            self.net.enable_gradient_checkpointing()
        self.params = list(self.net.parameters())
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.clip, decay = optim.clip, case.recipe.decay_of("student")
        self.average = EMAModel(self.params, decay=decay, foreach=True) if decay else None
        self.clean = case.batch["latents"].to(run.device)
        self.text_BLC = case.text_BLC
        is_half = run.dtype == "bfloat16"
        self.says = f"fused AdamW, float32{' under autocast to bfloat16' * is_half}, SDPA"
        device = torch.device(run.device).type
        self.autocast = partial(torch.autocast, device, torch.bfloat16, enabled=is_half)
        tokens = case.clip.tokens(case.config.patch_size).num_tokens
        self.work = case.work(pattern=attention.Dense(), executed=tokens**2, needed=tokens**2)

    def step(self, draws: Draws | None = None) -> float:
        """Take a step, with noise of its own unless it is told."""
        clean = self.clean
        if draws is None:
            draws = torch.randn_like(clean), torch.randn_like(clean[:, :1, 0, 0, 0]).sigmoid()
        noise, sigma_B1 = draws
        sigma = sigma_B1[:, :, None, None, None]
        noisy = (1 - sigma) * clean + sigma * noise
        with self.autocast():
            v = self.net(noisy, 1000 * sigma_B1[:, 0], self.text_BLC, return_dict=False)[0]
        loss = F.mse_loss(v.float(), noise - clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.step(self.params)
        return float(loss.detach())


def _ungated(config: wan.Config) -> wan.Config:
    return replace(config, gate_compress=False)


def _plain_tree(recipe: Recipe, config: wan.Config, args: argparse.Namespace) -> dict[str, Any]:
    """Return a recipe without files behind it: one device, a constant rate, no annealing."""
    frames, height, width = args.size
    tree = recipes.dump(recipe) | {
        "data": {"name": "synthetic", "frames": frames, "height": height, "width": width}
        | {"channels": config.in_channels},
        "parallel": {},
        "validate": {},
    }
    tree["roles"]["text"] = {"kind": "text", "family": "umt5", "config": TINY_TEXT}
    over = {
        "run": {"batch": args.batch, "accumulate": 1, "device": args.device}
        | {"strategy": "single", "strategy_args": {}, "threads": args.threads, "steps": 1_000_000},
        "roles": {
            "student": {"from": "", "attention": {"anneal_every": 0}},
            "text": {"trainable": False},
        },
        "method": {"args": {"tokenizer": "world:shapes", "negative_prompt": ""}},
        "optim": {"schedule": "constant", "warmup": 0},
    }
    return merge(tree, over)


def random_weights(config: wan.Config, device: str) -> dict[str, Tensor]:
    """Draw float32 weights as large as a trained network's, none constant; kept on the CPU."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = {}
    for name, p in weights.build(lambda: wan.DiT(config)).named_parameters():
        x = torch.randn(p.shape, device=device, generator=generator)
        if name.endswith("bias"):
            x.mul_(0.02)
        elif "norm" in name:
            x.mul_(0.1).add_(1)
        else:
            x.mul_(math.prod(p.shape[1:]) ** -0.5)
        drawn[name] = x.cpu()
    return drawn
