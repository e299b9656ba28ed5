"""What strategies share: float32 masters, their optimizer and their average, role by role.

A network computes with weights of its own dtype (bfloat16 without autocast); its masters take
gradients and updates in float32 and are copied into the network once a step. Weights that are
float32 in the network are their own masters.

All tensors here are plain ones. Where processes hold parts of weights (`fsdp2.py`), masters,
gradients, average and optimizer state are this process's parts, and only four functions differ:
`_place`, `local`, `leaf` and `whole`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.config import Strict, parse
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.parallel.mesh import Meshes, alone
from fastvideo_train.ema import Ema
from fastvideo_train.optim import Optimizer, Rows
from fastvideo_train.recipe import OptimSpec, Recipe
from fastvideo_train.roles import Role

BUCKET_NUMBERS = 1 << 25
"""Numbers that are averaged at a time: 128 MiB of float32."""


class Trained:
    """One learning role: parameters, masters, optimizer, average, and how often it was updated."""

    def __init__(self, role: Role, recipe: Recipe, meshes: Meshes) -> None:
        learning = {n for n, p in role.net.named_parameters() if p.requires_grad}
        self.net: nn.Module = role.net
        self.meshes = meshes
        # What a method froze inside a learning role is saved with it: the role stays whole.
        # What lies under a LoRA is read again from where it came.
        self.base, self.dtype = role.base, getattr(torch, recipe.run.dtype)
        others = () if role.base else role.net.named_parameters()
        self.frozen = {n: p.detach().clone() for n, p in others if n not in learning}
        self.masters: dict[str, Tensor] = self._place(role)
        self.params: dict[str, nn.Parameter] = {
            n: p for n, p in role.net.named_parameters() if n in learning
        }
        self.grads = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        self.copied = self._copies()
        self.optimizer = self._optimizer(recipe.optim_of(role.name))
        decay = recipe.decay_of(role.name)
        self.ema = Ema(self.masters, decay) if decay else None
        self.num_micro = 0
        self.num_updates = 0

    def _place(self, role: Role) -> dict[str, Tensor]:
        """Cast the network to what it computes in; return its float32 masters."""
        learning = {n: p for n, p in role.net.named_parameters() if p.requires_grad}
        masters = {n: _master(p, role, n) for n, p in learning.items()}
        for name, param in role.net.named_parameters():
            param.data = param.data.to(role.compute_dtype(name))
        return masters

    def _copies(self) -> list[str]:
        """Return the names of weights that have masters beside them."""
        return [n for n, p in self.params.items() if self.masters[n] is not p]

    def _optimizer(self, spec: OptimSpec, rows: Rows | None = None) -> Optimizer:
        return Optimizer(self.masters, spec, rows, self.dtype)

    def local(self, tensor: Tensor) -> Tensor:
        """Return what this process holds of a parameter, a gradient, or a leaf of a state."""
        return tensor

    def leaf(self, name: str, local: Tensor) -> Tensor:
        """Return a tensor shaped like a parameter as it stands in a state."""
        return local

    def whole(self, name: str, local: Tensor) -> Tensor:
        """Return the whole of a tensor shaped like a parameter; all processes together."""
        return local

    def collect(self) -> None:
        """Move the network's gradients into the float32 sum."""
        found = {n: self.local(p.grad) for n, p in self.params.items() if p.grad is not None}
        sums = [self.grads[n] for n in found]
        if self.num_micro == 0:
            for name in self.grads.keys() - found.keys():
                self.grads[name].zero_()
        if self.num_micro == 0 and found:
            torch._foreach_copy_(sums, list(found.values()))
        elif found:
            torch._foreach_add_(sums, [g.float() for g in found.values()])
        for param in self.params.values():
            param.grad = None
        self.num_micro += 1

    def norm(self) -> Tensor:
        """Return the norm of the whole gradient."""
        norms = torch._foreach_norm(list(self.grads.values()))
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    @property
    def learned(self) -> dict[str, Tensor]:
        """The average, or without one the masters."""
        return self.ema.weights if self.ema is not None else self.masters

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters into the network."""
        if self.copied:
            torch._foreach_copy_(
                [self.params[n] for n in self.copied], [self.masters[n] for n in self.copied]
            )

    @torch.no_grad()
    def restore_frozen(self, weights: Mapping[str, Tensor]) -> None:
        """Set what a method froze, in the network too."""
        params = dict(self.net.named_parameters())
        for name, tensor in weights.items():
            self.frozen[name].copy_(tensor)
            self.local(params[name]).copy_(self.part(params[name], tensor))

    def part(self, like: Tensor, tensor: Tensor) -> Tensor:
        """Return this process's part of a leaf of a state; `like` is a parameter, cut as it is."""
        return tensor

    @torch.no_grad()
    def assign(self, weights: Mapping[str, Tensor]) -> None:
        """Set masters and network from float32 weights, this process's parts of them."""
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self.refresh()

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state with leaves."""
        return self.optimizer.state_dict()

    def own_optimizer_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return `optimizer_state` again as the optimizer itself knows it."""
        return state


