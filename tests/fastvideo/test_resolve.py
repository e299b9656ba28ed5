"""Requests become complete and legal, and say where a wrong value came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo import capacity, sampler_note, weights
from fastvideo.resolve import check_lora_samplers, find_lora, notices, resolve
from fastvideo.sampling import GenerateRequest, LoraUse, SamplingParams
from fastvideo.schedulers import few_step
from fastvideo.shapes import Compression, PixelShape
from fastvideo.spec import Attention, Defaults, Network, Sampler, Scheduler, Spec

NETWORK = Network(family="x")
SPEC = Spec(
    name="small",
    dit=NETWORK,
    vae=NETWORK,
    text=NETWORK,
    defaults=Defaults(num_frames=17, height=64, width=96, fps=8, negative_prompt="grey"),
)


def ask(
    spec: Spec = SPEC, *, origin: dict[str, str] | None = None, **fields: Any
) -> SamplingParams:
    return resolve(GenerateRequest(**{"prompt": "x", **fields}), spec, origin=origin)


def again(params: SamplingParams) -> GenerateRequest:
    """Return the request that a recipe makes."""
    return GenerateRequest(**params.model_dump())


def test_what_is_left_out_is_the_default_of_the_model():
    assert ask(prompt="a ball", fps=24, seed=5) == SamplingParams(
        prompt="a ball",
        negative_prompt="grey",
        num_frames=17,
        height=64,
        width=96,
        fps=24,
        num_inference_steps=50,
        guidance_scale=5.0,
        seed=5,
    )


@pytest.mark.parametrize("seed", [None, -1])
def test_no_seed_draws_one_that_is_written_down(seed: int | None):
    made = [ask(seed=seed) for _ in range(3)]
    assert len({params.seed for params in made}) == 3
    assert all(resolve(again(params), SPEC) == params for params in made)


def test_zero_is_a_seed_like_any_other():
    assert ask(seed=0).seed == 0


def told(spec: Spec = SPEC, **fields: Any) -> list[str]:
    """Return the first word of each notice: the field."""
    request = GenerateRequest(**{"prompt": "x", **fields})
    return [line.split()[0].strip(":") for line in notices(request, resolve(request, spec), spec)]


def test_a_negative_prompt_that_is_not_used_is_told_and_is_not_in_the_parameters():
    assert told(negative_prompt="a ball", guidance_scale=1.0) == ["negative_prompt"]
    assert ask(negative_prompt="a ball", guidance_scale=1.0).negative_prompt == "grey"
    assert told(negative_prompt="a ball", guidance_scale=1.5) == told(guidance_scale=1.0) == []
    assert ask(negative_prompt="a ball", guidance_scale=1.5).negative_prompt == "a ball"


def test_guidance_above_and_below_that_of_a_distilled_model_is_told():
    few = Scheduler(name="few_step", args={"sigmas": [1.0, 0.9, 0.7]})
    defaults = {"guidance_scale": 2.0, "num_inference_steps": 3}
    own = {"scheduler": few, "defaults": SPEC.defaults.model_copy(update=defaults)}
    distilled = SPEC.model_copy(update=own)
    for scale, found in ((1.5, ["guidance_scale"]), (2.0, []), (3.0, ["guidance_scale"])):
        assert told(distilled, guidance_scale=scale) == found
    assert told(guidance_scale=3.0) == []


def test_a_tile_that_holds_the_whole_clip_is_told():
    assert told(attention="vsa(sparsity=0.5, tile=[5, 4, 6])") == ["attention"]
    assert told(attention="vsa(sparsity=0.5, tile=[5, 4, 5])") == []


@pytest.mark.parametrize(
    ("near", "far"),
    [
        ({"width": 192}, {"width": 208}),
        ({"height": 32}, {"height": 16}),
        ({"num_frames": 33}, {"num_frames": 37}),
        ({"num_frames": 5}, {"num_frames": 37, "width": 16}),
    ],
)
def test_sizes_far_from_the_trained_ones_are_told(near: dict, far: dict):
    assert (told(**near), told(**far)) == ([], ["size"])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_frames": 80}, "num_frames 80 must be 4k.1 for this model; nearest: 77, 81"),
        ({"height": 100}, "height 100 must be a multiple of 16 for this model; nearest: 96, 112"),
        ({"width": 8}, "width 8 must be a multiple of 16 for this model; nearest: 16 "),
    ],
)
def test_a_size_that_the_model_lacks_is_refused_with_the_nearest(fields: dict, text: str):
    with pytest.raises(ValueError, match=text) as caught:
        ask(**fields)
    assert "\n" not in str(caught.value)


def test_a_wrong_size_tells_who_asked_for_it():
    with pytest.raises(ValueError, match=r"\(from --frames\)$"):
        ask(num_frames=6, origin={"num_frames": "--frames"})
    bad = SPEC.model_copy(update={"defaults": Defaults(num_frames=6)})
    with pytest.raises(ValueError, match=r"\(from the defaults of small\)$"):
        ask(bad)


# A rotary table of 1,024 positions: of latent frames, and of 16 pixels each in height and width


@pytest.mark.parametrize(
    ("name", "most", "more"),
    [("num_frames", 4093, 4097), ("height", 16384, 16400), ("width", 16384, 16400)],
)
def test_more_positions_than_the_network_knows_are_refused_with_the_most(
    name: str, most: int, more: int
):
    assert getattr(ask(**{name: most}), name) == most
    rule = rf"^{name} .*1025 positions.* 1024 .*nearest: {most} \(from --it\)$"
    with pytest.raises(ValueError, match=rule):
        ask(**{name: more}, origin={name: "--it"})


def test_a_network_with_a_table_of_its_own_has_that_many_positions():
    dit = Network(family="x", config={"rope_max_seq_len": 8})
    changes = {"dit": dit, "compression": Compression(temporal=2, spatial=4, patch=(2, 1, 3))}
    # as many frames as no network of patches over time has: 1 mod 2 of pixels, 0 mod 2 of latents
    spec = SPEC.model_copy(update=changes)
    size = {"num_frames": 31, "height": 32, "width": 96}
    assert ask(spec, **size).num_frames == 31
    for name, more in (("num_frames", 35), ("height", 36), ("width", 108)):
        with pytest.raises(ValueError, match=rf"{name} .* nearest: {size[name]} \(from"):
            ask(spec, **{**size, name: more})


# Memory


def test_a_clip_that_this_machine_cannot_hold_is_refused_with_one_that_it_can(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(capacity, "has_no_gpu", lambda: True)
    monkeypatch.setattr(capacity, "host_memory", lambda: 4 * gib)
    large = {"num_frames": 81, "height": 4096, "width": 4096}
    with pytest.raises(
        ValueError, match=r"needs at least \d+\.\d GiB.* has 4\.0; nearest:"
    ) as said:
        ask(**large, origin={"height": "--size"})
    assert str(said.value).endswith("(from --size)")
    width, height, frames = map(int, str(said.value).split("nearest: ")[1].split()[0].split("x"))
    assert ask(num_frames=frames, height=height, width=width).num_frames == 81
    taken = capacity.estimate(PixelShape(frames, height, width), SPEC)
    assert width == height and 1.7 * gib < taken <= 2 * gib, "half of the memory is to spare"
    with pytest.raises(ValueError, match="needs at least") as said:
        ask(**{**large, "num_frames": 4093})
    width, height, frames = map(int, str(said.value).split("nearest: ")[1].split()[0].split("x"))
    assert 81 < ask(num_frames=frames, height=height, width=width).num_frames < 4093
    monkeypatch.setattr(capacity, "host_memory", lambda: None)
    assert ask(**large).width == 4096


def test_frames_alone_count_where_a_gpu_computes():
    clip = PixelShape(81, 1024, 1024)
    assert capacity.estimate(clip, SPEC, on_cpu=False) == 2 * 3 * 81 * 1024 * 1024
    assert capacity.estimate(clip, SPEC, on_cpu=True) > 3 * capacity.estimate(
        clip, SPEC, on_cpu=False
    )


# The row of stages


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (("encode_text", "denoise", "decode"), "'denoise' needs noise, not given before it"),
        (("encode_text", "prepare_latents", "denoise"), "make no frames"),
        (("encode_txt", "decode"), "stage 'encode_txt' is unknown; did you mean 'encode_text'"),
    ],
)
def test_a_row_of_stages_that_cannot_make_frames_is_refused(row: tuple[str, ...], text: str):
    with pytest.raises(ValueError, match=text):
        ask(SPEC.model_copy(update={"stages": row}))


# Distilled models


def few(**args: object) -> Spec:
    scheduler = Scheduler(name="few_step", args=args)
    defaults = SPEC.defaults.model_copy(update={"num_inference_steps": 3, "guidance_scale": 1.0})
    return SPEC.model_copy(update={"scheduler": scheduler, "defaults": defaults})


@pytest.mark.parametrize("num_steps", [1, 2, 4, 50])
def test_a_distilled_model_takes_its_own_number_of_steps(num_steps: int):
    spec = few(sigmas=[1.0, 0.9, 0.7])
    assert (
        ask(spec).num_inference_steps == ask(spec, num_inference_steps=3).num_inference_steps == 3
    )
    rule = rf"^num_inference_steps {num_steps}: .* exactly 3 .*nearest: 3 \(from --steps\)$"
    with pytest.raises(ValueError, match=rule):
        ask(spec, num_inference_steps=num_steps, origin={"num_inference_steps": "--steps"})


def test_a_distilled_model_that_names_no_points_takes_those_of_its_scheduler():
    assert ask(few()).num_inference_steps == len(few_step.Scheduler().sigmas)
    with pytest.raises(ValueError, match="takes exactly 3 steps"):
        ask(few(), num_inference_steps=4)


def test_other_schedulers_take_any_number_of_steps():
    assert [ask(num_inference_steps=n).num_inference_steps for n in (1, 1000)] == [1, 1000]


# Attention


def test_a_request_may_ask_for_another_attention_than_the_model_has():
    own = SPEC.model_copy(update={"attention": Attention(pattern="vsa", args={"top_k": 3})})
    assert ask(own).attention == "vsa(top_k=3, tile=[4, 4, 4])"
    assert ask(own, attention="dense").attention == "dense"
    with pytest.raises(ValueError, match=r"sparsity 1\.5 must be .* nearest: 0\.99"):
        ask(attention="vsa(sparsity=1.5)")
    with pytest.raises(ValueError, match=r"larger than the grid .*\(from --attention\)"):
        ask(own, attention="sta(windows=[[99, 1, 1]])", origin={"attention": "--attention"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vsa(sparsity=", r"must look like vsa\(sparsity=0\.8\)"),
        ("vsa(sparsity=0.8}\nb={c=1)", r"must look like vsa\(sparsity=0\.8\)"),
        ("vsa(sparsity=0.8} #)", r"must look like vsa\(sparsity=0\.8\)"),
        ("vsa(sparsity=0.8}, x={y=1)", r"must look like vsa\(sparsity=0\.8\)"),
        ("vsa(sparsity=nan)", r"sparsity nan must be at least 0 and below 1; such as 0\.8"),
        ("vsa(sparsity=-0.1)", r"sparsity -0\.1 must be .*; nearest: 0 \(from --attention\)$"),
        ("vsa(sparsity=1.0000000001)", r"nearest: 0\.99, or top_k=1 for a single tile"),
        ("vsa(sparsity=inf)", r"nearest: 0\.99, or top_k=1 for a single tile"),
        ("VSA(sparsity=0.8)", r"'VSA' is unknown; did you mean 'vsa'\?"),
        ("vsa(Sparsity=0.8)", r"no argument 'Sparsity'; did you mean 'sparsity'\?"),
    ],
)
def test_a_pattern_that_is_none_is_one_line_with_what_to_write(text: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        ask(attention=text, origin={"attention": "--attention"})
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("(from --attention)")


def test_a_pattern_of_the_spec_that_is_none_says_that_the_spec_does():
    bad = SPEC.model_copy(update={"attention": Attention(pattern="vsa", args={"sparsity": 1.5})})
    with pytest.raises(ValueError, match=r"sparsity 1\.5 must be .* \(from the .* of small\)$"):
        ask(bad)


def gated(pattern: str, **args: object) -> Spec:
    network = Network(family="x", config={"gate_compress": True})
    own = Attention(pattern=pattern, args=args)
    return SPEC.model_copy(update={"dit": network, "attention": own})


@pytest.mark.parametrize("attention", ["dense", "sta(windows=[[1, 1, 1]])"])
def test_a_pattern_that_would_drop_gates_is_refused_with_the_reason_and_the_override(attention):
    """Whoever asks for it: the request, or a spec that contradicts its own network."""
    reason = r"would drop the VSA gates that small was trained with; nearest: vsa\(sparsity=0\);"
    sparse, name = gated("vsa", sparsity=0.8), attention.partition("(")[0]
    with pytest.raises(ValueError, match=rf"{reason}.* --drop-gates.* \(from --attention\)$"):
        ask(sparse, attention=attention, origin={"attention": "--attention"})
    args = {"windows": [[1, 1, 1]]} if "sta" in attention else {}
    contradiction = gated(name, **args)
    with pytest.raises(ValueError, match=rf"{reason}.* \(from the defaults of small\)$"):
        ask(contradiction)
    for spec in (sparse, contradiction):
        params = ask(spec, attention=attention, drop_gates=True)
        assert params.drop_gates and params.attention.startswith(name)
        assert resolve(again(params), spec) == params, "a recipe says it again"


def test_vsa_of_any_sparsity_keeps_the_gates_and_needs_no_override():
    for spec in (gated("vsa", sparsity=0.8), gated("dense")):
        params = ask(spec, attention="vsa(sparsity=0)")
        assert (params.attention, params.drop_gates) == ("vsa(sparsity=0, tile=[4, 4, 4])", False)


def test_an_override_that_overrides_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^drop_gates true has .* there are none in small; leave"):
        ask(drop_gates=True)
    with pytest.raises(ValueError, match=r"keeps those of small;.* \(from --drop-gates\)$"):
        ask(gated("vsa", sparsity=0.8), drop_gates=True, origin={"drop_gates": "--drop-gates"})
    assert ask(drop_gates=False).drop_gates is False


def test_a_backend_is_auto_unless_named():
    assert ask().backend == "auto"
    assert ask(backend="flex").backend == "flex"


# LoRAs


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA that was distilled for two steps without guidance."""
    wanted = Sampler(num_inference_steps=2, guidance_scale=1.0)
    pair = {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1)}
    return weights.save(tmp_path / "a.safetensors", pair, sampler_note.header(wanted))


