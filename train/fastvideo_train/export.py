"""From a run to a folder that goes straight into `--model`: averaged weights, spec, and a proof.

export(run_folder, out)   # by the run's `[export]`: a whole model, or the vae/ part of one

A folder takes its name only after it was read back and its networks gave the numbers of the live
ones (rounded to the stored dtype) in one forward.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastvideo import files, model, preview
from fastvideo import registry as components
from fastvideo.config import Strict, merge, parse
from fastvideo.formats import PARTS
from fastvideo.formats import diffusers as layout
from fastvideo.log import logger
from fastvideo.models import classifier
from fastvideo.models import decoder as decoders
from fastvideo.spec import Defaults, Provenance, Scheduler
from fastvideo_train import _proof as proof
from fastvideo_train import export_lora, provenance
from fastvideo_train import roles as role_builder
from fastvideo_train.bundle import (
    bundle,
    check_latents,
    check_scheduler,
    load_vae,
    of_kind,
    read_vae,
    vae_folder,
)
from fastvideo_train.checkpoints import Checkpoints
from fastvideo_train.data.latents import encode_pixels, statistics
from fastvideo_train.export_lora import LoraExport
from fastvideo_train.loop import make_method
from fastvideo_train.methods import Wants
from fastvideo_train.origins import check_text, principal
from fastvideo_train.recipe import LatentsSpec, Recipe
from fastvideo_train.roles import Role
from fastvideo_train.validate import Clips

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PREVIEW_CLIPS = 8
TOLERANCE = 1e-5  # of the largest value; the same arithmetic on the same weights

Dtype = Literal["float32", "bfloat16"]


class TrainClips(Clips):
    """The training clips that statistics come from."""

    split: str = "train"
    seed: int = 0
    count: int = Field(default=64, ge=1)


class VaeExport(Strict):
    """`[export]` of a run that trains a VAE."""

    dtype: Dtype = "bfloat16"
    clips: TrainClips = TrainClips()


class SmallExport(Strict):
    """`[export]` of a run that trains a classifier or a small decoder."""

    dtype: Dtype = "bfloat16"


class ModelExport(Strict):
    """`[export]` of a run that trains a denoiser: what its folder says of itself."""

    name: str = Field(default="", description="the run's, unless given")
    vae: str = Field(min_length=1, description="a model folder that has a vae/")
    dtype: Dtype = "bfloat16"
    scheduler: Scheduler = Scheduler()
    defaults: Defaults = Defaults()
    provenance: Provenance = Provenance()


@dataclass(frozen=True)
class Exported:
    """A folder that was read back. Errors are shares of the largest value in one forward.

    error: against the live networks with rounded weights; rounding: against unrounded ones.
    """

    folder: Path
    error: float
    rounding: float


@dataclass(frozen=True)
class Trained:
    """A run read back: its recipe and its networks in float32, with averaged weights."""

    recipe: Recipe
    roles: Mapping[str, Role]
    step: int


def export(
    run: str | Path,
    folder: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    merge_lora: bool = False,
) -> Exported:
    """Export a run by the `[export]` of its recipe, with `changes` on top.

    A run that learned a LoRA gives its file, or with `merge_lora` what any other denoiser's gives.
    A run with a denoiser gives a whole model folder, one that trains a VAE gives its `vae/`, and a
    classifier or a small decoder a folder of its own.
    Raises `ValueError` if the run, the table or the folder will not do.
    """
    trained = load_run(run)
    values = merge(trained.recipe.export, changes or {})
    if merge_lora and not export_lora.learns(trained.recipe):
        raise ValueError(f"{run} learned no LoRA that could be merged")
    spec = _parse(trained.recipe, values, merge_lora=merge_lora)
    if isinstance(spec, LoraExport):
        role, path = of_kind(trained.roles, "dit"), Path(folder)
        return Exported(path, *export_lora.write(run, role, path, spec, overwrite=overwrite))
    if isinstance(spec, ModelExport):
        return export_model(trained, folder, spec, overwrite=overwrite)
    if isinstance(spec, SmallExport):
        is_decoder = any(role.kind == "decoder" for role in trained.roles.values())
        write = export_decoder if is_decoder else export_classifier
        return write(trained, folder, spec, overwrite=overwrite)
    return export_vae(trained, folder, spec, overwrite=overwrite)


def check(recipe: Recipe) -> None:
    """Raise `ValueError` for a wrong `[export]` before a run, rather than after it.

    Its VAE may be made while the run trains, so that a missing one is only logged.
    """
    _check_teacher(recipe)
    check_text(recipe)
    if not recipe.export:
        return
    spec = _parse(recipe, recipe.export)
    if isinstance(spec, ModelExport):
        _check_sampling(recipe, spec)
        try:
            read_vae(spec.vae)
        except ValueError as error:
            logger.warning("[export] vae of %s is needed after the run: %s", recipe.run.name, error)


def _check_sampling(recipe: Recipe, spec: ModelExport) -> None:
    check_scheduler(
        recipe,
        spec.scheduler,
        f"[export] of {recipe.run.name}:",
        steps=spec.defaults.num_inference_steps,
        guidance=spec.defaults.guidance_scale,
    )


def _check_teacher(recipe: Recipe) -> None:
    """Refuse a VAE to distil from that did not encode the latents; a run's is judged at export."""
    for role in recipe.roles.values():
        if role.kind != "vae" or recipe.data.name != "latents":
            continue
        try:
            vae = load_vae(role.from_)
        except ValueError:
            continue
        check_latents(recipe, vae, role.from_)