class Masters:
    """Back-propagates, updates and saves roles that have masters."""

    Config: type[Strict] = Strict
    trained: type[Trained] = Trained

    def __init__(self, recipe: Recipe, meshes: Meshes | None = None) -> None:
        self.recipe = recipe
        self.meshes = meshes or alone(recipe.run.device)
        self.check(recipe, self.meshes.degrees)
        self.config = self.parsed(recipe)
        self.roles: Mapping[str, Role] = {}
        self._trained: dict[str, Trained] = {}

    @classmethod
    def parsed(cls, recipe: Recipe) -> Any:
        """Return `[run] strategy_args`; `ValueError` for a key that the strategy does not have."""
        source = f"run.strategy_args of {recipe.run.name}, strategy {recipe.run.strategy!r}"
        return parse(cls.Config, recipe.run.strategy_args, source=source)

    @classmethod
    def check(cls, recipe: Recipe, degrees: ParallelConfig) -> None:
        """Raise `ValueError` for arguments that the strategy does not have."""
        cls.parsed(recipe)

    @property
    def first_device(self) -> str:
        """Where networks are built: where they compute."""
        return self.recipe.run.device

    def prepare(self, roles: Mapping[str, Role]) -> None:
        """Give every learning role masters, an optimizer and an average."""
        self.roles = roles
        self._trained = {
            n: self.trained(r, self.recipe, self.meshes) for n, r in roles.items() if r.trainable
        }

    def backward(self, roles: Sequence[str], loss: Tensor) -> None:
        """Add the gradients of `loss` / accumulate to the named roles, and to no other."""
        # Processes that share a sequence find parts of a gradient, of which others take the mean.
        self._back_propagate(
            roles, loss * self.meshes.degrees.of("sequence") / self.recipe.run.accumulate
        )
        for name in roles:
            self._trained[name].collect()

    def _back_propagate(self, roles: Sequence[str], loss: Tensor) -> None:
        inputs = [p for name in roles for p in self._trained[name].params.values()]
        torch.autograd.backward(loss, inputs=inputs)

    def reduce(self, one: Trained) -> None:
        """Replace the sums of gradients by their means over all processes."""

    @torch.no_grad()
    def update(self, role: str, *, step: int) -> dict[str, float]:
        """Clip, step and zero one role; return its gradient norm before the clip and its rate."""
        one = self._trained[role]
        self.reduce(one)
        norm = one.norm()
        clip = one.optimizer.spec.clip
        torch._foreach_mul_(list(one.grads.values()), torch.clamp(clip / (norm + 1e-6), max=1.0))
        for name, master in one.masters.items():
            master.grad = one.grads[name]
        lr = one.optimizer.step(step, self.recipe.run.steps, num_updates=one.num_updates)
        for master in one.masters.values():
            master.grad = None
        one.num_micro = 0
        one.num_updates += 1
        one.refresh()
        if one.ema is not None:
            one.ema.update(one.masters)
        return {"grad_norm": float(norm), "lr": lr}

    def gather(self, role: str, *, averaged: bool = True) -> dict[str, Tensor]:
        """Return a role's whole float32 weights: its average if there is one, else its masters."""
        one = self._trained[role]
        learned = one.learned if averaged else one.masters
        return {**one.frozen, **{n: one.whole(n, w) for n, w in learned.items()}}

    @contextmanager
    def averaged(self) -> Iterator[Mapping[str, Role]]:
        """Let every learning network compute with its average inside the block."""
        kept = {
            name: {n: m.detach().clone() for n, m in one.masters.items()}
            for name, one in self._trained.items()
        }
        for one in self._trained.values():
            one.assign(one.learned)
        try:
            yield self.roles
        finally:
            for name, one in self._trained.items():
                one.assign(kept[name])

    def state_dict(self) -> dict[str, Any]:
        """Return everything of the learning roles that the next step depends on."""
        return {name: _state(one) for name, one in self._trained.items()}

    def load_state_dict(self, state: Mapping[str, Any], *, source: str) -> None:
        """Restore `state_dict` bit for bit; raise `ValueError` if it belongs to other roles."""
        shapes = {
            name: {n: tuple(p.shape) for n, p in one.params.items()}
            for name, one in self._trained.items()
        }
        self.check_roles(state, shapes, source=source)
        for name, one in self._trained.items():
            if "adamw" not in state[name]["optimizer"]:
                how = " ".join(state[name]["optimizer"].values())
                raise ValueError(f"{source} was saved {how}; resume with the same strategy")
            _restore(one, state[name], self.recipe.decay_of(name))

    def check_roles(
        self, state: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Any]], *, source: str
    ) -> None:
        """Raise `ValueError` if a state is not of roles with parameters of these shapes."""
        if list(state) != list(shapes):
            raise ValueError(f"{source} trains {list(state)}, this run {list(shapes)}")
        for name, mine in shapes.items():
            if {n: tuple(m.shape) for n, m in state[name]["masters"].items()} != mine:
                raise ValueError(f"{source} holds other networks: role {name!r} has other shapes")
            if state[name].get("base", "") != self.roles[name].base:
                raise ValueError(f"{source}: the model under the LoRA of {name!r} is another now")

    def save_more(self, folder: Path) -> None:
        """Write nothing: `state_dict` holds everything."""

    def load_more(self, folder: Path) -> None:
        """Read nothing."""

    def close(self) -> None:
        """Drop nothing: networks hold no process group."""


