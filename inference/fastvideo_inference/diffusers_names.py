"""What users of diffusers' `WanPipeline` write: our name for it, or the error that says what to do.

pipe("a red ball", num_videos_per_prompt=2, generator=torch.Generator().manual_seed(3))
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing
from typing import Any

from fastvideo import sampling
from fastvideo.registry import did_you_mean
from fastvideo.spec import Spec
from fastvideo.stages import Event, Progress

_OWN_PARTS = "a model has its own parts; give a folder that holds others"
_STAYS = "all parts stay on the device"
_FASTEST = "leave it out: the fastest attention is chosen, unless a call names a backend"
OF_LOADING = {
    "cache_dir": "set HF_HUB_CACHE, or give a folder",
    "device_map": "use device='cuda'",
    "local_files_only": "set HF_HUB_OFFLINE=1",
    "low_cpu_mem_usage": "leave it out: there is one way to load",
    "revision": "fetch it with `hf download`, and give the folder",
    "scheduler": _OWN_PARTS,
    "subfolder": "give the folder itself, as 'model/subfolder'",
    "text_encoder": _OWN_PARTS,
    "token": "set HF_TOKEN, or log in with `hf auth login`",
    "tokenizer": _OWN_PARTS,
    "transformer": _OWN_PARTS,
    "use_safetensors": "leave it out: a folder's weights are read as they are",
    "vae": f"{_OWN_PARTS}, or name a small decoder with decoder='tiny'",
    "variant": "give a folder that holds these files under their usual names",
}
_LORA_STRENGTH = "a LoRA has its strength in lora=['file.safetensors:0.8']"
OF_A_CALL = {
    "attention_kwargs": _LORA_STRENGTH,
    "callback_on_step_end_tensor_inputs": "leave it out: a callback gets the latents alone",
    "cross_attention_kwargs": _LORA_STRENGTH,
    "guidance_scale_2": "the model has one denoiser: use guidance_scale",
    "negative_prompt_embeds": "give negative_prompt as text",
    "prompt_embeds": "give the prompt as text",
    "return_dict": "leave it out: a call returns a Video, and its frames are video.frames",
}
TAKEN = ("generator", "max_sequence_length", "num_videos_per_prompt", "output_type")
"""Keywords of diffusers' call that mean the same here, beside those of the same name."""
OF_A_PIPELINE = {
    "_guidance_scale": "give guidance_scale to the call",
    "_interrupt": "raise an exception, or close the iterator of pipe.events(request)",
    "delete_adapters": "use pipe.unload_lora(name)",
    "device": "it is pipe.model.device, by from_pretrained(..., device='cuda')",
    "disable_lora": "use pipe.unload_lora(), or a call's lora=[]",
    "dtype": "it is pipe.model.dtype, by from_pretrained(..., dtype='bfloat16')",
    "enable_attention_slicing": _FASTEST,
    "enable_model_cpu_offload": _STAYS,
    "enable_sequential_cpu_offload": _STAYS,
    "enable_vae_slicing": "leave it out: clips are decoded one by one",
    "enable_vae_tiling": "leave it out: clips are decoded in chunks of time",
    "enable_xformers_memory_efficient_attention": _FASTEST,
    "fuse_lora": "leave it out: loaded LoRAs are in the weights",
    "get_active_adapters": "use pipe.loras",
    "save_pretrained": "copy the folder, pipe.model.folder",
    "scheduler": "the model's own is described in pipe.model.spec",
    "set_adapters": "use pipe.set_lora(name, strength=0.8)",
    "set_progress_bar_config": "leave it out: pipe.events(request) yields the progress",
    "text_encoder": "use pipe.model.text",
    "tokenizer": "use pipe.model.tokenizer",
    "transformer": "use pipe.model.dit",
    "unload_lora_weights": "use pipe.unload_lora()",
    "vae": "use pipe.model.vae",
}
_BESIDE = ("callback_on_step_end", "count", "latents", "output")
_CALLS = {*_BESIDE, *TAKEN, *OF_A_CALL}
_OUTPUTS = {
    "np": "video.frames[None] / 255",
    "pil": "[[PIL.Image.fromarray(frame) for frame in video.frames]]",
    "pt": "torch.from_numpy(video.frames).permute(0, 3, 1, 2)[None] / 255",
}


