"""Learning a LoRA: low-rank maps beside frozen linear layers, and the weights that they amount to.

y = W x + b + alpha / rank * B A x with A (rank, I) drawn and B (O, rank) zero at first
(2106.09685, section 4.1); W and b keep their names and never change, so that a checkpoint holds
A and B alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo import rng
from fastvideo.log import logger
from fastvideo.lora import Change, merged
from fastvideo_train.recipe import LoraSpec

DOWN, UP = ".lora_A", ".lora_B"
_SAMPLE = 4096  # numbers from either end of a tensor: new weights differ in these too


class LoraLinear(nn.Linear):
    """A linear layer with frozen weights and two maps that learn."""

    def __init__(
        self,
        frozen: nn.Linear,
        spec: LoraSpec,
        generator: torch.Generator,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # weight and bias are there already
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.weight, self.bias = frozen.weight, frozen.bias
        self.scale = spec.scale
        bound = frozen.in_features**-0.5
        down_rI = torch.empty(spec.rank, frozen.in_features).uniform_(
            -bound, bound, generator=generator
        )
        device = device or frozen.weight.device
        self.lora_A = nn.Parameter(down_rI.to(device))
        self.lora_B = nn.Parameter(torch.zeros(frozen.out_features, spec.rank, device=device))

    def forward(self, x_BLI: Tensor) -> Tensor:
        """Return (B, L, O)."""
        low_BLr = F.linear(x_BLI, self.lora_A)
        return F.linear(x_BLI, self.weight, self.bias) + self.scale * F.linear(low_BLr, self.lora_B)


def add(
    net: nn.Module,
    spec: LoraSpec,
    *,
    seed: int,
    source: str,
    device: torch.device | str | None = None,
) -> None:
    """Put maps beside the linear layers that `spec.targets` name; only the maps learn from now on.

    A target is a part of a dotted name, such as attn1, attn1.to_q or blocks.0. The maps live on
    `device`, by default where the weights do. Raises `ValueError` for a target that names no linear
    layer.
    """
    linear = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    chosen = {name: m for name, m in linear.items() if any(_is_in(t, name) for t in spec.targets)}
    for target in spec.targets:
        if not any(_is_in(target, name) for name in chosen):
            parts = sorted({part for name in linear for part in name.split(".")} - {"net", "proj"})
            known = ", ".join(part for part in parts if not part.isdigit())
            raise ValueError(f"{source}.targets {target!r} names no linear layer (parts: {known})")
    net.requires_grad_(False)
    for name, layer in chosen.items():
        owner, _, own = name.rpartition(".")
        maps = LoraLinear(layer, spec, rng.torch_generator(seed, f"lora/{name}"), device)
        setattr(net.get_submodule(owner), own, maps.train(layer.training))
    count = sum(p.numel() for p in net.parameters() if p.requires_grad)
    logger.info("%s: rank %d on %d layers, %d numbers", source, spec.rank, len(chosen), count)


def pairs(learned: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return {module: (A, B)} of a role's learned weights."""
    modules = [name.removesuffix(DOWN) for name in learned if name.endswith(DOWN)]
    return {module: (learned[module + DOWN], learned[module + UP]) for module in modules}


def merge(
    base: Mapping[str, Tensor], learned: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """Return plain weights: the base, and in float32 those that the maps change.

    A weight that the base lacks was zero (what a network has by birth).
    """
    found = dict(base)
    for module, (down_rI, up_Or) in pairs(learned).items():
        name, change = f"{module}.weight", Change(up_Or=up_Or, down_rI=down_rI, scale=scale)
        if name in base:
            found[name] = merged(base[name].float(), [(1.0, change)])
        else:
            found[name] = change.times(1.0, torch.empty(change.shape))
    return found


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Digest names, shapes, types, and the first and last numbers of every tensor."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.flatten()
        for part in (flat[:_SAMPLE], flat[-_SAMPLE:]):
            digest.update(part.to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_in(target: str, name: str) -> bool:
    return f".{target}." in f".{name}."
