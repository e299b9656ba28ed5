"""The networks of `h200.py`: published shapes, random weights, work counted on the meta device.

`tflop` of a record is what is executed: of sparse attention, what is multiplied, padding included.
`dense_tflop` is what the network without sparsity and without gates would do. Steps and decoding
are those of `fastvideo.stages`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _h200_timing import Flop, counted
from torch import Tensor

from fastvideo import attention, rng, weights
from fastvideo.attention import sparse
from fastvideo.attention.choice import Need
from fastvideo.models.decoder import taehv
from fastvideo.models.dit import wan
from fastvideo.models.text import umt5
from fastvideo.models.vae.wan import WanVae, WanVaeConfig
from fastvideo.parallel.axis import Axis
from fastvideo.schedulers import few_step
from fastvideo.shapes import Compression, PixelShape
from fastvideo.stages import State, denoise
from fastvideo.stages.decode import decode

if TYPE_CHECKING:
    from h200 import Case, Record

STEPS = {"1.3b": 3, "14b": 4}
DIMS: dict[str, dict[str, Any]] = {
    "1.3b": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "14b": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    "text": {},  # the defaults: UMT5-XXL
    "vae": {},  # and Wan2.1's autoencoder
    "tiny": {},  # and taew2_1
    "ceiling": {"side": 8192},
}
TINY = {"attention_head_dim": 24, "num_attention_heads": 2, "ffn_dim": 64, "text_dim": 32}
SMOKE_DIMS: dict[str, dict[str, Any]] = {
    "1.3b": TINY | {"num_layers": 2},
    "14b": TINY | {"num_layers": 3},
    "text": {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
    },
    "vae": {"base_dim": 8, "dim_mult": (1, 1, 1, 1)},
    "tiny": {"widths": (8, 8, 8, 8), "num_blocks": (1, 1, 1)},
    "ceiling": {"side": 64},
}


@dataclass(frozen=True)
class Part:
    """A network, what it does in a clip, and its operations.

    `frames` is a decoder's way to frames in host memory, `given` an encoder's ids and mask;
    `forward` and `attention` are a denoiser's.
    """

    net: Any
    run: Callable[..., Any]
    flop: Flop
    frames: Callable[[Tensor], Any] | None = None
    given: tuple[Tensor, ...] = ()
    forward: Any = None
    forward_flop: Flop = (0, 0)
    attention: Record = field(default_factory=dict)


def text_part(args: argparse.Namespace) -> Part:
    """Make the encoder; `run()` returns the states of a prompt that fills all its tokens."""
    config = umt5.Config(**dims("text", args))
    net = network(lambda: umt5.TextEncoder(config), args)
    ids_BL = torch.randint(1, config.vocab_size, (1, args.tokens), device=args.device)
    mask_BL = torch.ones_like(ids_BL)
    empty_BL = torch.empty_like(ids_BL, device="meta")
    meta = weights.build(lambda: umt5.TextEncoder(config))
    flop = counted(lambda: meta(empty_BL, empty_BL))
    return Part(net, lambda: net(ids_BL, mask_BL), (flop, flop), given=(ids_BL, mask_BL))


def vae_part(case: Case, args: argparse.Namespace) -> Part:
    """Make the autoencoder; `run(latents)` yields pixels, chunk by chunk, on the device."""
    config, size = WanVaeConfig(**dims("vae", args)), chunk_of(case, args)
    net, meta = network(lambda: WanVae(config), args), weights.build(lambda: WanVae(config))
    frames = frames_of(bundle(args, vae=net), size)
    flop = (decoder_flop(meta, noise(case, args)),) * 2
    return Part(net, lambda z: net.stream(net.denormalize(z), size), flop, frames)


def tiny_part(case: Case, args: argparse.Namespace) -> Part:
    """Make the tiny decoder; its methods are those of `vae_part`."""
    config, size = taehv.Config(**dims("tiny", args)), chunk_of(case, args)
    net = network(lambda: taehv.Decoder(config), args)
    meta = weights.build(lambda: taehv.Decoder(config))
    frames = frames_of(bundle(args, decoder=net), size)
    flop = (decoder_flop(meta, noise(case, args)),) * 2
    return Part(net, lambda z: net.stream(z, size), flop, frames)


def decoder_flop(meta: Any, z_BCTHW: Tensor) -> int:
    """Return the operations of a decoder of the meta device for a clip's latents."""
    z_BCTHW = torch.empty_like(z_BCTHW, device="meta")
    return counted(lambda: deque(meta.stream(z_BCTHW, z_BCTHW.shape[2]), maxlen=0))


