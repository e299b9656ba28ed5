"""A run's networks and the VAE of a model folder, put together as a model that can render."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastvideo import attention as patterns
from fastvideo import hub, schedulers, weights
from fastvideo import registry as components
from fastvideo.formats import diffusers as layout
from fastvideo.model import Model
from fastvideo.spec import Attention, Defaults, Network, Provenance, Sampler, Scheduler, Spec
from fastvideo_train.data._manifest import read_manifest
from fastvideo_train.data.latents import encoder_hash
from fastvideo_train.loop import make_method
from fastvideo_train.origins import principal
from fastvideo_train.recipe import AttentionSpec, Recipe
from fastvideo_train.roles import Role


def of_kind(roles: Mapping[str, Role], kind: str) -> Role:
    """Return the role of a kind, the student where there are several; `ValueError` if none."""
    name = principal(name for name, role in roles.items() if role.kind == kind)
    if name is None:
        raise ValueError(f"the run has no role of kind {kind!r} (it has: {', '.join(roles)})")
    return roles[name]


def check_scheduler(
    recipe: Recipe, scheduler: Scheduler, source: str, *, steps: int, guidance: float
) -> None:
    """Refuse a way to sample other than the one that the run's student is distilled for."""
    sampler = distilled(recipe)
    if sampler is None:
        return
    wanted, own = sampler.scheduler, sampler.num_inference_steps
    assert wanted is not None, "what is distilled has a scheduler"
    if schedulers.create(scheduler.name, scheduler.args) != schedulers.create(
        wanted.name, wanted.args
    ):
        raise ValueError(
            f"{source} scheduler {scheduler.name} {scheduler.args} is not what method"
            f" {recipe.method.name} distils for; set it to {wanted.name} {wanted.args}"
        )
    if steps != own:
        raise ValueError(f"{source} {steps} steps are not those that are distilled; nearest: {own}")
    if guidance != sampler.guidance_scale:
        raise ValueError(
            f"{source} guidance {guidance:g} must be {sampler.guidance_scale:g}: the student is"
            " guidance-distilled"
        )


def distilled(recipe: Recipe) -> Sampler | None:
    """Return how a run's student is distilled to be sampled; None if its method distils none."""
    method: Any = make_method(recipe)
    scheduler: Scheduler | None = method.sampler
    if scheduler is None:
        return None
    steps = len(scheduler.args["sigmas"])
    return Sampler(scheduler=scheduler, num_inference_steps=steps, guidance_scale=1)


def read_vae(folder: str | Path) -> Network:
    """Return family and dims of the VAE of a model or a folder; `ValueError` if there is none."""
    return layout.read_network(vae_folder(folder), "vae")


def load_vae(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """Load the VAE of a model, or of a folder that needs no other part."""
    path, package = vae_folder(folder, weights=True), "fastvideo.models.vae"
    network = read_vae(folder)
    config = components.load(package, network.family, "Config").parse(network.config)
    vae: Any = weights.build(lambda: components.load(package, network.family, "Vae")(config))
    weights.load_into(vae, layout.tensors(path, "vae"), source=path / "vae", dtype=dtype)
    return vae.eval().requires_grad_(False)


def check_latents(recipe: Recipe, vae: Any, folder: str) -> None:
    """Refuse a VAE other than the one whose latents, or whose statistics, the run learned from."""
    if recipe.data.name != "latents" or not Path(recipe.data.folder).is_dir():
        return
    manifest, run = read_manifest(recipe.data.folder), recipe.run.name
    if encoder_hash(vae) != manifest.encoder:
        raise ValueError(
            f"the VAE of {folder} encodes by other weights than those of {recipe.data.folder},"
            f" which {run} learns from; take the VAE that encoded them, or encode them again"
        )
    near = [
        torch.allclose(torch.tensor(a).float(), torch.tensor(b).float(), rtol=1e-4, atol=1e-5)
        for a, b in (
            (manifest.latents_mean, vae.config.latents_mean),
            (manifest.latents_std, vae.config.latents_std),
        )
    ]
    if not all(near):
        raise ValueError(
            f"the VAE of {folder} normalises latents by other statistics than"
            f" {recipe.data.folder}, which {run} learns from"
        )


def bundle(
    recipe: Recipe,
    roles: Mapping[str, Role],
    *,
    vae: Any,
    vae_family: str,
    scheduler: Scheduler,
    step: int,
    name: str = "",
    defaults: Defaults | None = None,
    provenance: Provenance | None = None,
) -> Model:
    """Put the networks of a run and a VAE together as a model that can render.

    `step` counts the steps taken: a sparsity that still rises is that of the last one. `name` is
    the run's unless given; `defaults` are laid over what the method trained on.
    """
    dit, text = of_kind(roles, "dit"), of_kind(roles, "text")
    method: Any = make_method(recipe)
    export_defaults = defaults.model_dump(exclude_unset=True) if defaults else {}
    trained_on = {
        "max_text_tokens": method.config.max_text_tokens,
        "negative_prompt": method.config.negative_prompt,
    }
    spec = Spec(
        name=name or recipe.run.name,
        dit=Network(family=recipe.roles[dit.name].family, config=dict(dit.config)),
        vae=Network(family=vae_family),
        text=Network(family=recipe.roles[text.name].family, config=dict(text.config)),
        compression=layout.compression(asdict(dit.net.config), asdict(vae.config)),
        scheduler=scheduler,
        attention=attention_after(dit.attention, step),
        defaults=Defaults(**{**trained_on, **export_defaults}),
        provenance=provenance or Provenance(),
    )
    first = next(dit.net.parameters())
    return Model(spec, dit.net, vae, text.net, method.tokenizer, first.device, dit.dtype)


def attention_after(attention: AttentionSpec, step: int) -> Attention:
    """Return how a denoiser attends after so many steps."""
    args = dict(attention.args)
    if attention.anneal_every:
        args["sparsity"] = patterns.unparse(attention.at(max(0, step - 1)))[1]["sparsity"]
    return Attention(pattern=attention.pattern, args=args)


def vae_folder(folder: str | Path, *, weights: bool = False) -> Path:
    """Return the folder that a name or path of a model means; it may have no part but a VAE."""
    name = str(folder)
    if name in hub.bundled():
        return hub.ZOO / name
    return hub.open_spec(name, weights=weights)[1] if hub.is_remote(name) else Path(folder)
