"""PyTorch's scaled_dot_product_attention with an explicit order of kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvideo.attention.choice import Need
from fastvideo.attention.layout import Layout

_HOPPER = (9, 0)


def unsupported(need: Need) -> str | None:
    """SDPA serves dense attention on every device and dtype."""
    if not need.is_dense:
        return "serves dense patterns only"
    return None


def describe(need: Need) -> str:
    """Name the kernels in the order in which they are tried."""
    if need.device.type != "cuda":
        return "PyTorch's kernel for this device"
    return "first that fits of " + ", ".join(k.name for k in _kernels(need.device))


def attend(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, layout: Layout | None) -> Tensor:
    """Attend densely; every kernel computes the softmax in float32."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(_kernels(q.device), set_priority=True):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _kernels(device: torch.device) -> list[SDPBackend]:
    # cuDNN is 1.7-2.3x faster than flash on Hopper, and slower than it elsewhere.
    flash = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if torch.cuda.get_device_capability(device) == _HOPPER:
        return [SDPBackend.CUDNN_ATTENTION, *flash]
    return flash
