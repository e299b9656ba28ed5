"""The named networks of a run: built from the recipe, cast, marked as learning or frozen."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvideo import registry, rng, weights
from fastvideo.attention import Attend, Layout, check_fits, one_tile, parse, plan, select
from fastvideo.attention.choice import PACKAGE as BACKENDS
from fastvideo.log import logger, warned
from fastvideo.registry import did_you_mean
from fastvideo.shapes import LatentShape, TokenGrid
from fastvideo_train import lora, origins
from fastvideo_train.methods import Wants
from fastvideo_train.recipe import AttentionSpec, Kind, Recipe

NETWORK_CLASS: dict[Kind, str] = {
    "dit": "DiT",
    "vae": "Vae",
    "text": "TextEncoder",
    "classifier": "Classifier",
    "decoder": "Decoder",
    "discriminator": "Discriminator",
}
CUT_WHEN_FROZEN: tuple[Kind, ...] = ("dit", "text")
"""What FSDP2 cuts even if it is frozen; others are small, and called by functions of their own."""

_ANY_WINDOW_FITS = TokenGrid(*[1 << 60] * 3)
"""Clips are not known yet when roles are built."""


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
    base: str = ""
    """Fingerprint of the weights under a LoRA, which no checkpoint repeats; empty without one."""
    unread: origins.First = field(default_factory=origins.First)
    """First weights of a network on meta: who places it takes what it needs."""
    spread: Any = None
    """The denoiser with its sequences split over processes, where they are."""
    _attends: dict[Any, tuple[Attend, Layout]] = field(default_factory=dict)

    def attend(
        self, latents: LatentShape, *, num_text_tokens: int, step: int
    ) -> dict[str, Attend | Layout]:
        """Return `attend` and `layout` for a call of a denoiser on clips of this size.

        Chosen once for each size and pattern; a sparsity that rises is that of the step. Raises
        `ValueError`, naming the role, for a pattern or backend that does not fit the clips.
        """
        pattern = self.attention.at(step)
        config = self.family.Config.parse(self.config)
        if (pattern, latents) not in self._attends:
            device = next(self.net.parameters()).device
            with _naming(self.name):
                grid = latents.tokens(config.patch_size)
                layout = plan(pattern, grid, device)
                warned(filter(None, [one_tile(pattern, grid)]))
                chosen: Attend = select(
                    self.attention.backend,
                    layout=layout,
                    num_text_tokens=num_text_tokens,
                    dtype=self.dtype,
                    device=device,
                    needs_grad=self.trainable,
                    head_dim=config.attention_head_dim,
                )
            self._attends[pattern, latents] = (chosen, layout)
        attend, layout = self._attends[pattern, latents]
        return {"attend": attend, "layout": layout}

    @property
    def denoise(self) -> Any:
        """The denoiser as a method calls it: latents, times and conditioning to a velocity."""
        return self.net if self.spread is None else self.spread

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


def build(
    recipe: Recipe, wants: Mapping[str, Wants], *, only: Iterable[str] | None = None
) -> dict[str, Role]:
    """Build the roles that a method wants, or `only` those; `ValueError` if it has others.

    On device "meta" what starts `from` something is checked but not read: it stays `unread`. New
    weights are drawn whole on the CPU, because a draw depends on all draws before it: only small
    networks start anew.
    """
    check(recipe, wants)
    names = wants if only is None else only
    return {name: _build_role(name, recipe) for name in names}


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
        assert roles[name].spread is None, "what splits sequences calls no `forward`"
        for call in want.calls:
            setattr(net, call, torch.compile(getattr(net, call)))


def recompute_layers(roles: Mapping[str, Role]) -> None:
    """Let the layers of learning denoisers keep their inputs alone for the backward pass.

    Each is computed once more there (Chen et al. 1604.06174), for about a third more time.
    Raises `ValueError` if no denoiser learns.
    """
    learning = [r for r in roles.values() if r.kind == "dit" and r.trainable]
    if not learning:
        raise ValueError("run.recompute is for denoisers that learn, and this run has none")
    for layer in (layer for role in learning for layer in role.net.blocks):
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def _build_role(name: str, recipe: Recipe) -> Role:
    spec = recipe.roles[name]
    family = registry.module(f"fastvideo.models.{spec.kind}", spec.family)
    config = origins.dims(spec, name)
    if spec.kind == "text" and recipe.stored_text:
        return _stored_text(name, family, config, recipe)
    make = partial(getattr(family, NETWORK_CLASS[spec.kind]), family.Config.parse(config))
    net: Any = weights.build(make) if spec.from_ else _new(make, name, recipe)
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
        _check_attention(role)
    first = origins.first(spec, name) if spec.from_ else origins.First(net.state_dict())
    if recipe.run.device != "meta" or spec.lora is not None:  # whose fingerprint looks at them
        first = origins.First(first.whole())
    role = _loaded(role, first, recipe)
    net.requires_grad_(spec.trainable).train(spec.trainable)
    if spec.lora is None:
        return role
    source, device = f"roles.{name}.lora", _device_of_new(recipe)
    lora.add(net, spec.lora, seed=recipe.run.seed, source=source, device=device)
    return dataclasses.replace(role, base=lora.fingerprint(first.tensors))


def _new(make: Callable[[], nn.Module], name: str, recipe: Recipe) -> nn.Module:
    """Return a network with new weights, drawn from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive(recipe.run.seed, f"init/{name}"))
        net: Any = make()
        if recipe.roles[name].kind in ("dit", "text"):  # torch's own serves convolutions well
            net.init_weights()
    return net  # type: ignore[no-any-return]


