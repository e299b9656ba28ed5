"""What a LoRA's header says of its sampler: read without torch, compared, and put into a spec."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo import sampler_note, weights
from fastvideo.spec import Attention, Defaults, Network, Sampler, Scheduler, Spec

STEPS = {"sigmas": [1.0, 0.5], "renoise": False}
VSA = Attention(pattern="vsa", args={"sparsity": 0.5, "tile": [1, 2, 2]})
WANTED = Sampler(
    scheduler=Scheduler(name="few_step", args=STEPS),
    num_inference_steps=2,
    guidance_scale=1.0,
    attention=VSA,
)
NETWORKS = {part: Network(family="wan") for part in ("dit", "vae", "text")}


def spec(**changes: Any) -> Spec:
    own = {"defaults": Defaults(num_inference_steps=10, guidance_scale=4.0, fps=8), **changes}
    return Spec(name="base", **NETWORKS, **own)


def write(path: Path, header: dict[str, str] | None = None) -> Path:
    weights.save(path, {"a.lora_A.weight": torch.ones(1, 2)}, header or {})
    return path


def test_a_note_is_read_as_it_was_written_and_other_files_have_none(tmp_path: Path):
    noted = write(tmp_path / "a.safetensors", sampler_note.header(WANTED))
    assert sampler_note.read(noted) == WANTED
    other = {"scheduler": "its own", "ss_network_dim": "4"}
    assert sampler_note.read(write(tmp_path / "b.safetensors", other)) is None
    (tmp_path / "cut.safetensors").write_bytes(noted.read_bytes()[:40])
    assert sampler_note.read(tmp_path / "cut.safetensors") is None
    torch.save({"a": torch.ones(1)}, tmp_path / "c.pt")
    assert sampler_note.read(tmp_path / "c.pt") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "not valid JSON"), ("[]", "must hold keys"), ('{"steps": 3}', "steps .* is unknown")],
)
def test_a_wrong_note_is_refused_by_file_and_entry(text: str, reason: str, tmp_path: Path):
    path = write(tmp_path / "a.safetensors", {sampler_note.KEY: text})
    with pytest.raises(ValueError, match=reason) as caught:
        sampler_note.read(path)
    assert f"{sampler_note.KEY} in the header of {path}" in str(caught.value)


def test_a_model_that_is_sampled_so_is_taken_however_its_scheduler_is_spelled():
    made = sampler_note.applied(WANTED, spec())
    sampler_note.check("a", WANTED, made)
    spelled = {**STEPS, "timesteps": None}
    sampler_note.check(
        "a", WANTED, made.model_copy(update={"scheduler": Scheduler(name="few_step", args=spelled)})
    )
    sampler_note.check("a", Sampler(), spec())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"scheduler": Scheduler(name="few_step", args={"sigmas": [1.0, 0.6]})}, "scheduler few_"),
        ({"scheduler": Scheduler()}, r"scheduler few_step .*, not unipc \{\};"),
        ({"attention": Attention()}, r"attention vsa\(sparsity=0.5, .*\), not dense;"),
        ({"defaults": Defaults(num_inference_steps=2)}, "guidance_scale 1, not 5;"),
        (
            {"defaults": Defaults(num_inference_steps=4, guidance_scale=1)},
            "num_inference_steps 2, not 4;",
        ),
    ],
)
def test_a_model_that_is_sampled_otherwise_is_refused_with_the_way_out(
    change: dict[str, Any], text: str
):
    made = sampler_note.applied(WANTED, spec()).model_copy(update=change)
    with pytest.raises(ValueError, match=text) as caught:
        sampler_note.check("a.safetensors", WANTED, made)
    message = str(caught.value)
    assert message.startswith("lora a.safetensors is not sampled as base is: ")
    assert "fastvideo lora merge" in message and message.count(";") == 1 and "\n" not in message


def test_what_the_request_names_is_its_own_affair():
    dense = sampler_note.applied(WANTED, spec()).model_copy(update={"attention": Attention()})
    sampler_note.check("a", WANTED, dense, named=("attention",))
    with pytest.raises(ValueError, match="attention"):
        sampler_note.check("a", WANTED, dense, named=("guidance_scale",))


def test_a_note_changes_its_entries_of_a_spec_and_no_other():
    before = spec(derived=("networks: read", "scheduler: guessed", "attention: guessed"))
    made = sampler_note.applied(WANTED, before)
    assert sampler_note.of(made) == WANTED
    assert made.defaults.fps == 8 and made.name == "base" and made.derived == ("networks: read",)
    assert sampler_note.applied(Sampler(), before).scheduler == before.scheduler
    only = sampler_note.applied(Sampler(attention=VSA), before)
    assert only.attention == VSA and only.defaults == before.defaults


def test_a_note_that_this_release_cannot_follow_is_refused():
    with pytest.raises(ValueError, match="few_steps"):
        sampler_note.applied(Sampler(scheduler=Scheduler(name="few_steps")), spec())
    with pytest.raises(ValueError, match="pattern 'vs' is unknown"):
        sampler_note.applied(Sampler(attention=Attention(pattern="vs")), spec())
    gated = Network(family="wan", config={"gate_compress": True})
    with pytest.raises(ValueError, match="would drop the VSA gates that base"):
        sampler_note.applied(
            Sampler(attention=Attention()), spec().model_copy(update={"dit": gated})
        )


def test_several_notes_agree_entry_by_entry_or_are_refused_by_their_files():
    sparse = Sampler(attention=VSA)
    rest = WANTED.model_copy(update={"attention": None})
    assert sampler_note.agreed({"a": rest, "b": sparse}) == WANTED
    with pytest.raises(ValueError, match=r"loras a and b are not sampled alike: guidance_scale 1 "):
        sampler_note.agreed({"a": WANTED, "b": Sampler(guidance_scale=2)})


def test_a_note_is_judged_without_torch(tmp_path: Path):
    path = write(tmp_path / "a.safetensors", sampler_note.header(WANTED))
    code = (
        "import sys; from fastvideo import hub, sampler_note as s;"
        f"w = s.read({str(path)!r}); spec, _ = hub.open_spec('wan-nano');"
        "spec = spec.model_copy(update={'scheduler': w.scheduler, 'attention': w.attention,"
        "'defaults': spec.defaults.model_copy(update={'num_inference_steps': 2,"
        "'guidance_scale': 1.0})}); s.check('a', w, spec); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
