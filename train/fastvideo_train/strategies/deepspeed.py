"""DeepSpeed's ZeRO: optimizer state (1), gradients (2) and weights (3) in parts on every process.

    [run]
    strategy = "deepspeed"
    strategy_args = { zero = 2, offload = false }     # offload: optimizer state in host memory

For those who have DeepSpeed's settings or its offloading to start from; FSDP2 serves more. One
engine holds one role. Its AdamW is torch's own, so that nothing is compiled for it. What is cut is
known to DeepSpeed alone, so its checkpoints resume with as many processes as wrote them; weights
and averages stand in them whole beside it, so that every export reads them.

An average costs whole float32 weights on each process and gathering them once an update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvideo.config import Strict
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.parallel.mesh import Meshes
from fastvideo_train.ema import Ema
from fastvideo_train.optim import rate
from fastvideo_train.recipe import OptimSpec, Recipe
from fastvideo_train.roles import Role
from fastvideo_train.strategies._masters import Masters, outline_of, with_weights

try:  # before processes join: its defaults keep the group that is there on import
    import deepspeed
except ModuleNotFoundError:
    deepspeed = None

FOLDER = "deepspeed"
ZERO_3_SERVES = ("classifier",)
"""Kinds of networks whose modules are all called by `forward`, with plain tensors."""


class Config(Strict):
    """The stage of ZeRO, and whether the optimizer's state lies in host memory."""

    zero: Literal[1, 2, 3] = 2
    offload: bool = False


class _Engine:
    """One learning role, in an engine of DeepSpeed."""

    def __init__(self, role: Role, recipe: Recipe, config: Config) -> None:
        self.spec = recipe.optim_of(role.name)
        self.net: nn.Module = role.net
        self.base = role.base
        self.outline = outline_of(role.net)
        self.params = {n: p for n, p in role.net.named_parameters() if p.requires_grad}
        self.shapes = {n: tuple(p.shape) for n, p in self.params.items()}  # ZeRO-3 empties them
        others = () if role.base else role.net.named_parameters()
        self.frozen = {n: p.detach().clone() for n, p in others if n not in self.params}
        decay = recipe.decay_of(role.name)
        self.ema = Ema(self.params, decay) if decay else None
        self.engine = _engine(role, self.params, self.spec, config)
        self.num_updates = 0

    def masters(self) -> dict[str, Tensor]:
        """Return whole float32 weights; all processes together."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {n: safe_get_full_fp32_param(p).detach() for n, p in self.params.items()}

    def learned(self) -> dict[str, Tensor]:
        """Return the average, or without one the weights."""
        return self.ema.weights if self.ema is not None else self.masters()


class Strategy(Masters):
    """Trains roles by ZeRO."""

    Config = Config

    def __init__(self, recipe: Recipe, meshes: Meshes | None = None) -> None:
        super().__init__(recipe, meshes)
        if not dist.is_initialized():  # alone: DeepSpeed wants a group all the same
            store = dist.HashStore()  # type: ignore[attr-defined]
            backend = "nccl" if self.meshes.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        self._engines: dict[str, _Engine] = {}

    @classmethod
    def check(cls, recipe: Recipe, degrees: ParallelConfig) -> None:
        """Refuse what ZeRO cannot serve, and a missing package."""
        super().check(recipe, degrees)
        config: Config = cls.parsed(recipe)
        learning = [n for n, role in recipe.roles.items() if role.trainable]
        for name in learning:
            _check_role(recipe, name)
        if config.zero == 3 and len(learning) > 1:
            raise ValueError(
                f"run.strategy_args.zero 3 cannot serve method {recipe.method.name}, in which"
                f" {' and '.join(learning)} learn and call each other's weights; nearest: zero = 2,"
                " or strategy fsdp2"
            )
        for name in learning if config.zero == 3 else ():
            if recipe.roles[name].kind not in ZERO_3_SERVES:
                raise ValueError(
                    f"run.strategy_args.zero 3 cannot serve role {name!r} of kind"
                    f" {recipe.roles[name].kind!r}: it gathers a layer's weights where plain"
                    " tensors go through its forward, and this network's layers hand on tokens or"
                    " have functions of their own; nearest: zero = 2, or strategy fsdp2"
                )
        if recipe.run.compile:
            raise ValueError("run.compile must be false under strategy 'deepspeed'")
        _package()

    def prepare(self, roles: Mapping[str, Role]) -> None:
        """Give every learning role an engine."""
        self.roles = roles
        self._engines = {
            n: _Engine(r, self.recipe, self.config) for n, r in roles.items() if r.trainable
        }

    def backward(self, roles: Sequence[str], loss: Tensor) -> None:
        """Add the gradients of `loss` / accumulate to the named roles, and to no other."""
        (role,) = roles  # `check` refuses roles that share a loss
        scale = self.meshes.degrees.of("sequence") / self.recipe.run.accumulate
        self._engines[role].engine.backward(loss * scale)

    def update(self, role: str, *, step: int) -> dict[str, float]:
        """Clip, step and zero one role; return its gradient norm before the clip and its rate."""
        one, run = self._engines[role], self.recipe.run
        lr = one.spec.lr * rate(one.spec, step, run.steps, num_updates=one.num_updates)
        for group in one.engine.optimizer.param_groups:
            group["lr"] = lr
        one.engine.step()
        one.num_updates += 1
        if one.ema is not None:
            one.ema.update(one.masters())
        return {"grad_norm": float(one.engine.get_global_grad_norm()), "lr": lr}

    def gather(self, role: str, *, averaged: bool = True) -> dict[str, Tensor]:
        """Return a role's whole float32 weights: its average if there is one, else its masters."""
        one = self._engines[role]
        return {**one.frozen, **(one.learned() if averaged else one.masters())}

    @contextmanager
    def averaged(self) -> Iterator[Mapping[str, Role]]:
        """Yield roles with whole networks, averaged where they learn, on the first process."""
        roles = dict(self.roles)
        for name, one in self._engines.items():
            known = {n: p.detach() for n, p in one.net.named_parameters() if n not in one.params}
            weights = {**known, **one.learned()}
            if self.meshes.is_first:
                roles[name] = with_weights(one.outline, self.roles[name], weights)
        yield roles

    def state_dict(self) -> dict[str, Any]:
        """Return whole weights and averages; the engines' own state is not in it."""
        return {
            name: {
                "masters": one.masters(),
                "frozen": one.frozen,
                "base": one.base,
                "num_updates": one.num_updates,
                "optimizer": {FOLDER: self._cut},
                "ema": one.ema.state_dict() if one.ema is not None else None,
            }
            for name, one in self._engines.items()
        }

    def load_state_dict(self, state: Mapping[str, Any], *, source: str) -> None:
        """Restore what the engines do not; raise `ValueError` if it belongs to other roles."""
        self.check_roles(state, {n: one.shapes for n, one in self._engines.items()}, source=source)
        for name, one in self._engines.items():
            stored = state[name]["optimizer"].get(FOLDER)
            if stored != self._cut:
                how = stored or "by another strategy"
                raise ValueError(
                    f"{source} was saved {how}; resume with the same, this run is {self._cut}"
                )
            one.num_updates = state[name]["num_updates"]
            if one.ema is not None and state[name]["ema"] is not None:
                one.ema.load_state_dict(state[name]["ema"])
            elif one.ema is not None:
                one.ema.weights = {n: w.clone() for n, w in state[name]["masters"].items()}

    def save_more(self, folder: Path) -> None:
        """Let every engine write its part."""
        for name, one in self._engines.items():
            one.engine.save_checkpoint(str(folder / FOLDER), tag=name, save_latest=False)

    def load_more(self, folder: Path) -> None:
        """Let every engine read its part."""
        for name, one in self._engines.items():
            one.engine.load_checkpoint(str(folder / FOLDER), tag=name)

    def close(self) -> None:
        """Take the engines' hooks off, and destroy all process groups, DeepSpeed's own too."""
        for one in self._engines.values():
            one.engine.destroy()
        _package().comm.destroy_process_group()

    @property
    def _cut(self) -> str:
        c, size = self.config, self.meshes.degrees.world_size
        return f"by ZeRO-{c.zero} on {size} processes{' with offload' if c.offload else ''}"


