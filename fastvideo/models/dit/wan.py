"""The Wan2.1 text-to-video transformer, with the parameter names of diffusers.

A forward is three functions: `embed` makes tokens that carry their own positions and times,
`blocks` runs the layers with a given attention, `head` turns tokens back into latents
(Wan 2503.20314, section 4.2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo.attention import Attend, Dense, Layout, Vsa, plain, plan
from fastvideo.layers.norm import LayerNorm, RMSNorm, modulated_norm
from fastvideo.layers.rope import rotate, turns
from fastvideo.layers.timestep import sinusoid
from fastvideo.models.wan_dit_config import WanConfig
from fastvideo.shapes import LatentShape, TokenGrid

KEEP_FLOAT32: tuple[str, ...] = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
"""Parts of parameter names that stay float32 when the rest of the network is cast."""
ZERO_INITIALISED: tuple[str, ...] = ("to_gate_compress",)
"""Parts of names that a checkpoint may lack when training starts from it: they begin at zero."""

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class WanConditioning:
    """Text states (B, S, text_dim), padded with zero rows that Wan does attend to.

    `keys_values` holds what `WanDiT.prepare` made of them: keys and values (B, S, H, D) per layer.
    """

    text_BLC: Tensor
    keys_values: tuple[KeysValues, ...] = ()

    @classmethod
    def cat(cls, parts: Sequence[WanConditioning]) -> WanConditioning:
        """Join along the batch; prepared keys and values survive if every part has them."""
        is_prepared = all(p.keys_values for p in parts)
        layers = zip(*(p.keys_values for p in parts if is_prepared), strict=True)
        joined = tuple(
            (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in layers
        )
        return cls(torch.cat([p.text_BLC for p in parts]), joined)


@dataclass(frozen=True)
class Tokens:
    """A sequence that carries its positions and times: a shard or another order is only data."""

    x_BLC: Tensor
    turn_LF2: Tensor
    """Cosine and sine of each token's rotary angles, one pair per channel pair of a head."""
    frame_L: Tensor
    """Token frame of each token."""
    time_BTC: Tensor
    """Time embedding per token frame, or of the whole clip (T = 1)."""
    modulation_BT6C: Tensor
    cond: WanConditioning
    layout: Layout

    def per_token(self, m_BTC: Tensor) -> Tensor:
        """Spread values per frame over tokens: (B, L, C); one for the clip stays (B, 1, C)."""
        m_BTC = m_BTC.to(self.x_BLC.dtype)
        return m_BTC if m_BTC.shape[1] == 1 else m_BTC.index_select(1, self.frame_L)


class _Mlp(nn.Module):
    """linear_2(activation(linear_1(x)))."""

    def __init__(self, inner: int, outer: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inner, outer)
        self.linear_2 = nn.Linear(outer, outer)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(
            self.activation(self.linear_1(x.to(self.linear_1.weight.dtype)))
        )
        return out


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class _ConditionEmbedder(nn.Module):
    def __init__(self, c: WanConfig) -> None:
        super().__init__()
        self.freq_dim = c.freq_dim
        self.time_embedder = _Mlp(c.freq_dim, c.dim, F.silu)
        self.time_proj = nn.Linear(c.dim, 6 * c.dim)
        self.text_embedder = _Mlp(c.text_dim, c.dim, _gelu)

    def time(self, t_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the time embedding (B, T, C) and the blocks' shared modulation (B, T, 6, C)."""
        e_BTC = self.time_embedder(sinusoid(t_BT, self.freq_dim)).to(self.time_proj.weight.dtype)
        return e_BTC, self.time_proj(F.silu(e_BTC)).unflatten(-1, (6, -1))


class _Attention(nn.Module):
    def __init__(self, c: WanConfig) -> None:
        super().__init__()
        self.heads = c.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(c.dim, c.dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c.dim, c.dim)])
        self.norm_q, self.norm_k = (RMSNorm(c.dim, eps=c.eps) for _ in range(2))

    def queries(self, x_BLC: Tensor, turn_LF2: Tensor | None = None) -> Tensor:
        """Return q of shape (B, L, H, D), normalised over all heads together, then turned."""
        return self._heads(self.to_q(x_BLC), self.norm_q, turn_LF2)

    def keys_values(self, x_BSC: Tensor, turn_LF2: Tensor | None = None) -> KeysValues:
        """Return k, treated like q, and v, both of shape (B, S, H, D)."""
        v_BSHD = self.to_v(x_BSC).unflatten(-1, (self.heads, -1))
        return self._heads(self.to_k(x_BSC), self.norm_k, turn_LF2), v_BSHD

    def _heads(self, x_BLC: Tensor, norm: nn.Module, turn_LF2: Tensor | None) -> Tensor:
        y_BLHD: Tensor = norm(x_BLC).unflatten(-1, (self.heads, -1))
        if turn_LF2 is not None:
            y_BLHD = rotate(y_BLHD, turn_LF2)
        return y_BLHD.to(x_BLC.dtype)

    def output(self, out_BLHD: Tensor) -> Tensor:
        """Mix the heads."""
        out: Tensor = self.to_out[0](out_BLHD.flatten(2))
        return out


