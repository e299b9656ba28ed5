"""A model that is loaded once and turns prompts into clips.

pipe = VideoPipeline.from_pretrained("fastwan-nano")
pipe("a big red ball moving left at night", seed=1).save("ball.mp4")

Under `torchrun`, processes make a clip together: `from_pretrained(..., parallel="ulysses=2")`. Each
of them runs the same script, makes the same calls and gets the same clip; one writes it.

Threads may share a pipeline: clips of equal LoRAs take turns, an event at a time; one that needs
others waits for the open iterators of other threads (see `fastvideo.lora.Loras`).
"""

from __future__ import annotations

import atexit
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from fastvideo import env, hub, sampling, stages
from fastvideo import resolve as resolving
from fastvideo.config import parse
from fastvideo.hub import OpenModel
from fastvideo.log import warned
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.registry import did_you_mean
from fastvideo.resolve import check_lora_samplers, find_lora
from fastvideo.sampling import GenerateRequest, LoraUse, SamplingParams, read_layers
from fastvideo.stages import Chunk, Done, Event, State
from fastvideo_inference import diffusers_names, recipe, sharing
from fastvideo_inference.goodput.budget import make_in_time
from fastvideo_inference.recipe import DecoderId, ModelId, Recipe
from fastvideo_inference.video import Video

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

    from fastvideo.model import Model
    from fastvideo.parallel.mesh import Meshes
    from fastvideo_inference.goodput.profile import Profile
    from fastvideo_inference.remote import RemotePipeline

    Frames = npt.NDArray[np.uint8]

_WHOLE = ("frames", None)  # output, latents
_LEFT_OUT = {"frames": "", "latents": "decode"}  # output: the stage that is not run


