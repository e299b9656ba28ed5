"""Attention to a part of the keys, with the log-sum-exp that joins parts exactly.

If a query has scores s over keys in parts, lse = log sum exp(s) over all of them is what makes the
parts' results one: out = sum over parts of exp(lse_part - lse) out_part. Plain PyTorch in float32
or wider, a few queries at a time, on every device: exact, but without the tensor cores and fused
softmax of a flash kernel. In flash's terms it is 2205.14135, algorithms 1 and 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BLOCK_SCORES = 1 << 26
"""Scores that exist at a time: 256 MiB in float32, twice that in a backward pass."""


def attend(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(q k / sqrt(D)) v (B, H, L, D) and the scores' log-sum-exp (B, H, L)."""
    wide = wider(q_BHLD)
    k_BHDS, v_BHSD = k_BHSD.to(wide).transpose(2, 3), v_BHSD.to(wide)
    out, lse = [], []
    for rows_BHRD in _rows(q_BHLD, k_BHSD):
        scores_BHRS = rows_BHRD.to(wide) * _scale(q_BHLD) @ k_BHDS
        lse_BHR = scores_BHRS.logsumexp(-1)
        out.append(scores_BHRS.sub_(lse_BHR[..., None]).exp_() @ v_BHSD)
        lse.append(lse_BHR)
    return torch.cat(out, 2), torch.cat(lse, 2)


def join(
    out_BHLD: Tensor, lse_BHL: Tensor, part_BHLD: Tensor, part_lse_BHL: Tensor
) -> tuple[Tensor, Tensor]:
    """Join the results over two parts of the keys."""
    all_BHL = torch.logaddexp(lse_BHL, part_lse_BHL)
    old, new = ((lse - all_BHL).exp()[..., None] for lse in (lse_BHL, part_lse_BHL))
    return out_BHLD * old + part_BHLD * new, all_BHL


def gradients(
    grad_BHLD: Tensor,
    q_BHLD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    lse_BHL: Tensor,
    delta_BHL: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one part of the keys adds to the gradient of q, and the gradients of k and v.

    `lse_BHL` is over all keys, and `delta_BHL` the sum over D of the whole output times its
    gradient `grad_BHLD`. All three are in float32 or wider.
    """
    wide, scale = wider(q_BHLD), _scale(q_BHLD)
    k, v = k_BHSD.to(wide), v_BHSD.to(wide)
    dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    rows = zip(*(_rows(x, k_BHSD) for x in (q_BHLD, grad_BHLD, lse_BHL, delta_BHL)), strict=True)
    for rows_BHRD, slope_BHRD, lse_BHR, delta_BHR in rows:
        q, slope = rows_BHRD.to(wide) * scale, slope_BHRD.to(wide)
        weights_BHRS = (q @ k.transpose(2, 3)).sub_(lse_BHR[..., None]).exp_()
        dv += weights_BHRS.transpose(2, 3) @ slope
        slope_BHRS = (slope @ v.transpose(2, 3)).sub_(delta_BHR[..., None]).mul_(weights_BHRS)
        dq.append(slope_BHRS @ k * scale)
        dk += slope_BHRS.transpose(2, 3) @ q
    return torch.cat(dq, 2), dk, dv


def wider(x: Tensor) -> torch.dtype:
    """Return the dtype that sums are made in."""
    return torch.promote_types(x.dtype, torch.float32)


def _scale(q_BHLD: Tensor) -> float:
    return 1 / math.sqrt(q_BHLD.shape[-1])


def _rows(x: Tensor, k_BHSD: Tensor) -> tuple[Tensor, ...]:
    """Cut the queries, dim 2, so that few scores exist at a time."""
    batch, heads, num_keys, _ = k_BHSD.shape
    return torch.split(x, max(1, _BLOCK_SCORES // (batch * heads * num_keys)), dim=2)