def _parse(
    recipe: Recipe, values: Mapping[str, Any], *, merge_lora: bool = False
) -> ModelExport | VaeExport | SmallExport | LoraExport:
    kinds = {role.kind for role in recipe.roles.values()}
    source = f"[export] of {recipe.run.name}"
    if export_lora.learns(recipe) and not merge_lora:
        return parse(LoraExport, values, source=source)
    if "dit" in kinds:
        return parse(ModelExport, values, source=source)
    if kinds & {"classifier", "decoder"}:
        return parse(SmallExport, values, source=source)
    return parse(VaeExport, values, source=source)


def export_vae(
    run: Trained, folder: str | Path, spec: VaeExport, *, overwrite: bool = False
) -> Exported:
    """Write `vae/`: fresh statistics of its latents in its config, and their map to previews."""
    role = of_kind(run.roles, "vae")
    vae: Any = role.net
    dtype = DTYPES[spec.dtype]
    stored, clips = proof.rounded(vae, dtype), spec.clips
    vae.set_statistics(*statistics(stored, _pixels(clips, clips.count)))
    few_BCTHW = torch.cat([*_pixels(clips, min(clips.count, PREVIEW_CLIPS))])
    latents_BCTHW = vae.normalize(encode_pixels(stored, few_BCTHW))
    family = run.recipe.roles[role.name].family
    with _proved(Path(folder), overwrite=overwrite) as aside:
        layout.save_part(vae, aside / "vae", part="vae", family=family, dtype=dtype)
        preview.write(preview.fit(latents_BCTHW, few_BCTHW / 127.5 - 1), aside)
        error, rounding = proof.errors(proof.vae_forward, vae, load_vae(aside), dtype, ())
        _judge(error, folder, "vae")
    return Exported(Path(folder), error, rounding)


def _pixels(clips: TrainClips, count: int) -> Iterator[Tensor]:
    """Yield a world's first clips, uint8 (1, 3, T, H, W)."""
    world = clips.open()
    for index in range(count):
        frames_THWC = world.clip(clips.seed, index, clips.split).frames_THWC
        yield torch.tensor(frames_THWC).permute(3, 0, 1, 2)[None]


def export_classifier(
    run: Trained, folder: str | Path, spec: SmallExport, *, overwrite: bool = False
) -> Exported:
    """Write a classifier's config and weights."""
    role, dtype = of_kind(run.roles, "classifier"), DTYPES[spec.dtype]
    family = run.recipe.roles[role.name].family
    with _proved(Path(folder), overwrite=overwrite) as aside:
        classifier.write(role.net, aside, family=family, dtype=dtype)
        error, rounding = proof.errors(
            proof.judge_forward, role.net, classifier.read(aside), dtype, ()
        )
        _judge(error, folder, "classifier")
    return Exported(Path(folder), error, rounding)


def export_decoder(
    run: Trained, folder: str | Path, spec: SmallExport, *, overwrite: bool = False
) -> Exported:
    """Write a small decoder, with the statistics of the VAE's latents in its config."""
    role, vae = of_kind(run.roles, "decoder"), of_kind(run.roles, "vae")
    check_latents(run.recipe, vae.net, run.recipe.roles[vae.name].from_)
    net, dtype = role.net, DTYPES[spec.dtype]
    net.set_statistics(vae.net.config.latents_mean, vae.net.config.latents_std)
    family = run.recipe.roles[role.name].family
    with _proved(Path(folder), overwrite=overwrite) as aside:
        decoders.write(net, aside, family=family, dtype=dtype)
        stored = decoders.read(aside, dtype=torch.float32)
        error, rounding = proof.errors(proof.decoder_forward, net, stored, dtype, ())
        _judge(error, folder, "decoder")
    return Exported(Path(folder), error, rounding)


