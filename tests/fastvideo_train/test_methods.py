"""What the methods compute: losses, draws, and what they demand of a recipe."""

from __future__ import annotations

import pytest
import torch
from fastvideo_train.loop import Job, make_method, train
from fastvideo_train.methods import StepKey
from fastvideo_train.methods import classify as classify_method
from fastvideo_train.methods import flow_matching as flow_method
from fastvideo_train.methods import vae as vae_method
from tiny_recipes import tiny

from fastvideo import registry

KEY = StepKey(seed=0, step=0, num_steps=1)


def test_every_method_file_exports_config_and_method():
    for name in registry.names("fastvideo_train.methods"):
        module = registry.module("fastvideo_train.methods", name)
        assert module.Config.model_config["frozen"] and module.Method.wants


@pytest.mark.parametrize(
    ("method", "word", "message"),
    [
        ("vae", "method.args.l3=1", r"l3 in method\.args .* is unknown"),
        ("vae", "method.name=vea", "method 'vea' is unknown; did you mean 'vae'"),
        ("vae", "roles.vae.kind=dit", r"roles\.vae\.kind is 'dit'.*needs kind 'vae'"),
        ("vae", "roles.vay.kind=vae", "role 'vay' is unknown to method vae; did you mean 'vae'"),
        ("flow_matching", "roles.student.trainable=false", r"roles\.student\.trainable must be"),
        ("flow_matching", "roles.text.config.vocab_size=300", "vocab_size is 300; set .* to 341"),
    ],
)
def test_a_recipe_that_a_method_cannot_use_is_refused(method, word, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Job.open(tiny(method, word), tmp_path)


def test_the_vae_loss_of_a_perfect_reconstruction_is_its_kl():
    method = vae_method.Method(vae_method.Config(kl=2.0))
    zeros = torch.zeros(1, 4, 1, 2, 2)
    loss, parts = method.loss(torch.zeros(1, 3, 5, 16, 16), zeros + 1.0, zeros)
    assert loss.item() == pytest.approx(2.0 * 0.5) and parts["kl"].item() == pytest.approx(0.5)


def test_gradient_l1_is_the_difference_of_both_clips_gradients():
    a, b = torch.randn(2, 1, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = sum((a.diff(dim=d) - b.diff(dim=d)).abs().mean() for d in (2, 3, 4))
    torch.testing.assert_close(vae_method.gradient_l1(a - b), expected)
    still = vae_method.gradient_l1((a - b)[:, :, :1])
    assert still.isfinite() and still > 0


def test_pixels_become_the_signed_unit_range():
    pixels = torch.tensor([0, 255], dtype=torch.uint8)
    assert vae_method.to_unit(pixels).tolist() == [-1.0, 1.0]


def test_a_new_vae_begins_with_little_variance(tmp_path):
    job = Job.open(tiny("vae"), tmp_path)
    pixels = torch.zeros(1, 3, 5, 16, 16)
    _, logvar = job.roles["vae"].net.encode_moments(pixels)
    torch.testing.assert_close(logvar.float().mean(), torch.tensor(-5.0), rtol=0, atol=0.2)


def _flow(*sets: str) -> flow_method.Method:
    method = make_method(tiny("flow_matching", *sets))
    assert isinstance(method, flow_method.Method)
    return method


def test_a_larger_shift_draws_noisier_times():
    low, high = (_flow(f"method.args.shift={k}").sigmas(KEY, 4000) for k in (1.0, 3.0))
    assert low.shape == (4000, 1) and bool((low > 0).all()) and bool((high < 1).all())
    assert low.median().item() == pytest.approx(0.5, abs=0.03)
    assert high.median().item() == pytest.approx(0.75, abs=0.03)


def test_a_share_of_the_prompts_becomes_the_negative_one():
    method = _flow("method.args.text_dropout=0.25", "method.args.negative_prompt=dull")
    dropped = method.drop(["a"] * 4000, KEY).count("dull") / 4000
    assert dropped == pytest.approx(0.25, abs=0.03)
    assert _flow("method.args.text_dropout=0").drop(["a", "b"], KEY) == ["a", "b"]


def _batch() -> dict[str, object]:
    latents = torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    captions = ["a red ball", "a big blue star at sea"]
    return {"latents": latents, "frame_T": torch.arange(2), "captions": captions, "ids": []}


def test_the_flow_loss_of_a_zero_network_is_the_power_of_the_velocity(tmp_path):
    job = Job.open(tiny("flow_matching", "run.dtype=float32"), tmp_path)
    batch = _batch()
    (update,) = job.method.step(batch, job.roles, KEY)
    noise = KEY.noise("flow/noise", (2, 4, 2, 8, 8))
    expected = (noise - batch["latents"]).square().mean()  # a new output layer is zero
    torch.testing.assert_close(update.loss, expected)
    assert update.roles == ("student", "text")


def test_a_frozen_text_encoder_gets_no_update_and_no_graph(tmp_path):
    job = Job.open(tiny("flow_matching", "roles.text.trainable=false"), tmp_path)
    states = job.method.encode(["a red ball"], job.roles["text"])
    assert not states.requires_grad
    (update,) = job.method.step(_batch(), job.roles, KEY)
    assert update.roles == ("student",)


def test_text_states_are_padded_with_zero_rows(tmp_path):
    job = Job.open(tiny("flow_matching", "method.args.max_text_tokens=9"), tmp_path)
    states = job.method.encode(["a red ball", "a"], job.roles["text"])
    assert states.shape == (2, 9, 16)
    assert [int(row.abs().sum(-1).count_nonzero()) for row in states] == [4, 2]


def test_draws_differ_by_purpose_step_and_lane_and_repeat():
    keys = [KEY, StepKey(0, 1, 1), StepKey(0, 0, 1, 1), StepKey(1, 0, 1)]
    draws = [key.noise("a", (4,)) for key in keys] + [KEY.noise("b", (4,))]
    assert len({tuple(d.tolist()) for d in draws}) == 5
    assert torch.equal(KEY.noise("a", (4,)), draws[0])


def test_many_numbers_drawn_in_threads_are_those_of_each_clip_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        whole = KEY.noise("a", (4, 2, 600, 300))
    finally:
        torch.set_num_threads(before)
    for clip in range(4):
        alone = StepKey(0, 0, 1, first=clip).noise("a", (1, 2, 600, 300))
        assert torch.equal(whole[clip : clip + 1], alone)


def test_a_frozen_encoder_keeps_its_weights_while_the_decoder_learns(tmp_path):
    job = Job.open(tiny("vae", "method.args.train_encoder=false"), tmp_path)
    before = {n: p.detach().clone() for n, p in job.roles["vae"].net.named_parameters()}
    for _ in train(job):
        pass
    after = dict(job.roles["vae"].net.named_parameters())
    changed = {n for n, p in after.items() if not p.equal(before[n])}
    assert set(job.strategy.gather("vae")) == set(after), "what is exported is the whole network"
    assert changed and all(n.startswith(("decoder.", "post_quant_conv.")) for n in changed)


def test_the_loss_of_a_classifier_is_what_it_gets_wrong_and_cannot_redraw(tmp_path):
    job = Job.open(tiny("classify", "run.dtype=float32"), tmp_path)
    net = job.roles["classifier"].net
    method = classify_method.Method(classify_method.Config(sketch=3.0))
    truth = {"shape": "star", "colour": "red", "scene": "sea", "motion": "up", "size": "big"}
    targets, judged = net.targets([truth]), net(torch.zeros(1, 3, 5, 32, 32))
    for name, logits in judged.logits.items():
        logits.data = 50.0 * torch.nn.functional.one_hot(targets[name], logits.shape[1])
    loss, parts = method.loss(judged, targets, judged.sketch_BCTHW.detach() + 2.0)
    assert loss.item() == pytest.approx(3.0 * 4.0) and parts["sketch"].item() == pytest.approx(4.0)
    assert all(parts[f"right/{name}"] == 1 for name in truth)
    targets = net.targets([{**truth, "size": "small"}])
    loss, parts = method.loss(judged, targets, judged.sketch_BCTHW)
    assert loss.item() == pytest.approx(50 / 5) and parts["right/size"] == 0


def test_a_disturbed_clip_stays_near_and_differs_by_its_own_share():
    method = classify_method.Method(classify_method.Config(blur=1.0, noise=0.0))
    x = torch.rand(3, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    blurred = method.disturb(x, KEY)
    shares = (blurred - x).flatten(1).norm(dim=1) / (x - x.mean()).flatten(1).norm(dim=1)
    assert len({round(float(s), 4) for s in shares}) == 3 and bool((shares < 1).all())
    flat = torch.ones(1, 3, 2, 8, 8)
    torch.testing.assert_close(method.disturb(flat, KEY), flat)
    plain = classify_method.Method(classify_method.Config(blur=0, noise=0))
    assert torch.equal(plain.disturb(x, KEY), x)


def test_a_classifier_of_another_world_is_refused(tmp_path):
    recipe = tiny("classify", 'roles.classifier.config.attributes.size=["tiny", "huge"]')
    with pytest.raises(ValueError, match=r"size '(small|big)' is unknown \(known: tiny, huge\)"):
        for _ in train(Job.open(recipe, tmp_path)):
            pass
