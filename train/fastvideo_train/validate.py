"""Look at a run from outside: a world's parser reads what its networks make of unseen clips.

job = Job.open(recipe, folder, validate=validator(recipe, folder))   # None without [validate]

A run of method `vae` or `decoder` reconstructs held-out clips; a run with a denoiser renders
held-out prompts with the VAE of `[validate] vae`; both write a contact sheet to `validate/` in the
run's folder. A classifier names what is in held-out clips.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import Field

from fastvideo import measure, media, sampling, worlds
from fastvideo.config import Strict, parse
from fastvideo.measure import Frames, Reconstructed, Rendered
from fastvideo.metrics.faithfulness import faithfulness, rates
from fastvideo.model import Model
from fastvideo.resolve import resolve
from fastvideo.spec import Scheduler
from fastvideo_train.bundle import (
    bundle,
    check_latents,
    check_scheduler,
    load_vae,
    of_kind,
    read_vae,
)
from fastvideo_train.loop import Validate
from fastvideo_train.origins import principal
from fastvideo_train.recipe import Recipe
from fastvideo_train.roles import Role

_CALLS = {"forward", "encode", "encode_moments", "decode"}  # what `roles.compile_calls` may replace


class Clips(Strict):
    """The clips that a validation looks at: `count` of them, never trained on.

    Seed 1, because `fastvideo eval` measures with seed 0: clips that chose between recipes,
    checkpoints and settings must not be those that judge the result. Captions and backgrounds
    differ; the held-out combinations of attributes are few, and the same.
    """

    world: str = "shapes"
    split: str = "heldout"
    seed: sampling.OwnSeed = 1
    count: int = Field(default=16, ge=1)
    num_frames: sampling.NumFrames = 81
    height: sampling.Height = 128
    width: sampling.Width = 128
    fps: sampling.Fps = 16
    sheet: int = Field(default=8, ge=0, description="clips on the contact sheet")

    def open(self) -> worlds.World:
        """Return the world at these sizes."""
        return worlds.open_world(
            self.world,
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            fps=self.fps,
        )


class Prompts(Clips):
    """The prompts that a validation renders, and how; `vae` is a model folder that has one."""

    vae: str
    steps: sampling.NumSteps = 20
    guidance: sampling.GuidanceScale = 3.0
    scheduler: Scheduler = Scheduler(name="euler")
    batch: int = Field(default=8, ge=1)


def validator(recipe: Recipe, folder: Path) -> Validate | None:
    """Return the validation that `[validate]` describes, None if it is empty.

    Raises `ValueError` if the table or, in a run that validates, its VAE will not do.
    """
    if not recipe.validation:
        return None
    source = f"[validate] of {recipe.run.name}"
    if any(role.kind == "dit" for role in recipe.roles.values()):
        return _Rendering(parse(Prompts, recipe.validation, source=source), recipe, folder)
    clips = parse(Clips, recipe.validation, source=source)
    if any(role.kind == "classifier" for role in recipe.roles.values()):
        return _Naming(clips)
    return _Reconstruction(clips, folder)


class _Naming:
    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __call__(self, roles: Mapping[str, Role], *, step: int) -> Mapping[str, float]:
        c, world = self.clips, self.clips.open()
        net = of_kind(roles, "classifier").net
        device = next(net.parameters()).device
        truths, named = [], []
        with _eager(roles):
            for i in range(c.count):
                clip = world.clip(c.seed, i, c.split)
                pixels = torch.from_numpy(clip.frames_THWC).permute(3, 0, 1, 2)[None]
                truths.append(clip.truth)
                named += net.labels(net(pixels.to(device)))
        found = rates(faithfulness(truths, named, legal=worlds.attributes(c.world)))
        return {f"right/{attribute}": rate for attribute, rate in found.items()}


class _Reconstruction:
    def __init__(self, clips: Clips, folder: Path) -> None:
        self.clips, self.folder = clips, folder

    def __call__(self, roles: Mapping[str, Role], *, step: int) -> Mapping[str, float]:
        c, world = self.clips, self.clips.open()
        vae = of_kind(roles, "vae").net
        decoder = next((role.net for role in roles.values() if role.kind == "decoder"), None)
        true = [world.clip(c.seed, i, c.split) for i in range(c.count)]
        with _eager(roles):
            made = [measure.reconstructed(vae, world, clip, decoder=decoder) for clip in true]
        pairs = zip(true, made, strict=True)
        _sheet(self.folder, step, [f for t, m in pairs for f in (t.frames_THWC, m.frames)], c.sheet)
        numbers = {"psnr": fmean(m.psnr for m in made), "ssim": fmean(m.ssim for m in made)}
        return numbers | _rates(made, c)


class _Rendering:
    def __init__(self, prompts: Prompts, recipe: Recipe, folder: Path) -> None:
        self.prompts, self.recipe, self.folder = prompts, recipe, folder
        self._vae: Any = None
        check_scheduler(
            recipe,
            prompts.scheduler,
            f"[validate] of {recipe.run.name}:",
            steps=prompts.steps,
            guidance=prompts.guidance,
        )
        if 0 < recipe.run.validate_every <= recipe.run.steps:  # a wrong VAE is refused now
            self._vae = self._load_vae()

    def __call__(self, roles: Mapping[str, Role], *, step: int) -> Mapping[str, float]:
        p, model = self.prompts, self._model(roles, step)
        with _eager(roles):
            made = [m for first in range(0, p.count, p.batch) for m in self._batch(model, first)]
        _sheet(self.folder, step, [m.frames for m in made], p.sheet, [m.prompt for m in made])
        known = [m.flicker for m in made if not math.isnan(m.flicker)]  # none of 1 or 2 frames
        return ({"flicker": fmean(known)} if known else {}) | _rates(made, p)

    def _batch(self, model: Model, first: int) -> list[Rendered]:
        p, world = self.prompts, self.prompts.open()
        indices = range(first, min(first + p.batch, p.count))
        clips = [world.clip(p.seed, i, p.split) for i in indices]
        requests = [
            sampling.GenerateRequest(
                prompt=clip.caption,
                seed=p.seed + i,
                num_inference_steps=p.steps,
                guidance_scale=p.guidance,
                num_frames=p.num_frames,
                height=p.height,
                width=p.width,
            )
            for i, clip in zip(indices, clips, strict=True)
        ]
        params = [resolve(request, model.spec) for request in requests]
        return measure.rendered(model, world, clips, params)

    def _model(self, roles: Mapping[str, Role], step: int) -> Model:
        """Put the run's networks into the model folder that lends its VAE."""
        if self._vae is None:
            self._vae = self._load_vae()
        return bundle(
            self.recipe,
            roles,
            vae=self._vae,
            vae_family=read_vae(self.prompts.vae).family,
            scheduler=self.prompts.scheduler,
            step=step,
        )

    def _load_vae(self) -> Any:
        """Load the VAE in the denoiser's dtype; `ValueError` if the latents are not its own."""
        dits = {name: role for name, role in self.recipe.roles.items() if role.kind == "dit"}
        dit = dits[principal(dits) or next(iter(dits))]
        dtype = getattr(torch, dit.dtype or self.recipe.run.dtype)
        try:
            vae = load_vae(self.prompts.vae, dtype=dtype)
            check_latents(self.recipe, vae, self.prompts.vae)
        except ValueError as error:
            raise ValueError(f"[validate] vae of {self.recipe.run.name}: {error}") from None
        return vae


@contextmanager
def _eager(roles: Mapping[str, Role]) -> Iterator[None]:
    """Take compiled functions off the networks: other sizes would compile them anew."""
    compiled = {
        name: {key: role.net.__dict__.pop(key) for key in [*role.net.__dict__] if key in _CALLS}
        for name, role in roles.items()
    }
    try:
        yield
    finally:
        for name, functions in compiled.items():
            roles[name].net.__dict__.update(functions)


def _rates(made: Sequence[Reconstructed | Rendered], clips: Clips) -> dict[str, float]:
    found = rates(measure.rows(made, worlds.attributes(clips.world)))
    return {f"right/{attribute}": rate for attribute, rate in found.items()}


def _sheet(
    folder: Path,
    step: int,
    clips: Sequence[Frames],
    count: int,
    labels: Sequence[str] | None = None,
) -> None:
    if not count:
        return
    shown = clips[: count if labels else 2 * count]
    image = media.contact_sheet(shown, labels=labels[:count] if labels else None)
    media.write_png(folder / "validate" / f"step-{step:08d}.png", image, overwrite=True)
