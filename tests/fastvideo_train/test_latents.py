from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from fastvideo_train.data.clips import ClipBatches
from fastvideo_train.data.latents import (
    LatentBatches,
    encode_pixels,
    encode_world,
    encoder_hash,
    statistics,
)

from fastvideo.models.vae.wan import Vae, WanVaeConfig
from fastvideo.weights import Checkpoint, read_metadata

CONFIG = WanVaeConfig(
    base_dim=8,
    decoder_base_dim=8,
    z_dim=4,
    dim_mult=(1, 1, 1),
    num_res_blocks=1,
    temperal_downsample=(True, True),
    latents_mean=(0.5, -0.25, 0.0, 0.125),
    latents_std=(0.5, 2.0, 1.0, 0.25),
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_temporal=4,
    scale_factor_spatial=8,
)
WORLD = "toy_world:World"
SIZES = {"seed": 1, "num_frames": 9, "height": 16, "width": 16, "shard_size": 4, "batch": 2}


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return Vae(CONFIG).eval()


@pytest.fixture(scope="module")
def folder(vae, tmp_path_factory):
    path = tmp_path_factory.mktemp("latents")
    encode_world(vae, WORLD, path, num_clips=11, **SIZES, dtype="float32")
    return path


def direct(vae, index, frames=9):
    clips = ClipBatches(WORLD, seed=1, batch=1, num_frames=frames, height=16, width=16)
    return vae.normalize(encode_pixels(vae, clips.batch(index)["pixels"]))[0]


def test_stored_latents_are_the_normalised_means_of_their_clips(vae, folder):
    batch = LatentBatches(folder, seed=0, batch=11).batch(0)
    assert batch["latents"].dtype == torch.float32 and batch["latents"].shape == (11, 4, 3, 2, 2)
    clips = ClipBatches(WORLD, seed=1, batch=11, num_frames=9, height=16, width=16).batch(0)
    captions = dict(zip(clips["ids"], clips["captions"], strict=True))
    for z, caption, name in zip(batch["latents"], batch["captions"], batch["ids"], strict=True):
        torch.testing.assert_close(z, direct(vae, int(name.split("/")[-1])), rtol=1e-4, atol=1e-4)
        assert caption == captions[name]


def test_an_epoch_visits_every_clip_once_and_the_next_in_another_order(folder):
    batches = LatentBatches(folder, seed=0, batch=11)
    first, second = batches.batch(0)["ids"], batches.batch(1)["ids"]
    assert len(set(first)) == 11 and set(first) == set(second) and first != second


def test_a_batch_is_a_function_of_seed_and_step_across_epoch_borders(folder):
    one, other = (LatentBatches(folder, seed=0, batch=4) for _ in range(2))
    in_order = [one.batch(s)["ids"] for s in range(6)]
    backwards = [other.batch(s)["ids"] for s in reversed(range(6))][::-1]
    assert in_order == backwards
    flat = [name for names in in_order for name in names]
    assert len(set(flat[:11])) == 11 and len(set(flat[11:22])) == 11
    assert LatentBatches(folder, seed=9, batch=4).batch(0)["ids"] != in_order[0]
    resumed = LatentBatches(folder, seed=0, batch=4, start_step=3).prefetch(2)
    assert [b["ids"] for b in resumed] == in_order[3:5]


def test_short_clips_are_served_from_the_store_of_long_ones(vae, folder):
    batch = LatentBatches(folder, seed=0, batch=3, frames=5).batch(0)
    assert batch["latents"].shape == (3, 4, 2, 2, 2)
    for z, name in zip(batch["latents"], batch["ids"], strict=True):
        index = int(name.split("/")[-1])
        torch.testing.assert_close(z, direct(vae, index, frames=5), rtol=1e-4, atol=1e-4)


def test_spread_frames_are_equally_far_apart_and_reach_every_frame(folder):
    whole = LatentBatches(folder, seed=0, batch=3)
    spread = LatentBatches(folder, seed=0, batch=3, spread=2)
    seen = set()
    for step in range(40):
        batch, frames = spread.batch(step), spread.batch(step)["frame_T"].tolist()
        assert torch.equal(batch["latents"], whole.batch(step)["latents"][:, :, frames])
        seen.add(tuple(frames))
    assert seen == {(0, 1), (1, 2), (0, 2)}
    assert whole.batch(0)["frame_T"].tolist() == [0, 1, 2]


def test_more_spread_frames_than_there_are_is_refused(folder):
    with pytest.raises(ValueError, match="spread 4 is more than the 3 latent frames"):
        LatentBatches(folder, seed=0, batch=1, spread=4)


