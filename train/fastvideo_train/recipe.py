"""A training run as data: the strict, frozen form of a recipe file.

    recipe = load("configs/train/nano/vae.toml", sets=["run.steps=10"], smoke=False)

Torch-free, so that a wrong recipe is refused before anything is loaded. A recipe's `[smoke]` table
is a second layer, used with `--smoke` only: tiny networks and three steps. A recipe that
`extends = "other.toml"`, a path from its own folder, states only what differs; a method, data,
scheduler or attention of another name takes nothing from the one that it replaces, and the name
and provenance of `[export]` are no other run's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fastvideo import attention as patterns
from fastvideo import sampling
from fastvideo.config import Strict, assignments, merge, parse, read_toml
from fastvideo.parallel.degrees import ParallelConfig

Kind = Literal["dit", "vae", "text", "classifier", "decoder", "discriminator"]
Dtype = Literal["float32", "bfloat16"]

OWN_CLAIMS = ("name", "provenance")  # of `[export]`

SHARDING = ("fsdp2", "deepspeed")
"""Strategies that cut weights into parts: processes that no degree names hold one each."""


class Run(Strict):
    """What the loop needs: how long, how much at once, how often to look and to save."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    accumulate: int = Field(default=1, ge=1)
    dtype: Dtype = "bfloat16"
    device: str = Field(default="cpu", description="auto, cpu, cuda or cuda:N")
    strategy: str = "single"
    strategy_args: dict[str, Any] = Field(default_factory=dict)
    threads: int = Field(default=0, ge=0, description="0 leaves the number to torch")
    compile: bool = False
    recompute: bool = Field(
        default=False, description="layers of learning denoisers once more in the backward pass"
    )
    memory_gib: float | None = Field(
        default=None, gt=0, description="of a device, to plan for; what is free of it counts too"
    )
    save_every: int = Field(default=0, ge=0, description="steps; 0 saves by time and at the end")
    save_every_s: float = Field(default=600.0, gt=0)
    validate_every: int = Field(default=0, ge=0, description="steps; 0 never")
    log_every: int = Field(default=20, ge=1)
    keep: int = Field(default=2, ge=1)


