"""TAEHV's decoder: published names and arithmetic, streaming, causality, folders and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fastvideo import registry
from fastvideo.models import decoder as decoders
from fastvideo.models.decoder.taehv import Config, Decoder
from fastvideo.models.vae.wan import WAN21_MEAN
from fastvideo.shapes import Compression

SMALL = Config(
    z_dim=4,
    widths=(8, 6, 4, 4),
    num_blocks=(2, 1, 1),
    space=(True, True, False),
    time=(False, True, True),
    patch_size=2,
)
WAN = Compression(temporal=4, spatial=8, patch=(1, 2, 2))


def small(config: Config = SMALL) -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Decoder(config).eval().requires_grad_(False)


def latents(frames: int = 5, batch: int = 2, channels: int = 4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, frames, 4, 6, generator=draw)


def plainly(state: dict[str, torch.Tensor], z_BCTHW: torch.Tensor, config: Config) -> torch.Tensor:
    """TAEHV in its plainest form: one layer after the other, in the published order, no fusion.

    From the description of the network alone; nothing of the module under test is called.
    """

    def conv(x, name, pad):
        bias = state.get(f"{name}.bias")
        return F.conv2d(x, state[f"{name}.weight"], bias, padding=pad)

    B, _, T = z_BCTHW.shape[:3]
    x = torch.cat([z_BCTHW[b].transpose(0, 1) for b in range(B)])  # clip after clip, NCHW
    x = F.relu(conv(3 * torch.tanh(x / 3), "decoder.1", 1))
    i = 3
    for count, doubles, grows in zip(config.num_blocks, config.space, config.time, strict=True):
        for _ in range(count):
            clips = x.reshape(B, T, *x.shape[1:])
            past = torch.cat([0 * clips[:, :1], clips], 1)[:, :-1].reshape(x.shape)
            h = F.relu(conv(torch.cat([x, past], 1), f"decoder.{i}.conv.0", 1))
            h = F.relu(conv(h, f"decoder.{i}.conv.2", 1))
            x = F.relu(x + conv(h, f"decoder.{i}.conv.4", 1))
            i += 1
        x = F.interpolate(x, scale_factor=2) if doubles else x
        channels = x.shape[1]
        x = conv(x, f"decoder.{i + 1}.conv", 0)
        x = x.reshape(-1, channels, *x.shape[2:])
        T *= 1 + grows
        x = conv(x, f"decoder.{i + 2}", 1)
        i += 3
    x = F.pixel_shuffle(conv(F.relu(x), f"decoder.{i + 1}", 1), config.patch_size)
    frames = x.reshape(B, T, *x.shape[1:])[:, 2 ** sum(config.time) - 1 :]
    return (2 * frames.transpose(1, 2) - 1).clamp(-1, 1)


# names and shapes of taew2_1.pth and taew2_2.pth, written out from the published network
BLOCK = {0: 2, 2: 1, 4: 1}


def published(channels: int, patch: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "decoder.1.weight": (256, channels, 3, 3),
        "decoder.1.bias": (256,),
        "decoder.7.conv.weight": (256, 256, 1, 1),
        "decoder.8.weight": (128, 256, 3, 3),
        "decoder.13.conv.weight": (256, 128, 1, 1),
        "decoder.14.weight": (64, 128, 3, 3),
        "decoder.19.conv.weight": (128, 64, 1, 1),
        "decoder.20.weight": (64, 64, 3, 3),
        "decoder.22.weight": (3 * patch**2, 64, 3, 3),
        "decoder.22.bias": (3 * patch**2,),
    }
    for first, width in ((3, 256), (9, 128), (15, 64)):
        for i in range(first, first + 3):
            for layer, times in BLOCK.items():
                shapes[f"decoder.{i}.conv.{layer}.weight"] = (width, times * width, 3, 3)
                shapes[f"decoder.{i}.conv.{layer}.bias"] = (width,)
    return shapes


def encoder_of_published(channels: int) -> dict[str, tuple[int, ...]]:
    """Some of the encoder's tensors, which a decoder has no use for."""
    return {"encoder.0.weight": (64, 3, 3, 3), "encoder.18.weight": (channels, 64, 3, 3)}


