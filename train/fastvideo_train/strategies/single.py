"""One process, one device: float32 masters beside the networks' own weights.

A network computes with weights of its own dtype (bfloat16 without autocast); its masters take
gradients and updates in float32 and are copied into the network once a step. Weights that are
float32 in the network are their own masters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo_train.ema import Ema
from fastvideo_train.optim import Optimizer
from fastvideo_train.recipe import Recipe
from fastvideo_train.roles import Role


class _Trained:
    """One learning role: parameters, masters, optimizer, average, and how often it was updated."""

    def __init__(self, role: Role, recipe: Recipe) -> None:
        params = {n: p for n, p in role.net.named_parameters() if p.requires_grad}
        self.net: nn.Module = role.net
        self.params: dict[str, nn.Parameter] = params
        # What a method froze inside a learning role is saved with it: the role stays whole.
        # What lies under a LoRA is read again from where it came.
        self.base = role.base
        others = () if role.base else role.net.named_parameters()
        self.frozen = {n: p.detach().clone() for n, p in others if n not in params}
        self.masters: dict[str, Tensor] = {n: _master(p, role, n) for n, p in params.items()}
        for name, param in role.net.named_parameters():
            param.data = param.data.to(role.compute_dtype(name))
        self.grads = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        self.copied = [n for n, p in params.items() if self.masters[n] is not p]
        self.optimizer = Optimizer(self.masters, recipe.optim_of(role.name))
        self.ema = Ema(self.masters, recipe.ema.decay) if recipe.ema.decay else None
        self.num_micro = 0
        self.num_updates = 0

    def collect(self) -> None:
        """Move the network's gradients into the float32 sum."""
        present = [n for n, p in self.params.items() if p.grad is not None]
        new = [self.params[n].grad for n in present]
        sums = [self.grads[n] for n in present]
        if self.num_micro == 0:
            torch._foreach_copy_(sums, [g for g in new if g is not None])
            for name in self.grads.keys() - set(present):
                self.grads[name].zero_()
        else:
            torch._foreach_add_(sums, [g.float() for g in new if g is not None])
        for param in self.params.values():
            param.grad = None
        self.num_micro += 1

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
            params[name].copy_(tensor)

    @torch.no_grad()
    def assign(self, weights: Mapping[str, Tensor]) -> None:
        """Set masters and network from float32 weights."""
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self.refresh()


class Strategy:
    """Back-propagates, updates and saves the roles of a run in this process."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._trained: dict[str, _Trained] = {}

    def prepare(self, roles: Mapping[str, Role]) -> None:
        """Give every learning role masters, an optimizer and an average."""
        self._trained = {n: _Trained(r, self.recipe) for n, r in roles.items() if r.trainable}

    def backward(self, roles: Sequence[str], loss: Tensor) -> None:
        """Add the gradients of `loss` / accumulate to the named roles, and to no other."""
        inputs = [p for name in roles for p in self._trained[name].params.values()]
        torch.autograd.backward(loss / self.recipe.run.accumulate, inputs=inputs)
        for name in roles:
            self._trained[name].collect()

    @torch.no_grad()
    def update(self, role: str, *, step: int) -> dict[str, float]:
        """Clip, step and zero one role; return its gradient norm before the clip and its rate."""
        one = self._trained[role]
        grads = list(one.grads.values())
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        clip = one.optimizer.spec.clip
        torch._foreach_mul_(grads, torch.clamp(clip / (norm + 1e-6), max=1.0))
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
        learned = one.ema.weights if averaged and one.ema is not None else one.masters
        return {**one.frozen, **learned}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let every learning network compute with its average inside the block."""
        kept = {
            name: {n: m.detach().clone() for n, m in one.masters.items()}
            for name, one in self._trained.items()
        }
        for name, one in self._trained.items():
            one.assign(self.gather(name))
        try:
            yield
        finally:
            for name, one in self._trained.items():
                one.assign(kept[name])

    def state_dict(self) -> dict[str, Any]:
        """Return everything of the learning roles that the next step depends on."""
        return {
            name: {
                "masters": {n: m.detach() for n, m in one.masters.items()},
                "frozen": one.frozen,
                "base": one.base,
                "num_updates": one.num_updates,
                "optimizer": one.optimizer.state_dict(),
                "ema": one.ema.state_dict() if one.ema is not None else None,
            }
            for name, one in self._trained.items()
        }

    def load_state_dict(self, state: Mapping[str, Any], *, source: str) -> None:
        """Restore `state_dict` bit for bit; raise `ValueError` if it belongs to other roles."""
        if list(state) != list(self._trained):
            raise ValueError(f"{source} trains {list(state)}, this run {list(self._trained)}")
        for name, one in self._trained.items():
            mine = {n: m.shape for n, m in one.masters.items()}
            if {n: m.shape for n, m in state[name]["masters"].items()} != mine:
                raise ValueError(f"{source} holds other networks: role {name!r} has other shapes")
            if state[name].get("base", "") != one.base:
                raise ValueError(f"{source}: the model under the LoRA of {name!r} is another now")
            one.assign(state[name]["masters"])
            one.restore_frozen(state[name].get("frozen", {}))
            one.optimizer.load_state_dict(state[name]["optimizer"])
            # a checkpoint that counted none is of a run whose warm-up was over
            one.num_updates = state[name].get("num_updates", one.optimizer.spec.warmup)
            if one.ema is not None and state[name]["ema"] is not None:
                one.ema.load_state_dict(state[name]["ema"])
            elif one.ema is not None:  # switched on by the resumed recipe: starts from here
                one.ema = Ema(one.masters, self.recipe.ema.decay)


def _master(param: nn.Parameter, role: Role, name: str) -> Tensor:
    is_own = role.compute_dtype(name) == torch.float32
    return param if is_own else param.detach().clone()