def export_model(
    run: Trained, folder: str | Path, spec: ModelExport, *, overwrite: bool = False
) -> Exported:
    """Write a whole model: the run's denoiser and text encoder, and the VAE of another folder."""
    _check_sampling(run.recipe, spec)
    vae = load_vae(spec.vae)
    check_latents(run.recipe, vae, spec.vae)
    live = bundle(
        run.recipe,
        run.roles,
        vae=vae,
        vae_family=read_vae(spec.vae).family,
        scheduler=spec.scheduler,
        step=run.step,
        name=spec.name,
        defaults=spec.defaults,
        provenance=provenance.of(run.recipe, run.step, spec.provenance, vae=spec.vae),
    )
    dtype = DTYPES[spec.dtype]
    forwards: dict[str, Callable[[Any], Tensor]] = {
        "text": lambda net: proof.text_forward(live, net),
        "dit": lambda net: proof.dit_forward(live, net),
        "vae": proof.vae_forward,
    }
    keep = components.load("fastvideo.models.dit", live.spec.dit.family, "KEEP_FLOAT32")
    worst = (0.0, 0.0)
    with _proved(Path(folder), overwrite=overwrite) as aside:
        layout.save(live, aside, dtype=dtype, overwrite=True)
        if (map_of_vae := vae_folder(spec.vae) / preview.FILE).is_file():
            shutil.copyfile(map_of_vae, aside / preview.FILE)
        stored = model.load(aside, device="cpu", dtype="float32")
        for part in PARTS:
            kept = keep if part == "dit" else ()
            nets = getattr(live, part), getattr(stored, part)
            errors = proof.errors(forwards[part], *nets, dtype, kept)
            _judge(errors[0], folder, part)
            worst = max(worst[0], errors[0]), max(worst[1], errors[1])
    return Exported(Path(folder), *worst)


def load_run(folder: str | Path) -> Trained:
    """Read a run's newest checkpoint; `ValueError` if it has none."""
    store = Checkpoints(Path(folder) / "checkpoints")
    path = store.latest()
    if path is None:
        raise ValueError(f"{folder} has no checkpoint; is it the folder of a run?")
    info = store.read_info(path)
    recipe = parse(Recipe, info["recipe"], source=str(path))
    wants = make_method(recipe).wants
    roles = role_builder.build(_to_read(recipe, str(folder)), wants, only=_exported(wants))
    for role in roles.values():
        role.net.eval().requires_grad_(False)
    return Trained(recipe, roles, info["step"])


def _exported(wants: Mapping[str, Wants]) -> list[str]:
    """Return the role of each kind that a model is made of: a teacher or a critic stays behind."""
    kinds = dict.fromkeys(want.kind for want in wants.values())
    found = (principal(n for n, want in wants.items() if want.kind == kind) for kind in kinds)
    return [name for name in found if name is not None]


def _to_read(recipe: Recipe, folder: str) -> Recipe:
    """Return the recipe with float32 networks whose weights come from the run itself."""
    roles = {
        name: role.model_copy(
            update={
                "dtype": None,
                "lora": None,  # merged
                "from_": folder if role.trainable else role.from_,
            }
        )
        for name, role in recipe.roles.items()
    }
    run = recipe.run.model_copy(update={"dtype": "float32", "device": "cpu"})
    data = recipe.data
    if isinstance(data, LatentsSpec):
        data = data.model_copy(update={"text": "encoder"})  # it becomes a part of the model
    return recipe.model_copy(update={"roles": roles, "run": run, "data": data})


@contextmanager
def _proved(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a folder beside `folder` that takes its name if nothing was wrong with it."""
    if folder.exists() and overwrite and not _is_export(folder):
        raise ValueError(f"{folder} is not an exported model, so it is not replaced; remove it")
    with files.folder(folder, overwrite=overwrite) as aside:
        yield aside


def _is_export(folder: Path) -> bool:
    """Tell whether a folder is one of ours, which may be replaced: a model, or a lone network."""
    return (folder / "vae" / "config.json").is_file() or classifier.is_here(folder)


def _judge(error: float, folder: str | Path, part: str) -> None:
    if not error <= TOLERANCE:
        raise ValueError(
            f"{folder} is not exported: its {part}, read back, differs from the live one by"
            f" {error:.1e} of the largest value (allowed: {TOLERANCE:.0e})"
        )