class AttentionSpec(Strict):
    """How a denoiser attends: a pattern, who computes it, and how its sparsity is reached.

    With `anneal_every`, the sparsity starts at 0 and rises by `anneal_by` every so many steps until
    it is that of `args` (VSA 2505.13389, section 2.4); 0 starts there.
    """

    pattern: str = "dense"
    args: dict[str, Any] = Field(default_factory=dict)
    backend: str = "auto"
    anneal_every: int = Field(default=0, ge=0)
    anneal_by: float = Field(default=0.03, gt=0, lt=1)

    @model_validator(mode="after")
    def _is_a_pattern(self) -> AttentionSpec:
        pattern = patterns.parse(self.pattern, self.args)
        rises = isinstance(pattern, patterns.Vsa) and pattern.sparsity is not None
        if self.anneal_every and not rises:
            raise ValueError("anneal_every needs a pattern with a sparsity, such as vsa")
        return self

    def at(self, step: int) -> patterns.Pattern:
        """Return the pattern of a 0-based step."""
        pattern = patterns.parse(self.pattern, self.args)
        if not self.anneal_every or not isinstance(pattern, patterns.Vsa):
            return pattern
        assert pattern.sparsity is not None, "checked when made"
        risen = self.anneal_by * (step // self.anneal_every)
        return dataclasses.replace(pattern, sparsity=min(risen, pattern.sparsity))


class LoraSpec(Strict):
    """Low-rank maps that learn in place of a denoiser's own weights (`lora.py`).

    `alpha` is the rank unless given; a target is a part of a layer's name: attn1, attn2.to_v, ffn.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    targets: tuple[str, ...] = Field(default=("attn1", "attn2", "ffn"), min_length=1)

    @property
    def scale(self) -> float:
        """Return what the maps' product counts: alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class RoleSpec(Strict):
    """A network of the run: its family, dims, first weights and whether it learns.

    `from` is a model, a run's folder or a file of weights; empty draws new weights. `config` goes
    on top of the dims found there. `dtype` overrides the run's, `optim` overrides single keys of
    `[optim]`, `ema` is the decay of its own average (0: none, as for a critic that nothing takes);
    `attention` is a denoiser's own.
    """

    kind: Kind
    family: str = "wan"
    config: dict[str, Any] = Field(default_factory=dict)
    from_: str = Field(default="", alias="from")
    trainable: bool = True
    dtype: Dtype | None = None
    optim: dict[str, Any] = Field(default_factory=dict)
    ema: float | None = Field(default=None, ge=0, lt=1)
    attention: AttentionSpec = AttentionSpec()
    lora: LoraSpec | None = None

    @model_validator(mode="after")
    def _lora_has_a_base(self) -> RoleSpec:
        if self.lora is not None:
            if self.kind != "dit" or not self.trainable:
                raise ValueError("a lora belongs to a role of kind 'dit' that is trainable")
            if not self.from_:
                raise ValueError("a lora needs `from`, the model that it is learned on")
        return self

    @model_validator(mode="after")
    def _only_denoisers_attend(self) -> RoleSpec:
        if self.kind != "dit" and self.attention != AttentionSpec():
            raise ValueError(f"attention belongs to roles of kind 'dit', not {self.kind!r}")
        return self


class MethodSpec(Strict):
    """A method (a file under `methods/`) and its own config, checked by that file."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)


class ClipsSpec(Strict):
    """Clips rendered from a world while training (`data/clips.py` says what each key does)."""

    name: Literal["clips"]
    world: str = "shapes"
    num_frames: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    fps: Annotated[int, BeforeValidator(sampling.read_fps), Field(ge=1)] = 16
    crop: tuple[int, int] | None = None
    window: bool = False
    render_frames: int = Field(default=81, ge=1)
    crops_per_clip: int = Field(default=1, ge=1)
    workers: int = Field(default=1, ge=0)


class LatentsSpec(Strict):
    """Latents and captions from shards on disk (`data/latents.py`).

    With `text = "stored"` their text states stand in for the text encoder, which is not loaded.
    """

    name: Literal["latents"]
    folder: str
    frames: int | None = Field(default=None, ge=1, description="only the first frames of each clip")
    spread: int | None = Field(
        default=None, ge=1, description="so many latent frames, evenly spaced over any part of it"
    )
    text: Literal["encoder", "stored"] = "encoder"


class SyntheticSpec(Strict):
    """Random latents with captions of a world (`data/synthetic.py`): for tests and timings only."""

    name: Literal["synthetic"]
    world: str = "shapes"
    channels: int = Field(default=16, ge=1)
    frames: int = Field(default=1, ge=1)
    height: int = Field(default=8, ge=1)
    width: int = Field(default=8, ge=1)


DataSpec = Annotated[ClipsSpec | LatentsSpec | SyntheticSpec, Field(discriminator="name")]


class MuonSpec(Strict):
    """Muon for matrices and convolution kernels; everything else stays with AdamW."""

    lr: float = Field(default=5e-3, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    iterations: int = Field(default=5, ge=1)
    scale: float = Field(default=0.2, gt=0)


class OptimSpec(Strict):
    """AdamW, its learning-rate schedule, the clip, and optionally Muon beside it."""

    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.97)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = Field(default=0, ge=0)
    floor: float = Field(default=0.05, ge=0, le=1, description="last rate as a share of `lr`")
    muon: MuonSpec | None = None


class EmaSpec(Strict):
    """Averaged weights: what is validated and exported. A decay of 0 turns the average off."""

    decay: float = Field(default=0.999, ge=0, lt=1)


class Recipe(Strict):
    """A whole run."""

    run: Run
    roles: dict[str, RoleSpec] = Field(min_length=1)
    method: MethodSpec
    data: DataSpec
    optim: OptimSpec
    ema: EmaSpec = EmaSpec()
    parallel: ParallelConfig = ParallelConfig()
    validation: dict[str, Any] = Field(default_factory=dict, alias="validate")
    export: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _something_learns(self) -> Recipe:
        if not any(role.trainable for role in self.roles.values()):
            raise ValueError("no role is trainable; set trainable = true for one of the roles")
        for name in self.roles:
            self.optim_of(name)
        return self

    @model_validator(mode="after")
    def _guidance_is_whole(self) -> Recipe:
        if self.parallel.guidance > 1:
            raise ValueError(
                f"parallel.guidance {self.parallel.guidance} must be 1 in training, where both"
                " forwards are one batch; use data, shard, ring or ulysses"
            )
        return self

    def degrees(self, world_size: int) -> ParallelConfig:
        """Return `[parallel]` with what it leaves of the processes given to its strategy.

        Raises `ValueError` if they do not fit, or the batch cannot be cut into equal parts.
        """
        axis = "shard" if self.run.strategy in SHARDING else "data"
        degrees = self.parallel.filled(world_size, axis)
        batch, parts = self.run.batch, degrees.of("batch")
        if batch % parts:
            near = sorted({max(1, batch // parts) * parts, -(-batch // parts) * parts})
            raise ValueError(
                f"run.batch {batch} must be a multiple of {parts}, the processes that share it"
                f" (data x shard); nearest: {', '.join(map(str, near))}"
            )
        return degrees

    @property
    def stored_text(self) -> str:
        """The folder whose text states stand in for the text encoder; empty if it is loaded."""
        is_stored = isinstance(self.data, LatentsSpec) and self.data.text == "stored"
        return self.data.folder if is_stored else ""  # type: ignore[union-attr]

    def decay_of(self, role: str) -> float:
        """Return the decay of a role's average; 0 keeps none."""
        own = self.roles[role].ema
        return self.ema.decay if own is None else own

    def optim_of(self, role: str) -> OptimSpec:
        """Return `[optim]` with the role's own keys on top."""
        over = self.roles[role].optim
        if not over:
            return self.optim
        values = merge(self.optim.model_dump(exclude_none=True), over)
        return parse(OptimSpec, values, source=f"roles.{role}.optim")


def load(path: str | Path, *, sets: Iterable[str] = (), smoke: bool = False) -> Recipe:
    """Read a recipe; `sets` are `a.b=value` words. Raise a one-line `ValueError` if it is wrong."""
    tree = _extended(Path(path))
    small = tree.pop("smoke", {})
    if smoke:
        if not small:
            raise ValueError(f"{path} has no [smoke] table, so --smoke has nothing to shrink to")
        tree = _laid(tree, small)
    return parse(Recipe, _laid(tree, assignments(sets)), source=str(path))


def _extended(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file on top of the one that it `extends`, a path beside it."""
    real = path.resolve()
    if real in below:
        raise ValueError(f"recipe {path} extends itself by way of {below[-1]}")
    tree = read_toml(path)
    base = tree.pop("extends", "")
    if not isinstance(base, str):
        raise ValueError(f"extends {base!r} in {path} must be the path of a recipe")
    if not base:
        return tree
    under = _extended(path.parent / base, (*below, real))
    # another run is another model: it says itself what it is called, of what licence and by whom
    under["export"] = {k: v for k, v in under.get("export", {}).items() if k not in OWN_CLAIMS}
    return _laid(under, tree)


def _laid(tree: dict[str, Any], over: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Lay `over` over `tree`; a component of another name takes none of the old one's arguments."""
    out = dict(tree)
    for key, value in over.items():
        old = out.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            is_other = any(k in value and value[k] != old.get(k) for k in ("name", "pattern"))
            is_label = f"{path}{key}" in ("run", "export")  # their name chooses no component
            value = value if is_other and not is_label else _laid(old, value, f"{path}{key}.")
        out[key] = value
    return out


def dump(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain JSON values; `parse(Recipe, dump(r))` gives it back."""
    return recipe.model_dump(mode="json", by_alias=True, exclude_none=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List `key: old -> new` for every leaf in which two dumped recipes differ."""
    out = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, f"{name}.")
        elif a != b:
            out.append(f"{name}: {a!r} -> {b!r}")
    return out
