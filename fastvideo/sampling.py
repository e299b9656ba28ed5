"""The declaration of sampling fields: type, rule, help text, and where each may be set.

request = GenerateRequest(prompt="a red ball", num_frames=41)     # what a user asks for
params = resolve(request, spec)                                   # `fastvideo.resolve`: complete

Flags, TOML and JSONL keys, keywords of the pipeline, rows of `eval`, the page and recipes take
their fields from here; a test holds them equal.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from numbers import Integral
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from fastvideo.config import Keys, Source, Strict, parse, where
from fastvideo.registry import did_you_mean, names
from fastvideo.shapes import parse_size

MAX_SEED = 2**63 - 1
_NEWER = ("backend", "drop_gates", "lora")  # fields that older evaluations do not name
_FPS_SLACK = Fraction(1, 10**6)  # 23.976024 means 24000/1001
_FPS_TEXT = re.compile(r"\s*\d{1,12}(\.\d{0,12}|/\d{1,12})?\s*")
_WHOLE_TEXT = re.compile(r"\s*-?\d{1,20}\s*")
CLI, PYTHON, EVAL, HTTP, PAGE = "cli", "python", "eval", "http", "page"


@dataclass(frozen=True)
class Setting:
    """What a field means, the short name that people type, and where it may be set."""

    help: str
    alias: str = ""
    where: tuple[str, ...] = (CLI, PYTHON, EVAL, HTTP, PAGE)


class LoraUse(Strict):
    """A LoRA's file (or name on the hub), how strongly it counts, and its hash once it is known."""

    path: str = Field(min_length=1)
    strength: float = Field(default=1.0, ge=-100, le=100, allow_inf_nan=False)
    hash: str = ""


def read_lora(text: str) -> dict[str, Any]:
    """Split PATH:STRENGTH; what follows the last colon is a strength if it is a number."""
    path, colon, tail = text.rpartition(":")
    try:
        return {"path": path, "strength": float(tail)} if colon else {"path": text}
    except ValueError:
        return {"path": text}


def _check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("text must not hold a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start]
        raise ValueError(f"text must be valid Unicode; it holds a lone {lone!r}") from None
    return text


def _check_prompt(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("the prompt is empty; say what the clip should show")
    return prompt


def _check_backend(name: str) -> str:
    legal = ["auto", *names("fastvideo.attention.backends")]
    if name not in legal:
        hint = did_you_mean(name, legal)
        raise ValueError(f"backend {name!r} is unknown{hint} (known: {', '.join(legal)})")
    return name


def _read_loras(given: Any) -> Any:
    several = [given] if isinstance(given, str) else given
    if not isinstance(several, list | tuple):
        return given
    return [read_lora(one) if isinstance(one, str) else one for one in several]


def read_fps(given: Any) -> int | float:
    """Read 16, 23.976, "24000/1001" or a `Fraction`: an int if it is whole, else a float."""
    is_text = isinstance(given, str) and not _FPS_TEXT.fullmatch(given)
    try:  # a text such as "1e999999999" would take all memory
        asked = Fraction("" if isinstance(given, bool) or is_text else given)
    except (ValueError, TypeError, ArithmeticError):
        raise ValueError("must be a number such as 16, 23.976 or 24000/1001") from None
    rate = asked.limit_denominator(1001)
    if asked >= 1 and abs(rate - asked) > asked * _FPS_SLACK:
        raise ValueError(f"must be a fraction with a denominator up to 1001; nearest: {rate}")
    return int(rate) if rate.denominator == 1 else float(rate)


def typed_whole(text: str) -> int | str:
    """Return the whole number that somebody typed; other text, such as "1.0", as it is."""
    return int(text) if _WHOLE_TEXT.fullmatch(text) else text


def _read_whole(given: Any) -> Any:
    """Take integers of other libraries, such as numpy's; a bool is none."""
    return given if isinstance(given, bool) or not isinstance(given, Integral) else int(given)


_NOT_HTTP = (CLI, PYTHON, EVAL)
PROMPT = Setting("what the clip shows", "text", where=(CLI, PYTHON, HTTP, PAGE))
NEGATIVE = Setting("what the clip does not show", "negative")
FRAMES = Setting("number of frames, 4k+1", "frames")
HEIGHT = Setting("height in pixels")
WIDTH = Setting("width in pixels")
FPS = Setting("frames per second of the file: 16, 23.976, 24000/1001")
STEPS = Setting("denoising steps", "steps")
GUIDANCE = Setting("scale of classifier-free guidance; 1 is off", "guidance")
SEED = Setting("seed of the noise; -1 or none draws one, which is printed")
ATTENTION = Setting("another pattern: dense, vsa(sparsity=0.8)", where=_NOT_HTTP)
BACKEND = Setting("what computes the attention; doctor lists them", where=_NOT_HTTP)
DROP_GATES = Setting("let a pattern drop the gates of a VSA model", where=_NOT_HTTP)
LORA = Setting("LoRAs, each PATH[:STRENGTH] or a name", where=(CLI, PYTHON, HTTP, PAGE))

Text = Annotated[str, AfterValidator(_check_text)]
Whole = Annotated[int, Field(strict=True), BeforeValidator(_read_whole)]
Prompt = Annotated[Text, AfterValidator(_check_prompt), PROMPT]
NegativePrompt = Annotated[Text, NEGATIVE]
NumFrames = Annotated[Whole, Field(ge=1), FRAMES]
Height = Annotated[Whole, Field(ge=1), HEIGHT]
Width = Annotated[Whole, Field(ge=1), WIDTH]
Fps = Annotated[int | float, Field(ge=1, le=240), BeforeValidator(read_fps), FPS]
NumSteps = Annotated[Whole, Field(ge=1, le=1000), STEPS]
GuidanceScale = Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False), GUIDANCE]
Seed = Annotated[Whole, Field(ge=-1, le=MAX_SEED), SEED]
OwnSeed = Annotated[Seed, Field(ge=0)]
AttentionText = Annotated[str, ATTENTION]
Backend = Annotated[str, AfterValidator(_check_backend), BACKEND]
DropGates = Annotated[bool, Field(strict=True), DROP_GATES]
Loras = Annotated[tuple[LoraUse, ...], BeforeValidator(_read_loras), LORA]


