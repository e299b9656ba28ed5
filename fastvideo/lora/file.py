"""A LoRA file in any spelling: what it says of each module, or the reason why it is refused.

file = read("style.safetensors")
file.modules["blocks.0.self_attn.q"].scale  # alpha / rank

Read are the names of diffusers, PEFT, ComfyUI, kohya (musubi), DiffSynth and LightX2V: prefixes are
dropped here, and `fastvideo.lora.fit` finds the network's module. Written are those of diffusers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo import files, foreign, weights
from fastvideo.weights import Checkpoint

ADAPTER_METADATA = "lora_adapter_metadata"
"""Key of a safetensors header under which diffusers keeps PEFT's config, as JSON."""
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's two files."""

_PREFIX = re.compile(
    r"(?:(?:lora_unet|lora_transformer|lycoris|base_model|model|diffusion_model|pipe|dit|unet"
    r"|transformer(?!_blocks))[._]+)+"  # transformer_blocks are those of other architectures
)
_TEXT = re.compile(r"lora_te\d?_|te\d?\.|text_encoders?(_\d)?\.|cond_stage_model\.")
_PAIR = re.compile(
    r"(?P<module>.+?)[._]lora(?:_linear_layer)?[._](?P<side>A|B|down|up)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<kind>weight|bias))?"  # the first is an adapter's name
)
_WHOLE = re.compile(r"(?P<module>.+)\.(?P<kind>alpha|diff|diff_b|diff_m|w_norm|b_norm)")
_KINDS = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b"}
_UNSUPPORTED = {
    "DoRA": r"\.dora_scale$|lora_magnitude_vector",
    "LoHa": r"\.hada_\w+$",
    "LoKr": r"\.lokr_\w+$",
    "OFT": r"\.b?oft_\w+",
    "LoRA with a middle map": r"[._]lora_mid\b",
    "GLoRA": r"\.[ab][12]\.weight$",
    "replaced weights": r"\.(set|reshape)_weight$",
}
_MAX_NAMED = 8


@dataclass(frozen=True)
class Entry:
    """What a file says of one module, with its tensors by kind, still mapped from the file.

    down (r, I) or (r, I, ...) and up (O, r) or (O, r, 1, ...) multiply to a change of the weight,
    up_bias (O) changes the bias with them, all times `scale`; diff, diff_b and diff_m are whole
    changes of the weight, the bias and a table of modulation, which no scale applies to.
    """

    tensors: Mapping[str, Tensor]
    scale: float = 1.0


@dataclass(frozen=True)
class LoraFile:
    """The modules of a file by their names in it, less the prefix; `text` names those of others,
    and `unknown_keys` what PEFT's config says that is not known here.
    """

    path: Path
    modules: Mapping[str, Entry]
    text: tuple[str, ...] = ()
    unknown_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class LowRank:
    """A pair to write: scale * up @ down is added to a module's weight."""

    down_rI: Tensor
    up_Or: Tensor
    scale: float = 1.0


def read(path: str | Path) -> LoraFile:
    """Read a file of LoRA maps.

    Raises a one-line `ValueError` for a damaged file, half a pair, ranks that differ, and for kinds
    that are not plain additions to weights (DoRA, LoHa, ...), by the names of their tensors.
    """
    checkpoint = Checkpoint(path)
    _refuse_unsupported(checkpoint.names(), path)
    found: dict[str, dict[str, Tensor]] = {}
    text: dict[str, None] = {}
    strange = []
    for name in checkpoint.names():
        match = _PAIR.fullmatch(name) or _WHOLE.fullmatch(name)
        if match is None:
            strange.append(name)
        elif _TEXT.match(name):
            text[match["module"]] = None
        else:
            prefix = _PREFIX.match(match["module"])
            module, kind = match["module"][prefix.end() if prefix else 0 :], _kind_of(match)
            if kind in found.setdefault(module, {}):
                raise ValueError(f"{path} has two tensors for {kind} of {module}")
            found[module][kind] = checkpoint.tensor(name)
    if strange:
        raise ValueError(f"{path}: {len(strange)} tensors are not LoRA weights: {some(strange)}")
    config = _adapter_config(checkpoint.path)
    unknown = foreign.check(config, foreign.PEFT, source=path)
    scale_of = _scales(config, path)
    modules = {name: _entry(name, tensors, scale_of, path) for name, tensors in found.items()}
    return LoraFile(checkpoint.path, modules, tuple(text), unknown)


def unknown_keys(path: Path) -> tuple[str, ...]:
    """Return what PEFT's config of a LoRA says that is not known here."""
    return foreign.check(_adapter_config(path), foreign.PEFT, source=path)


