"""Wan2.1's original folders, and the table of names between them and ours (diffusers').

The folder holds config.json and diffusion_pytorch_model*.safetensors (DiT), Wan2.1_VAE.pth,
models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/ (tokenizer).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo import foreign
from fastvideo.formats import diffusers, find_unknown_keys, read_json, refuse_variants
from fastvideo.registry import did_you_mean
from fastvideo.spec import Network, Scheduler, Spec

if TYPE_CHECKING:
    from torch import Tensor

    from fastvideo.weights import Checkpoint

MARKS = "config.json of a WanModel (original Wan2.1)"
STEM = "diffusion_pytorch_model"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = Path("google") / "umt5-xxl"

# Dims that the original folder leaves to its code; both families' defaults are the published ones.
_VAE_CONFIG: dict[str, Any] = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4]}
_TEXT_CONFIG: dict[str, Any] = {"vocab_size": 256384, "d_model": 4096, "num_layers": 24}

_TEXT_LEN = 512  # what a config that does not say leaves to the original code

_DIT_KEYS = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    **{k: k for k in ("ffn_dim", "freq_dim", "num_layers", "eps", "text_dim", "patch_size")},
    "cross_attn_norm": "cross_attn_norm",
}
_DIT_FIXED: dict[str, Any] = {"model_type": "t2v", "qk_norm": True, "window_size": [-1, -1]}
_DIT_ELSEWHERE = ("dim", "text_len")


@dataclass(frozen=True)
class Names:
    """Pairs (original, ours) of templates, read both ways: `{n}` a number, `{p}` any tail."""

    pairs: tuple[tuple[str, str], ...]

    def to_ours(self, name: str) -> str | None:
        """Translate an original name; None if the table has no such name."""
        return self._translate(name, 0)

    def to_original(self, name: str) -> str | None:
        """Translate one of our names; None if the table has no such name."""
        return self._translate(name, 1)

    def _translate(self, name: str, side: int) -> str | None:
        for pair in self.pairs:
            match = _pattern(pair[side]).fullmatch(name)
            if match:
                return pair[1 - side].format(**match.groupdict())
        return None


def _dit_names() -> Iterable[tuple[str, str]]:
    outer = {
        "patch_embedding": "patch_embedding",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "head.head": "proj_out",
    }
    inner = {
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
        "norm3": "norm2",  # their norm3 is ours with the number 2; their norm2 has no weights
    }
    layers = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    layers |= {"norm_q": "norm_q", "norm_k": "norm_k"}
    for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        inner |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in layers.items()}
    yield from ((f"{a}.{{p}}", f"{b}.{{p}}") for a, b in outer.items())
    yield from ((f"blocks.{{n}}.{a}.{{p}}", f"blocks.{{n}}.{b}.{{p}}") for a, b in inner.items())
    yield "blocks.{n}.modulation", "blocks.{n}.scale_shift_table"
    yield "head.modulation", "scale_shift_table"


def _vae_names(num_stages: int = 4, blocks_per_stage: int = 3) -> Iterable[tuple[str, str]]:
    yield "conv1.{p}", "quant_conv.{p}"
    yield "conv2.{p}", "post_quant_conv.{p}"
    block = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2"}
    block |= {"residual.6": "conv2", "shortcut": "conv_shortcut"}
    for side in ("encoder", "decoder"):
        yield f"{side}.conv1.{{p}}", f"{side}.conv_in.{{p}}"
        yield f"{side}.head.0.{{p}}", f"{side}.norm_out.{{p}}"
        yield f"{side}.head.2.{{p}}", f"{side}.conv_out.{{p}}"
        yield f"{side}.middle.1.{{p}}", f"{side}.mid_block.attentions.0.{{p}}"
        for a, b in block.items():
            for i, j in ((0, 0), (2, 1)):
                yield f"{side}.middle.{i}.{a}.{{p}}", f"{side}.mid_block.resnets.{j}.{b}.{{p}}"
    sampler = {"resample.1": "resample.1", "time_conv": "time_conv"}
    for a, b in (block | sampler).items():
        yield f"encoder.downsamples.{{n}}.{a}.{{p}}", f"encoder.down_blocks.{{n}}.{b}.{{p}}"
    per_stage = blocks_per_stage + 1  # the last is the upsampler, which the last stage lacks
    for i in range(num_stages * per_stage - 1):
        stage, j = divmod(i, per_stage)
        is_sampler = j == blocks_per_stage
        ours = f"decoder.up_blocks.{stage}." + ("upsamplers.0" if is_sampler else f"resnets.{j}")
        for a, b in (sampler if is_sampler else block).items():
            yield f"decoder.upsamples.{i}.{a}.{{p}}", f"{ours}.{b}.{{p}}"


def _text_names() -> Iterable[tuple[str, str]]:
    yield "token_embedding.{p}", "shared.{p}"
    yield "norm.{p}", "encoder.final_layer_norm.{p}"
    attention, mlp = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    layer = {f"attn.{x}": f"{attention}.{x}" for x in "qkvo"}
    layer |= {"pos_embedding.embedding": f"{attention}.relative_attention_bias"}
    layer |= {"norm1": "layer.0.layer_norm", "norm2": "layer.1.layer_norm"}
    layer |= {"ffn.gate.0": f"{mlp}.wi_0", "ffn.fc1": f"{mlp}.wi_1", "ffn.fc2": f"{mlp}.wo"}
    for a, b in layer.items():
        yield f"blocks.{{n}}.{a}.{{p}}", f"encoder.block.{{n}}.{b}.{{p}}"


_PAIRS = {"dit": _dit_names, "vae": _vae_names, "text": _text_names}


@functools.cache
def names(part: str) -> Names:
    """Return the table of a part: "dit", "vae" or "text"."""
    return Names(tuple(_PAIRS[part]()))


def detect(folder: Path) -> bool:
    """Tell whether a folder has this layout."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("_class_name") == "WanModel"


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the config of each part under our keys."""
    return {
        "dit": _dit_config(folder / "config.json"),
        "vae": {**_VAE_CONFIG},
        "text": {**_TEXT_CONFIG},
    }


def unknown_keys(folder: Path) -> tuple[str, ...]:
    """Return keys of the tokenizer's config that are not known here."""
    return find_unknown_keys(folder, {f"{TOKENIZER}/tokenizer_config.json": foreign.TOKENIZER})