class CallbackInputs(dict[str, Any]):
    """What a callback gets: the latents; any other key is answered."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"callback_on_step_end gets the latents alone, no {key}")


def refuse(given: Collection[str], table: Mapping[str, str], *, own: Collection[str] = ()) -> None:
    """Raise `ValueError` for a keyword: of diffusers, with what to write instead, or unknown."""
    for key in given:
        if key in table:
            raise ValueError(f"{key} is a keyword of diffusers; here: {table[key]}")
        raise ValueError(f"{key} in the call is unknown{did_you_mean(key, [*own, *table])}")


def load_dtype(dtype: Any, foreign: dict[str, Any]) -> str:
    """Return the dtype to load; take `torch_dtype` and `use_safetensors=True` out of `foreign`."""
    if foreign.get("use_safetensors") in (True, None):
        foreign.pop("use_safetensors", None)
    theirs = foreign.pop("torch_dtype", None)
    if theirs is not None and dtype != "auto":
        raise ValueError("dtype in the call is given a second time, by torch_dtype")
    return str(dtype if theirs is None else theirs).removeprefix("torch.")


def merged(own: Mapping[str, Any], foreign: Mapping[str, Any], spec: Spec | None) -> dict[str, Any]:
    """Return the keywords of a call with those of diffusers, and our short ones, under our names.

    Raises `ValueError` for what is unknown, means another thing here, or is given twice. Without a
    spec the model is a server's.
    """
    ours = dict(own)
    for key, value in foreign.items():
        if value is None:
            continue
        found = _ours(key, value, spec)
        for name in found.keys() & ours.keys():
            raise ValueError(f"{name} in the call is given a second time, by {key}")
        ours |= found
    return ours


def _ours(key: str, value: Any, spec: Spec | None) -> dict[str, Any]:
    """Return what one foreign keyword sets."""
    if key == "num_videos_per_prompt":
        return {"count": value}
    if key == "generator":
        return {"seed": seed_of(value)}
    if key == "output_type":
        return {"output": _output(value)}
    if key == "max_sequence_length":
        limit = spec.defaults.max_text_tokens if spec else None
        if value != limit:
            known = f"must be {limit} for this model" if limit else "is known to the server"
            raise ValueError(f"{key} {value} {known}; leave it out")
        return {}
    if key == "callback_on_step_end_tensor_inputs" and value in (["latents"], ("latents",)):
        return {}
    if key in OF_A_CALL:
        refuse([key], OF_A_CALL)
    if key in _BESIDE:
        return {key: value}
    return sampling.spelled({key: value}, source="the call", beside=_CALLS)


def seed_of(generator: Any) -> int:
    """Return the seed of a fresh `torch.Generator`, and draw from it, as diffusers would.

    The noise is not diffusers'. A generator that has drawn before is refused: what it would make is
    no clip of its seed.
    """
    import torch

    if not isinstance(generator, torch.Generator):
        raise ValueError("generator must be one torch.Generator; for several clips use seed=[1, 5]")
    seed, device = generator.initial_seed(), generator.device
    fresh = torch.Generator(device).manual_seed(seed)
    if not torch.equal(generator.get_state(), fresh.get_state()):
        raise ValueError("generator was used before; use seed= and another number for each call")
    torch.rand((), generator=generator, device=device)
    return seed


def after_steps(
    events: Generator[Event, None, None], callback: Any, pipe: Any
) -> Generator[Event, None, None]:
    """Call `callback(pipe, step, timestep, {"latents": ...})` after each step, as diffusers does.

    Raises `ValueError` for what is no function, and for a callback that changes the latents.
    """
    if not callable(callback):
        raise ValueError(f"callback_on_step_end {callback!r} must be a function")
    return _after_steps(events, callback, pipe)


def _after_steps(
    events: Generator[Event, None, None], callback: Callable[..., Any], pipe: Any
) -> Generator[Event, None, None]:
    import torch

    from fastvideo import schedulers

    own = pipe.model.spec.scheduler
    with closing(events):  # if the callback raises, too
        for event in events:
            yield event
            if isinstance(event, Progress) and event.stage == "denoise" and event.state:
                times = schedulers.create(own.name, own.args).grid(event.total).timesteps
                latents = event.state.latents
                assert latents is not None, "a step has latents"
                shown = latents.clone()
                given = CallbackInputs(latents=shown)
                found = callback(pipe, event.index - 1, times[event.index - 1], given) or {}
                kept = isinstance(found, Mapping) and all(x is shown for x in found.values())
                if not kept or not torch.equal(shown, latents):
                    raise ValueError("callback_on_step_end cannot change a clip; return its inputs")


def explain(name: str, known: Collection[str] = ()) -> str:
    """Return the message of an attribute that a pipeline has not."""
    if name in OF_A_PIPELINE:
        return f"{name} is of diffusers' pipeline; here: {OF_A_PIPELINE[name]}"
    hint = "" if name.startswith("_") else did_you_mean(name, [*known, *OF_A_PIPELINE])
    return f"'VideoPipeline' object has no attribute {name!r}{hint}"


def refuse_assigned(name: str) -> None:
    """Raise `AttributeError` for what users of diffusers set and a pipeline does not read."""
    if name in OF_A_PIPELINE:
        answer = OF_LOADING.get(name, OF_A_PIPELINE[name])
        raise AttributeError(f"{name} of diffusers' pipeline cannot be set; here: {answer}")


def check_place(model: Any, *place: Any) -> None:
    """Raise `ValueError` if a loaded model has another device or dtype than `.to()` names."""
    import torch

    from fastvideo.model import pick_device

    for one in place:
        name = str(one).removeprefix("torch.")
        dtype = vars(torch).get(name)
        if isinstance(dtype, torch.dtype):
            fits, load = dtype == model.dtype, f"dtype={str(dtype).removeprefix('torch.')!r}"
        else:
            asked, has, load = pick_device(one), model.device, f"device={str(one)!r}"
            fits = asked.type == has.type and asked.index in (None, has.index or 0)
        if not fits:
            where = f"{model.device} in {str(model.dtype).removeprefix('torch.')}"
            raise ValueError(
                f"to({one}): the model is on {where}; use from_pretrained(..., {load})"
            )


def _output(kind: Any) -> str:
    if kind == "latent":
        return "latents"
    if kind not in _OUTPUTS:
        raise ValueError(f"output_type {kind!r} is unknown; use output='frames' or 'latents'")
    raise ValueError(
        f"output_type {kind!r} is a keyword of diffusers; here frames are uint8, T H W 3:"
        f" use {_OUTPUTS[kind]}"
    )