def test_every_family_exports_config_and_decoder_and_reads_files_without_config():
    for name in registry.names("fastvideo.models.decoder"):
        module = registry.module("fastvideo.models.decoder", name)
        assert module.Config.parse({}) and module.Decoder and callable(module.dims_of)


@pytest.mark.parametrize(("channels", "patch"), [(16, 1), (48, 2)], ids=["taew2_1", "taew2_2"])
def test_names_and_shapes_are_the_published_ones(channels: int, patch: int):
    with torch.device("meta"):
        net = Decoder(Config(z_dim=channels, patch_size=patch))
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert shapes == published(channels, patch)
    assert (net.config.temporal_stride, net.config.spatial_stride) == (4, 8 * patch)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_published_file_is_read_by_its_shapes_and_its_encoder_is_named_as_unused(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    shapes = {**encoder_of_published(16), **published(16, 1)}
    state = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    path = tmp_path / f"taew2_1{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with caplog.at_level("INFO", logger="fastvideo"):
        net = decoders.read(path, dtype=torch.bfloat16)
    assert "2 tensors of an encoder are not used" in caplog.text
    assert "16 channels are taken for Wan2.1's" in caplog.text
    assert net.config.widths == (256, 128, 64, 64) and net.config.num_blocks == (3, 3, 3)
    assert net.config.time == (False, True, True) and net.config.latents_mean == WAN21_MEAN
    assert net.dtype == torch.bfloat16 and not net.training


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        Config(z_dim=4, widths=(6, 4, 4, 4), num_blocks=(1, 1, 1)),
        Config(4, widths=(4, 6, 4), num_blocks=(1, 2), space=(False,) * 2, time=(True,) * 2),
    ],
    ids=["patched", "published strides", "two stages"],
)
def test_the_fused_network_is_the_published_arithmetic(config: Config):
    net, z = small(config), 3 * latents()
    want = plainly(net.state_dict(), z, config)
    s, side = config.temporal_stride, config.spatial_stride
    assert want.shape == (2, 3, 1 + s * 4, 4 * side, 6 * side)
    torch.testing.assert_close(net.decode(z), want, rtol=1e-4, atol=1e-5)
    with torch.enable_grad():
        torch.testing.assert_close(net.decode(z), want, rtol=1e-4, atol=1e-5)


def test_the_first_frames_of_the_grown_ones_are_dropped():
    net, z = small(), latents()
    assert [net.decode(latents(frames=n)).shape[2] for n in (1, 2, 21)] == [1, 5, 81]
    image = net.decode(z[:, :, :1])
    assert image.shape == (2, 3, 1, 32, 48)
    torch.testing.assert_close(image, net.decode(z)[:, :, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 9])
def test_streaming_gives_the_whole_clip(chunk: int):
    net, z = small(), latents()
    with torch.enable_grad():
        whole = net.decode(z)
    parts = list(net.stream(z, chunk))
    assert parts[0].shape[2] == 4 * min(chunk, 5) - 3
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-4, atol=1e-5)


def test_two_streams_of_one_network_do_not_meet():
    net, a, b = small(), latents(), latents().flip(0)
    first, second = net.stream(a, 2), net.stream(b, 2)
    woven = [part for pair in zip(first, second, strict=True) for part in pair]
    torch.testing.assert_close(torch.cat(woven[0::2], 2), net.decode(a), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(woven[1::2], 2), net.decode(b), rtol=1e-4, atol=1e-5)


def test_no_frame_depends_on_a_later_latent_and_each_does_on_its_own():
    net, z = small(), latents()
    other = z.clone()
    other[:, :, 3:] += 1
    a, b = net.decode(z), net.decode(other)
    assert torch.equal(a[:, :, :9], b[:, :, :9])
    assert (a - b)[:, :, 9:].abs().amax((0, 1, 3, 4)).min() > 1e-4


def test_clips_of_a_batch_do_not_see_each_other():
    net, z = small(), latents()
    alone = torch.cat([net.decode(one[None]) for one in z])
    torch.testing.assert_close(net.decode(z), alone, rtol=1e-4, atol=1e-5)