class GenerateRequest(Strict):
    """What a user asks for; None is the model's default."""

    prompt: Prompt
    negative_prompt: NegativePrompt | None = None
    num_frames: NumFrames | None = None
    height: Height | None = None
    width: Width | None = None
    fps: Fps | None = None
    num_inference_steps: NumSteps | None = None
    guidance_scale: GuidanceScale | None = None
    seed: Seed | None = None
    attention: AttentionText | None = None
    backend: Backend | None = None
    drop_gates: DropGates | None = None
    lora: Loras | None = None


class SamplingParams(Strict):
    """A request with nothing left open: equal parameters on one model give equal frames.

    `fastvideo.resolve` makes it from a request and a spec; it is not resolved again. The fields
    with a default are newer than the first recipes, which lack them.
    """

    prompt: Prompt
    negative_prompt: NegativePrompt
    num_frames: NumFrames
    height: Height
    width: Width
    fps: Fps
    num_inference_steps: NumSteps
    guidance_scale: GuidanceScale
    seed: OwnSeed
    attention: AttentionText = "dense"
    backend: Backend = "auto"
    drop_gates: DropGates = False
    lora: Loras = ()

    def without_newer_defaults(self, *, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Return the fields less the newer ones at their defaults, as older recipes of the same."""
        fields = type(self).model_fields
        idle = {name for name in _NEWER if getattr(self, name) == fields[name].default}
        return self.model_dump(exclude={*exclude, *idle})


def settings(where: str | None = None) -> Mapping[str, Setting]:
    """Return the declaration, field by field, of those that may be set in one place (or any)."""
    found = {}
    for name, field in SamplingParams.model_fields.items():
        (setting,) = (m for m in field.metadata if isinstance(m, Setting))
        if where is None or where in setting.where:
            found[name] = setting
    return found


Asked = TypeVar("Asked", GenerateRequest, SamplingParams)
Layer = tuple[Source, Mapping[str, Any]]
"""Where fields come from, and the fields, under full or short names."""


def spelled(
    values: Mapping[str, Any], *, source: Source, beside: Collection[str] = ()
) -> dict[str, Any]:
    """Return fields under their full names: `steps` is num_inference_steps, `size` two of them.

    Raises `ValueError` for a field that is given twice or is unknown; the nearest is suggested,
    also of those `beside` the fields.
    """
    return {name: value for name, (value, _) in _placed(values, source, beside).items()}


def read_layers(*layers: Layer) -> GenerateRequest:
    """Merge layers, later ones on top; `ValueError` names the place that gave a wrong value."""
    return read_with_origins(*layers)[0]


def read_with_origins(
    *layers: Layer, beside: Collection[str] = ()
) -> tuple[GenerateRequest, dict[str, str]]:
    """Return the request of `read_layers`, and where each of its fields comes from."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, layer in layers:
        placed = _placed(layer, source, beside)
        own = {name: place for name, (_, place) in placed.items()}
        given = {"prompt": "of another layer"} | {k: value for k, (value, _) in placed.items()}
        checked = parse(GenerateRequest, given, source=partial(_place_of, own))
        values |= {name: getattr(checked, name) for name in own}
        origins |= own
    if "prompt" not in values:
        raise ValueError("prompt is missing in the request")
    return GenerateRequest.model_construct(**values), origins  # each value is checked by its layer


def _place_of(places: Mapping[str, str], keys: Keys) -> str:
    return places[str(keys[0])] if keys else "the request"


def _placed(
    values: Mapping[str, Any], source: Source, beside: Collection[str]
) -> dict[str, tuple[Any, str]]:
    """Return each field's value and where it was given."""
    full = {key: name for name, one in settings().items() for key in (name, one.alias) if key}
    found: dict[str, tuple[Any, str]] = {}
    for key, value in values.items():
        origin = where(source, [key])
        if key == "size":
            fields = dict(zip(("width", "height"), parse_size(value, source=origin), strict=True))
        elif key in full:
            fields = {full[key]: value}
        else:
            hint = did_you_mean(key, [*full, "size", *beside])
            raise ValueError(f"{key} in {origin} is unknown{hint}")
        for name, one in fields.items():
            if name in found:
                raise ValueError(f"{key} in {origin} gives {name} a second time")
            found[name] = one, origin
    return found


def draw_seed() -> int:
    """Return a random seed. Larger ones are legal; this is short, since people read and type it."""
    return secrets.randbelow(2**31)


def clips(params: Asked, count: int) -> list[Asked]:
    """Return several clips of a prompt: seed, seed + 1, and so on; an open seed is drawn."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count {count!r} must be a whole number of at least 1")
    first = draw_seed() if params.seed is None or params.seed == -1 else params.seed
    if first > MAX_SEED - (count - 1):
        raise ValueError(f"seed {first} of {count} clips must be at most {MAX_SEED - count + 1}")
    return [params.model_copy(update={"seed": first + i}) for i in range(count)]
