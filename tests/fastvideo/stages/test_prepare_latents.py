"""Seeds become noise, and a caller's own noise is checked."""

from __future__ import annotations

import pytest
import torch

from fastvideo import rng
from fastvideo.model import Model
from fastvideo.stages import Done, State, prepare_latents
from tests import clips


def test_noise_is_the_documented_draw(model: Model):
    noise = prepare_latents.draw(model, clips.params(model), seeds=[5])
    assert torch.equal(noise, rng.noise((1, 4, 3, 4, 6), seed=5, purpose="latents"))


def test_every_clip_draws_from_its_own_seed(model: Model):
    requests = tuple(clips.params(model, seed=seed) for seed in (7, 3))
    *_, done = prepare_latents.run(model, State(requests))
    assert isinstance(done, Done)
    alone = [rng.noise((1, 4, 3, 4, 6), seed=seed, purpose="latents") for seed in (7, 3)]
    assert torch.equal(done.state.noise, torch.cat(alone))


def test_size_that_the_model_lacks_is_refused_with_the_nearest(model: Model):
    wrong = clips.params(model).model_copy(update={"height": 33})
    with pytest.raises(ValueError, match="nearest: 32, 48"):
        prepare_latents.draw(model, wrong, seeds=[0])


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(1, 4, 2, 4, 6),
        torch.zeros(2, 4, 3, 4, 6),
        torch.full((1, 4, 3, 4, 6), torch.nan),
    ],
)
def test_noise_that_does_not_fit_is_refused(model: Model, bad: torch.Tensor):
    with pytest.raises(ValueError, match=r"latents (of shape .* do not fit|hold values)"):
        list(prepare_latents.run(model, State((clips.params(model),), noise=bad)))