def outline_of(net: nn.Module) -> nn.Module:
    """Return a copy of a network whose parameters have shapes alone."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in net.parameters()}
    outline: nn.Module = copy.deepcopy(net, memo)
    return outline


def with_weights(outline: nn.Module, role: Role, weights: Mapping[str, Tensor]) -> Role:
    """Return a role with a plain network of these weights, in what it computes in."""
    net = copy.deepcopy(outline)
    cast = {n: w.to(role.compute_dtype(n)) for n, w in weights.items()}
    net.load_state_dict(cast, strict=False, assign=True)  # buffers are in the outline
    net.to(next(iter(weights.values())).device).requires_grad_(False)
    return replace(role, net=net, spread=None)


@torch.no_grad()
def change_flat(tensors: Sequence[Tensor], change: Callable[[Tensor], Tensor]) -> None:
    """Replace tensors by what `change` makes of them laid end to end, as many at a time as fit."""
    for bucket in _buckets(tensors):
        flat = change(torch.cat([tensor.flatten() for tensor in bucket]))
        parts = torch.split(flat, [tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(x.numel() for x in bucket) + tensor.numel() > BUCKET_NUMBERS:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _state(one: Trained) -> dict[str, Any]:
    ema = one.ema.state_dict() if one.ema is not None else None
    if one.ema is not None and ema is not None:
        ema = {**ema, "weights": {n: one.leaf(n, w) for n, w in one.ema.weights.items()}}
    return {
        "masters": {n: one.leaf(n, m.detach()) for n, m in one.masters.items()},
        "frozen": one.frozen,
        "base": one.base,
        "num_updates": one.num_updates,
        "optimizer": one.optimizer_state(),
        "ema": ema,
    }


def _restore(one: Trained, state: Mapping[str, Any], decay: float) -> None:
    def parts(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: one.part(one.params[n], leaf) for n, leaf in leaves.items()}

    one.assign(parts(state["masters"]))
    one.restore_frozen(state.get("frozen", {}))
    one.optimizer.load_state_dict(one.own_optimizer_state(state["optimizer"]))
    # older checkpoints have no count beside the optimizer's own
    one.num_updates = state.get("num_updates", one.optimizer.num_updates)
    if one.ema is not None and state["ema"] is not None:
        one.ema.load_state_dict({**state["ema"], "weights": parts(state["ema"]["weights"])})
    elif one.ema is not None:  # switched on by the resumed recipe: starts from here
        one.ema = Ema(one.masters, decay)


def _master(param: nn.Parameter, role: Role, name: str) -> Tensor:
    is_own = role.compute_dtype(name) == torch.float32
    return param if is_own else param.detach().clone()
