"""The body of a create request, JSON or multipart, becomes a complete, legal submission."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from fractions import Fraction
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fastvideo import sampling
from fastvideo.config import Strict, parse
from fastvideo.hub import OpenModel
from fastvideo.resolve import notices, resolve
from fastvideo.sampling import GenerateRequest, SamplingParams
from fastvideo.spec import Spec
from fastvideo_inference.engine.config import Limits
from fastvideo_inference.engine.job import Submission
from fastvideo_inference.goodput import quality
from fastvideo_inference.goodput.profile import Setting
from fastvideo_inference.recipe import Names
from fastvideo_inference.serve.catalogue import Catalogue
from fastvideo_inference.serve.errors import ApiError, public

SOURCE = "the request"
REFUSED = {
    "input_reference": "this server makes clips from text alone",
    "attention": "the operator of the server chooses it",
    "backend": "the operator of the server chooses it",
    "drop_gates": "the operator of the server chooses it",
}
_TEXTS = ("prompt", "text", "negative_prompt", "negative", "fps", "lora", "size")
_NUMBER = re.compile(r"-?\d{1,19}(\.\d{1,9})?")
_SECONDS = re.compile(r"\d{1,6}(\.\d{1,6})?")
_PATIENCE_S = 30.0
_MAX_PARTS, _MAX_LORAS, _MAX_NAME_CHARS = 64, 16, 64


class Beside(Strict):
    """Fields of a body that are no sampling fields."""

    model: str = ""
    seconds: str | int | float | None = None
    slo_class: str = ""
    decoder: str = ""
    previews: bool = False
    count: int = 1  # clips, of seeds that follow each other
    allow_smaller: bool | None = None


async def read(request: Request) -> dict[str, Any]:
    """Return the fields of a body; 400, 408 or 415 if it cannot be read."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(_PATIENCE_S):
            if media_type == "application/json":
                return _read_json(await request.body())
            if media_type == "multipart/form-data":
                return await _read_multipart(request)
    except TimeoutError:
        raise ApiError(408, "the body took too long", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client left amid its body", code="incomplete_body") from None
    text = "the content type must be application/json or multipart/form-data"
    raise ApiError(415, text, code="unsupported_media_type")


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return {key: value for key, value in values.items() if value is not None}


async def _read_multipart(request: Request) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        form = request.form(max_files=0, max_fields=_MAX_PARTS)
        async with form as parts:
            for name, value in parts.multi_items():
                key = name.removesuffix("[]")
                if key == "lora":
                    found.setdefault(key, []).append(value)
                elif key in found:
                    raise ApiError(400, f"{key} is given twice", code="invalid_value", param=key)
                else:
                    found[key] = value
    except (HTTPException, ValueError) as error:  # older Starlettes leave the parser's own
        text = str(error.detail if isinstance(error, HTTPException) else error)
        if "Too many files" in text:
            text = f"files are refused: {REFUSED['input_reference']}"
        raise ApiError(400, text, code="invalid_multipart") from None
    return found


def submission(
    fields: Mapping[str, Any], *, catalogue: Catalogue, limits: Limits, is_adaptive: bool = False
) -> Submission:
    """Complete and check the fields of a body; `ApiError` names the field at fault.

    `is_adaptive`: a class of the config chooses what a request leaves open, to be in time.
    """
    for name in fields.keys() & REFUSED.keys():
        text = f"{name} cannot be set over HTTP: {REFUSED[name]}"
        raise ApiError(400, text, code="unsupported_field", param=name)
    try:
        _check_lengths(fields, limits)
        others = Beside.model_fields.keys() & fields.keys()
        beside = parse(Beside, {name: fields[name] for name in others}, source=SOURCE)
        model = catalogue.model(beside.model)
        own = {name: value for name, value in fields.items() if name not in others}
        request = _request(own, fields.get("seconds"), model.spec)  # true is 1 in beside
        model_id, uses = catalogue.id_of(model.name), request.lora or ()
        names = Names(model_id, beside.decoder, tuple(use.path for use in uses))
        request = request.model_copy(update={"lora": tuple(map(catalogue.lora, uses))})
        params = resolve(request, model.spec)
        _check_limits(params, limits, count=beside.count)
        smaller: tuple[Setting, ...] = ()
        if beside.allow_smaller or (beside.allow_smaller is None and is_adaptive):
            fixed = catalogue.decoder(beside.decoder, model) if beside.decoder else None
            asked = request.model_copy(update={"seed": params.seed})
            smaller = _smaller(asked, model, fixed, limits, is_asked=bool(beside.allow_smaller))
        digest = hashlib.sha256(json.dumps(dict(fields), sort_keys=True).encode()).hexdigest()
        return Submission(
            model=model.name,
            params=params,
            notices=notices(request, params, model.spec),
            slo_class=beside.slo_class,
            decoder=catalogue.decoder(beside.decoder, model),
            body_sha256=digest,
            previews=beside.previews,
            names=names,
            smaller=smaller,
            allow_smaller=beside.allow_smaller,
            count=beside.count,
        )
    except (ValueError, RecursionError) as error:
        raise invalid(error, catalogue.public) from None


def _smaller(
    request: GenerateRequest,
    model: OpenModel,
    decoder: str | None,
    limits: Limits,
    *,
    is_asked: bool,
) -> tuple[Setting, ...]:
    """Return the settings of a model that may replace a request's, within the server's limits."""
    try:
        found = quality.candidates(request, model, decoder=decoder)
    except ValueError:
        if is_asked:
            raise
        return ()
    kept = []
    for setting in found:
        with suppress(ApiError):
            _check_limits(setting.params, limits)
            kept.append(setting)
    return tuple(kept)


def invalid(error: Exception, public: Callable[[str], str] = public) -> ApiError:
    """Return the answer to a wrong value; our errors begin with the field at fault."""
    word = re.split(r"\W", str(error), maxsplit=1)[0]
    param = word if word in {*sampling.settings(), *Beside.model_fields, "size"} else None
    return ApiError(400, public(str(error)), code="invalid_value", param=param)


def _request(fields: Mapping[str, Any], seconds: Any, spec: Spec) -> GenerateRequest:
    """Read the sampling fields; `seconds` counts where there is no number of frames."""
    values = {name: value if name in _TEXTS else _number(value) for name, value in fields.items()}
    beside = [*Beside.model_fields, *REFUSED]
    request, _ = sampling.read_with_origins((SOURCE, values), beside=beside)
    if seconds is None or request.num_frames is not None:
        return request
    fps = request.fps if request.fps is not None else spec.defaults.fps
    frames = frames_of(str(seconds), fps=fps, stride=spec.compression.temporal)
    return request.model_copy(update={"num_frames": frames})


def frames_of(seconds: str, *, fps: float, stride: int) -> int:
    """Return the smallest legal number of frames that lasts at least so long."""
    if not _SECONDS.fullmatch(seconds) or not float(seconds):
        raise ValueError(f"seconds {seconds!r} must be a positive number such as 5 or 2.5")
    wanted = Fraction(seconds) * Fraction(fps).limit_denominator(1001)
    return 1 + stride * max(0, -((1 - wanted) // stride))


def _number(value: Any) -> Any:
    """Return the number that a text of a form stands for; anything else as it is."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        return value
    return float(value) if "." in value else int(value)


def _check_lengths(fields: Mapping[str, Any], limits: Limits) -> None:
    for name, value in fields.items():
        if len(name) > _MAX_NAME_CHARS:
            raise ValueError(f"{name[:_MAX_NAME_CHARS]}... is not a field")
        if isinstance(value, list) and len(value) > _MAX_LORAS:
            raise ValueError(f"{name} has {len(value)} entries; at most {_MAX_LORAS} are allowed")
        if isinstance(value, str) and len(value) > limits.prompt_chars:
            text = f"{name} has {len(value)} characters; this server allows {limits.prompt_chars}"
            raise ApiError(400, text, code="over_limit", param=name)


def _check_limits(params: SamplingParams, limits: Limits, *, count: int = 1) -> None:
    asked = {**params.model_dump(), "count": count}
    asked["pixels"] = params.width * params.height * params.num_frames
    for name in ("width", "height", "num_frames", "num_inference_steps", "pixels", "count"):
        limit: int = limits.model_dump()[name]
        if asked[name] > limit:
            text = f"{name} {asked[name]} exceeds the limit of this server, {limit}"
            raise ApiError(400, text, code="over_limit", param=name)


def schema(models: Iterable[str]) -> dict[str, Any]:
    """Return the JSON schema of a body, from the declaration of the sampling fields."""
    declared = GenerateRequest.model_json_schema()["properties"]
    http = sampling.settings(sampling.HTTP)
    fields = {name: {**declared[name], "description": one.help} for name, one in http.items()}
    fields["lora"] = {"type": "array", "items": {"type": "string"}}
    fields["size"] = {"type": "string", "pattern": r"^\d+x\d+$"}
    fields |= Beside.model_json_schema()["properties"]
    fields["model"]["enum"] = list(models)
    return {"type": "object", "properties": fields, "required": ["prompt"]}
