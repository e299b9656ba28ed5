"""The named networks of a run: built from the recipe, cast, marked as learning or frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastvideo import registry, rng
from fastvideo.attention import Attend, Layout, plan, select
from fastvideo.log import logger
from fastvideo.registry import did_you_mean
from fastvideo.shapes import LatentShape
from fastvideo.weights import Checkpoint, load_into
from fastvideo_train.checkpoints import Checkpoints
from fastvideo_train.methods import Wants
from fastvideo_train.recipe import AttentionSpec, Kind, Recipe, RoleSpec

NETWORK_CLASS: dict[Kind, str] = {
    "dit": "DiT",
    "vae": "Vae",
    "text": "TextEncoder",
    "classifier": "Classifier",
}
SUBFOLDER: dict[Kind, str] = {
    "dit": "transformer",
    "vae": "vae",
    "text": "text_encoder",
    "classifier": "",  # a folder of its own, no part of a model
}


@dataclass(frozen=True)
class Role:
    """One network of the run. `family` is its module, `config` its raw dims as in `config.json`.

    `net` is a torch module of the family's class; what may be called on it is the family's affair.
    A learning role is built in float32, so that masters start exact; its strategy casts it.
    """

    name: str
    kind: Kind
    family: ModuleType
    config: Mapping[str, Any]
    net: Any
    trainable: bool
    dtype: torch.dtype
    is_new: bool
    attention: AttentionSpec = field(default_factory=AttentionSpec)
    _attends: dict[Any, tuple[Attend, Layout]] = field(default_factory=dict)

    def attend(
        self, latents: LatentShape, *, num_text_tokens: int, step: int
    ) -> dict[str, Attend | Layout]:
        """Return `attend` and `layout` for a call of a denoiser on clips of this size.

        Chosen once for each size and pattern; a sparsity that rises is that of the step.
        """
        pattern = self.attention.at(step)
        config = self.family.Config.parse(self.config)
        if (pattern, latents) not in self._attends:
            device = next(self.net.parameters()).device
            layout = plan(pattern, latents.tokens(config.patch_size), device)
            self._attends[pattern, latents] = (
                select(
                    self.attention.backend,
                    layout=layout,
                    num_text_tokens=num_text_tokens,
                    dtype=self.dtype,
                    device=device,
                    needs_grad=self.trainable,
                    head_dim=config.attention_head_dim,
                ),
                layout,
            )
        attend, layout = self._attends[pattern, latents]
        return {"attend": attend, "layout": layout}

    @property
    def keep_float32(self) -> tuple[str, ...]:
        """Parts of names of parameters that never compute in another dtype."""
        return self.family.KEEP_FLOAT32 if self.kind == "dit" else ()

    def compute_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a parameter computes in."""
        return torch.float32 if any(part in name for part in self.keep_float32) else self.dtype

    def num_params(self) -> int:
        """Return how many numbers the network has."""
        return sum(p.numel() for p in self.net.parameters())


def build(recipe: Recipe, wants: Mapping[str, Wants]) -> dict[str, Role]:
    """Build the roles that a method wants; raise `ValueError` if the recipe has others."""
    check(recipe, wants)
    return {name: _build_role(name, recipe) for name in wants}


def check(recipe: Recipe, wants: Mapping[str, Wants]) -> None:
    """Raise `ValueError` if the recipe's roles are not what the method wants."""
    method = recipe.method.name
    for name in recipe.roles:
        if name not in wants:
            hint = did_you_mean(name, wants)
            legal = ", ".join(wants)
            raise ValueError(f"role {name!r} is unknown to method {method}{hint} (it has: {legal})")
    for name, want in wants.items():
        if name not in recipe.roles:
            raise ValueError(f"method {method} needs a [roles.{name}] of kind {want.kind!r}")
        role = recipe.roles[name]
        if role.kind != want.kind:
            raise ValueError(
                f"roles.{name}.kind is {role.kind!r}; method {method} needs kind {want.kind!r}"
            )
        if want.trainable is not None and role.trainable != want.trainable:
            raise ValueError(f"roles.{name}.trainable must be {want.trainable} in method {method}")


def compile_calls(roles: Mapping[str, Role], wants: Mapping[str, Wants]) -> None:
    """Compile the functions that the method calls, in place; parameters keep their names."""
    for name, want in wants.items():
        net = roles[name].net
        for call in want.calls:
            setattr(net, call, torch.compile(getattr(net, call)))