def derive_spec(folder: Path) -> Spec:
    """Describe a folder; `derived` lists what was read or assumed."""
    found = configs(folder)
    text_len = read_json(folder / "config.json").get("text_len", _TEXT_LEN)
    return Spec(
        name=folder.name,
        dit=Network(family="wan", config=found["dit"]),
        vae=Network(family="wan", config=found["vae"]),
        text=Network(family="umt5", config=found["text"]),
        compression=diffusers.compression(found["dit"], found["vae"]),
        scheduler=Scheduler(name="unipc", args={"shift": 5.0, "start": 0.999, "stop": 0.0}),
        defaults=diffusers.WAN_DEFAULTS.model_copy(update={"max_text_tokens": text_len}),
        derived=(
            "dit, number of text tokens: from config.json",
            "vae, text: the published Wan2.1 dims, assumed",
            "scheduler: unipc with shift 5 on Wan's own grid, assumed",
            "attention: dense, assumed",
            "defaults: size, frames, fps, steps, guidance, negative prompt of Wan2.1, assumed",
        ),
    )


def tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """Open the weights of a part, under our names; tensors stay mapped where the file allows it."""
    from fastvideo.weights import Checkpoint

    path = {"dit": folder, "vae": folder / VAE_FILE, "text": folder / TEXT_FILE}[part]
    return rename(Checkpoint(path, stem=STEM), part)


def rename(checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    """Give an original file's tensors our names; raise `ValueError` for names not in the table."""
    if part == "dit":
        refuse_variants(checkpoint.names(), source=checkpoint.path)
    ours = {name: names(part).to_ours(name) for name in checkpoint.names()}
    unknown = [name for name, own in ours.items() if own is None]
    if unknown:
        some = ", ".join(unknown[:8])
        raise ValueError(
            f"{checkpoint.path} holds {len(unknown)} tensors that no original Wan2.1 {part} has: "
            f"{some}"
        )
    return {own: checkpoint.tensor(name) for name, own in ours.items() if own is not None}


def tokenizer_folder(folder: Path) -> Path:
    """Return where the tokenizer is."""
    return folder / TOKENIZER


def _dit_config(path: Path) -> dict[str, Any]:
    values = read_json(path)
    for key, needed in _DIT_FIXED.items():
        if values.get(key, needed) != needed:
            raise ValueError(f"{key} {values[key]!r} in {path} must be {needed!r} in this release")
    legal = {*_DIT_KEYS, *_DIT_FIXED, *_DIT_ELSEWHERE}
    for key in values:
        if key not in legal and not key.startswith("_"):
            raise ValueError(f"{key} in {path} is unknown{did_you_mean(key, legal)}")
    for key in ("dim", "num_heads"):
        if key not in values:
            raise ValueError(f"{key} is missing in {path}")
    head_dim, rest = divmod(values["dim"], values["num_heads"])
    if rest:
        raise ValueError(
            f"dim {values['dim']} in {path} must be a multiple of num_heads {values['num_heads']}"
        )
    config = {ours: values[theirs] for theirs, ours in _DIT_KEYS.items() if theirs in values}
    return {**config, "attention_head_dim": head_dim}


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{p\}", r"(?P<p>.+)")
    return re.compile(escaped)
