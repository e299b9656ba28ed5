"""Requests are complete, legal, and say where a wrong value came from."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastvideo_inference import naming, prompts
from fastvideo_inference.request import GenerateRequest, Plan, read_layers

from fastvideo.shapes import parse_size
from fastvideo.spec import Attention, Defaults, Network, Spec

NETWORK = Network(family="x")
SPEC = Spec(
    name="small",
    dit=NETWORK,
    vae=NETWORK,
    text=NETWORK,
    defaults=Defaults(num_frames=17, height=64, width=96, fps=8, negative_prompt="grey"),
)


def test_what_is_left_out_is_the_default_of_the_model():
    plan = GenerateRequest(prompt="a ball", fps=24, seed=5).resolve(SPEC)
    assert plan == Plan(
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


def test_a_plan_remembers_what_the_user_gave():
    plan = GenerateRequest(prompt="a ball", fps=8, seed=None).resolve(SPEC)
    assert plan.model_fields_set == {"prompt", "fps"}


@pytest.mark.parametrize("seed", [None, -1])
def test_no_seed_draws_one_that_is_written_down(seed: int | None):
    plans = [GenerateRequest(prompt="x", seed=seed).resolve(SPEC) for _ in range(3)]
    assert len({plan.seed for plan in plans}) == 3
    assert all(plan.resolve(SPEC) == plan for plan in plans)


def test_zero_is_a_seed_like_any_other():
    assert GenerateRequest(prompt="x", seed=0).resolve(SPEC).seed == 0


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_frames": 80}, "num_frames 80 must be 4k.1 for this model; nearest: 77, 81"),
        ({"height": 100}, "height 100 must be a multiple of 16 for this model; nearest: 96, 112"),
        ({"width": 8}, "width 8 must be a multiple of 16 for this model; nearest: 16 "),
        ({"num_inference_steps": 0}, "num_inference_steps 0 in the call: must be at least 1"),
        (
            {"guidance_scale": -0.5},
            "guidance_scale -0.5 in the call: must be at least 0",
        ),
        ({"guidance_scale": float("nan")}, "guidance_scale NaN in the call: .* finite"),
        ({"fps": 0}, "fps 0 in the call"),
        ({"seed": -2}, "seed -2 in the call"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"frames": 5}, "frames in the call is unknown"),
        ({"num_framse": 5}, "did you mean 'num_frames'"),
    ],
)
def test_illegal_values_are_one_line_with_value_and_rule(fields: dict, text: str):
    with pytest.raises(ValueError, match=text) as caught:
        read_layers(("the call", {"prompt": "x", **fields})).resolve(SPEC)
    assert "\n" not in str(caught.value)


def test_later_layers_win_and_a_wrong_layer_is_named():
    low, high = ("a.toml", {"fps": 10, "seed": 1}), ("flags", {"prompt": "x", "seed": 2})
    assert read_layers(low, high).model_dump(exclude_none=True) == {
        "prompt": "x",
        "fps": 10,
        "seed": 2,
    }
    with pytest.raises(ValueError, match=r"fps 0 in a\.toml"):
        read_layers(("a.toml", {"fps": 0}), ("flags", {"prompt": "x", "fps": 8}))


def test_a_wrong_size_tells_who_asked_for_it():
    request = GenerateRequest(prompt="x", num_frames=6)
    with pytest.raises(ValueError, match=r"\(from --frames\)$"):
        request.resolve(SPEC, origin={"num_frames": "--frames"})
    bad = SPEC.model_copy(update={"defaults": Defaults(num_frames=6)})
    with pytest.raises(ValueError, match=r"\(from the defaults of small\)$"):
        GenerateRequest(prompt="x").resolve(bad)


def test_a_request_may_ask_for_another_attention_than_the_model_has():
    own = SPEC.model_copy(update={"attention": Attention(pattern="vsa", args={"top_k": 3})})
    assert GenerateRequest(prompt="x").resolve(own).attention == "vsa(top_k=3, tile=[4, 4, 4])"
    assert GenerateRequest(prompt="x", attention="dense").resolve(own).attention == "dense"
    with pytest.raises(ValueError, match=r"sparsity 1\.5 must be .* nearest: 0\.99"):
        GenerateRequest(prompt="x", attention="vsa(sparsity=1.5)")
    wide = GenerateRequest(prompt="x", attention="sta(windows=[[99, 1, 1]])")
    with pytest.raises(ValueError, match=r"larger than the grid .*\(from --attention\)"):
        wide.resolve(own, origin={"attention": "--attention"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vsa(sparsity=", r"must look like vsa\(sparsity=0\.8\)"),
        ("vsa(sparsity=0.8}\nb={c=1)", r"must look like vsa\(sparsity=0\.8\)"),
        ("vsa(sparsity=0.8} #)", r"must look like vsa\(sparsity=0\.8\)"),
        ("vsa(sparsity=0.8}, x={y=1)", r"must look like vsa\(sparsity=0\.8\)"),
        ("vsa(sparsity=nan)", r"sparsity nan must be at least 0 and below 1; such as 0\.8"),
        ("vsa(sparsity=-0.1)", r"sparsity -0\.1 must be .*; nearest: 0$"),
        ("vsa(sparsity=1.0000000001)", r"nearest: 0\.99, or top_k=1 for a single tile"),
        ("vsa(sparsity=inf)", r"nearest: 0\.99, or top_k=1 for a single tile"),
        ("VSA(sparsity=0.8)", r"'VSA' is unknown; did you mean 'vsa'\?"),
        ("vsa(Sparsity=0.8)", r"no argument 'Sparsity'; did you mean 'sparsity'\?"),
    ],
)
def test_a_pattern_that_is_none_is_one_line_with_what_to_write(text: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        read_layers(("the call", {"prompt": "x", "attention": text}))
    assert "\n" not in str(caught.value)


def gated(pattern: str, **args: object) -> Spec:
    network = Network(family="x", config={"gate_compress": True})
    own = Attention(pattern=pattern, args=args)
    return SPEC.model_copy(update={"dit": network, "attention": own})


@pytest.mark.parametrize("attention", ["dense", "sta(windows=[[1, 1, 1]])"])
def test_a_pattern_that_would_drop_gates_is_refused_with_the_reason_and_the_override(attention):
    """Whoever asks for it: the request, or a spec that contradicts its own network."""
    request = GenerateRequest(prompt="x", attention=attention)
    reason = r"would drop the VSA gates that small was trained with; nearest: vsa\(sparsity=0\);"
    with pytest.raises(ValueError, match=rf"{reason}.* --drop-gates.* \(from --attention\)$"):
        request.resolve(gated("vsa", sparsity=0.8), origin={"attention": "--attention"})
    args = {"windows": [[1, 1, 1]]} if "sta" in attention else {}
    contradiction = gated(attention.partition("(")[0], **args)
    with pytest.raises(ValueError, match=rf"{reason}.* \(from the defaults of small\)$"):
        GenerateRequest(prompt="x").resolve(contradiction)
    for spec in (gated("vsa", sparsity=0.8), contradiction):
        plan = request.model_copy(update={"drop_gates": True}).resolve(spec)
        assert plan.drop_gates and plan.attention.startswith(attention.partition("(")[0])
        assert plan.resolve(spec) == plan, "a recipe says it again"


def test_vsa_of_any_sparsity_keeps_the_gates_and_needs_no_override():
    for spec in (gated("vsa", sparsity=0.8), gated("dense")):
        plan = GenerateRequest(prompt="x", attention="vsa(sparsity=0)").resolve(spec)
        assert (plan.attention, plan.drop_gates) == ("vsa(sparsity=0, tile=[4, 4, 4])", False)


def test_an_override_that_overrides_nothing_is_refused():
    asked = GenerateRequest(prompt="x", drop_gates=True)
    with pytest.raises(ValueError, match=r"^drop_gates true has .* there are none in small; leave"):
        asked.resolve(SPEC)
    with pytest.raises(ValueError, match=r"keeps those of small;.* \(from --drop-gates\)$"):
        asked.resolve(gated("vsa", sparsity=0.8), origin={"drop_gates": "--drop-gates"})
    assert GenerateRequest(prompt="x", drop_gates=False).resolve(SPEC).drop_gates is False


def test_a_backend_is_a_known_name():
    assert GenerateRequest(prompt="x").resolve(SPEC).backend == "auto"
    assert GenerateRequest(prompt="x", backend="flex").resolve(SPEC).backend == "flex"
    with pytest.raises(ValueError, match=r"'gathr' is unknown; did you mean 'gather'\? \(known: a"):
        read_layers(("the call", {"prompt": "x", "backend": "gathr"}))


def test_sizes_are_width_by_height():
    assert parse_size("224x128") == (224, 128)
    for wrong in ("224", "224*128", "x", "224x", "-1x5"):
        with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
            parse_size(wrong)


def test_names_are_filled_from_prompt_seed_and_index(tmp_path: Path):
    template = naming.check_template(f"{tmp_path}/{{index}}-{{prompt:9}}-{{seed}}.mp4", num_clips=2)
    path = naming.fill(template, prompt="A Red  ball/../über", seed=7, index=1)
    assert path == tmp_path / "1-a-red-bal-7.mp4"


def test_a_prompt_cannot_leave_its_folder(tmp_path: Path):
    path = naming.fill(f"{tmp_path}/{{prompt}}.mp4", prompt="../../etc/passwd", seed=0, index=0)
    assert path.parent == tmp_path
    assert naming.fill("{prompt}.mp4", prompt="?!", seed=0, index=0) == Path("clip.mp4")


def test_a_folder_gets_the_default_name(tmp_path: Path):
    assert naming.check_template(str(tmp_path), num_clips=3) == f"{tmp_path}/{naming.DEFAULT_NAME}"
    assert naming.check_template("new/", num_clips=3) == f"new/{naming.DEFAULT_NAME}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{sed}.mp4", r"\{sed\} is unknown; did you mean 'seed'"),
        ("{prompt:x}.mp4", "must have a length"),
        ("{prompt.mp4", "is not a template"),
        ("{}.mp4", r"\{\} is unknown"),
        ("a.mp4", r"one file for 2 clips; add \{index\}"),
    ],
)
def test_wrong_templates_are_refused(template: str, text: str):
    with pytest.raises(ValueError, match=text):
        naming.check_template(template, num_clips=2)


def test_a_free_name_is_one_that_neither_a_clip_nor_a_sidecar_has(tmp_path: Path):
    path = tmp_path / "a.mp4"
    assert naming.unused(path) == path
    path.touch()
    (tmp_path / "a-2.json").touch()
    assert naming.unused(path) == tmp_path / "a-3.mp4"
    assert naming.unused(path, taken={tmp_path / "a-3.mp4"}) == tmp_path / "a-4.mp4"


def test_text_files_hold_a_prompt_a_line(tmp_path: Path):
    path = tmp_path / "p.txt"
    path.write_text("# title\n a red ball \n\n  # more\na blue ball\n")
    rows = [(f"{path}:2", {"prompt": "a red ball"}), (f"{path}:5", {"prompt": "a blue ball"})]
    assert prompts.read_prompts(path) == rows


def test_json_lines_hold_a_request_a_line(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x", "seed": 4}\n')
    assert prompts.read_prompts(path) == [(f"{path}:1", {"prompt": "x", "seed": 4})]


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("p.jsonl", '{"prompt": "x"}\nnope', "p.jsonl:2 is not valid JSON"),
        ("p.jsonl", '["x"]', "p.jsonl:1 must be an object"),
        ("p.txt", "# nothing\n", "holds no prompt"),
        ("p.csv", "x", "must end in one of: .txt, .jsonl"),
    ],
)
def test_wrong_prompt_files_are_refused_by_line(tmp_path: Path, name: str, text: str, error: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=error):
        prompts.read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        prompts.read_prompts(tmp_path / "none.txt")