def _device_of_new(recipe: Recipe) -> str:
    return "cpu" if recipe.run.device == "meta" else recipe.run.device


def _loaded(role: Role, first: origins.First, recipe: Recipe) -> Role:
    """Give a network its first weights, or note them if it stays on meta."""
    spec, device = recipe.roles[role.name], recipe.run.device
    source = spec.from_ or "new weights"
    found = _completed(first.tensors, role) if spec.from_ else first.tensors
    aliases = role.family.ALIASES if spec.kind == "text" else None
    given = weights.fitting(role.net, found, source=source, aliases=aliases)
    weights.load_into(
        role.net,
        given,
        source=source,
        dtype=torch.float32 if spec.trainable and spec.lora is None else role.dtype,
        device=device if spec.from_ else _device_of_new(recipe),
        keep_float32=role.keep_float32,
    )
    if device != "meta" or role.is_new:
        return role
    return dataclasses.replace(role, unread=dataclasses.replace(first, tensors=given))


def _stored_text(name: str, family: ModuleType, config: Mapping[str, Any], recipe: Recipe) -> Role:
    """Return stored text states in the encoder's place."""
    from fastvideo_train.data.text_states import StoredText

    net = StoredText(recipe.stored_text).to(_device_of_new(recipe)).eval()
    dtype = getattr(torch, recipe.run.dtype)
    return Role(name, "text", family, config, net, False, dtype, is_new=False)


def _check_gates(role: Role) -> None:
    """Refuse a pattern under which a network's gates would not count."""
    if role.config.get("gate_compress") and role.attention.pattern != "vsa":
        raise ValueError(
            f"roles.{role.name} has the gates of VSA (gate_compress), which attention pattern"
            f" {role.attention.pattern!r} would drop; set roles.{role.name}.attention.pattern to"
            " 'vsa'"
        )


def _check_attention(role: Role) -> None:
    """Refuse a backend that does not exist and windows that are not the network's."""
    config = role.family.Config.parse(role.config)
    with _naming(role.name):
        if role.attention.backend != "auto":
            registry.module(BACKENDS, role.attention.backend)
        pattern = parse(role.attention.pattern, role.attention.args)
        check_fits(pattern, _ANY_WINDOW_FITS, num_heads=config.num_attention_heads)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say in whose attention an illegal value stands."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"roles.{name}.attention: {error}") from error


def _completed(weights: dict[str, Tensor], role: Role) -> dict[str, Tensor]:
    """Add zero-initialised tensors that a learning network has and its first weights may lack."""
    added = role.family.ZERO_INITIALISED if role.kind == "dit" and role.trainable else ()
    zeros = {
        name: torch.zeros(1).expand(tensor.shape)  # without memory of their own
        for name, tensor in role.net.state_dict().items()
        if any(part in name for part in added)
    }
    if not zeros or any(name in weights for name in zeros):  # some but not all is a damaged file
        return weights
    logger.info("%s starts with %d tensors at zero: %s", role.name, len(zeros), ", ".join(added))
    return {**zeros, **weights}