def frames_of(model: Any, size: int | None) -> Callable[[Tensor], np.ndarray]:
    """Return the way from latents to the frames (T, H, W, 3) of a clip in host memory."""
    return lambda z_BCTHW: np.concatenate(list(decode(model, z_BCTHW, chunk=size)))


def chunk_of(case: Case, args: argparse.Namespace) -> int | None:
    """Return the latent frames that are decoded at a time; None leaves it to the decoder."""
    if case.chunk in ("", "auto"):
        return None
    return noise(case, args).shape[2] if case.chunk == "whole" else int(case.chunk)


def dit_part(case: Case, args: argparse.Namespace, *, num_layers: int = 0) -> Part:
    """Make the denoiser; `run(states)` draws noise and returns the clip's latents.

    With `num_layers` it has these alone.
    """
    pattern, x_BCTHW = attention.read(case.pattern), noise(case, args)
    over = {"num_layers": num_layers} if num_layers else {}
    has_gates = isinstance(pattern, attention.Vsa)
    config = wan.Config(**dims(case.model, args) | over, gate_compress=has_gates)
    net = weights.build(lambda: wan.DiT(config))
    num = num_steps(case, args)
    model = bundle(args, dit=net, steps=num)
    # refused before memory is taken
    forward: Any = denoise.with_attention(model, x_BCTHW, case.backend, pattern=pattern)
    fill(net, args, wan.KEEP_FLOAT32)

    def run(states_BLC: Tensor) -> Tensor:
        start, cond = noise(case, args).to(args.device), wan.Conditioning(states_BLC)
        params: Any = SimpleNamespace(
            num_inference_steps=num,
            guidance_scale=1.0,
            attention=case.pattern,
            backend=case.backend,
            drop_gates=False,
            seed=0,
        )
        state = State((params,), cond=cond, noise=start)
        return deque(denoise.steps(model, state, forward), maxlen=1).pop().x

    once, executed, dense = dit_work(config, forward, x_BCTHW, args)
    return Part(
        net,
        run,
        flop=(once + num * executed, once + num * dense),
        forward=forward,
        forward_flop=(executed, dense),
        attention=attention_facts(config, forward, args),
    )


def attention_facts(config: wan.Config, forward: Any, args: argparse.Namespace) -> Record:
    """Return what computes self-attention, and how much of the dense work that is."""
    layout, backend = forward.layout, forward.attend.self_backend
    length = layout.grid.num_tokens
    pairs, needed = (round(n) for n in sparse.pairs(layout, backend))
    need = Need(layout, **place(args), needs_grad=False, num_keys=length)
    return {
        "backend": backend.__name__.rpartition(".")[2],
        "kernels": backend.describe(
            dataclasses.replace(need, head_dim=config.attention_head_dim),
        ),
        "executed_share": round(pairs / length**2, 4),
        "executed_over_needed": round(pairs / needed, 3),
    }


def dit_work(
    config: wan.Config, forward: Any, x_BCTHW: Tensor, args: argparse.Namespace
) -> tuple[int, int, int]:
    """Return the operations once a clip, of a forward, and of a dense forward without gates."""
    layout, backend = forward.layout, forward.attend.self_backend
    once, dense = dit_flop(config, x_BCTHW, args)
    length, tiles = layout.grid.num_tokens, layout.tiles.num if layout.tiles else 0
    pairs = round(sparse.pairs(layout, backend)[0])
    extra = 4 * config.dim * (pairs - length**2 + tiles**2 * config.gate_compress)
    extra += 2 * length * config.dim**2 * config.gate_compress
    return once, dense + config.num_layers * extra, dense


