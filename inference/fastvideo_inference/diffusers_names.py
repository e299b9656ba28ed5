"""What users of diffusers' `WanPipeline` write: our name for it, or the error that says what to do.

pipe("a red ball", num_videos_per_prompt=2, generator=torch.Generator().manual_seed(3))
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from contextlib import closing
from typing import Any

from fastvideo import sampling
from fastvideo.registry import did_you_mean
from fastvideo.spec import Spec
from fastvideo.stages import Event, Progress

_OWN_PARTS = "a model has its own parts; give a folder that holds others"
OF_LOADING = {
    "device_map": "use device='cuda'",
    "revision": "fetch it with `hf download`, and give the folder",
    "scheduler": _OWN_PARTS,
    "text_encoder": _OWN_PARTS,
    "transformer": _OWN_PARTS,
    "vae": f"{_OWN_PARTS}, or name a small decoder with decoder='tiny'",
    "variant": "give a folder that holds these files under their usual names",
}
OF_A_CALL = {
    "attention_kwargs": "a LoRA has its strength in lora=['file.safetensors:0.8']",
    "callback_on_step_end_tensor_inputs": "use pipe.events(request), which yields the state too",
    "guidance_scale_2": "the model has one denoiser: use guidance_scale",
    "negative_prompt_embeds": "give negative_prompt as text",
    "prompt_embeds": "give the prompt as text",
    "return_dict": "leave it out: a call returns a Video, and its frames are video.frames",
}
OF_A_PIPELINE = {
    "enable_model_cpu_offload": "all parts stay on the device",
    "enable_sequential_cpu_offload": "all parts stay on the device",
    "enable_vae_tiling": "leave it out: clips are decoded in chunks of time",
    "fuse_lora": "leave it out: loaded LoRAs are in the weights",
    "scheduler": "the model's own is described in pipe.model.spec",
    "set_adapters": "use pipe.set_lora(name, strength=0.8)",
    "set_progress_bar_config": "leave it out: pipe.events(request) yields the progress",
    "transformer": "use pipe.model.dit",
    "unload_lora_weights": "use pipe.unload_lora()",
    "vae": "use pipe.model.vae",
}
_BESIDE = ("callback_on_step_end", "count", "generator", "latents", "output")
_OUTPUTS = {
    "np": "video.frames[None] / 255",
    "pil": "[[PIL.Image.fromarray(frame) for frame in video.frames]]",
    "pt": "torch.from_numpy(video.frames).permute(0, 3, 1, 2)[None] / 255",
}


def refuse(given: Collection[str], table: Mapping[str, str], *, own: Collection[str] = ()) -> None:
    """Raise `ValueError` for a keyword: of diffusers, with what to write instead, or unknown."""
    for key in given:
        if key in table:
            raise ValueError(f"{key} is a keyword of diffusers; here: {table[key]}")
        raise ValueError(f"{key} in the call is unknown{did_you_mean(key, [*own, *table])}")


def merged(own: Mapping[str, Any], foreign: Mapping[str, Any], spec: Spec | None) -> dict[str, Any]:
    """Return the keywords of a call with those of diffusers, and our short ones, under our names.

    Raises `ValueError` for what is unknown, means another thing here, or is given twice. Without a
    spec the model is a server's.
    """
    limit = spec.defaults.max_text_tokens if spec else None
    ours: dict[str, Any] = {}
    for key, value in foreign.items():
        if value is None:
            continue
        if key == "num_videos_per_prompt":
            ours["count"] = value
        elif key == "generator":
            ours["seed"] = seed_of(value)
        elif key == "output_type":
            ours["output"] = _output(value)
        elif key == "max_sequence_length":
            if value != limit:
                known = f"must be {limit} for this model" if limit else "is known to the server"
                raise ValueError(f"{key} {value} {known}; leave it out")
        elif key in OF_A_CALL:
            refuse([key], OF_A_CALL)
        else:
            ours |= sampling.spelled({key: value}, source="the call", beside=_BESIDE)
    for key in ours.keys() & own.keys() - {"output"}:
        raise ValueError(f"{key} in the call is given a second time, by {', '.join(foreign)}")
    return {**own, **ours}


def seed_of(generator: Any) -> int:
    """Return the seed of a fresh `torch.Generator`, and draw from it, as diffusers would.

    The noise is not diffusers'. A generator that has drawn before is refused: what it would make is
    no clip of its seed.
    """
    import torch

    if not isinstance(generator, torch.Generator):
        raise ValueError("generator must be one torch.Generator; for several clips use count=")
    seed, device = generator.initial_seed(), generator.device
    fresh = torch.Generator(device).manual_seed(seed)
    if not torch.equal(generator.get_state(), fresh.get_state()):
        raise ValueError("generator was used before; use seed= and another number for each call")
    torch.rand((), generator=generator, device=device)
    return seed


def after_steps(
    events: Generator[Event, None, None], callback: Any, pipe: Any
) -> Generator[Event, None, None]:
    """Call `callback(pipe, step, timestep, {})` after each denoising step, as diffusers does."""
    from fastvideo import schedulers

    own = pipe.model.spec.scheduler
    with closing(events):  # if the callback raises, too
        for event in events:
            yield event
            if isinstance(event, Progress) and event.stage == "denoise" and event.state:
                times = schedulers.create(own.name, own.args).grid(event.total).timesteps
                if callback(pipe, event.index - 1, times[event.index - 1], {}):
                    raise ValueError("callback_on_step_end cannot change a clip; let it return {}")


def explain(name: str) -> str:
    """Return the message of an attribute that a pipeline has not."""
    if name in OF_A_PIPELINE:
        return f"{name} is of diffusers' pipeline; here: {OF_A_PIPELINE[name]}"
    return f"'VideoPipeline' object has no attribute {name!r}"


def check_place(model: Any, *place: Any) -> None:
    """Raise `ValueError` if a loaded model has another device or dtype than `.to()` names."""
    import torch

    from fastvideo.model import pick_device

    for one in place:
        if isinstance(one, torch.dtype):
            fits, load = one == model.dtype, f"dtype={str(one).removeprefix('torch.')!r}"
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
