"""Text encoders, and the one way from prompts to the states that a DiT attends to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from fastvideo.models.text.tokenizer import Tokenizer


def encode_prompts(
    encoder: Callable[[Tensor, Tensor], Tensor],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    device: str = "cpu",
) -> Tensor:
    """Return the states (B, max_tokens, C) of prompts, zero after each prompt's end.

    Wan attends to the zero rows, so their number is part of the result. The encoder itself runs on
    the longest prompt only: padding is masked, positions are relative, more rows change nothing.
    """
    ids_BL, mask_BL = tokenizer(prompts, max_tokens)
    mask_BL = mask_BL.to(device)
    states_BLC = encoder(ids_BL.to(device), mask_BL)
    states_BLC = states_BLC.masked_fill(~mask_BL.bool()[..., None], 0)
    num_rows = max_tokens - states_BLC.shape[1]
    rows_BLC = states_BLC.new_zeros(states_BLC.shape[0], num_rows, states_BLC.shape[2])
    import torch  # late, so that listing the families stays free of torch

    return torch.cat([states_BLC, rows_BLC], dim=1)
