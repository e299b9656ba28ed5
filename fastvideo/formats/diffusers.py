"""Folders as diffusers' WanPipeline saves them: one subfolder per part, whole or in shards.

`save` adds `fastvideo.json`; a folder without it gets a spec derived from the parts' own configs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastvideo import files, foreign, stock_few_step
from fastvideo import spec as specs
from fastvideo.formats import (
    PARTS,
    find_unknown_keys,
    read_json,
    refuse_variants,
    tensor_names,
)
from fastvideo.log import logger
from fastvideo.shapes import Compression
from fastvideo.spec import Attention, Defaults, Network, Scheduler, Spec

if TYPE_CHECKING:
    import torch

    from fastvideo.weights import Checkpoint

MARKS = "fastvideo.json, or model_index.json with transformer/, vae/, text_encoder/ (diffusers)"
SUBFOLDERS = {"dit": "transformer", "vae": "vae", "text": "text_encoder"}
TOKENIZER = "tokenizer"
_SCHEDULER = "scheduler/scheduler_config.json"

# {part: {class name in the part's config: family}}
_FAMILIES = {
    # The second is ours: diffusers would load such a network and drop its gates without a word.
    "dit": {"WanTransformer3DModel": "wan", "WanVsaTransformer3DModel": "wan"},
    "vae": {"AutoencoderKLWan": "wan"},
    "text": {"UMT5EncoderModel": "umt5"},
}
_SCHEDULERS = {
    "UniPCMultistepScheduler": ("unipc", foreign.UNIPC),
    "FlowMatchEulerDiscreteScheduler": ("euler", foreign.EULER),
}
_STEMS = {"dit": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text": "model"}
# Stock diffusers reads any transformer/ whose weights it finds, whatever class its config names,
# and drops tensors that it does not know: weights with gates get a name under which it finds none.
_GATED_STEM = "vsa_gated_model"
_DIFFUSERS_VERSION = "0.42.1"

# Wan2.1's own negative prompt (its wan/configs/shared_config.py).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"  # noqa: RUF001
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"  # noqa: RUF001
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
WAN_DEFAULTS = Defaults(negative_prompt=NEGATIVE_PROMPT)
_FEW_STEPS = {"num_inference_steps": 3, "guidance_scale": 1.0}
_FASTWAN: dict[str, Any] = {
    "sigmas": [*foreign.FASTWAN_SIGMAS],
    "timesteps": [*foreign.FASTWAN_TIMESTEPS],
}
# FastWan's scripts train the 1.3B (30 layers) and the 14B (40) at these; their files do not tell.
_FASTWAN_SPARSITY, _FASTWAN_SPARSITY_14B, _LAYERS_14B = 0.8, 0.9, 40


def detect(folder: Path) -> bool:
    """Tell whether a folder has this layout."""
    marks = (specs.FILE_NAME, "model_index.json", "transformer/config.json")
    return any((folder / mark).is_file() for mark in marks)


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the config of each part: {"dit": {...}, "vae": {...}, "text": {...}}."""
    found = {part: _config(folder, part) for part in PARTS}
    if "gate_compress" not in found["dit"] and _has_gates(folder):
        found["dit"]["gate_compress"] = True
    return found


def derive_spec(folder: Path) -> Spec:
    """Describe a folder that does not describe itself; `derived` lists what was read or assumed."""
    is_few_step = _pipeline_kind(folder) == "WanDMDPipeline"
    found = configs(folder)
    if is_few_step:
        scheduler = Scheduler(name="few_step", args=dict(_FASTWAN))
        origin = "assumed for a WanDMDPipeline"
    else:
        scheduler = _scheduler(folder / _SCHEDULER)
        origin = "from scheduler_config.json"
    attention, why = _attention(found["dit"])
    return Spec(
        name=folder.name,
        dit=_network(folder, "dit", found["dit"]),
        vae=_network(folder, "vae", found["vae"]),
        text=_network(folder, "text", found["text"]),
        compression=compression(found["dit"], found["vae"]),
        scheduler=scheduler,
        attention=attention,
        defaults=WAN_DEFAULTS.model_copy(update=_FEW_STEPS if is_few_step else {}),
        derived=(
            "networks: from the config.json of transformer, vae and text_encoder",
            "compression: from the dims of vae and transformer",
            f"scheduler: {scheduler.name} {scheduler.args or ''}, {origin}",
            f"attention: {why}, assumed",
            "defaults: size, frames, fps, steps, guidance, negative prompt of Wan2.1, assumed",
        ),
    )


def compression(dit: Mapping[str, Any], vae: Mapping[str, Any]) -> Compression:
    """Compute the strides of a Wan from the configs of its parts (diffusers' keys and defaults)."""
    halvings = len(vae.get("dim_mult", (1, 2, 4, 4))) - 1
    patch_t, patch_h, patch_w = dit.get("patch_size", (1, 2, 2))
    return Compression(
        temporal=2 ** sum(vae.get("temperal_downsample", (False, True, True))),
        spatial=2**halvings * (vae.get("patch_size") or 1),
        patch=(patch_t, patch_h, patch_w),
    )