def test_a_lora_is_found_and_its_hash_is_written_down(lora: Path):
    found = find_lora(LoraUse(path=str(lora), strength=0.5))
    assert found.strength == 0.5 and len(found.hash) == 64
    assert find_lora(found) == found
    plain = LoraUse(path=str(lora), strength=0.0)
    params = ask(lora=(plain,))
    assert params.lora == (plain.model_copy(update={"hash": found.hash}),)
    assert resolve(again(params), SPEC).lora == params.lora, "a recipe says it again"


@pytest.mark.parametrize(
    ("use", "text"),
    [
        ({"path": "none.safetensors"}, r"LoRA 'none.safetensors' is neither a file"),
        ({"hash": "0" * 64}, "has hash .* and the one asked for 000000000000"),
        ({}, "is not sampled as small is: num_inference_steps 2, not 50; guidance_scale 1, not 5"),
    ],
)
def test_a_lora_that_will_not_do_is_refused_with_who_asked_for_it(
    lora: Path, use: dict[str, str], text: str
):
    words = [{"path": str(lora), **use}]
    with pytest.raises(ValueError, match=rf"{text}.* \(from --lora\)$"):
        ask(lora=words, origin={"lora": "--lora"})


def test_what_the_request_names_is_not_held_against_a_lora(lora: Path):
    own = {"num_inference_steps": 5, "guidance_scale": 2.0}
    assert ask(lora=[str(lora)], **own).guidance_scale == 2.0
    with pytest.raises(ValueError, match="guidance_scale 1, not 5"):
        ask(lora=[str(lora)], num_inference_steps=5)
    uses = [LoraUse(path=str(lora))]
    check_lora_samplers(uses, SPEC, named=own)
    check_lora_samplers([use.model_copy(update={"strength": 0.0}) for use in uses], SPEC)
    with pytest.raises(ValueError, match="num_inference_steps 2, not 50"):
        check_lora_samplers(uses, SPEC, named=("guidance_scale",))
