"""Upsampling and the convolution behind it in one step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def doubling_kernel(weight_OIHW: Tensor) -> Tensor:
    """Turn "repeat each pixel 2x2, then convolve 3x3" into one transposed convolution of stride 2.

    Each of a pixel's four outputs sees only 2x2 different inputs, so this is 2.25 times less work.
    Call `F.conv_transpose2d` with stride 2 and padding 1.
    """
    w = F.pad(weight_OIHW.float(), (1, 1, 1, 1))
    w = w[:, :, 1:] + w[:, :, :-1]
    w = w[..., 1:] + w[..., :-1]
    w = w.to(weight_OIHW.dtype).flip(2, 3).transpose(0, 1)  # (I, O, 4, 4)
    return w.contiguous(memory_format=torch.channels_last)  # decides the layout for a batch of one