def tensors(folder: Path, part: str) -> Checkpoint:
    """Open the weights of a part, under our names."""
    from fastvideo.weights import Checkpoint

    path = folder / SUBFOLDERS[part]
    checkpoint = Checkpoint(path, stem=stem(folder, part))
    if part == "dit":
        refuse_variants(checkpoint.names(), source=path, known=("to_gate_compress",))
    return checkpoint


def stem(folder: Path, part: str) -> str:
    """Return how a part's files of weights begin; FastWan's gated ones begin like all others."""
    place = folder / SUBFOLDERS[part]
    gated = (place / f"{_GATED_STEM}.safetensors{end}" for end in ("", ".index.json"))
    return _GATED_STEM if part == "dit" and any(map(Path.is_file, gated)) else _STEMS[part]


def tokenizer_folder(folder: Path) -> Path:
    """Return where the tokenizer is."""
    return folder / TOKENIZER


class Saveable(Protocol):
    """What `save` reads of a loaded model."""

    @property
    def spec(self) -> Spec: ...
    @property
    def dit(self) -> Any: ...
    @property
    def vae(self) -> Any: ...
    @property
    def text(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...


def save(
    model: Saveable,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model as a folder that stock diffusers and we load; all of it appears, or nothing.

    Stock diffusers finds no weights in a transformer with VSA's gates, which it would drop.
    dtype: type of the stored weights (None: as they are); parts that stay float32 do.
    Raises `ValueError` if the folder exists (unless `overwrite`) or cannot be written.
    """
    target = Path(folder)
    dims = [dataclasses.asdict(module.config) for module in (model.dit, model.vae)]
    true = compression(*dims)
    assert model.spec.compression == true, f"{model.spec.compression} in the spec; dims say {true}"
    with files.folder(target, overwrite=overwrite) as new:
        for part in PARTS:
            save_part(
                getattr(model, part),
                new / SUBFOLDERS[part],
                part=part,
                family=getattr(model.spec, part).family,
                dtype=dtype,
            )
        model.tokenizer.save(new / TOKENIZER)
        scheduler = scheduler_config(model.spec)
        _write_json(new / _SCHEDULER, scheduler)
        _write_json(new / "model_index.json", _index(model.spec, scheduler["_class_name"]))
        specs.write(model.spec, new)
    return target


def save_part(
    module: Any, folder: Path, *, part: str, family: str, dtype: torch.dtype | None = None
) -> None:
    """Write one network's config and weights into its own subfolder of a model folder."""
    from fastvideo.registry import load
    from fastvideo.weights import cast, save

    keep = load("fastvideo.models.dit", family, "KEEP_FLOAT32") if part == "dit" else ()
    values = dataclasses.asdict(module.config)
    kind = _class_name(part, family, values)
    if not values.get("gate_compress"):  # a key that diffusers does not know
        values.pop("gate_compress", None)
    if part == "vae":  # diffusers computes sizes from these, not from the dims
        strides = compression({}, values)
        values["scale_factor_temporal"] = strides.temporal
        values["scale_factor_spatial"] = strides.spatial
    _write_json(folder / "config.json", {**_kind_entries(kind, dtype), **values})
    state = cast(module.state_dict(), dtype=dtype, keep_float32=keep)
    assert not any("_orig_mod" in name for name in state), f"save the {part} that was compiled from"
    name = _GATED_STEM if values.get("gate_compress") else _STEMS[part]
    save(folder / f"{name}.safetensors", state)


def _class_name(part: str, family: str, dims: Mapping[str, Any]) -> str:
    plain, *gated = (name for name, own in _FAMILIES[part].items() if own == family)
    return gated[0] if dims.get("gate_compress") else plain


def _has_gates(folder: Path) -> bool:
    names = tensor_names(folder / SUBFOLDERS["dit"], stem(folder, "dit"))
    return any("to_gate_compress" in name for name in names)


def _attention(dims: Mapping[str, Any]) -> tuple[Attention, str]:
    """Return what a network with or without gates was trained under, and say it in words."""
    if not dims.get("gate_compress"):
        return Attention(), "dense"
    layers = dims.get("num_layers", _LAYERS_14B)
    sparsity = _FASTWAN_SPARSITY_14B if layers >= _LAYERS_14B else _FASTWAN_SPARSITY
    known = "0.9 is the 14B's of 40 layers, 0.8 the 1.3B's"
    return (
        Attention(pattern="vsa", args={"sparsity": sparsity, "tile": [4, 4, 4]}),
        f"vsa at sparsity {sparsity} with tiles of 4x4x4, as its network has VSA's gates"
        f" and {layers} layers ({known})",
    )


def read_network(folder: Path, part: str) -> Network:
    """Read the family and dims of one part of a model folder; other parts need not be there."""
    return _network(folder, part, _config(folder, part))


def unknown_keys(folder: Path) -> tuple[str, ...]:
    """Return keys of the configs that other libraries wrote which are not known here, by file.

    Raises `ValueError` for a value that makes other arithmetic.
    """
    kinds = {f"{SUBFOLDERS['text']}/config.json": foreign.UMT5}
    if not (folder / specs.FILE_NAME).is_file() and _pipeline_kind(folder) != "WanDMDPipeline":
        kinds[_SCHEDULER] = _scheduler_kind(folder / _SCHEDULER)[1]
    kinds[f"{TOKENIZER}/tokenizer_config.json"] = foreign.TOKENIZER
    return find_unknown_keys(folder, kinds)


def _config(folder: Path, part: str) -> dict[str, Any]:
    """Read the config of a part; of the text encoder, which transformers writes, what is known."""
    values = read_json(folder / SUBFOLDERS[part] / "config.json")
    return {k: v for k, v in values.items() if part != "text" or k in foreign.UMT5}


def _kind_entries(kind: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """Entries by which diffusers and transformers know a class, beside its dims."""
    if kind != "UMT5EncoderModel":
        return {"_class_name": kind, "_diffusers_version": _DIFFUSERS_VERSION}
    return {
        "architectures": [kind],
        "model_type": "umt5",
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        **({"dtype": str(dtype).removeprefix("torch.")} if dtype else {}),
    }


def _index(spec: Spec, scheduler: str) -> dict[str, Any]:
    return {
        "_class_name": "WanPipeline",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": _transformer(spec),
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def _transformer(spec: Spec) -> list[str]:
    name = _class_name("dit", spec.dit.family, spec.dit.config)
    return ["diffusers" if name == "WanTransformer3DModel" else "fastvideo", name]


def scheduler_config(spec: Spec) -> dict[str, Any]:
    """Return the stock scheduler that takes the spec's steps, or the nearest that there is."""
    if spec.scheduler.name == "few_step":
        return _few_step_config(spec)
    shift = float(spec.scheduler.args.get("shift", 1.0))
    if spec.scheduler.name == "unipc":
        kind = {"_class_name": "UniPCMultistepScheduler", **foreign.UNIPC.implemented()}
        return {**kind, "flow_shift": shift}
    kind = {"_class_name": "FlowMatchEulerDiscreteScheduler", **foreign.EULER.implemented()}
    return {**kind, "shift": shift}


def _few_step_config(spec: Spec) -> dict[str, Any]:
    """Return the config of a stock scheduler that takes exactly these steps, if asked for N.

    With `renoise` it draws its noise from torch's global generator: other clips, equal in kind.
    Without such a config the sigmas are left to the caller, and a warning tells that.
    """
    from fastvideo.registry import load

    own = load("fastvideo.schedulers", "few_step", "Scheduler")(**spec.scheduler.args)
    found = stock_few_step.stock_shift(own.sigmas)
    if found is None or not stock_few_step.tells_sigmas(own.sigmas, own.timesteps):
        logger.warning(
            "%s: no config of a stock scheduler takes sigmas %s at timesteps %s; give both to the"
            " set_timesteps of its scheduler in diffusers",
            spec.name, list(own.sigmas), own.timesteps or "1000 sigma",
        )  # fmt: skip
        found = (1.0, None)
    shift, terminal = found
    kind = {"_class_name": "FlowMatchEulerDiscreteScheduler", **foreign.EULER.implemented()}
    mine = {"shift": shift, "shift_terminal": terminal, "stochastic_sampling": own.renoise}
    return {**kind, **mine}


def _scheduler(path: Path) -> Scheduler:
    values, (name, keys) = read_json(path), _scheduler_kind(path)
    foreign.check(values, keys, source=path)
    shift = values.get("flow_shift" if name == "unipc" else "shift", 1.0)
    return Scheduler(name=name, args={"shift": float(shift)})


def _scheduler_kind(path: Path) -> tuple[str, foreign.Keys]:
    kind = read_json(path).get("_class_name")
    if kind not in _SCHEDULERS:
        known = ", ".join(_SCHEDULERS)
        raise ValueError(f"scheduler {kind!r} in {path} is not supported (known: {known})")
    return _SCHEDULERS[kind]


def _network(folder: Path, part: str, config: dict[str, Any]) -> Network:
    names = config.get("architectures") or [config.get("_class_name")]
    family = _FAMILIES[part].get(names[0])
    if family is None:
        known = ", ".join(_FAMILIES[part])
        path = folder / SUBFOLDERS[part] / "config.json"
        raise ValueError(f"class {names[0]!r} in {path} is not supported (known: {known})")
    return Network(family=family, config=config)


def _pipeline_kind(folder: Path) -> str:
    """Return the pipeline class (FastWan's distilled models have their own); refuse all others."""
    path = folder / "model_index.json"
    index = read_json(path) if path.is_file() else {}
    kind = str(index.get("_class_name", "WanPipeline"))
    if kind not in ("WanPipeline", "WanDMDPipeline"):
        raise ValueError(
            f"pipeline {kind!r} in {path} is not supported (known: WanPipeline, WanDMDPipeline)"
        )
    second = index.get("transformer_2") or [None]
    if second[0] is not None or index.get("boundary_ratio") is not None:
        raise ValueError(f"{path} names two transformers (Wan2.2 A14B); one is supported")
    return kind


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    files.write_text(path, text, overwrite=True)
