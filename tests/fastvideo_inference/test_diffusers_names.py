"""What users of diffusers write is taken where it means the same, else answered in one line."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastvideo_inference import diffusers_names
from tiny_loras import pairs, write_as

from fastvideo import Video, VideoPipeline

PROMPT = "a red ball moving left"
SMALL: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> VideoPipeline:
    return VideoPipeline.from_pretrained(tiny_folder, dtype="float32")


def asked(videos: list[Video]) -> list[tuple[str, int]]:
    requests = [video.recipe["request"] for video in videos]
    return [(request["prompt"], request["seed"]) for request in requests]


def same(one: Video, other: Video) -> bool:
    return np.array_equal(one.frames, other.frames)


def test_every_keyword_of_wan_pipeline_is_taken_or_answered():
    diffusers = pytest.importorskip("diffusers")
    theirs = inspect.signature(diffusers.WanPipeline.__call__).parameters.keys() - {"self"}
    ours = inspect.signature(VideoPipeline.__call__).parameters.keys()
    answered = diffusers_names.OF_A_CALL.keys() - {"cross_attention_kwargs"}  # of image pipelines
    assert theirs - ours - {*diffusers_names.TAKEN} == answered


def test_a_call_as_diffusers_documents_it_makes_the_clip_of_our_own_words(pipe: VideoPipeline):
    theirs = pipe(
        prompt=PROMPT,
        negative_prompt="a ball",
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator("cpu").manual_seed(3),
        max_sequence_length=16,
        prompt_embeds=None,
        callback_on_step_end_tensor_inputs=["latents"],
    )
    words = {"negative": "a ball", "size": "48x32", "frames": 5, "steps": 2, "guidance": 2}
    ours = pipe(text=PROMPT, seed=np.int64(3), **words)
    assert same(theirs, ours) and theirs.recipe == ours.recipe


def test_several_clips_are_a_list_and_each_is_that_of_its_seed(pipe: VideoPipeline):
    one = pipe(PROMPT, seed=4, **SMALL)
    for key in ("count", "num_videos_per_prompt"):
        made = pipe(PROMPT, seed=3, **{key: 2}, **SMALL)
        assert asked(made) == [(PROMPT, 3), (PROMPT, 4)] and same(made[1], one)
    made = pipe(PROMPT, seed=[9, 4], **SMALL)
    assert asked(made) == [(PROMPT, 9), (PROMPT, 4)] and same(made[1], one)
    made = pipe([PROMPT], seed=range(4, 6), count=2, **{**SMALL, "num_frames": 1})
    assert asked(made) == [(PROMPT, seed) for seed in (4, 5, 5, 6)]
    rows = pipe([PROMPT, "a blue ball"], seed=4, count=2, **SMALL)
    assert asked(rows) == [(PROMPT, 4), (PROMPT, 5), ("a blue ball", 4), ("a blue ball", 5)]
    assert same(rows[0], one) and len(pipe([PROMPT], seed=4, **SMALL)) == 1
    (_, first), (_, second) = asked(pipe(PROMPT, count=2, **SMALL))
    assert second == first + 1, "a seed that was drawn"


def test_all_prompts_are_refused_before_the_first_is_made(pipe: VideoPipeline, monkeypatch):
    monkeypatch.setattr(pipe.model.dit, "forward", None)
    for wrong in ([PROMPT, " "], [PROMPT, 5]):
        with pytest.raises(ValueError, match=r"^prompt .* in the call, prompt 2: "):
            pipe(wrong, **SMALL)
    with pytest.raises(ValueError, match=r"^callback_on_step_end 3 must be a function$"):
        pipe(PROMPT, callback_on_step_end=3, **SMALL)
    for make in (pipe, pipe.stream):
        with pytest.raises(ValueError, match=r"^latents must be a torch.Tensor .* not ndarray$"):
            make(PROMPT, latents=np.zeros((1, 4, 2, 4, 6)), **SMALL)
        with pytest.raises(ValueError, match=r"^prompt is missing in the"):
            make()
    with pytest.raises(ValueError, match="latents are the noise of one clip; 2 are asked for"):
        pipe(PROMPT, count=2, latents=torch.zeros(1, 4, 2, 4, 6), **SMALL)


def test_a_generator_gives_its_seed_once(pipe: VideoPipeline):
    generator = torch.Generator().manual_seed(7)
    assert asked([pipe(PROMPT, generator=generator, **SMALL)]) == [(PROMPT, 7)]
    for used in (generator, [torch.Generator()], 7):
        with pytest.raises(ValueError, match=r"generator (was used before|must be one torch)"):
            pipe(PROMPT, generator=used, **SMALL)
    with pytest.raises(ValueError, match="seed in the call is given a second time, by generator"):
        pipe(PROMPT, generator=torch.Generator(), seed=1, **SMALL)


def test_a_callback_sees_each_step_and_may_end_the_clip(pipe: VideoPipeline):
    seen = []

    def note(*args: Any) -> Any:
        seen.append(args)
        return args[-1]

    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    how = {**SMALL, "num_inference_steps": 3, "seed": 1}
    assert same(pipe(PROMPT, callback_on_step_end=note, **how), pipe(PROMPT, **how))
    assert [(who, step, *extra) for who, step, _, extra in seen] == [
        (pipe, i, "latents") for i in range(3)
    ]
    times = [float(time) for _, _, time, _ in seen]
    assert 1000 >= times[0] > times[1] > times[2] > 0
    last = pipe(PROMPT, output="latents", **how).latents
    assert torch.equal(seen[-1][-1]["latents"], last) and not torch.equal(
        seen[-2][-1]["latents"], last
    )
    for callback, text in (
        (lambda *_: {"latents": 0}, "cannot change a clip"),
        (lambda *_: True, "cannot change a clip"),
        (lambda *args: {"latents": args[-1]["latents"].zero_()}, "cannot change a clip"),
        (lambda *args: args[-1]["prompt_embeds"], "gets the latents alone, no prompt_embeds"),
    ):
        with pytest.raises(ValueError, match=f"^callback_on_step_end {text}"):
            pipe(PROMPT, callback_on_step_end=callback, **how)
    with pytest.raises(
        AttributeError, match=r"^_interrupt .* cannot be set; here: raise an exception"
    ):
        pipe(PROMPT, callback_on_step_end=lambda who, *_: setattr(who, "_interrupt", True), **how)
    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPT, callback_on_step_end=stop, **how)


def test_an_output_type_is_taken_or_answered_with_what_gives_it(pipe: VideoPipeline):
    import PIL.Image

    ours = pipe(PROMPT, seed=1, output="latents", **SMALL)
    assert torch.equal(pipe(PROMPT, seed=1, output_type="latent", **SMALL).latents, ours.latents)
    video, found = pipe(PROMPT, seed=1, **SMALL), {}
    for kind in ("np", "pt", "pil"):
        with pytest.raises(ValueError, match=rf"^output_type '{kind}' .* use ") as caught:
            pipe(PROMPT, output_type=kind, **SMALL)
        words = str(caught.value).partition(": use ")[2]
        found[kind] = eval(words, {"video": video, "torch": torch, "PIL": PIL})
    assert found["np"].shape == (1, 5, 32, 48, 3) and found["np"].max() <= 1
    assert torch.equal(found["pt"], torch.from_numpy(found["np"]).permute(0, 1, 4, 2, 3).float())
    assert np.array_equal(np.asarray(found["pil"][0][4]), video.frames[4])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_steps": 5}, "num_steps in the call is unknown; did you mean 'steps'"),
        ({"num_inference_step": 5}, "did you mean 'num_inference_steps'"),
        ({"latens": 5}, "did you mean 'latents'"),
        ({"generatr": 5}, "did you mean 'generator'"),
        ({"num_video_per_prompt": 2}, "did you mean 'num_videos_per_prompt'"),
        ({"cross_attention_kwargs": {}}, "is a keyword of diffusers; here: a LoRA has its"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "here: leave it out: a callb"),
        ({"prompt_embeds": torch.zeros(1)}, "prompt_embeds is .* diffusers; here: give the prompt"),
        ({"return_dict": False}, "return_dict is .* leave it out"),
        ({"max_sequence_length": 512}, "max_sequence_length 512 must be 16 for this model"),
    ],
)
def test_other_keywords_are_answered_in_one_line(pipe: VideoPipeline, fields: dict, text: str):
    for make in (pipe, pipe.stream):
        with pytest.raises(ValueError, match=text) as caught:
            make(PROMPT, **fields)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"steps": 5, "num_inference_steps": 5}, "num_inference_steps in the call is given a sec"),
        ({"output_type": "gif"}, "output_type 'gif' is unknown"),
        ({"num_videos_per_prompt": 1.5}, "count 1.5 must be a whole number"),
        ({"output_type": "latent", "output": "frames"}, "output .* a second time, by output_type$"),
        ({"size": "32x32", "height": 32, "frames": 5}, "height .* a second time, by size$"),
        ({"text": "a ball"}, "prompt in the call is given a second time, by text$"),
    ],
)
def test_values_that_no_call_has_are_refused(pipe: VideoPipeline, fields: dict, text: str):
    with pytest.raises(ValueError, match=text):
        pipe(PROMPT, **fields)


def test_a_stream_takes_the_same_names(pipe: VideoPipeline):
    generator = torch.Generator().manual_seed(3)
    frames = list(pipe.stream(PROMPT, generator=generator, frames=5, steps=1, guidance=1.0))
    assert np.array_equal(np.stack(frames), pipe(PROMPT, seed=3, **SMALL).frames)
    for how in ({"num_videos_per_prompt": 2}, {"count": 2}, {"callback_on_step_end": print}):
        with pytest.raises(ValueError, match=r"^(count|callback_\w+) is not for a stream, which"):
            pipe.stream(PROMPT, **how)


def test_loading_takes_types_and_devices_of_torch_and_answers_the_rest(tiny_folder: Path):
    taken = {"torch_dtype": torch.bfloat16, "use_safetensors": True}
    for how in (taken, {"dtype": torch.bfloat16}):
        pipe = VideoPipeline.from_pretrained(tiny_folder, device=torch.device("cpu"), **how)
        assert pipe.model.dtype == torch.bfloat16
    for how, text in (
        ({"torch_dtype": torch.float64}, "dtype 'float64' is unknown"),
        ({"vae": pipe.model.vae}, "vae is a keyword of diffusers; here: a model has its own parts"),
        ({"torch_dtype": torch.float32, "dtype": "bfloat16"}, "dtype .* second time, by torch_dty"),
        ({"torch_dtyp": torch.float32}, "torch_dtyp in the call .* did you mean 'torch_dtype'"),
        ({"use_safetensors": False}, "use_safetensors is a keyword of diffusers; here: leave it"),
        ({"devise": "cpu"}, "devise in the call is unknown; did you mean 'device'"),
        ({"variants": "fp16"}, "variants in the call is unknown; did you mean 'variant'"),
    ):
        with pytest.raises(ValueError, match=text):
            VideoPipeline.from_pretrained(tiny_folder, **how)


def test_a_pipeline_stays_where_it_was_loaded(pipe: VideoPipeline):
    assert pipe.to("cpu") is pipe.to(torch.device("cpu"), torch.float32) is pipe.to("cpu:0") is pipe
    assert pipe.to(device="cpu", dtype="float32", silence_dtype_warnings=True) is pipe
    for dtype in (torch.float16, "half"):
        with pytest.raises(ValueError, match=r"use .* dtype='float16'"):
            pipe.to(dtype=dtype)
    for place, text in (
        (["meta"], r"to\(meta\): the model is on cpu in float32; use .*device='meta'\)"),
        (["cpu", torch.float16], r"to\(torch.float16\): .* dtype='float16'\)"),
        (["cudda"], "device 'cudda' is unknown"),
    ):
        with pytest.raises(ValueError, match=text):
            pipe.to(*place)


def test_methods_of_diffusers_are_taken_or_answered(pipe: VideoPipeline, tmp_path: Path):
    path = write_as("diffusers", tmp_path, pairs(pipe.model.dit))
    plain = pipe(PROMPT, seed=1, **SMALL)
    pipe.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="style")
    assert pipe.loras["style"].path == str(path)
    assert not same(plain, pipe(PROMPT, seed=1, **SMALL))
    pipe.unload_lora("style")
    pipe.load_lora_weights(tmp_path.parent, "same", subfolder=tmp_path.name, weight_name=path.name)
    assert pipe.loras["same"].path == str(path)
    pipe.unload_lora("same")
    with pytest.raises(ValueError, match="token is a keyword of diffusers; here: set HF_TOKEN"):
        pipe.load_lora_weights(tmp_path, token="x")
    for name, answer in diffusers_names.OF_A_PIPELINE.items():
        with pytest.raises(AttributeError) as caught:
            getattr(pipe, name)
        assert str(caught.value) == f"{name} is of diffusers' pipeline; here: {answer}"
        with pytest.raises(AttributeError, match=f"^{name} .* cannot be set; here: "):
            setattr(pipe, name, None)
    for part in ("scheduler", "text_encoder", "tokenizer", "transformer", "vae"):
        with pytest.raises(AttributeError, match="here: a model has its own parts; give a folder"):
            setattr(pipe, part, None)
    for name, hint in (("enable", ""), ("load_lor", "; did you mean 'load_lora'?"), ("_ipy", "")):
        with pytest.raises(AttributeError) as caught:
            getattr(pipe, name)
        assert str(caught.value) == f"'VideoPipeline' object has no attribute {name!r}{hint}"
