"""Where a role's first weights and dims come from: a run, a model, or a file of weights.

A run's folder serves a role of another name too, if it trained one network of its kind alone or
one named `student`: a teacher starts from the run that trained it as its student.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo.config import parse
from fastvideo.models import classifier as classifiers
from fastvideo.models import decoder as decoders
from fastvideo.weights import Checkpoint
from fastvideo_train import lora, shards
from fastvideo_train.checkpoints import Checkpoints
from fastvideo_train.recipe import Kind, Recipe, RoleSpec

SUBFOLDER: dict[Kind, str] = {
    "dit": "transformer",
    "vae": "vae",
    "text": "text_encoder",
    "classifier": "",  # a folder of its own, no part of a model
    "decoder": "",
    "discriminator": "",
}


@dataclass(frozen=True)
class First:
    """First weights by name, as they lie on disk: none is in memory until it is used.

    Most are mapped from files. What several processes of a run wrote is on meta here.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    checkpoint: Path = Path()
    path: str = ""
    """Where in the checkpoint those on meta are."""

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Read weights that are on meta into tensors of their names; cut ones take their parts."""
        if targets:
            paths = {f"{self.path}/{name}": tensor for name, tensor in targets.items()}
            shards.fill(paths, self.checkpoint / shards.FOLDER)

    def whole(self) -> dict[str, Tensor]:
        """Return all weights, none on meta."""
        late = {n: torch.empty_like(t, device="cpu") for n, t in self.tensors.items() if t.is_meta}
        self.read_into(late)
        return {**self.tensors, **late}


def check_exists(spec: RoleSpec, name: str) -> None:
    """Raise `ValueError` for a missing local folder, which would be asked of the hub otherwise."""
    path = Path(spec.from_)
    if not spec.from_ or path.exists():
        return
    if path.parts[0] == "runs" or (len(path.parts) > 1 and Path(path.parts[0]).is_dir()):
        raise ValueError(f"roles.{name}.from {spec.from_} does not exist; train it first")


def dims(spec: RoleSpec, name: str) -> dict[str, Any]:
    """Return a role's config: what lies behind `from`, with the recipe's own keys on top."""
    check_exists(spec, name)
    path = Path(spec.from_)
    if not spec.from_:
        return spec.config
    if (path / "checkpoints").is_dir():
        return {**_dims_of_run(path, spec, name), **spec.config}
    if not SUBFOLDER[spec.kind]:
        return {**_dims_alone(path, spec, name), **spec.config}
    if path.is_file():
        return spec.config
    from fastvideo import hub  # needed only when a role starts from a model folder
    from fastvideo.formats import diffusers

    part, all_parts = path / SUBFOLDER[spec.kind], diffusers.SUBFOLDERS.values()
    if part.is_dir() and not all((path / other).is_dir() for other in all_parts):
        has_dims = (part / "config.json").is_file()
        own = diffusers.read_network(path, spec.kind).config if has_dims else {}
        return {**own, **spec.config}
    model_spec, _ = hub.open_spec(spec.from_)
    config: dict[str, Any] = getattr(model_spec, spec.kind).config
    return {**config, **spec.config}


def first_weights(spec: RoleSpec, name: str) -> dict[str, Tensor]:
    """Return the weights of `first`, none on meta."""
    return first(spec, name).whole()


def first(spec: RoleSpec, name: str) -> First:
    """Return the weights behind `from`: a run's average, a file's, or a part of a model.

    Raises `ValueError` if there is nothing, or it has no such role or part.
    """
    check_exists(spec, name)
    path = Path(spec.from_)
    latest = Checkpoints(path / "checkpoints").latest()
    if latest is not None:
        return _weights_of_run(latest, spec, name)
    if spec.kind == "decoder":
        return First(dict(decoders.tensors(path)))
    part = path / SUBFOLDER[spec.kind]
    if part.is_dir() or path.is_file():  # also a folder that has this part alone
        return First(dict(Checkpoint(part if part.is_dir() else path)))
    from fastvideo import formats, hub

    _, folder = hub.open_spec(spec.from_, weights=True)
    return First(dict(formats.find(folder).tensors(folder, spec.kind)))


def check_text(recipe: Recipe) -> None:
    """Refuse a frozen denoiser whose model has another text encoder than the run has.

    Its text states would differ from those of its training, and no number would show it.
    """
    text = next((r for r in recipe.roles.values() if r.kind == "text"), None)
    if text is None or text.trainable or not text.from_:
        return
    for name, role in recipe.roles.items():
        if role.kind != "dit" or role.trainable or role.from_ in ("", text.from_):
            continue
        own = _text_beside(role, name)
        if own and not _equal_rounded(own, first_weights(text, "text")):
            raise ValueError(
                f"roles.{name} is from {role.from_}, whose text encoder is not that of roles.text,"
                f" {text.from_}; set roles.text.from to {role.from_}"
            )


def learned(run: str | Path, name: str) -> tuple[Recipe, int, dict[str, Tensor]]:
    """Return a run's recipe, its step, and what a role learned of its own: averages, if any."""
    store = Checkpoints(Path(run) / "checkpoints")
    latest = store.latest()
    assert latest is not None, "the run was read before"
    recipe, state = recipe_of(latest), store.read_state(latest, mapped=True)
    learned = _learned(state, name, latest).whole()
    return recipe, int(store.read_info(latest)["step"]), learned