def dit_flop(config: wan.Config, x_BCTHW: Tensor, args: argparse.Namespace) -> tuple[int, int]:
    """Return the operations done once a clip, and those of a dense forward without gates."""
    plain = dataclasses.replace(config, gate_compress=False)
    meta = weights.build(lambda: wan.DiT(plain))
    x_BCTHW = torch.empty_like(x_BCTHW, device="meta")
    cond = wan.Conditioning(torch.empty(1, args.tokens, config.text_dim, device="meta"))
    once = counted(lambda: meta.prepare(cond))
    cond = meta.prepare(cond)
    return once, counted(lambda: meta(x_BCTHW, torch.empty(1, 1, device="meta"), cond))


def bundle(args: argparse.Namespace, *, steps: int = 3, **networks: Any) -> Any:
    """Return what stages read of a model; a spec proper would need pydantic where this runs."""
    spec = SimpleNamespace(
        name="random weights",
        scheduler=SimpleNamespace(name="few_step", args={"sigmas": spread(steps)}),
        compression=Compression(),
        defaults=SimpleNamespace(max_text_tokens=args.tokens),
    )
    parts: dict[str, Any] = {"dit": None, "vae": None, "decoder": None} | networks
    return SimpleNamespace(spec=spec, meshes=SimpleNamespace(axis=Axis), **place(args), **parts)


def network(make: Callable[[], Any], args: argparse.Namespace, keep: Sequence[str] = ()) -> Any:
    """Build a network with random weights, float32 where a name has a part of `keep`."""
    return fill(weights.build(make), args, keep)


def fill(net: Any, args: argparse.Namespace, keep: Sequence[str] = ()) -> Any:
    """Draw the weights of a network of the meta device, on the device where it is to run."""
    drawn = {}
    for name, p in net.named_parameters():
        dtype = "float32" if any(part in name for part in keep) else args.dtype
        x = torch.randn(p.shape, device=args.device, dtype=getattr(torch, dtype))
        if name.endswith("bias"):
            drawn[name] = x.mul_(0.02)
        elif "norm" in name or "gamma" in name:
            drawn[name] = x.mul_(0.1).add_(1)
        else:  # T5's scores are not scaled: its queries' weights are
            unscaled = "SelfAttention.q" in name
            drawn[name] = x.mul_((8 if unscaled else 1) ** -1 * math.prod(p.shape[1:]) ** -0.5)
    net.load_state_dict(drawn, strict=True, assign=True)
    return net.eval().requires_grad_(False)


def spread(num: int) -> tuple[float, ...]:
    """Return the noise levels of FastWan's three steps, or of another number with shift 8."""
    if num == 3:
        return tuple(few_step.Scheduler().sigmas)
    return tuple(8 * u / (1 + 7 * u) for u in (1 - i / num for i in range(num)))


# Places and shapes


def dims(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return a network's dims as its config takes them."""
    return (SMOKE_DIMS if args.smoke else DIMS)[name]


def num_steps(case: Case, args: argparse.Namespace) -> int:
    """Return how many steps the model takes, unless `--steps` says otherwise."""
    return int(args.steps or STEPS[case.model])


def place(args: argparse.Namespace) -> dict[str, Any]:
    """Return where and in which type networks run."""
    return {"device": torch.device(args.device), "dtype": getattr(torch, args.dtype)}


def noise(case: Case, args: argparse.Namespace) -> Tensor:
    """Draw starting latents, float32 (1, 16, T, H, W), on the CPU as the pipeline does."""
    width, height, frames = map(int, case.size.split("x"))
    shape = PixelShape(frames, height, width).latent(Compression())
    size = (16, shape.frames, shape.height, shape.width)
    return rng.clip_noise(size, seeds=(0,), purpose="latents")


def inputs(
    net: Any, case: Case, args: argparse.Namespace
) -> tuple[Tensor, Tensor, wan.Conditioning]:
    """Draw what a denoiser's forward takes: latents, a time, and text states (1, L, C)."""
    states_BLC = torch.randn(1, args.tokens, net.config.text_dim, **place(args))
    t_BT = torch.full((1, 1), 757.0, device=args.device)
    return noise(case, args).to(**place(args)), t_BT, wan.Conditioning(states_BLC)