def read(path):
    return Checkpoint(path).tensor("latents").tolist(), read_metadata(path)


@pytest.mark.parametrize(("frames", "near"), [(4, "1, 5"), (13, "nearest: 9"), (0, "1, 5")])
def test_a_length_that_the_store_cannot_serve_is_refused_with_the_nearest(folder, frames, near):
    with pytest.raises(ValueError, match=near):
        LatentBatches(folder, seed=0, batch=1, frames=frames)


def test_encoding_again_redoes_only_what_is_missing(vae, tmp_path):
    encode_world(vae, WORLD, tmp_path, num_clips=10, **SIZES)
    shards = sorted(tmp_path.glob("*.safetensors"))
    before = {p.name: (p.stat().st_mtime_ns, read(p)) for p in shards}
    assert len(shards) == 3
    shards[1].unlink()
    with pytest.raises(ValueError, match="unfinished"):
        LatentBatches(tmp_path, seed=0, batch=1)
    seen = []
    encode_world(
        vae, WORLD, tmp_path, num_clips=10, **SIZES, report=lambda *done: seen.append(done)
    )
    after = {p.name: (p.stat().st_mtime_ns, read(p)) for p in shards}
    assert {n for n in before if before[n][0] != after[n][0]} == {shards[1].name}
    assert {n for n in before if before[n][1] != after[n][1]} == set()
    assert seen[-1] == (10, 10) and (6, 10) in seen and (2, 10) not in seen


def test_a_folder_grows_when_more_clips_are_asked_for(vae, tmp_path):
    encode_world(vae, WORLD, tmp_path, num_clips=6, **SIZES)
    first = (tmp_path / "00000.safetensors").stat().st_mtime_ns
    encode_world(vae, WORLD, tmp_path, num_clips=9, **SIZES)
    assert (tmp_path / "00000.safetensors").stat().st_mtime_ns == first
    assert len(set(LatentBatches(tmp_path, seed=0, batch=9).batch(0)["ids"])) == 9
    with pytest.raises(ValueError, match="num_clips 6 is less than the 9"):
        encode_world(vae, WORLD, tmp_path, num_clips=6, **SIZES)


def test_latents_of_another_encoder_or_size_are_refused_by_name(vae, folder):
    torch.manual_seed(1)
    other = Vae(CONFIG)
    with pytest.raises(ValueError, match=f"holds other latents .*{encoder_hash(vae)}"):
        encode_world(other, WORLD, folder, num_clips=11, **SIZES, dtype="float32")
    with pytest.raises(ValueError, match="seed 1, not 2"):
        encode_world(vae, WORLD, folder, num_clips=11, **{**SIZES, "seed": 2}, dtype="float32")
    with pytest.raises(ValueError, match="stale"):
        LatentBatches(folder, seed=0, batch=1, encoder=encoder_hash(other))
    assert len(LatentBatches(folder, seed=0, batch=1, encoder=encoder_hash(vae))) == 11


def test_the_fingerprint_sees_the_encoder_and_not_the_decoder(vae):
    other = Vae(CONFIG)
    other.load_state_dict(vae.state_dict())
    with torch.no_grad():
        next(other.decoder.parameters()).add_(1)
    assert encoder_hash(other) == encoder_hash(vae)
    with torch.no_grad():
        next(other.encoder.parameters()).add_(1e-3)
    assert encoder_hash(other) != encoder_hash(vae)


def test_an_encoder_has_one_fingerprint_in_float32_and_in_bfloat16(vae):
    half, back = Vae(CONFIG).bfloat16(), Vae(CONFIG)
    half.load_state_dict(vae.state_dict())
    back.load_state_dict(half.state_dict())
    assert encoder_hash(half) == encoder_hash(back) == encoder_hash(vae)


def test_a_damaged_manifest_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="fastvideo data encode"):
        LatentBatches(tmp_path, seed=0, batch=1)
    values = json.loads((folder / "manifest.json").read_text()) | {"shards": 3}
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"shards in .* is unknown"):
        LatentBatches(tmp_path, seed=0, batch=1)


def test_statistics_make_normalised_latents_standard(vae):
    clips = ClipBatches(WORLD, seed=1, batch=4, num_frames=9, height=16, width=16)
    pixels = [clips.batch(s)["pixels"] for s in range(3)]
    mean, std = statistics(vae, pixels)
    fresh = Vae(dataclasses.replace(CONFIG, latents_mean=mean, latents_std=std))
    fresh.load_state_dict(vae.state_dict())
    z = torch.cat([fresh.normalize(encode_pixels(fresh, p)) for p in pixels])
    z = z.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(4).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(4).double(), atol=1e-3, rtol=0)
