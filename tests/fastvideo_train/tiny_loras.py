"""Random LoRAs for the tiny model, and the same one as each of the tools writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastvideo.formats import wan

ALPHA, RANK = 3.0, 4
Pairs = dict[str, tuple[Tensor, Tensor]]


def pairs(net: nn.Module, *, seed: int = 0, only: tuple[str, ...] = ("attn", "ffn")) -> Pairs:
    """Draw maps (r, I) and (O, r) for every linear module with a part of `only` in its name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            0.2 * torch.randn(RANK, module.in_features, generator=generator),
            0.2 * torch.randn(module.out_features, RANK, generator=generator),
        )
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and any(part in name for part in only)
    }


def original(name: str) -> str:
    """Return a module's name in the original Wan."""
    found = wan.names("dit").to_original(f"{name}.weight")
    assert found is not None
    return found.removesuffix(".weight")


def spelled(kind: str, maps: Pairs) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header of a LoRA as a tool would write it."""
    kohyas = ("comfy", "kohya", "mixed", "kohya_model")
    down, up = ("lora_down", "lora_up") if kind in kohyas else ("lora_A", "lora_B")
    tensors = {}
    for name, (a, b) in maps.items():
        module = {
            "diffusers": f"transformer.{name}",
            "peft": f"base_model.model.{name}",
            "comfy": f"diffusion_model.{original(name)}",
            "kohya": f"lora_unet_{original(name).replace('.', '_')}",
            "kohya_two": f"lora_unet__{original(name).replace('.', '_')}",
            "mixed": "lora_unet_" + original(name).replace(".", "_", 1),
            "kohya_model": f"lora_unet_model_{original(name).replace('.', '_')}",
            "bare": original(name),
            "diffsynth": original(name),
        }[kind]
        adapter = ".default" if kind in ("peft", "diffsynth") else ""
        tensors |= {f"{module}.{down}{adapter}.weight": a, f"{module}.{up}{adapter}.weight": b}
        if kind not in ("diffusers", "peft"):
            tensors[f"{module}.alpha"] = torch.tensor(ALPHA)
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(maps)}
    config = {f"transformer.{key}": value for key, value in config.items()}
    header = {"lora_adapter_metadata": json.dumps(config)} if kind == "diffusers" else {}
    return tensors, header


KINDS = ("diffusers", "peft", "comfy", "kohya", "kohya_two", "kohya_model", "mixed", "bare")
KINDS += ("diffsynth",)


def write(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str] | None = None) -> Path:
    """Write a safetensors file; a PEFT one gets its config beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={"format": "pt", **(header or {})})
    return path


def write_as(kind: str, folder: Path, maps: Pairs) -> Path:
    """Write a LoRA in the spelling of a tool, and what that tool writes beside it."""
    tensors, header = spelled(kind, maps)
    if kind != "peft":
        return write(folder / f"{kind}.safetensors", tensors, header)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": False}
    path = write(folder / "peft" / "adapter_model.safetensors", tensors)
    (path.parent / "adapter_config.json").write_text(json.dumps(config))
    return path
