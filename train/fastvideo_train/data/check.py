"""What a recipe's stored data must be, looked at before any network is built or loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvideo import hub, registry
from fastvideo_train import origins
from fastvideo_train.data import hashes
from fastvideo_train.data._manifest import AnyManifest, VideoManifest, read_manifest
from fastvideo_train.data._stores import check_whole
from fastvideo_train.data.text_states import stored_prompts
from fastvideo_train.recipe import LatentsSpec, Recipe


def check(recipe: Recipe) -> None:
    """Raise `ValueError` for latents or text states that are unfinished or of other encoders.

    Weights are only mapped and hashed: those of the VAEs that the recipe names, and with stored
    text those of the text encoder.
    """
    data = recipe.data
    if not isinstance(data, LatentsSpec):
        return
    manifest = read_manifest(data.folder)
    check_whole(Path(data.folder), manifest)
    for where, values in (("validate", recipe.validation), ("export", recipe.export)):
        if isinstance(values.get("vae"), str):
            _check_vae(values["vae"], f"{where}.vae", data.folder, manifest)
    if data.text == "stored":
        _check_text(recipe, data, manifest)


def _check_vae(name: str, key: str, folder: str, manifest: AnyManifest) -> None:
    place = hub.ZOO / name if name in hub.bundled() else Path(name)
    if not (place / "vae").is_dir():
        return  # what needs it says so: an export's VAE may be made while the run trains
    if hashes.of_vae(place) != manifest.encoder:
        raise ValueError(
            f"latents in {folder} are stale: {key} {name} encodes by other weights than those that"
            " made them; take the VAE that encoded them, or encode them again"
        )


def _check_text(recipe: Recipe, data: LatentsSpec, manifest: AnyManifest) -> None:
    if not isinstance(manifest, VideoManifest):
        raise ValueError(
            f"data.text 'stored' needs text states, and {data.folder} was encoded from a world; use"
            " 'encoder'"
        )
    role, args = recipe.roles.get("text"), recipe.method.args
    if role is None:
        raise ValueError(f"data.text 'stored' is of no use to method {recipe.method.name}")
    if role.trainable or not role.from_:
        raise ValueError(
            "data.text 'stored' needs roles.text with trainable = false and `from`, the model whose"
            " text encoder made the states"
        )
    if recipe.run.validate_every and recipe.validation:
        raise ValueError(
            "data.text 'stored' has no states for the prompts of [validate]; set"
            " run.validate_every = 0, or data.text = 'encoder'"
        )
    _same("roles.text.from", role.from_, _text_hash(recipe), manifest.text.encoder, data.folder)
    name = str(args.get("tokenizer", ""))
    if not name.startswith("world:"):  # those words are no file
        own = hashes.of_tokenizer(origins.tokenizer_folder(name))
        _same("method.args.tokenizer", name, own, manifest.text.tokenizer, data.folder)
    limit = args.get("max_text_tokens")
    if limit != manifest.text.max_tokens:
        raise ValueError(
            f"method.args.max_text_tokens {limit} must be {manifest.text.max_tokens}, as in the"
            f" text states of {data.folder}"
        )
    negative = str(args.get("negative_prompt", ""))
    if negative not in stored_prompts(Path(data.folder)):
        raise ValueError(
            f"method.args.negative_prompt {negative!r} has no state in {data.folder}; encode with"
            " --prompt and it, or take another"
        )


def _same(key: str, value: str, own: str, stored: str, folder: str) -> None:
    if own != stored:
        raise ValueError(
            f"text states in {folder} are stale: {key} {value} is another than the one that made"
            " them; take that one, or encode them again"
        )


def _text_hash(recipe: Recipe) -> str:
    role = recipe.roles["text"]
    aliases: Any = registry.module("fastvideo.models.text", role.family).ALIASES
    return hashes.of_text(origins.first_weights(role, "text"), aliases)
