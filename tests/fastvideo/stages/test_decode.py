"""Latents become frames."""

from __future__ import annotations

import numpy as np
import torch

from fastvideo.model import Model
from fastvideo.stages import decode


def test_decoded_chunks_are_the_whole_clip_in_order(model: Model):
    z = torch.randn(1, 4, 3, 2, 2, generator=torch.manual_seed(0))
    chunks = list(decode.decode(model, z, chunk=1))
    whole = decode.to_uint8(model.vae.decode(model.vae.denormalize(z))[0])
    assert [len(c) for c in chunks] == [1, 4, 4]
    assert np.abs(np.concatenate(chunks).astype(int) - whole).max() <= 1


def test_pixels_map_to_the_ends_and_middle_of_a_byte():
    pixels = torch.tensor([-1.0, 0.0, 1.0, 3.0]).view(4, 1, 1, 1).expand(4, 2, 1, 1)
    assert decode.to_uint8(pixels)[0, 0, 0].tolist() == [0, 128, 255, 255]
