"""The clip classifier: what it sees, what it is indifferent to, and the one that is bundled."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from fastvideo import hub, registry
from fastvideo.metrics.faithfulness import faithfulness, rates
from fastvideo.models import classifier
from fastvideo.models.classifier.clips import SKETCH, Classifier, Config
from fastvideo.worlds.shapes import ATTRIBUTES, CLASSIFIER, World

BUNDLED = hub.ZOO / CLASSIFIER
SMALL = {"attributes": {"a": ["x", "y"], "b": ["p", "q", "r"]}, "frames": 4, "side": 32, "width": 8}


def small() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(Config.parse(SMALL)).eval().requires_grad_(False)


def clips(count: int = 3, frames: int = 7) -> torch.Tensor:
    return torch.rand(count, 3, frames, 40, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_every_family_exports_config_classifier_and_version():
    for name in registry.names("fastvideo.models.classifier"):
        module = registry.module("fastvideo.models.classifier", name)
        assert module.Config.parse(SMALL) and module.Classifier and module.VERSION >= 1


def test_a_clip_gets_features_logits_and_a_sketch_whatever_its_size():
    net = small()
    for shape in ((2, 3, 1, 33, 65), (2, 3, 4, 32, 32), (2, 3, 81, 16, 48)):
        judged = net(torch.zeros(shape))
        assert judged.features_BF.shape == (2, 32)
        assert {name: tuple(x.shape) for name, x in judged.logits.items()} == {
            "a": (2, 2),
            "b": (2, 3),
        }
        assert judged.sketch_BCTHW.shape == (2, 3, *SKETCH)


def test_the_features_of_a_clip_do_not_depend_on_its_batch():
    net, x = small(), clips()
    alone = torch.cat([net(one[None]).features_BF for one in x])
    torch.testing.assert_close(net(x).features_BF, alone)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)


def test_the_order_of_frames_changes_the_features():
    net, x = small(), clips()
    assert not torch.allclose(net(x).features_BF, net(x.flip(2)).features_BF, atol=1e-3)


def test_bytes_are_pixels():
    net = small()
    pixels = torch.randint(0, 256, (1, 3, 5, 32, 32), dtype=torch.uint8)
    floats = pixels.float() / 127.5 - 1
    assert torch.equal(net(pixels).features_BF, net(floats).features_BF)


def test_resampling_takes_evenly_spaced_frames_and_area_means():
    net = small()
    x = torch.arange(10.0).reshape(1, 1, 10, 1, 1).expand(1, 3, 10, 64, 64)
    assert net.resample(x)[0, 0, :, 0, 0].tolist() == [0, 3, 6, 9]
    x = torch.rand(1, 3, 4, 64, 64)
    torch.testing.assert_close(
        net.resample(x)[0, 0, 1, 2, 3], x[0, 0, 1, 4:6, 6:8].mean(), rtol=1e-5, atol=0
    )


def test_labels_are_the_likeliest_values_and_unknown_truths_are_refused():
    net, x = small(), clips()
    judged = net(x)
    for i, found in enumerate(net.labels(judged)):
        assert found["b"] == "pqr"[int(judged.logits["b"][i].argmax())]
    targets = net.targets([{"a": "y", "b": "r"}, {"a": "x", "b": "p"}])
    assert {k: v.tolist() for k, v in targets.items()} == {"a": [1, 0], "b": [2, 0]}
    with pytest.raises(ValueError, match=r"b 'z' is unknown \(known: p, q, r\)"):
        net.targets([{"a": "x", "b": "z"}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame": 3}, "field 'frame'; did you mean 'frames'"),
        ({"attributes": {}}, "attributes must give"),
        ({"side": 48}, "side 48 must be a multiple of 32"),
        ({"width": 12}, "width 12 must be a multiple of 8"),
        ({"features": 0}, "frames and features must be at least 1"),
    ],
)
def test_illegal_dims_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config.parse({**SMALL, **changes})


def test_a_written_classifier_reads_back_and_a_wrong_one_is_refused(tmp_path):
    net, x = small(), clips()
    classifier.write(net, tmp_path, family="clips", dtype=torch.float32)
    again = classifier.read(tmp_path)
    assert again.config == net.config
    assert torch.equal(again(x).features_BF, net(x).features_BF)
    values = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"family": "clip"}, "classifier 'clip' is unknown; did you mean 'clips'"),
        ({"side": 33}, r"side 33 .*from .*config\.json"),
        ({"features": 8}, "does not fit the network"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
        with pytest.raises(ValueError, match=message):
            classifier.read(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match="cannot be read as the config of a classifier"):
        classifier.read(tmp_path)


def test_the_bundled_classifier_is_small_and_no_model():
    assert (BUNDLED / "model.safetensors").stat().st_size < 1_500_000
    assert CLASSIFIER not in hub.bundled()
    net = classifier.read(BUNDLED)
    assert dict(net.config.attributes) == ATTRIBUTES


def test_the_bundled_classifier_names_what_true_held_out_clips_show():
    net, world = classifier.read(BUNDLED), World(128, 128, 16, 3)
    true = [world.clip(5, i, "heldout") for i in range(64)]
    pixels = (torch.from_numpy(c.frames_THWC).permute(3, 0, 1, 2)[None] for c in true)
    named = [net.labels(net(p))[0] for p in pixels]
    found = rates(faithfulness([c.truth for c in true], named, legal=ATTRIBUTES))
    assert all(found[name] >= 0.95 for name in ATTRIBUTES), found


def test_the_bundled_classifier_tells_clips_of_one_prompt_apart():
    net, world = classifier.read(BUNDLED), World(128, 128, 16, 3)
    truth = world.clip(5, 0, "heldout").truth
    frames = [world.render(truth, np.random.default_rng(i)) for i in (0, 0, 1)]
    a, b, c = (
        net(torch.from_numpy(f).permute(3, 0, 1, 2)[None]).features_BF.double() for f in frames
    )
    assert torch.equal(a, b) and (a - c).norm() > 0.01 * a.norm()


def test_a_damaged_folder_is_named(tmp_path):
    folder = shutil.copytree(BUNDLED, tmp_path / "c")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        classifier.read(folder)