class VideoPipeline:
    """Text to video with one loaded model."""

    def __init__(
        self, model: Model, model_id: ModelId, decoder_id: DecoderId | None = None
    ) -> None:
        self.model = model
        self.model_id = model_id
        self.decoder_id = decoder_id
        self.loras: dict[str, LoraUse] = {}
        self.profile: Profile | None = None  # what budgets go by, once one was asked for
        self._thread = threading.get_ident()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = hub.DEFAULT_MODEL,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        decoder: str | Path | None = None,
        parallel: str | None = None,
        **foreign: Any,
    ) -> VideoPipeline:
        """Load a bundled name, folder or hub id; raise `ValueError` naming what does not fit.

        `decoder` is a small one to use in place of the VAE's: its name in the model's decoders/, a
        folder, or a published file of TAEHV's. `parallel` says how the processes that torchrun
        started make a clip together, such as "ulysses=2,guidance=2" for four; with "data=2" each
        half of them makes clips of its own. They stay joined until the script ends. `torch_dtype`
        is read as `dtype`; other keywords of diffusers are refused with what to write instead.
        """
        dtype = diffusers_names.load_dtype(dtype, foreign)
        own = ("device", "dtype", "torch_dtype", "decoder", "parallel")
        diffusers_names.refuse(foreign, diffusers_names.OF_LOADING, own=own)
        model = hub.open_model(name_or_path)  # its weights are fetched once all else is right
        return cls.load(
            model,
            device=str(device),
            dtype=dtype,
            decoder=recipe.decoder_id(decoder, model.spec, model.folder),
            degrees=sharing.read(parallel, world_size=env.world_size()),
        )

    @classmethod
    def load(
        cls,
        found: OpenModel,
        *,
        device: str = "auto",
        dtype: str = "auto",
        decoder: DecoderId | None = None,
        degrees: ParallelConfig | None = None,
    ) -> VideoPipeline:
        """Load a model that was opened before; see `from_pretrained`."""
        from fastvideo.model import load

        meshes = _joined(degrees, device) if degrees and degrees.world_size > 1 else None
        model = load(
            found,
            device=meshes.device if meshes else device,
            dtype=dtype,
            decoder=decoder.name_or_path if decoder else None,
        )
        if meshes:
            sharing.warn_of_idle(meshes.degrees, model.spec)
            model = dataclasses.replace(model, meshes=meshes)
        assert model.folder is not None, "a loaded model comes from a folder"
        model_id = ModelId(
            name_or_path=found.name,
            spec=model.spec.name,
            fingerprint=recipe.fingerprint(model.folder),
        )
        return cls(model, model_id, decoder)

    @staticmethod
    def connect(
        url: str,
        *,
        model: str | None = None,
        decoder: str | None = None,
        slo_class: str | None = None,
        api_key: str | None = None,
    ) -> RemotePipeline:
        """Return a pipeline whose clips a server of `fastvideo serve` makes; nothing is sent yet.

        `model`, `decoder` and `slo_class` are names of the server; None is its default.
        """
        from fastvideo_inference.remote import RemotePipeline

        return RemotePipeline(
            url, model=model, decoder=decoder, slo_class=slo_class, api_key=api_key
        )

    def with_decoder(self, name: str | Path | None) -> VideoPipeline:
        """Return a pipeline of the same weights with another decoder; "" or None is the VAE's."""
        from fastvideo.model import load_decoder

        model, name = self.model, name or None
        assert model.folder is not None, "a loaded model comes from a folder"
        own = recipe.decoder_id(name, model.spec, model.folder)
        net = load_decoder(model.spec, model.folder, name, device=model.device, dtype=model.dtype)
        other = VideoPipeline(dataclasses.replace(model, decoder=net), self.model_id, own)
        other.loras = self.loras
        return other

    @overload
    def __call__(self, prompt: str, *, count: int, **fields: Any) -> list[Video]: ...
    @overload
    def __call__(
        self, prompt: str, *, seed: list[int] | tuple[int, ...] | range, **fields: Any
    ) -> list[Video]: ...
    @overload
    def __call__(self, prompt: list[str] | tuple[str, ...], **fields: Any) -> list[Video]: ...
    @overload
    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | Fraction | str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        attention: str | None = None,
        backend: str | None = None,
        drop_gates: bool | None = None,
        lora: Sequence[str] | None = None,
        latents: Tensor | None = None,
        output: Literal["frames", "latents"] | None = None,
        budget: float | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> Video: ...
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | Fraction | str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] | None = None,
        attention: str | None = None,
        backend: str | None = None,
        drop_gates: bool | None = None,
        lora: Sequence[str] | None = None,
        count: int | None = None,
        latents: Tensor | None = None,
        output: Literal["frames", "latents"] | None = None,
        budget: float | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        **foreign: Any,
    ) -> Video | list[Video]:
        """Make a clip; None is the model's default, a random seed, and the LoRAs that are loaded.

        A list of prompts or seeds gives a list of clips, and so does `count`: that many of each, of
        seed, seed + 1, and so on. `attention` is another pattern than the model's, such as
        "vsa(sparsity=0.8)", and `backend` the name of what computes it; `drop_gates` lets a pattern
        drop the gates of a VSA model. `latents` replaces the noise drawn from the seed (B C T H W,
        standard normal); with `output="latents"` the clip stays undecoded. Within a `budget` of
        seconds a clip, what is left open is chosen for the best one, and `Video.budget` says how
        and why; the first call measures this machine. Short names (`steps`) and names of diffusers
        are taken where they mean the same. Raises `ValueError` before any work for what the model
        cannot make.
        """
        own = {k: v for k, v in locals().items() if v is not None and k not in ("self", "foreign")}
        if foreign:
            own = diffusers_names.merged(own, foreign, self.model.spec)
            again: Video | list[Video] = self(**own)
            return again
        output = output or "frames"
        if output not in _LEFT_OUT:
            raise ValueError(f"output {output!r} is unknown; use one of: {', '.join(_LEFT_OUT)}")
        fields = {k: v for k, v in own.items() if k in sampling.settings()}
        prompts = prompt if isinstance(prompt, list | tuple) else [prompt]
        seeds = seed if isinstance(seed, list | tuple | range) else [seed]
        requests = _requests(prompts, seeds, fields)
        rows = [(request, *self._resolved(request)) for request in requests]
        each = 1 if count is None else count
        asked = [(of, one, lines) for of, row, lines in rows for one in sampling.clips(row, each)]
        if latents is not None and len(asked) != 1:
            raise ValueError(f"latents are the noise of one clip; {len(asked)} are asked for")

        make = partial(self._make, latents=latents, output=output, callback=callback_on_step_end)
        if budget is None:
            made = [make(self, params, notices) for _, params, notices in asked]
        else:
            made = make_in_time(self, asked, budget, make, is_whole=(output, latents) == _WHOLE)
        is_one = isinstance(prompt, str) and count is None and seeds is not seed
        return made[0] if is_one else made

    def _make(
        self,
        pipe: VideoPipeline,
        params: SamplingParams,
        notices: tuple[str, ...],
        *,
        latents: Tensor | None,
        output: Literal["frames", "latents"],
        callback: Callable[..., Any] | None,
    ) -> Video:
        """Make a clip by this pipeline with its decoder or another."""
        events: Iterator[Event]
        events = pipe.events(params, latents=latents, output=output, notices=notices)
        if callback is not None:
            events = diffusers_names.after_steps(events, callback, self)
        last = deque(events, maxlen=1).pop()  # a list would keep every step's state
        assert isinstance(last, Done), "stages end in Done"
        return pipe.video(last.state, own_noise=latents is not None)

    def stream(
        self, prompt: str | None = None, *, latents: Tensor | None = None, **fields: Any
    ) -> Generator[Frames, None, None]:
        """Yield frames (H W 3 uint8) as they are decoded; a call's arguments for one clip."""
        own = {} if prompt is None else {"prompt": prompt}
        fields = diffusers_names.merged(own, fields, self.model.spec)
        for key in fields.keys() - sampling.settings().keys():
            raise ValueError(f"{key} is not for a stream, which is the frames of one clip")
        # Resolved now, so that an illegal request fails here and not at the first frame.
        params, notices = self._resolved(request_of(**fields))
        return _single_frames(self.events(params, latents=latents, notices=notices))

    def events(
        self,
        request: GenerateRequest | SamplingParams,
        *,
        latents: Tensor | None = None,
        output: Literal["frames", "latents"] = "frames",
        previews: bool = False,
        notices: tuple[str, ...] = (),
    ) -> Generator[Event, None, None]:
        """Resolve a request and return its events; drop or `close()` the iterator to cancel.

        From its first event to its end it needs its LoRAs in the weights. What needs others waits
        in another thread, and raises `ValueError` in the same one.

        `previews` asks for a `Preview` after each step. Parameters that were resolved before are
        taken as they are, with the `notices` about them.
        """
        if isinstance(request, GenerateRequest):
            request, notices = self._resolved(request)
        _check_noise(latents)
        params, latents = self._agreed(request, latents)
        from fastvideo.lora import uses_of

        self.model.loras.check(self.model.dit, uses_of(params.lora))
        row = [stage for stage in self.model.spec.stages if stage != _LEFT_OUT[output]]
        state = State((params,), noise=latents, previews=previews, notices=notices)
        return stages.run(row, self.model, state)

    def _resolved(self, request: GenerateRequest) -> tuple[SamplingParams, tuple[str, ...]]:
        """Complete a request, with the pipeline's LoRAs if it names none, and check all of it."""
        if request.lora is None and self.loras:
            request = request.model_copy(update={"lora": tuple(self.loras.values())})
        params, model = resolving.resolve(request, self.model.spec), self.model
        has_small = model.decoder is not None
        sharing.check(model.meshes.degrees, params, model.spec, has_small_decoder=has_small)
        return params, warned(resolving.notices(request, params, model.spec))

    def _agreed(
        self, params: SamplingParams, latents: Tensor | None
    ) -> tuple[SamplingParams, Tensor | None]:
        """Take what the first of the processes that share a clip asks.

        A seed that each had drawn for itself would make another clip on each.
        """
        from fastvideo.parallel.agree import broadcast_object

        meshes = self.model.meshes
        if meshes.axis("sample").size == 1:
            return params, latents
        if threading.get_ident() != self._thread:
            raise ValueError(
                "parallel: clips are made in the thread that loaded the pipeline, as all processes"
                " must make them in the same order"
            )
        asked = (params, None if latents is None else latents.cpu())
        return broadcast_object(asked, meshes.axis("sample"), meshes.device)

    def load_lora(self, path: str | Path, *, strength: float = 1.0, name: str | None = None) -> str:
        """Let every clip use a LoRA (a file, a folder or a hub name), and return its name here.

        The name is the file's unless given; the same name again is another strength or file.
        Raises `ValueError` if it does not fit the model, which then stays as it is, or is sampled
        otherwise, as one that was distilled. Like `set_lora` and `unload_lora`, it waits for open
        iterators of other threads that need other LoRAs, and is refused in the thread of one.
        """
        use = find_lora(_parse_lora(path, strength))
        key = name or hub.find_lora(use.path).stem
        self._set_lora(key, use)
        return key

    def load_lora_weights(
        self,
        path: str | Path,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **foreign: Any,
    ) -> None:
        """Load a LoRA by the keywords of diffusers; see `load_lora`."""
        own = ("adapter_name", "weight_name", "subfolder")
        diffusers_names.refuse(foreign, diffusers_names.OF_LOADING, own=own)
        parts = (part for part in (path, subfolder, weight_name) if part)
        self.load_lora("/".join(map(str, parts)), name=adapter_name)

    def to(
        self,
        *place: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        silence_dtype_warnings: bool = False,
    ) -> VideoPipeline:
        """Return the pipeline; `ValueError` if it was loaded to another device or type."""
        named = (one for one in (*place, device, dtype) if one is not None)
        diffusers_names.check_place(self.model, *named)
        return self

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(diffusers_names.explain(name, dir(self)))

        def __setattr__(self, name: str, value: Any) -> None:
            diffusers_names.refuse_assigned(name)
            super().__setattr__(name, value)

    def set_lora(self, name: str, *, strength: float) -> None:
        """Change the strength of a loaded LoRA; `ValueError` for an unknown name."""
        old = self._known(name)
        self._set_lora(name, _parse_lora(old.path, strength, old.hash))

    def unload_lora(self, name: str | None = None) -> None:
        """Drop a LoRA, or all; without any, the weights are what they were before, bit for bit."""
        gone = list(self.loras) if name is None else [name]
        if name is not None:
            self._known(name)
        self._merge([use for key, use in {**self.loras}.items() if key not in gone])
        for key in gone:
            self.loras.pop(key, None)

    def _set_lora(self, name: str, use: LoraUse) -> None:
        check_lora_samplers([use], self.model.spec)
        self._merge({**self.loras, name: use}.values())
        self.loras[name] = use  # alone: another thread may have loaded its own meanwhile

    def _merge(self, loras: Iterable[LoraUse]) -> None:
        from fastvideo.lora import uses_of

        self.model.loras.use(self.model.dit, uses_of(loras))

    def _known(self, name: str) -> LoraUse:
        if name not in self.loras:
            known = ", ".join(self.loras) or "none"
            hint = did_you_mean(name, self.loras)
            raise ValueError(f"LoRA {name!r} is not loaded{hint} (loaded: {known})")
        return self.loras[name]

    def recipe(self, state: State, *, own_noise: bool = False) -> Recipe:
        """Return what it takes to make the frames of a state again."""
        (params,) = state.requests
        return Recipe(
            model=self.model_id,
            request=params,
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            latents="given" if own_noise else "seed",
            decoder=self.decoder_id,
            backends=state.backends,
            versions=recipe.versions(),
            not_applied=tuple(recipe.not_applied(params.lora, self.model.loras)),
            unknown_keys=(*self.model.spec.unknown_keys, *recipe.unknown_keys(params.lora)),
        )

    def video(self, state: State, *, own_noise: bool = False) -> Video:
        """Turn the state of the last `Done` into a clip."""
        (params,), frames = state.requests, state.frames
        return Video(
            fps=params.fps,
            recipe=self.recipe(state, own_noise=own_noise).model_dump(mode="json"),
            timings=dict(state.timings),
            frames=None if frames is None else frames[0],
            latents=state.latents if frames is None else None,
            writes=self.model.meshes.axis("sample").rank == 0,
        )