def _build_role(name: str, recipe: Recipe) -> Role:
    spec = recipe.roles[name]
    _check_exists(spec, name)  # before the config too, which is read from there
    family = registry.module(f"fastvideo.models.{spec.kind}", spec.family)
    config = _config(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive(recipe.run.seed, f"init/{name}"))
        net: Any = getattr(family, NETWORK_CLASS[spec.kind])(family.Config.parse(config))
        if spec.kind in ("dit", "text"):  # torch's own initialisation serves convolutions well
            net.init_weights()
    dtype = getattr(torch, spec.dtype or recipe.run.dtype)
    role = Role(
        name,
        spec.kind,
        family,
        config,
        net,
        spec.trainable,
        dtype,
        is_new=not spec.from_,
        attention=spec.attention,
    )
    if spec.kind == "dit":
        _check_gates(role)
    load_into(
        net,
        _completed(first_weights(spec, name), role) if spec.from_ else net.state_dict(),
        source=spec.from_ or "new weights",
        dtype=torch.float32 if spec.trainable else dtype,
        device=recipe.run.device,
        keep_float32=role.keep_float32,
        aliases=family.ALIASES if spec.kind == "text" else None,
    )
    net.requires_grad_(spec.trainable).train(spec.trainable)
    return role


def _check_gates(role: Role) -> None:
    """Refuse a pattern under which a network's gates would not count."""
    if role.config.get("gate_compress") and role.attention.pattern != "vsa":
        raise ValueError(
            f"roles.{role.name} has the gates of VSA (gate_compress), which attention pattern"
            f" {role.attention.pattern!r} would drop; set roles.{role.name}.attention.pattern to"
            " 'vsa'"
        )


def _completed(weights: dict[str, Tensor], role: Role) -> dict[str, Tensor]:
    """Add zeros for what a learning network has by birth and its first weights may lack."""
    born = role.family.BORN_ZERO if role.kind == "dit" and role.trainable else ()
    zeros = {
        name: torch.zeros(tensor.shape)
        for name, tensor in role.net.state_dict().items()
        if any(part in name for part in born)
    }
    if not zeros or any(name in weights for name in zeros):  # some but not all is a damaged file
        return weights
    logger.info("%s starts with %d tensors at zero: %s", role.name, len(zeros), ", ".join(born))
    return {**zeros, **weights}


def _check_exists(spec: RoleSpec, name: str) -> None:
    """Raise `ValueError` for a missing local folder, which would be asked of the hub otherwise."""
    path = Path(spec.from_)
    if not spec.from_ or path.exists():
        return
    if path.parts[0] == "runs" or (len(path.parts) > 1 and Path(path.parts[0]).is_dir()):
        raise ValueError(f"roles.{name}.from {spec.from_} does not exist; train it first")


def _config(spec: RoleSpec) -> dict[str, Any]:
    is_run = (Path(spec.from_) / "checkpoints").is_dir()
    if spec.config or not spec.from_ or is_run:
        return spec.config
    from fastvideo import hub  # needed only when a role starts from a model folder

    model_spec, _ = hub.open_spec(spec.from_)
    config: dict[str, Any] = getattr(model_spec, spec.kind).config
    return config


def first_weights(spec: RoleSpec, name: str) -> dict[str, Tensor]:
    """Return the weights behind `from`: a run's average, a file's, or a part of a model.

    Raises `ValueError` if there is nothing, or it has no such role or part.
    """
    _check_exists(spec, name)
    path = Path(spec.from_)
    latest = Checkpoints(path / "checkpoints").latest()
    if latest is not None:
        return _weights_of_run(latest, name)
    part = path / SUBFOLDER[spec.kind]
    if part.is_dir() or path.is_file():  # also a folder that has this part alone
        return dict(Checkpoint(part if part.is_dir() else path))
    from fastvideo import formats, hub

    _, folder = hub.open_spec(spec.from_, weights=True)
    return dict(formats.find(folder).tensors(folder, spec.kind))


def _weights_of_run(checkpoint: Path, name: str) -> dict[str, Tensor]:
    state = Checkpoints(checkpoint.parent).read_state(checkpoint)
    if name not in state:
        raise ValueError(f"{checkpoint} trained no role {name!r} (it has: {', '.join(state)})")
    average = state[name]["ema"]
    learned = average["weights"] if average else state[name]["masters"]
    return {**state[name].get("frozen", {}), **learned}