def save(
    path: str | Path,
    maps: Mapping[str, LowRank],
    *,
    dtype: torch.dtype = torch.float32,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write pairs by module name (ours, which are diffusers') as a file that diffusers reads.

    The scale goes into `up`, so that alpha equals the rank in the file and readers that know no
    header make the same weights. notes: more entries of the header.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module, pair in maps.items():
        ranks[module] = len(pair.down_rI)
        tensors[f"transformer.{module}.lora_A.weight"] = pair.down_rI.to(dtype)
        up_Or = (pair.up_Or.float() * pair.scale).to(dtype)
        tensors[f"transformer.{module}.lora_B.weight"] = up_Or
    rank = max(ranks.values())
    others = {module: r for module, r in ranks.items() if r != rank}
    config = {"r": rank, "lora_alpha": rank, "target_modules": list(maps)}
    if others:
        config |= {"rank_pattern": others, "alpha_pattern": others}
    header = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    return weights.save(path, tensors, {ADAPTER_METADATA: header, **(notes or {})})


def some(names: list[str]) -> str:
    """Join the first few of some names, and say how many more there are."""
    rest = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _kind_of(match: re.Match[str]) -> str:
    groups = match.groupdict()
    if "side" not in groups:
        return _KINDS.get(groups["kind"], groups["kind"])
    side = _KINDS.get(groups["side"], groups["side"])
    return f"{side}_bias" if groups["kind"] == "bias" else side


def _refuse_unsupported(names: list[str], path: str | Path) -> None:
    for kind, pattern in _UNSUPPORTED.items():
        those = [name for name in names if re.search(pattern, name)]
        if those:
            raise ValueError(f"{path} is {kind}, which is not supported: {some(those)}")


def _entry(
    name: str, found: dict[str, Tensor], scale_of: Callable[..., float], path: str | Path
) -> Entry:
    tensors = dict(found)
    alpha = tensors.pop("alpha", None)
    if alpha is not None and (alpha.numel() != 1 or not math.isfinite(float(alpha))):
        raise ValueError(f"{path}: alpha of {name} must be one finite number")
    for kind, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
            raise ValueError(f"{path}: {kind} of {name} must hold finite floating-point numbers")
    if "down_bias" in tensors:
        raise ValueError(f"{path}: {name} has a bias of its lora_A, which nothing writes")
    down, up = tensors.get("down"), tensors.get("up")
    if (down is None) != (up is None) or (up is None and "up_bias" in tensors):
        has, lacks = ("down", "up") if up is None else ("up", "down")
        raise ValueError(f"{path}: {name} has a {has} map without its {lacks} map")
    if down is None or up is None:
        return Entry(tensors)
    if down.ndim < 2 or up.ndim < 2 or len(down) != up.shape[1]:
        raise ValueError(
            f"{path}: the maps of {name} have shapes {tuple(down.shape)} and {tuple(up.shape)};"
            " their ranks, the first and the second number, must be equal"
        )
    if not len(down):
        raise ValueError(f"{path}: the maps of {name} have rank 0, which must be at least 1")
    return Entry(tensors, scale_of(name, len(down), None if alpha is None else float(alpha)))


def _scales(
    config: Mapping[str, Any], path: str | Path
) -> Callable[[str, int, float | None], float]:
    """Return the scale of a module from name, rank and own alpha, by what the file says of all."""
    everywhere, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{path}: alpha_pattern must be an object, not {patterns!r}")
    for key, value in {**patterns, "lora_alpha": everywhere}.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and math.isfinite(value)):
            raise ValueError(f"{path}: the alpha of {key} must be a finite number, not {value!r}")

    def fits(pattern: str, name: str) -> bool:
        try:
            return bool(re.fullmatch(rf"(.*\.)?({pattern})", name))
        except re.error as error:
            raise ValueError(f"{path}: alpha_pattern {pattern!r}: {error}") from None

    def scale(name: str, rank: int, alpha: float | None) -> float:
        if alpha is None:
            alpha = next((v for k, v in patterns.items() if fits(k, name)), everywhere)
        alpha = float(rank if alpha is None else alpha)
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


def _adapter_config(path: Path) -> dict[str, Any]:
    """Return PEFT's config out of the header or from the file beside; empty if there is none."""
    beside, source = path.with_name(ADAPTER_CONFIG), str(path)
    text = ""
    if path.suffix == ".safetensors":
        text = weights.read_metadata(path).get(ADAPTER_METADATA, "")
    if not text and path.name == ADAPTER_FILE and beside.is_file():
        text, source = files.read_text(beside), str(beside)
    try:
        values = json.loads(text or "{}")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"the config of the LoRA in {source} is not a JSON object")
    own = {key.removeprefix("transformer."): value for key, value in values.items()}
    return {key: value for key, value in own.items() if "." not in key}  # of no text encoder