class _Up(nn.Module):
    def __init__(self, c: WanConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(c.dim, c.ffn_dim)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return _gelu(self.proj(x_BLC))


class _FeedForward(nn.Module):
    def __init__(self, c: WanConfig) -> None:
        super().__init__()
        # The identity stands where diffusers has a dropout, so that the numbers in names agree.
        self.net = nn.Sequential(_Up(c), nn.Identity(), nn.Linear(c.ffn_dim, c.dim))

    def forward(self, x_BLC: Tensor) -> Tensor:
        out: Tensor = self.net(x_BLC)
        return out


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; time modulates first and last."""

    def __init__(self, c: WanConfig) -> None:
        super().__init__()
        self.eps = c.eps
        self.attn1 = _Attention(c)
        self.norm2 = LayerNorm(c.dim, c.eps) if c.cross_attn_norm else nn.Identity()
        self.attn2 = _Attention(c)
        self.ffn = _FeedForward(c)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, c.dim))
        self.to_gate_compress = nn.Linear(c.dim, c.dim) if c.gate_compress else None

    def forward(self, tokens: Tokens, attend: Attend, text: Tensor | KeysValues) -> Tokens:
        """Run one layer; `text` is embedded, (B, S, C), or already this layer's keys and values."""
        m_BT6C = self.scale_shift_table + tokens.modulation_BT6C
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = map(tokens.per_token, m_BT6C.unbind(2))

        x_BLC = tokens.x_BLC
        h_BLC = modulated_norm(x_BLC, shift=shift_a, scale=scale_a, eps=self.eps)
        q_BLHD = self.attn1.queries(h_BLC, tokens.turn_LF2)
        k_BLHD, v_BLHD = self.attn1.keys_values(h_BLC, tokens.turn_LF2)
        gate_BLHD = self._gate(h_BLC, tokens.layout)
        out_BLHD = attend(q_BLHD, k_BLHD, v_BLHD, layout=tokens.layout, gate_BLHD=gate_BLHD)
        x_BLC = torch.addcmul(x_BLC, self.attn1.output(out_BLHD), gate_a)

        q_BLHD = self.attn2.queries(self.norm2(x_BLC))
        k_BSHD, v_BSHD = self.attn2.keys_values(text) if isinstance(text, Tensor) else text
        x_BLC = x_BLC + self.attn2.output(attend(q_BLHD, k_BSHD, v_BSHD))

        h_BLC = modulated_norm(x_BLC, shift=shift_f, scale=scale_f, eps=self.eps)
        x_BLC = torch.addcmul(x_BLC, self.ffn(h_BLC), gate_f)
        return dataclasses.replace(tokens, x_BLC=x_BLC)

    def _gate(self, h_BLC: Tensor, layout: Layout) -> Tensor | None:
        """Return the weight of VSA's coarse branch, per token and channel (2505.13389, eq. 6).

        None for a network without gates, and where the pattern has no such branch.
        """
        if self.to_gate_compress is None or not isinstance(layout.pattern, Vsa):
            return None
        gate_BLC: Tensor = self.to_gate_compress(h_BLC)
        return gate_BLC.view(*h_BLC.shape[:2], self.attn1.heads, -1)


class Blocks(nn.ModuleList):
    """The layers, called as one function of tokens and an attention."""

    def forward(self, tokens: Tokens, attend: Attend, *, num: int | None = None) -> Tokens:
        """Run the first `num` layers, or all, on `tokens`, whose conditioning is embedded."""
        cond, layers = tokens.cond, list(self)[:num]
        texts = cond.keys_values[:num] or [cond.text_BLC] * len(layers)
        # With the keys of all layers in its arguments, torch 2.11 compiles every layer anew.
        tokens = dataclasses.replace(tokens, cond=WanConditioning(cond.text_BLC))
        for block, text in zip(layers, texts, strict=True):
            tokens = block(tokens, attend, text)
        return tokens


class WanDiT(nn.Module):
    """Velocity of noisy latents at a time, given a text; new with `init_weights`."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embedding = nn.Conv3d(c.in_channels, c.dim, c.patch_size, stride=c.patch_size)
        self.condition_embedder = _ConditionEmbedder(c)
        self.blocks = Blocks(Block(c) for _ in range(c.num_layers))
        self.proj_out = nn.Linear(c.dim, c.out_channels * math.prod(c.patch_size))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, c.dim))
        self.init_weights()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations: that of the weights not in `KEEP_FLOAT32`."""
        return self.patch_embedding.weight.dtype

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw first weights: Xavier, small embedders, zero output, tables N(0, 1) / sqrt(C)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                assert module.bias is not None, "every linear map of Wan has a bias"
                nn.init.zeros_(module.bias)
                if "to_gate_compress" in name:
                    nn.init.zeros_(module.weight)
                elif "text_embedder" in name or "time_embedder" in name:
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
            elif isinstance(module, LayerNorm | RMSNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, WanDiT | Block):
                std = self.config.dim**-0.5
                nn.init.normal_(module.scale_shift_table, std=std, generator=generator)
        nn.init.zeros_(self.proj_out.weight)

    def forward(
        self,
        x_BCTHW: Tensor,
        t_BT: Tensor,
        cond: WanConditioning,
        cache: None = None,
        *,
        attend: Attend = plain,
        layout: Layout | None = None,
        frame_T: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity (noise - clean), in the shape and dtype of `x_BCTHW`.

        `t_BT` is in 0..1000, (B, 1) or one per token frame (B, T). `layout` defaults to dense,
        but VSA-gated models need an explicit VSA layout.
        `frame_T` says which frames of a longer clip these are; the default is the first T.
        """
        assert cache is None, "this network keeps no cache between calls"
        tokens = self.embed(x_BCTHW, t_BT, cond, layout=layout, frame_T=frame_T)
        v_BCTHW = self.head(self.blocks(tokens, attend))
        return v_BCTHW.to(x_BCTHW.dtype)

    def features(
        self,
        x_BCTHW: Tensor,
        t_BT: Tensor,
        cond: WanConditioning,
        *,
        num_layers: int,
        attend: Attend = plain,
        layout: Layout | None = None,
        frame_T: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens (B, L, C) after the first layers, in grid order; the rest as above."""
        tokens = self.embed(x_BCTHW, t_BT, cond, layout=layout, frame_T=frame_T)
        first: Tokens = self.blocks(tokens, attend, num=num_layers)
        return first.layout.restore(first.x_BLC, 1)

    def embed(
        self,
        x_BCTHW: Tensor,
        t_BT: Tensor,
        cond: WanConditioning,
        *,
        layout: Layout | None = None,
        frame_T: Tensor | None = None,
    ) -> Tokens:
        """Cut latents into tokens in the layout's order; embed their positions, times and text."""
        grid = LatentShape(*x_BCTHW.shape[2:]).tokens(self.config.patch_size)
        self._check(x_BCTHW, t_BT, cond, grid)
        assert layout or not self.config.gate_compress, "a network with gates is given its layout"
        layout = layout or plan(Dense(), grid, x_BCTHW.device)
        assert layout.grid == grid, f"layout is for {layout.grid}, latents make {grid}"

        x_BLC = self.patch_embedding(x_BCTHW.to(self.dtype)).flatten(2).transpose(1, 2)
        head_dim = self.config.attention_head_dim
        turn_LF2 = turns(grid, head_dim=head_dim, device=x_BLC.device, frame_T=frame_T)
        frame_L = torch.arange(grid.num_tokens, device=x_BLC.device) // (grid.height * grid.width)
        time_BTC, modulation_BT6C = self.condition_embedder.time(t_BT)
        if not cond.keys_values:
            cond = WanConditioning(self._embed_text(cond))
        return Tokens(
            x_BLC=layout.arrange(x_BLC, 1).contiguous(),
            turn_LF2=layout.arrange(turn_LF2, 0),
            frame_L=layout.arrange(frame_L, 0),
            time_BTC=time_BTC,
            modulation_BT6C=modulation_BT6C,
            cond=cond,
            layout=layout,
        )

    def head(self, tokens: Tokens) -> Tensor:
        """Project tokens to patches and put these together as latents, in the tokens' dtype."""
        m_BT2C = self.scale_shift_table + tokens.time_BTC[:, :, None]
        shift, scale = map(tokens.per_token, m_BT2C.unbind(2))
        h_BLC = modulated_norm(tokens.x_BLC, shift=shift, scale=scale, eps=self.config.eps)
        out_BLC = tokens.layout.restore(self.proj_out(h_BLC), 1)
        grid, (p_t, p_h, p_w) = tokens.layout.grid, self.config.patch_size
        t, h, w = grid.frames, grid.height, grid.width
        out = out_BLC.reshape(-1, t, h, w, p_t, p_h, p_w, self.config.out_channels)
        out = out.permute(0, 7, 1, 4, 2, 5, 3, 6)  # B C t p_t h p_h w p_w
        return out.reshape(-1, self.config.out_channels, t * p_t, h * p_h, w * p_w)

    def prepare(self, cond: WanConditioning) -> WanConditioning:
        """Compute what no step changes: each layer's keys and values of the text. Exact."""
        text_BSC = self._embed_text(cond)
        layers = (cast(Block, block).attn2.keys_values(text_BSC) for block in self.blocks)
        return WanConditioning(cond.text_BLC, tuple(layers))

    def _embed_text(self, cond: WanConditioning) -> Tensor:
        out: Tensor = self.condition_embedder.text_embedder(cond.text_BLC)
        return out

    def _check(self, x: Tensor, t_BT: Tensor, cond: WanConditioning, grid: TokenGrid) -> None:
        c = self.config
        assert x.shape[1] == c.in_channels, (
            f"latents have {x.shape[1]} channels, not {c.in_channels}"
        )
        legal = ((x.shape[0], 1), (x.shape[0], grid.frames))
        assert t_BT.shape in legal, f"times of shape {tuple(t_BT.shape)} must have one of {legal}"
        text = cond.text_BLC
        assert text.shape[0] == x.shape[0], f"{text.shape[0]} texts for {x.shape[0]} clips"
        assert text.shape[2] == c.text_dim, (
            f"text states have {text.shape[2]} channels, not {c.text_dim}"
        )
        if grid.longest > c.rope_max_seq_len:
            raise ValueError(
                f"token grid {grid} exceeds the network's {c.rope_max_seq_len} positions per axis "
                "(rope_max_seq_len)"
            )


Config = WanConfig
DiT = WanDiT
Conditioning = WanConditioning
