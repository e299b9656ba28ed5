"""AdamW, with Muon for matrices and convolution kernels, and the learning-rate schedule.

Muon (Jordan et al. 2024; update scale of Liu et al. 2502.16982, eq. 4): momentum, then the nearest
semi-orthogonal matrix by Newton-Schulz iterations, so that a matrix learns in all its directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvideo_train.recipe import MuonSpec, OptimSpec

# Coefficients of the quintic that maps singular values in (0, 1] towards 1 (Jordan et al. 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def rate(spec: OptimSpec, step: int, num_steps: int, *, num_updates: int | None = None) -> float:
    """Return the factor on every learning rate at a 0-based step: warm-up, then the schedule.

    A role that is not updated in every step warms up over its own `num_updates`. From the step at
    which that ended the schedule falls with the run, so that each role ends at its floor.
    """
    done_before = step if num_updates is None else num_updates
    if done_before < spec.warmup:
        return (done_before + 1) / spec.warmup
    if spec.schedule == "constant":
        return 1.0
    warm = spec.warmup * (step + 1) / (done_before + 1)  # steps that its warm-up took
    done = min(1.0, max(0, step - warm) / max(1, num_steps - warm))
    falling = 1.0 - done if spec.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return spec.floor + (1.0 - spec.floor) * falling


def orthogonalise(
    x_NRC: Tensor, *, iterations: int = 5, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Return the nearly semi-orthogonal matrices nearest to those of `x_NRC`, in `dtype`.

    Works on the shorter side: each of the iterations costs about 6 min(R, C)^2 max(R, C) flops.
    """
    x = x_NRC.to(dtype)
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


@dataclass(frozen=True)
class Rows:
    """Which rows of every parameter this process holds, where parameters are cut along their first
    axis.

    shapes: whole shapes by name. whole: rows (r, C) and the whole shape to (R, C), all processes
    together. own: back to one's rows.
    """

    shapes: Mapping[str, tuple[int, ...]]
    whole: Callable[[Tensor, tuple[int, int]], Tensor]
    own: Callable[[Tensor], Tensor]


class Muon:
    """Momentum and orthogonalised updates of a fixed set of matrices, same shapes stacked together.

    The momentum lives in one tensor per shape, (N, R, C) float32, in the order of the parameters.
    Of matrices that are cut into rows each process keeps the momentum of its rows; their updates
    are those of the whole matrices, which every process computes for itself.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        spec: MuonSpec,
        rows: Rows | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.spec, self._rows = spec, rows
        self._how: dict[str, Any] = {"iterations": spec.iterations, "dtype": dtype}
        self._groups: dict[tuple[int, int], list[Tensor]] = {}
        for name, param in params.items():
            whole = rows.shapes[name] if rows else param.shape
            self._groups.setdefault((whole[0], math.prod(whole[1:])), []).append(param)
        self._momentum = {
            shape: torch.zeros(
                (len(group), len(group[0]), shape[1]), dtype=torch.float32, device=group[0].device
            )
            for shape, group in self._groups.items()
        }

    def step(self, factor: float) -> None:
        """Update the parameters in place from their `.grad` at `factor` times the rate."""
        spec, lr = self.spec, self.spec.lr * factor
        for shape, params in self._groups.items():
            momentum = self._momentum[shape]
            grad = torch.stack([_grad(p).reshape(len(p), shape[1]) for p in params])
            momentum.lerp_(grad, 1.0 - spec.momentum)
            nesterov = grad.lerp_(momentum, spec.momentum)
            update = self._orthogonal(nesterov, shape)
            size = lr * spec.scale * math.sqrt(max(shape))
            if spec.weight_decay:
                torch._foreach_mul_(params, 1.0 - lr * spec.weight_decay)
            deltas = [u.view_as(p) for u, p in zip(update.float().unbind(), params, strict=True)]
            torch._foreach_add_(params, deltas, alpha=-size)

    def _orthogonal(self, x_NrC: Tensor, shape: tuple[int, int]) -> Tensor:
        if self._rows is None:
            return orthogonalise(x_NrC, **self._how)
        # One at a time: all matrices of a shape are as large as the layers that nobody holds whole.
        updates = []
        for x_rC in x_NrC:
            whole = self._rows.whole(x_rC, shape)[None]
            update = orthogonalise(whole, **self._how)[0]
            updates.append(self._rows.own(update))
        return torch.stack(updates)

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
    """AdamW and Muon over one role's float32 masters; learning rates are a function of the step.

    dtype: what Muon iterates in. bfloat16 is enough, but rounding to it makes of gradients that
    differ in their last bit, as those of other numbers of processes do, updates that differ more.
    """

    def __init__(
        self,
        masters: Mapping[str, Tensor],
        spec: OptimSpec,
        rows: Rows | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.spec = spec
        shapes = rows.shapes if rows else {n: tuple(m.shape) for n, m in masters.items()}
        names = list(masters)
        weights = [n for n in names if masters[n].dim() >= 2]
        ends = {"first": weights[0] if weights else "", "last": weights[-1] if weights else ""}
        chosen = {n for n in names if spec.muon is not None and is_matrix(n, shapes[n], **ends)}
        self.muon_names = sorted(chosen, key=names.index)
        matrices = {n: masters[n] for n in self.muon_names}
        self.muon = Muon(matrices, spec.muon or MuonSpec(), rows, dtype)
        decayed = [n for n in names if n not in chosen and masters[n].dim() >= 2]
        plain = [n for n in names if n not in chosen and masters[n].dim() < 2]
        self.adamw_names = [*decayed, *plain]  # in the order of AdamW's own numbers
        groups = [
            {"params": [masters[n] for n in group], "weight_decay": decay}
            for group, decay in ((decayed, spec.weight_decay), (plain, 0.0))
            if group
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

    @property
    def num_updates(self) -> int:
        """How often AdamW stepped, as its own state says."""
        counts = self.adamw.state.values() if self.adamw is not None else ()
        return max((int(state["step"]) for state in counts), default=0)

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