def test_clamped_pixels_are_in_range_and_unclamped_ones_have_gradients():
    net = small().requires_grad_(True)
    with torch.no_grad():
        net.decoder[-1].bias.fill_(9.0)
        assert float(net.decode(latents()).max()) == 1
    loss = net.decode(latents(), clamp=False)
    assert loss.min() > 1
    loss.mean().backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    assert all(g is not None and g.abs().max() > 0 for g in grads.values()), "a part gets none"


def test_wrong_latents_and_chunks_are_refused():
    with pytest.raises(ValueError, match=r"must be \(batch, 4, frames"):
        small().decode(latents(channels=3))
    with pytest.raises(ValueError, match="chunk 0 must be at least 1"):
        small().stream(latents(), 0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": [8, 8]}, "field 'width'; did you mean 'widths'"),
        ({"widths": [8, 8]}, "num_blocks has 3 entries and must have 1"),
        ({"latents_mean": [0.0]}, "latents_mean has 1 entries and must have none or 16"),
        ({"patch_size": 0}, "must be at least 1"),
    ],
)
def test_dims_that_cannot_be_built_are_refused(values: dict[str, object], words: str):
    with pytest.raises(ValueError, match=words):
        Config.parse(values)


def test_a_written_folder_reads_back_the_same(tmp_path: Path):
    net = small()
    decoders.write(net, tmp_path / "decoders" / "tiny", family="taehv", dtype=torch.float32)
    place = decoders.locate("tiny", tmp_path)
    assert decoders.names(tmp_path) == ["tiny"] and place == tmp_path / "decoders" / "tiny"
    assert decoders.locate(place, tmp_path / "elsewhere") == place
    again = decoders.read(place)
    assert again.config == net.config
    assert torch.equal(again.decode(latents()), net.decode(latents()))


@pytest.mark.parametrize("name", ["tyni", "", "nowhere/tiny.pth", "decoders"])
def test_an_unknown_decoder_is_refused_with_the_names_that_are_there(name: str, tmp_path: Path):
    decoders.write(small(), tmp_path / "decoders/tiny", family="taehv", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"is neither one of .* \(vae, tiny\)"):
        decoders.locate(name, tmp_path)


def test_a_folder_of_another_network_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"family": "clips"}))
    with pytest.raises(ValueError, match=r"family 'clips' .* is no decoder \(known: taehv\)"):
        decoders.read_config(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="holds no decoder of the taehv family"):
        decoders.read_config(tmp_path / "vae.safetensors")


def test_a_file_with_foreign_tensors_is_refused_by_their_names(tmp_path: Path):
    state = {**small(Config(z_dim=4)).state_dict(), "decoder.99.gate": torch.zeros(1)}
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected: decoder\.99\.gate"):
        decoders.read(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"z_dim": 8}, "latents of 8 channels; the model's have 4"),
        ({"patch_size": 1}, "4 frames of 4x4 pixels from a latent; the model needs 4 of 8x8"),
        ({"time": (False, False, True)}, "makes 2 frames of 8x8 pixels"),
        ({"latents_mean": (0.1, 0.0, 0.0, 0.0)}, "belongs to another VAE"),
    ],
)
def test_a_decoder_of_other_latents_is_refused_with_the_reason(config, words):
    vae = {"z_dim": 4, "latents_mean": (0.2, 0.0, 0.0, 0.0)}
    decoders.check_fits(SMALL, source="tiny", compression=WAN, vae=vae)
    wrong = Config(**{**vars(SMALL), **config})
    with pytest.raises(ValueError, match=words):
        decoders.check_fits(wrong, source="tiny", compression=WAN, vae=vae)


def test_a_folders_dims_are_read_and_judged_without_torch(tmp_path: Path):
    decoders.write(small(), tmp_path, family="taehv", dtype=torch.float32)
    code = (
        "import sys\nfrom pathlib import Path\nfrom fastvideo.models import decoder\n"
        "assert decoder.read_config(Path(sys.argv[1])).temporal_stride == 4\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