def _check_role(recipe: Recipe, name: str) -> None:
    """Refuse an optimizer or a network that ZeRO cannot serve."""
    if recipe.optim_of(name).muon is not None:
        raise ValueError(
            f"strategy 'deepspeed' cuts weights without regard to their shape, and muon of role"
            f" {name!r} needs matrices; take [optim.muon] out, or use strategy fsdp2"
        )
    role = recipe.roles[name]
    if role.kind in ("text", "discriminator"):
        raise ValueError(
            f"strategy 'deepspeed' back-propagates a loss into one network, and role {name!r}"
            f" of kind {role.kind!r} learns by way of another; use strategy fsdp2, or freeze it"
        )
    if role.kind == "dit" and (role.dtype or recipe.run.dtype) != "float32":
        raise ValueError(
            f"strategy 'deepspeed' casts all weights of role {name!r} alike, and those of its times"
            " and norms must stay float32; set its dtype to 'float32', or use strategy fsdp2"
        )


def _engine(role: Role, params: Mapping[str, nn.Parameter], spec: OptimSpec, config: Config) -> Any:
    decayed = [p for p in params.values() if p.dim() >= 2]
    plain = [p for p in params.values() if p.dim() < 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, spec.weight_decay), (plain, 0.0))
        if group
    ]
    zero: dict[str, Any] = {"stage": config.zero}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # batches are the loop's affair
        "managed_gradient_accumulation": False,  # and so is when an update is due
        "gradient_clipping": spec.clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": role.dtype == torch.bfloat16},
        "communication_data_type": "fp32",
        "steps_per_print": 2**62,
    }
    optimizer = torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)
    engine, *_ = _package().initialize(model=role.net, optimizer=optimizer, config=settings)
    return engine


def _package() -> Any:
    if deepspeed is None:
        raise ValueError(
            "run.strategy 'deepspeed' needs the package deepspeed;"
            " DS_BUILD_OPS=0 pip install -e '.[train]'"
        )
    return deepspeed
