"""What a user asks for, checked against a model's spec before any weights are read.

request = GenerateRequest(prompt="a red ball", num_frames=41)
plan = request.resolve(spec)  # complete and legal: the spec's defaults fill what was left out
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from fastvideo import attention as patterns
from fastvideo.config import Strict, merge, parse
from fastvideo.spec import Spec

MAX_SEED = 2**63 - 1
# Larger seeds are legal; drawn ones stay short, since people read and type them.
_DRAWN_SEEDS = 2**31


class GenerateRequest(Strict):
    """A request; None is the model's default. `model_fields_set` tells what the user gave."""

    prompt: str
    negative_prompt: str | None = None
    num_frames: int | None = Field(default=None, ge=1)
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    fps: int | None = Field(default=None, ge=1, le=240)
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-1, le=MAX_SEED)
    attention: str | None = Field(default=None, description="such as dense or vsa(sparsity=0.8)")

    @field_validator("attention")
    @classmethod
    def _is_a_pattern(cls, text: str | None) -> str | None:
        return None if text is None else patterns.write(patterns.read(text))

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
        if given.get("seed", -1) == -1:
            values["seed"] = secrets.randbelow(_DRAWN_SEEDS)
        plan = parse(Plan, values, source=f"the defaults of {spec.name}")
        try:
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
        return plan.model_construct(_fields_set=set(given), **plan.model_dump())


class Plan(GenerateRequest):
    """A request with nothing left open: the same plan on the same model gives the same frames."""

    negative_prompt: str
    num_frames: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    fps: int = Field(ge=1, le=240)
    num_inference_steps: int = Field(ge=1, le=1000)
    guidance_scale: float = Field(ge=0, allow_inf_nan=False)
    seed: int = Field(ge=0, le=MAX_SEED)
    attention: str = "dense"  # a recipe that does not say is older than the choice


def _own_pattern(spec: Spec) -> str:
    try:
        return patterns.write(patterns.parse(spec.attention.pattern, spec.attention.args))
    except ValueError as error:
        raise ValueError(f"{error} (from the spec of {spec.name})") from None


def read_layers(*layers: tuple[str, Mapping[str, Any]]) -> GenerateRequest:
    """Merge (source, values) layers, later ones on top; `ValueError` names the wrong layer."""
    values: dict[str, Any] = {}
    for source, layer in layers:
        parse(GenerateRequest, {"prompt": "checked below", **layer}, source=source)
        values = merge(values, layer)
    return parse(GenerateRequest, values, source="the request")
