"""AdamW, with Muon for matrices and convolution kernels, and the learning-rate schedule.

Muon (Jordan et al. 2024; update scale of Liu et al. 2502.16982, eq. 4): momentum, then the nearest
semi-orthogonal matrix by Newton-Schulz iterations, so that a matrix learns in all its directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastvideo_train.recipe import MuonSpec, OptimSpec

# Coefficients of the quintic that maps singular values in (0, 1] towards 1 (Jordan et al. 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def rate(spec: OptimSpec, step: int, num_steps: int, *, num_updates: int | None = None) -> float:
    """Return the factor on every learning rate at a 0-based step: warm-up, then the schedule.

    A role that is not updated in every step warms up over its own `num_updates`; the schedule falls
    with the run for all roles, so that each ends at its floor.
    """
    done_before = step if num_updates is None else num_updates
    if done_before < spec.warmup:
        return (done_before + 1) / spec.warmup
    if spec.schedule == "constant":
        return 1.0
    done = min(1.0, max(0, step - spec.warmup) / max(1, num_steps - spec.warmup))
    falling = 1.0 - done if spec.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return spec.floor + (1.0 - spec.floor) * falling


def orthogonalise(x_NRC: Tensor, *, iterations: int = 5) -> Tensor:
    """Return the nearly semi-orthogonal matrices nearest to those of `x_NRC`, in bfloat16.

    Works on the shorter side: each of the iterations costs about 6 min(R, C)^2 max(R, C) flops.
    """
    x = x_NRC.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, poly, x, beta=_A)
    return x.mT if is_tall else x


def is_matrix(name: str, shape: tuple[int, ...], *, first: str, last: str) -> bool:
    """Whether Muon takes a parameter: a matrix or kernel that is no first, last or embedding."""
    rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
    return (
        len(shape) >= 2
        and min(rows, columns) > 1
        and name not in (first, last)
        and not any(word in name for word in ("embed", "shared", "modulation", "scale_shift"))
    )


class Muon:
    """Momentum and orthogonalised updates of a fixed set of matrices, same shapes stacked together.

    The momentum lives in one tensor per shape, (N, R, C) float32, in the order of the parameters.
    """

    def __init__(self, params: Mapping[str, Tensor], spec: MuonSpec) -> None:
        self.spec = spec
        self._groups: dict[tuple[int, int], list[Tensor]] = {}
        for param in params.values():
            shape = (param.shape[0], param[0].numel())
            self._groups.setdefault(shape, []).append(param)
        self._momentum = {
            shape: torch.zeros((len(group), *shape), dtype=torch.float32, device=group[0].device)
            for shape, group in self._groups.items()
        }

    def step(self, factor: float) -> None:
        """Update the parameters in place from their `.grad` at `factor` times the rate."""
        spec, lr = self.spec, self.spec.lr * factor
        for shape, params in self._groups.items():
            momentum = self._momentum[shape]
            grad = torch.stack([_grad(p).reshape(shape) for p in params])
            momentum.lerp_(grad, 1.0 - spec.momentum)
            nesterov = grad.lerp_(momentum, spec.momentum)
            update = orthogonalise(nesterov, iterations=spec.iterations)
            size = lr * spec.scale * math.sqrt(max(shape))
            if spec.weight_decay:
                torch._foreach_mul_(params, 1.0 - lr * spec.weight_decay)
            deltas = [u.view_as(p) for u, p in zip(update.float().unbind(), params, strict=True)]
            torch._foreach_add_(params, deltas, alpha=-size)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the momenta by shape."""
        return {f"{r}x{c}": m for (r, c), m in self._momentum.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy momenta in; raise `ValueError` if they belong to other matrices."""
        mine = self.state_dict()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in mine.items()}:
            raise ValueError("the checkpoint's Muon state belongs to matrices of other shapes")
        for key, value in state.items():
            mine[key].copy_(value)


class Optimizer:
    """AdamW and Muon over one role's float32 masters; learning rates are a function of the step."""

    def __init__(self, masters: Mapping[str, Tensor], spec: OptimSpec) -> None:
        self.spec = spec
        names = list(masters)
        weights = [n for n in names if masters[n].dim() >= 2]
        ends = {"first": weights[0] if weights else "", "last": weights[-1] if weights else ""}
        chosen = {
            n for n in names if spec.muon is not None and is_matrix(n, masters[n].shape, **ends)
        }
        self.muon_names = sorted(chosen, key=names.index)
        self.muon = Muon({n: masters[n] for n in self.muon_names}, spec.muon or MuonSpec())
        decayed = [masters[n] for n in names if n not in chosen and masters[n].dim() >= 2]
        plain = [masters[n] for n in names if n not in chosen and masters[n].dim() < 2]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((decayed, spec.weight_decay), (plain, 0.0))
            if params
        ]
        self.adamw = (
            torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)
            if groups
            else None
        )

    def step(self, step: int, num_steps: int, *, num_updates: int | None = None) -> float:
        """Update the masters in place from their `.grad`; return AdamW's learning rate."""
        factor = rate(self.spec, step, num_steps, num_updates=num_updates)
        lr = self.spec.lr * factor
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
        self.muon.step(factor)
        return lr

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        adamw = self.adamw.state_dict() if self.adamw is not None else {}
        return {"adamw": adamw, "muon": self.muon.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; raise `ValueError` if it belongs to other parameters.

        Rates, betas and decays stay those of this recipe, which may have changed since.
        """
        if self.adamw is not None:
            own = [{k: v for k, v in g.items() if k != "params"} for g in self.adamw.param_groups]
            self.adamw.load_state_dict(state["adamw"])
            for group, values in zip(self.adamw.param_groups, own, strict=True):
                group.update(values)
        self.muon.load_state_dict(state["muon"])


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None, "the strategy gives every master a gradient"
    return param.grad