def principal(names: Iterable[str]) -> str | None:
    """Return the one of several roles of a kind that stands for it: `student`, or the only one."""
    found = list(names)
    return "student" if "student" in found else found[0] if len(found) == 1 else None


def _weights_of_run(checkpoint: Path, spec: RoleSpec, name: str) -> First:
    store = Checkpoints(checkpoint.parent)
    recipe = recipe_of(checkpoint)
    state = store.read_state(checkpoint, mapped=True)
    source = _role_behind(recipe, spec, name, checkpoint)
    there = recipe.roles[source]
    if source not in state:  # frozen there: it is what that run started from
        if not there.from_:
            run = checkpoint.parent.parent
            raise ValueError(
                f"roles.{name}.from {spec.from_}: roles.{source} of {run} was new there and is not"
                " saved, as it learned nothing"
            )
        return first(there, source)
    learned = _learned(state, source, checkpoint)
    if there.lora is None:
        learned.tensors.update(state[source].get("frozen", {}))
        return learned
    base = first_weights(there, source)
    if lora.fingerprint(base) != state[source]["base"]:
        raise ValueError(f"{checkpoint} learned a LoRA on other weights than {there.from_} has now")
    return First(lora.merge(base, learned.whole(), there.lora.scale))


def _dims_alone(path: Path, spec: RoleSpec, name: str) -> dict[str, Any]:
    """Return the dims of a network that is no part of a model, as its own package reads them.

    Those of a decoder are without the statistics of the latents that it learned on so far: it may
    go on with those of another VAE.
    """
    if not path.exists():
        raise ValueError(f"roles.{name}.from {path} is neither a run nor a {spec.kind}'s own place")
    if spec.kind == "decoder":
        values = asdict(decoders.read_config(path))
        return {key: value for key, value in values.items() if not key.startswith("latents_")}
    if spec.kind == "classifier" and path.is_dir():
        return asdict(classifiers.read_config(path))
    return {}


def _text_beside(role: RoleSpec, name: str) -> dict[str, Tensor]:
    """Return the text encoder of the model behind a denoiser; nothing if it stands alone."""
    try:
        return first_weights(role.model_copy(update={"kind": "text", "config": {}}), name)
    except ValueError:
        return {}


def _equal_rounded(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tell whether weights are equal in bfloat16, in which a run's are exported."""
    if one.keys() != other.keys():
        return False
    return all(torch.equal(one[n].bfloat16(), other[n].bfloat16()) for n in one)


def _learned(state: Mapping[str, Any], role: str, checkpoint: Path) -> First:
    """Return the average of a role, or without one its masters."""
    if state[role]["ema"]:
        return First(dict(state[role]["ema"]["weights"]), checkpoint, f"{role}/ema/weights")
    return First(dict(state[role]["masters"]), checkpoint, f"{role}/masters")


def _dims_of_run(folder: Path, spec: RoleSpec, name: str) -> dict[str, Any]:
    """Return the dims that a run's checkpoint noted, or those that its recipe leads to."""
    store = Checkpoints(folder / "checkpoints")
    latest = store.latest()
    if latest is None:
        return {}
    recipe = recipe_of(latest)
    source = _role_behind(recipe, spec, name, latest)
    noted: dict[str, Any] = store.read_info(latest).get("dims", {})
    return noted.get(source) or dims(recipe.roles[source], source)


def recipe_of(checkpoint: Path) -> Recipe:
    """Return the recipe that a checkpoint was made by."""
    info = Checkpoints(checkpoint.parent).read_info(checkpoint)
    return parse(Recipe, info["recipe"], source=str(checkpoint))


def _role_behind(recipe: Recipe, spec: RoleSpec, name: str, checkpoint: Path) -> str:
    """Return the role of a run that serves `name`: a trained one of its name or kind, or frozen."""
    of_kind = {n: role for n, role in recipe.roles.items() if role.kind == spec.kind}
    trained = [n for n, role in of_kind.items() if role.trainable]
    if name in trained:
        return name
    found = principal(trained) or (name if name in of_kind and not trained else None)
    if found is None and not trained and of_kind:
        found = principal(of_kind)
    if found is not None:
        return found
    has = ", ".join(f"{n} ({role.kind})" for n, role in recipe.roles.items() if role.trainable)
    what = (
        f"trained several roles of kind {spec.kind!r} and none is named {name!r} or 'student'"
        if trained
        else f"has no role of kind {spec.kind!r}"
    )
    raise ValueError(
        f"roles.{name}.from {spec.from_}: {checkpoint.name} {what} (it trained: {has})"
    )


def tokenizer_folder(name: str) -> Path:
    """Return a tokenizer's folder; of a model, bundled or on the hub, the one that it has."""
    from fastvideo import formats, hub

    if Path(name).is_dir() or not (name in hub.bundled() or hub.is_remote(name)):
        return Path(name)
    _, folder = hub.open_spec(name)
    found: Path = formats.find(folder).tokenizer_folder(folder)
    return found
