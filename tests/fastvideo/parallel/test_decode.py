"""Bands of rows on several processes against one process that decodes whole frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastvideo.models.vae.wan import WanVae, WanVaeConfig
from fastvideo.parallel import decode, mesh, rules
from fastvideo.parallel.degrees import ParallelConfig

WAN21 = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "temperal_downsample": (True, True),
    "scale_factor_spatial": 4,
    "latents_mean": (0.0,) * 4,
    "latents_std": (1.0,) * 4,
}
WAN22 = WAN21 | {
    "decoder_base_dim": 12,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 8,
}
LAYOUTS: dict[str, dict[str, Any]] = {"wan21": WAN21, "wan22": WAN22}
CHUNKS = (None, 1, 2)
# processes, batch, latent frames, latent height and width; most heights divide by nothing
SIZES = [(2, 1, 3, 5, 3), (3, 2, 2, 7, 2), (4, 1, 3, 5, 4), (4, 1, 1, 4, 1)]


def network(layout: str, dtype: torch.dtype = torch.float32) -> WanVae:
    """A decoder of random weights, the same in every process."""
    vae = WanVae(WanVaeConfig.parse(LAYOUTS[layout]))
    generator = torch.Generator().manual_seed(1)
    for name, p in vae.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "gamma" in name:
            p.data = 1 + 0.3 * noise
        else:
            p.data = noise * (0.2 if p.ndim == 1 else p[0].numel() ** -0.5)
    return vae.to(dtype).requires_grad_(False)


def latents(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def together(
    rank: int, size: int, degrees: ParallelConfig, shape: tuple[int, ...], dtype: torch.dtype
) -> dict[Any, list[Tensor]]:
    torch.manual_seed(rank)
    axis = mesh.build(degrees, torch.device("cpu")).axis("sample")
    return {
        (layout, chunk): list(
            decode.stream(network(layout, dtype), latents(*shape), axis, chunk=chunk)
        )
        for layout in LAYOUTS
        for chunk in CHUNKS
    }


@pytest.mark.parametrize(("size", "batch", "frames", "height", "width"), SIZES)
def test_bands_of_rows_give_the_frames_of_one_process_piece_by_piece_on_every_rank(
    ranks, size: int, batch: int, frames: int, height: int, width: int
):
    shape = (batch, 4, frames, height, width)
    everywhere = ranks(size, together, ParallelConfig(ulysses=size), shape, torch.float32)
    for (layout, chunk), parts in everywhere[0].items():
        alone = list(network(layout).stream(latents(*shape), chunk))
        whole = torch.cat(alone, dim=2)
        assert whole.abs().median() < 0.9, "clamping would hide errors"
        if chunk is not None:
            assert [p.shape for p in parts] == [p.shape for p in alone]
        assert relative_error(torch.cat(parts, dim=2), whole) <= 1e-5, (layout, chunk)
        for others in everywhere[1:]:
            same = zip(others[layout, chunk], parts, strict=True)
            assert all(torch.equal(a, b) for a, b in same), (layout, chunk)


def test_bands_in_bfloat16_are_as_close_as_bfloat16_is(ranks):
    shape = (1, 4, 2, 5, 3)
    (parts, *_) = ranks(2, together, ParallelConfig(guidance=2), shape, torch.bfloat16)
    for (layout, _), pieces in parts.items():
        exact = network(layout).decode(latents(*shape))
        rough = network(layout, torch.bfloat16).decode(latents(*shape)).float()
        ours = torch.cat(pieces, dim=2)
        assert ours.dtype == torch.bfloat16
        assert (ours - exact).abs().mean() <= 1.2 * (rough - exact).abs().mean()


def halves_of_two_clips(rank: int, size: int, shape: tuple[int, ...]) -> Tensor:
    """Two pairs of processes, each pair with a clip of its own."""
    meshes = mesh.build(ParallelConfig(data=2, ring=2), torch.device("cpu"))
    z = latents(2, *shape)[meshes.axis("data").rank, None]
    return torch.cat(list(decode.stream(network("wan21"), z, meshes.axis("sample"))), dim=2)


def test_processes_that_work_on_other_clips_are_left_alone(ranks):
    shape = (4, 2, 3, 2)
    clips = ranks(4, halves_of_two_clips, shape)
    alone = network("wan21").decode(latents(2, *shape))
    for clip, rank in zip(clips, (0, 0, 1, 1), strict=True):
        assert relative_error(clip, alone[rank, None]) <= 1e-5
    assert not torch.allclose(clips[0], clips[2], atol=0.1)


def silent_neighbour(rank: int, size: int) -> str:
    axis = mesh.build(ParallelConfig(ring=2), torch.device("cpu")).axis("sample")
    rows = decode.Rows(axis, (2, 1))
    x = torch.arange(3.0)[rows.axis.rank * 2 :][: rows.each[rank]].view(1, 1, 1, -1, 1) + 1
    padded = rows.pad(x.expand(1, 1, 3, -1, 1), skip=1)
    dist.barrier()
    return str(padded[0, 0, :, :, 0].int().tolist())


def test_a_padded_band_has_its_neighbours_rows_and_zeros_at_the_edges_and_in_skipped_frames(ranks):
    first, second = ranks(2, silent_neighbour)
    assert first == "[[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3]]"
    assert second == "[[0, 3, 0], [2, 3, 0], [2, 3, 0]]"


def test_more_processes_than_rows_are_refused():
    rules.check_rows(4, 4)
    with pytest.raises(ValueError, match="5 processes cannot decode a clip of 4 latent rows"):
        rules.check_rows(4, 5)


def test_one_process_decodes_as_if_there_were_no_axis():
    vae, z = network("wan22"), latents(1, 4, 2, 2, 2)
    parts = decode.stream(vae, z, mesh.alone().axis("sample"), chunk=1)
    assert all(torch.equal(a, b) for a, b in zip(parts, vae.stream(z, 1), strict=True))
