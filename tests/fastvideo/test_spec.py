"""A model folder's description survives writing and reading, and is strict."""

from __future__ import annotations

import json

import pytest

from fastvideo import spec as specs
from fastvideo.shapes import Compression, LatentShape
from fastvideo.spec import Network, Spec

SPEC = Spec(
    name="tiny",
    dit=Network(family="wan"),
    vae=Network(family="wan"),
    text=Network(family="umt5"),
    compression=Compression(temporal=4, spatial=16, patch=(1, 2, 2)),
    scheduler=specs.Scheduler(name="few_step", args={"sigmas": [1.0, 0.5], "timesteps": None}),
    defaults=specs.Defaults(num_inference_steps=2, guidance_scale=1),
    derived=("the scheduler",),
)


def test_spec_survives_a_file(tmp_path):
    specs.write(SPEC, tmp_path)
    assert specs.read(tmp_path) == SPEC


def test_a_row_of_stages_survives_and_the_usual_one_is_not_written(tmp_path):
    """Older releases do not know the key."""
    assert "stages" not in json.loads(specs.write(SPEC, tmp_path).read_text())
    assert specs.read(tmp_path).stages == specs.TEXT_TO_VIDEO
    short = SPEC.model_copy(update={"stages": ("encode_text", "prepare_latents", "denoise")})
    specs.write(short, tmp_path)
    assert specs.read(tmp_path) == short


def test_dims_of_networks_stay_in_their_own_files(tmp_path):
    dit = Network(family="wan", config={"num_layers": 2})
    specs.write(SPEC.model_copy(update={"dit": dit}), tmp_path)
    assert "num_layers" not in (tmp_path / specs.FILE_NAME).read_text()


def test_folder_without_the_file_has_no_spec(tmp_path):
    assert specs.read(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": 3}, "guidance in .* is unknown"),
        ({"dit": {"famly": "wan"}}, r"dit\.famly in .* is unknown; did you mean 'family'\?"),
        ({"defaults": {"fps": 0}}, r"defaults\.fps 0 in .*: must be at least 1"),
        ({"compression": {"spacial": 8}}, r"compression\.spacial .* did you mean 'spatial'\?"),
        ({"compression": {"spatial": 0}}, "factors of at least 1"),
        ({"version": 2}, "a newer fastvideo wrote this folder"),
    ],
)
def test_wrong_entry_is_named_with_its_file(tmp_path, changes, message):
    path = specs.write(SPEC, tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message) as error:
        specs.read(tmp_path)
    assert specs.FILE_NAME in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not valid JSON"), ("[]", "must hold keys and values")]
)
def test_file_that_is_no_table_is_named(tmp_path, text, message):
    (tmp_path / specs.FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        specs.read(tmp_path)
    assert specs.FILE_NAME in str(error.value)


def test_latent_shape_follows_the_family():
    assert SPEC.latent_shape(frames=5, height=64, width=96) == LatentShape(2, 4, 6)
    with pytest.raises(ValueError, match="nearest: 64, 96"):
        SPEC.latent_shape(frames=5, height=80, width=96)
