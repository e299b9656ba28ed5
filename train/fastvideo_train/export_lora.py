"""From a run that learned a LoRA to its file, in diffusers' names, and a proof of what it holds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo import files, sampler_note
from fastvideo.config import Strict
from fastvideo.log import logger
from fastvideo.lora import Loras, Use
from fastvideo.lora.file import LowRank, save
from fastvideo.shapes import LatentShape
from fastvideo.spec import Attention, Defaults, Provenance, Sampler, Scheduler
from fastvideo_train import lora, origins, provenance
from fastvideo_train.bundle import attention_after, distilled
from fastvideo_train.recipe import Dtype, Recipe, RoleSpec
from fastvideo_train.roles import Role

TOLERANCE = 1e-5  # of the largest value; sums of the same numbers in another order
NUM_TOKENS = 8  # of the made-up text of the proof


class LoraExport(Strict):
    """`[export]` of a run that learns a LoRA; what a merged folder needs may stand there too."""

    dtype: Dtype = "float32"
    name: str = ""
    vae: str = ""
    scheduler: Scheduler = Scheduler()
    defaults: Defaults = Defaults()
    provenance: Provenance = Provenance()


def learns(recipe: Recipe) -> bool:
    """Tell whether the denoiser that a run is for learns a LoRA."""
    name = origins.principal(n for n, role in recipe.roles.items() if role.kind == "dit")
    return name is not None and recipe.roles[name].lora is not None


def write(
    run: str | Path, role: Role, path: Path, spec: LoraExport, *, overwrite: bool
) -> tuple[float, float]:
    """Write a run's averaged maps, with their scale in them; return the errors of one forward.

    role: the run's denoiser in float32, its maps merged. The errors, shares of the largest value,
    are those of the base with the file merged: against the base with the rounded maps, and against
    `role`. Raises `ValueError` if `path` will not do, or the first error is no rounding.
    """
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} must end in .safetensors, as a LoRA is one file (--merge-lora writes a folder)"
        )
    dtype: torch.dtype = getattr(torch, spec.dtype)
    recipe, step, learned = origins.learned(run, role.name)
    there = recipe.roles[role.name]
    assert there.lora is not None, "only a run that learns one comes here"
    scale = there.lora.scale
    maps = {name: LowRank(a, b, scale) for name, (a, b) in lora.pairs(learned).items()}
    first = origins.first_weights(there, role.name)
    base = {  # zero-initialised, unless the file has it
        name: first[name] if name in first else torch.zeros_like(tensor)
        for name, tensor in role.net.state_dict().items()
    }
    also = [n for n, other in recipe.roles.items() if other.kind == "text" and other.trainable]
    if also:
        logger.warning("%s holds nothing of %s, which learned too", path, also[0])
    with files.atomic(path, overwrite=overwrite) as new:
        said = provenance.of(recipe, step, spec.provenance)
        save(new, maps, dtype=dtype, notes=_notes(recipe, there, step, said))
        stored, rounded = _with(role.net, base), _with(role.net, _rounded(base, maps, dtype))
        Loras().use(stored, [Use(new)])
        got, same, exact = (_forward(role, net) for net in (stored, rounded, role.net))
        size = exact.abs().max().clamp_min(1e-12)
        error, rounding = (float((got - other).abs().max() / size) for other in (same, exact))
        if not error <= TOLERANCE:
            raise ValueError(f"{path} is not exported: read back, it differs by {error:.1e}")
    return error, rounding


def _notes(recipe: Recipe, there: RoleSpec, step: int, said: Provenance) -> dict[str, str]:
    """Return the header's entries: what it was learned on and how, and how it is sampled."""
    assert there.lora is not None, "only a run that learns one comes here"
    wanted = _sampler(recipe, there, step)
    return {
        "base_model": there.from_,
        "trained_rank": str(there.lora.rank),
        "trained_alpha": f"{there.lora.rank * there.lora.scale:g}",
        "trained_steps": str(step),
        "run": recipe.run.name,
        "provenance": said.model_dump_json(exclude_defaults=True),
        **(sampler_note.header(wanted) if wanted else {}),
    }


def _sampler(recipe: Recipe, there: RoleSpec, step: int) -> Sampler | None:
    """Return how the file is sampled; None for a style, which goes on any model of its shapes."""
    wanted, attention = distilled(recipe), attention_after(there.attention, step)
    if wanted is None and attention == Attention():
        return None
    return (wanted or Sampler()).model_copy(update={"attention": attention})


def _rounded(
    base: Mapping[str, Tensor], maps: Mapping[str, LowRank], dtype: torch.dtype
) -> dict[str, Tensor]:
    learned: dict[str, Tensor] = {}
    for module, pair in maps.items():
        learned[module + lora.DOWN] = pair.down_rI.to(dtype).float()
        learned[module + lora.UP] = (pair.up_Or * pair.scale).to(dtype).float()
    return lora.merge(base, learned, 1.0)


def _with(net: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(net)
    other.load_state_dict(dict(weights))
    return other


@torch.no_grad()
def _forward(role: Role, net: Any) -> Tensor:
    c = net.config
    frames, height, width = c.patch_size
    grid = LatentShape(2 * frames, 4 * height, 4 * width)
    shape = (1, c.in_channels, grid.frames, grid.height, grid.width)
    x = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    text = torch.linspace(-1, 1, NUM_TOKENS * c.text_dim).reshape(1, NUM_TOKENS, c.text_dim)
    attn_kwargs = role.attend(grid, num_text_tokens=NUM_TOKENS, step=0)
    v: Tensor = net(x, torch.full((1, 1), 500.0), role.family.Conditioning(text), **attn_kwargs)
    return v.double()
