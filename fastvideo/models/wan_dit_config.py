"""Dims of the Wan transformer, checked before a network is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastvideo.models import config_fields

_IGNORED_KEYS = {"window_size", "add_img_emb"}


@dataclass(frozen=True)
class WanConfig:
    """Dims of the network, under the keys of diffusers' config.json."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None
    gate_compress: bool = False
    """Whether every block has the gate of video sparse attention (VSA)."""

    def __post_init__(self) -> None:
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if (value := getattr(self, key)) is not None:
                raise ValueError(
                    f"{key} {value} makes this an image-to-video network; only text-to-video "
                    f"networks ({key} null) are supported"
                )
        if self.qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm {self.qk_norm!r} must be 'rms_norm_across_heads'")
        if self.attention_head_dim < 6 or self.attention_head_dim % 2:
            raise ValueError(
                f"attention_head_dim {self.attention_head_dim} must be even and at least 6: "
                "rotary positions turn channel pairs in three axes"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim {self.freq_dim} must be even: half cosines, half sines")

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> WanConfig:
        """Read a diffusers config.json; raise `ValueError` for a key that is not known."""
        own = dict(values)
        if own.get("out_channels", 0) is None:
            own["out_channels"] = own.get("in_channels", cls.in_channels)
        made: WanConfig = config_fields.read(cls, own, ignored=_IGNORED_KEYS)
        return made

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim
