"""The encoder of UMT5: relative positions in every layer, unscaled attention, gated GELU.

Raffel et al. 1910.10683 (T5) and Chung et al. 2304.09151 (UMT5). Parameter names are those of
transformers' UMT5EncoderModel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo import foreign
from fastvideo.models import config_fields

ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}


@dataclass(frozen=True)
class Umt5Config:
    """Dims of the encoder, under transformers' names; the defaults are those of UMT5-XXL."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Umt5Config:
        """Read a transformers config; raise `ValueError` for a key or variant not known here."""
        foreign.check(values, foreign.UMT5, source="the umt5 config")
        idle = [k for k in values if k in foreign.UMT5 and k not in cls.__dataclass_fields__]
        made: Umt5Config = config_fields.read(cls, values, ignored=idle)
        return made


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; the result has the type of the weight."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Attention without scaling, with this layer's own bias per distance bucket."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        buckets = config.relative_attention_num_buckets
        self.relative_attention_bias = nn.Embedding(buckets, config.num_heads)

    def forward(self, x_BLC: Tensor, buckets_LL: Tensor, mask_B11L: Tensor) -> Tensor:
        """Attend among the tokens of each prompt; `mask_B11L` is 0 or a large negative number."""
        q_BHLD, k_BHLD, v_BHLD = (
            linear(x_BLC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        bias_HLL = self.relative_attention_bias(buckets_LL).permute(2, 0, 1)
        scores_BHLL = (q_BHLD @ k_BHLD.transpose(-1, -2)).float() + bias_HLL + mask_B11L
        weights_BHLL = scores_BHLL.softmax(-1).to(v_BHLD.dtype)
        out_BLC: Tensor = self.o((weights_BHLL @ v_BHLD).transpose(1, 2).flatten(2))
        return out_BLC


class GatedMlp(nn.Module):
    """wo(gelu(wi_0 x) * wi_1 x) (Shazeer 2002.05202)."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Map each token by itself."""
        out: Tensor = self.wo(
            nn.functional.gelu(self.wi_0(x_BLC), approximate="tanh") * self.wi_1(x_BLC)
        )
        return out


class _AttentionLayer(nn.Module):
    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config)
        self.layer_norm = RmsNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, x_BLC: Tensor, buckets_LL: Tensor, mask_B11L: Tensor) -> Tensor:
        out: Tensor = self.SelfAttention(self.layer_norm(x_BLC), buckets_LL, mask_B11L)
        return x_BLC + out


class _MlpLayer(nn.Module):
    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.DenseReluDense = GatedMlp(config)
        self.layer_norm = RmsNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, x_BLC: Tensor) -> Tensor:
        out: Tensor = self.DenseReluDense(self.layer_norm(x_BLC))
        return x_BLC + out


class _Block(nn.Module):
    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_AttentionLayer(config), _MlpLayer(config)])

    def forward(self, x_BLC: Tensor, buckets_LL: Tensor, mask_B11L: Tensor) -> Tensor:
        x_BLC = self.layer[0](x_BLC, buckets_LL, mask_B11L)
        out: Tensor = self.layer[1](x_BLC)
        return out


class _Stack(nn.Module):
    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.final_layer_norm = RmsNorm(config.d_model, eps=config.layer_norm_epsilon)


class Umt5Encoder(nn.Module):
    """Token ids to text states."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _Stack(config)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the states (B, L, C) of prompts; mask is 1 for tokens, 0 for padding.

        Rows of padding hold numbers without meaning.
        """
        x_BLC = self.shared(ids_BL)
        buckets_LL = self._buckets(ids_BL.shape[1], ids_BL.device)
        hidden_B11L = ~mask_BL.bool()[:, None, None, :]
        mask_B11L = torch.zeros(hidden_B11L.shape, device=x_BLC.device)
        mask_B11L = mask_B11L.masked_fill(hidden_B11L, torch.finfo(torch.float32).min)
        for block in self.encoder.block:
            x_BLC = block(x_BLC, buckets_LL, mask_B11L)
        out_BLC: Tensor = self.encoder.final_layer_norm(x_BLC)
        return out_BLC

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw weights for training from scratch, with T5's variances."""
        c = self.config
        inner = c.num_heads * c.d_kv
        stds = {
            "shared": 1.0,
            "q": (c.d_model * c.d_kv) ** -0.5,  # attention has no 1/sqrt(d_kv): it is in here
            "o": inner**-0.5,
            "wo": c.d_ff**-0.5,
        }
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                std = stds.get(name.split(".")[-2], c.d_model**-0.5)
                weight.normal_(0.0, std, generator=generator)

    def _buckets(self, length: int, device: torch.device) -> Tensor:
        """Return the distance bucket of every (query, key): exact when near, else logarithmic."""
        half = self.config.relative_attention_num_buckets // 2
        num_exact = half // 2
        position_L = torch.arange(length, device=device)
        offset_LL = position_L[None, :] - position_L[:, None]
        distance_LL = offset_LL.abs()
        octaves = math.log(self.config.relative_attention_max_distance / num_exact)
        # float32, like every published implementation: a boundary must fall on the same side
        far_LL = (distance_LL.clamp(min=1).float() / num_exact).log() / octaves
        far_LL = (num_exact + (far_LL * (half - num_exact)).long()).clamp(max=half - 1)
        near_or_far_LL = torch.where(distance_LL < num_exact, distance_LL, far_LL)
        return near_or_far_LL + half * (offset_LL > 0)


Config = Umt5Config
TextEncoder = Umt5Encoder
