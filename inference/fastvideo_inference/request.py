"""What a user asks for, checked against a model's spec before any weights are read.

request = GenerateRequest(prompt="a red ball", num_frames=41)
plan = request.resolve(spec)  # complete and legal: the spec's defaults fill what was left out
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import Field, field_validator

from fastvideo import attention as patterns
from fastvideo import hub, registry, sampler_note
from fastvideo.config import Strict, merge, parse
from fastvideo.spec import GuidanceScale, LoraStrength, Spec

MAX_SEED = 2**63 - 1
# Larger seeds are legal; drawn ones stay short, since people read and type them.
_DRAWN_SEEDS = 2**31
_BACKENDS = "fastvideo.attention.backends"
_NEW = {"lora": (), "backend": "auto", "drop_gates": False}  # fields that older recipes lack


class LoraUse(Strict):
    """A LoRA's file (or name on the hub), how strongly it counts, and its hash once it is known."""

    path: str = Field(min_length=1)
    strength: LoraStrength = 1.0
    hash: str = ""

    def found(self) -> LoraUse:
        """Return it with the hash of its file; `ValueError` if that is absent, or another one."""
        actual = hub.lora_hash(hub.find_lora(self.path))
        if self.hash not in ("", actual):
            raise ValueError(
                f"lora {self.path} has hash {actual[:12]} and the one asked for {self.hash[:12]}"
            )
        return self.model_copy(update={"hash": actual})


class GenerateRequest(Strict):
    """A request; None is the model's default. `model_fields_set` tells what the user gave."""

    prompt: str
    negative_prompt: str | None = None
    num_frames: int | None = Field(default=None, ge=1)
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    fps: int | None = Field(default=None, ge=1, le=240)
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    guidance_scale: GuidanceScale | None = None
    seed: int | None = Field(default=None, ge=-1, le=MAX_SEED)
    attention: str | None = Field(default=None, description="such as dense or vsa(sparsity=0.8)")
    backend: str | None = Field(default=None, description="what computes it, such as gather")
    drop_gates: bool | None = Field(
        default=None, description="whether a pattern that drops the model's VSA gates is taken"
    )
    lora: tuple[LoraUse, ...] | None = Field(default=None, description="PATH or PATH:STRENGTH, ...")

    @field_validator("lora", mode="before")
    @classmethod
    def _from_words(cls, given: Any) -> Any:
        several = [given] if isinstance(given, str) else given
        if not isinstance(several, list | tuple):
            return given
        return [read_lora(one) if isinstance(one, str) else one for one in several]

    @field_validator("attention")
    @classmethod
    def _is_a_pattern(cls, text: str | None) -> str | None:
        return None if text is None else patterns.write(patterns.read(text))

    @field_validator("backend")
    @classmethod
    def _is_a_backend(cls, name: str | None) -> str | None:
        legal = ["auto", *registry.names(_BACKENDS)]
        if name is not None and name not in legal:
            hint = registry.did_you_mean(name, legal)
            raise ValueError(f"backend {name!r} is unknown{hint} (known: {', '.join(legal)})")
        return name

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty; say what the clip should show")
        return prompt

    def resolve(self, spec: Spec, *, origin: Mapping[str, str] | None = None) -> Plan:
        """Fill in the spec's defaults, draw the seed if it is None or -1, and check the size.

        `origin` says where a field came from (such as "--frames"), for the `ValueError`.
        """
        given = {k: v for k, v in self.model_dump().items() if v is not None}
        values = {**spec.defaults.model_dump(exclude={"max_text_tokens"}), **given}
        values.setdefault("attention", _own_pattern(spec))
        values["lora"] = tuple(_found(use, (origin or {}).get("lora")) for use in self.lora or ())
        if given.get("seed", -1) == -1:
            values["seed"] = secrets.randbelow(_DRAWN_SEEDS)
        plan = parse(Plan, values, source=f"the defaults of {spec.name}")
        try:
            _check_gates(plan, spec)
            check_samplers(plan.lora, spec, named=given)
            shape = spec.latent_shape(frames=plan.num_frames, height=plan.height, width=plan.width)
            patterns.check_fits(
                patterns.read(plan.attention),
                shape.tokens(spec.compression.patch),
                num_heads=spec.dit.config.get("num_attention_heads"),
            )
        except ValueError as error:
            first = str(error).split()[0]
            field = first if first in values else "attention"
            default = "the request" if field in given else f"the defaults of {spec.name}"
            where = (origin or {}).get(field, default)
            raise ValueError(f"{error} (from {where})") from None
        return plan.model_construct(_fields_set=set(given), **dict(plan))


