"""What an export says of its making: what its recipe says, and what the run itself knows.

Nothing else is claimed: no title, licence or author, unless the recipe's own `[export]` names it.
"""

from __future__ import annotations

from pathlib import Path

from fastvideo import hub
from fastvideo.spec import UNSTATED, Provenance
from fastvideo_train import origins
from fastvideo_train.checkpoints import Checkpoints
from fastvideo_train.data._manifest import VideoManifest, read_manifest
from fastvideo_train.recipe import ClipsSpec, LatentsSpec, Recipe


def of(recipe: Recipe, step: int, said: Provenance, *, vae: str = "") -> Provenance:
    """Return what a recipe says of a model, completed by its data, method and parents."""
    known = {
        "recipe": f"run {recipe.run.name}: {step} steps of {recipe.method.name}",
        "data": _data(recipe),
    }
    missing = {key: text for key, text in known.items() if not getattr(said, key)}
    parents = {**_parents(recipe, vae), **said.parents}
    return said.model_copy(update={**missing, "parents": parents})


def _data(recipe: Recipe) -> str:
    data = recipe.data
    if isinstance(data, ClipsSpec):
        return f"clips rendered from the world {data.world}"
    if not isinstance(data, LatentsSpec):
        return "random latents"
    name = Path(data.folder).name
    try:
        manifest = read_manifest(data.folder)
    except ValueError:
        return f"latents {name}"
    if isinstance(manifest, VideoManifest):
        count = sum(bucket.planned for bucket in manifest.buckets)
        return f"latents {name}: {count} videos, clips.jsonl {manifest.clips}"
    return f"latents {name}: {manifest.count} clips of the world {manifest.world}"


def _parents(recipe: Recipe, vae: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name in [*(role.from_ for role in recipe.roles.values()), vae]:
        found |= _with_ancestors(name) if name else {}
    return found


def _with_ancestors(name: str) -> dict[str, str]:
    """Return the licences of a run or a model and of its own parents."""
    latest = Checkpoints(Path(name) / "checkpoints").latest()
    if latest is not None:
        recipe = origins.recipe_of(latest)
        said = recipe.export.get("provenance", {}).get("licence")
        return {f"run {recipe.run.name}": said or UNSTATED, **_parents(recipe)}
    try:
        spec, _ = hub.open_spec(name)
    except ValueError:  # a folder with a VAE alone, or a file of weights
        return {Path(name).name if Path(name).is_absolute() else name: UNSTATED}
    return {spec.name: spec.provenance.licence or UNSTATED, **spec.provenance.parents}