def _joined(degrees: ParallelConfig, device: str) -> Meshes:
    """Join the launcher's processes until the script ends, and make the meshes."""
    from fastvideo.model import pick_device
    from fastvideo.parallel import mesh

    with ExitStack() as stack:
        own = stack.enter_context(mesh.joined(pick_device(device)))
        meshes = mesh.build(degrees, own)
        atexit.register(stack.pop_all().close)
    return meshes


def _parse_lora(path: str | Path, strength: float, file_hash: str = "") -> LoraUse:
    return parse(
        LoraUse, {"path": str(path), "strength": strength, "hash": file_hash}, source="the LoRA"
    )


def request_of(place: str = "the call", /, **fields: Any) -> GenerateRequest:
    """Build a request from a call's arguments, leaving out those that are None."""
    return read_layers((place, {k: v for k, v in fields.items() if v is not None}))


def _requests(
    prompts: Sequence[Any], seeds: Iterable[Any], fields: Mapping[str, Any]
) -> Iterator[GenerateRequest]:
    """Yield the request of each prompt and seed; errors number the prompts of a list."""
    place = "the call" if len(prompts) == 1 else "the call, prompt {}"
    for (i, prompt), seed in product(enumerate(prompts, start=1), seeds):
        yield request_of(place.format(i), **{**fields, "prompt": prompt, "seed": seed})


def _check_noise(latents: Any) -> None:
    import torch

    if latents is not None and not isinstance(latents, torch.Tensor):
        kind = type(latents).__name__
        raise ValueError(f"latents must be a torch.Tensor (B C T H W), not {kind}")


def _single_frames(events: Iterator[Event]) -> Generator[Frames, None, None]:
    for event in events:
        if isinstance(event, Chunk):
            yield from event.frames