class Plan(GenerateRequest):
    """A request with nothing left open: the same plan on the same model gives the same frames."""

    negative_prompt: str
    num_frames: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    fps: int = Field(ge=1, le=240)
    num_inference_steps: int = Field(ge=1, le=1000)
    guidance_scale: GuidanceScale
    seed: int = Field(ge=0, le=MAX_SEED)
    attention: str = "dense"  # a recipe that does not say is older than the choice
    backend: str = "auto"
    drop_gates: bool = False
    lora: tuple[LoraUse, ...] = ()

    def to_attend(self) -> dict[str, Any]:
        """Return the arguments of `render.denoise` and `render.frames` for the attention."""
        pattern = patterns.read(self.attention)
        return {"pattern": pattern, "backend": self.backend, "drop_gates": self.drop_gates}

    def not_asked(self) -> set[str]:
        """List the newer fields at their defaults, so that older recipes of the same agree."""
        return {name for name, default in _NEW.items() if getattr(self, name) == default}


def _check_gates(plan: Plan, spec: Spec) -> None:
    has_gates = bool(spec.dit.config.get("gate_compress"))
    pattern = patterns.read(plan.attention)
    if has_gates and not plan.drop_gates:
        patterns.check_keeps_gates(pattern, name=spec.name)
    if plan.drop_gates and (not has_gates or isinstance(pattern, patterns.Vsa)):
        kept = f"attention {plan.attention} keeps those of" if has_gates else "there are none in"
        raise ValueError(
            f"drop_gates true has no VSA gates to drop, {kept} {spec.name}; leave it out, or say"
            " --no-drop-gates (drop_gates false)"
        )


def _own_pattern(spec: Spec) -> str:
    try:
        return patterns.write(patterns.parse(spec.attention.pattern, spec.attention.args))
    except ValueError as error:
        raise ValueError(f"{error} (from the spec of {spec.name})") from None


def check_samplers(uses: Iterable[LoraUse], spec: Spec, *, named: Collection[str] = ()) -> None:
    """Raise `ValueError` for a LoRA that is sampled otherwise than the model.

    named: fields that the request itself decides.
    """
    for use in uses:
        wanted = sampler_note.read(hub.find_lora(use.path)) if use.strength else None
        if wanted:
            sampler_note.check(use.path, wanted, spec, named=named)


def read_lora(text: str) -> dict[str, Any]:
    """Split PATH:STRENGTH; what follows the last colon is a strength if it is a number."""
    path, colon, tail = text.rpartition(":")
    try:
        return {"path": path, "strength": float(tail)} if colon else {"path": text}
    except ValueError:
        return {"path": text}


def _found(use: LoraUse, origin: str | None) -> LoraUse:
    try:
        return use.found()
    except ValueError as error:
        raise ValueError(f"{error} (from {origin or 'the request'})") from None


def read_layers(*layers: tuple[str, Mapping[str, Any]]) -> GenerateRequest:
    """Merge (source, values) layers, later ones on top; `ValueError` names the wrong layer."""
    values: dict[str, Any] = {}
    for source, layer in layers:
        parse(GenerateRequest, {"prompt": "checked below", **layer}, source=source)
        values = merge(values, layer)
    return parse(GenerateRequest, values, source="the request")
