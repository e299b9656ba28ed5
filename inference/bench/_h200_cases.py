"""What `h200.py` measures: a kind of case is a function, which makes its networks and times them.

Operations are counted by PyTorch from shapes, on the meta device. `tflop` is what is executed:
of sparse attention, what is multiplied, padding included. `dense_tflop` is what the network without
sparsity and without gates would do.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastvideo import attention, render, rng, weights
from fastvideo.attention import sparse
from fastvideo.models.dit import wan
from fastvideo.models.text import umt5
from fastvideo.models.vae.wan import WanVae, WanVaeConfig
from fastvideo.sample import guide, sample
from fastvideo.schedulers import few_step
from fastvideo.shapes import Compression, LatentShape, PixelShape

if TYPE_CHECKING:
    from h200 import Case, Record

PEAK_TFLOPS = {"H100": 989, "H200": 989}  # dense bf16 by the datasheet; other devices get no MFU
DIMS: dict[str, dict[str, Any]] = {
    "1.3b": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "14b": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    "text": {},  # the defaults: UMT5-XXL
    "vae": {},  # and Wan2.1's autoencoder
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
    "ceiling": {"side": 64},
}


def ceiling(case: Case, args: argparse.Namespace) -> Record:
    """Measure what this device reaches at best: a product of random matrices, and a copy."""
    side = dims("ceiling", args)["side"]
    a, b = (torch.randn(side, side, **place(args)) for _ in range(2))
    large = torch.randn(16 * side, side, **place(args))
    new = torch.empty_like(large)
    copy = timed(lambda: new.copy_(large), args)
    copy["tb_per_s"] = round(2 * large.nbytes / copy["s"] / 1e12, 3)
    return {"stages": {"product": timed(lambda: a @ b, args, 2 * side**3), "copy": copy}}


def text(case: Case, args: argparse.Namespace) -> Record:
    """Measure the text encoder."""
    part = text_part(args)
    checks = checked(part.run, part.net.encoder.block, case, args)
    return {"stages": {"text": timed(part.run, args, *part.flop)}, **checks}


def decode(case: Case, args: argparse.Namespace) -> Record:
    """Measure the autoencoder's decoder, its pixels left on the device; it is never compiled."""
    part, z_BCTHW = vae_part(case, args), noise(case, args).to(args.device)
    run = functools.partial(_joined, part.run, z_BCTHW)
    checks = checked(run, [], case, args)
    return {"stages": {"decode": timed(run, args, *part.flop)}, **checks}


def _joined(run: Callable[[Tensor], Iterator[Tensor]], z_BCTHW: Tensor) -> Tensor:
    return torch.cat(list(run(z_BCTHW)), dim=2)


def denoise(case: Case, args: argparse.Namespace) -> Record:
    """Measure one forward and the few steps; from the forward, estimate fifty with guidance."""
    part = dit_part(case, args)
    states_BLC = torch.randn(1, args.tokens, part.net.config.text_dim, **place(args))
    cond = part.net.prepare(wan.Conditioning(states_BLC))
    x_BCTHW, t_BT = noise(case, args).to(**place(args)), torch.full((1, 1), 757.0).to(args.device)
    assert part.forward is not None, "a denoiser has forwards"
    run = functools.partial(part.forward, x_BCTHW, t_BT, cond)
    checks = checked(run, part.net.blocks, case, args)
    forward = timed(run, args, *part.forward_flop)
    stages = {
        "forward": forward,
        f"{args.steps} steps": timed(lambda: part.run(states_BLC), args, *part.flop),
        "50 steps with guidance, estimated: 100 forwards": {"s": round(100 * forward["s"], 3)},
    }
    return {"stages": stages, "attention": part.attention, **checks}


def clip(case: Case, args: argparse.Namespace) -> Record:
    """Measure from a prompt's ids to frames in host memory, every part resident."""
    encoder, part, vae = text_part(args), dit_part(case, args), vae_part(case, args)

    def run() -> list[float]:
        began = now(args)
        states_BLC = encoder.run()
        encoded = now(args)
        z_BCTHW = part.run(states_BLC)
        denoised = now(args)
        count = sum(len(render.to_uint8(pixels[0])) for pixels in vae.run(z_BCTHW))
        assert count == int(case.size.split("x")[2]), f"{count} frames of {case.size}"
        ended = now(args)
        return [encoded - began, denoised - encoded, ended - denoised, ended - began]

    blocks = [*encoder.net.encoder.block, *part.net.blocks]
    checks = checked(lambda: part.run(encoder.run()), blocks, case, args)
    run()
    columns = zip(*repeated(run, args), strict=True)
    flops = [encoder.flop, part.flop, vae.flop]
    flops.append((sum(f[0] for f in flops), sum(f[1] for f in flops)))
    names = ("text", f"{args.steps} steps", "decode and copy", "end to end")
    rows = [summary(c, args, *f) for c, f in zip(columns, flops, strict=True)]
    stages = dict(zip(names, rows, strict=True))
    return {"stages": stages, "attention": part.attention, **checks}


MEASURES = {f.__name__: f for f in (ceiling, text, decode, denoise, clip)}


# The parts


@dataclass(frozen=True)
class Part:
    """A network, what it does in a clip, and its operations: executed, and of the dense network."""

    net: Any
    run: Callable[..., Any]
    flop: tuple[int, int]
    forward: Callable[..., Tensor] | None = None
    forward_flop: tuple[int, int] = (0, 0)
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
    return Part(net, lambda: net(ids_BL, mask_BL), (flop, flop))


def vae_part(case: Case, args: argparse.Namespace) -> Part:
    """Make the autoencoder; `run(latents)` yields pixels, chunk by chunk, on the device."""
    config = WanVaeConfig(**dims("vae", args))
    net, meta = network(lambda: WanVae(config), args), weights.build(lambda: WanVae(config))
    z_BCTHW = torch.empty_like(noise(case, args), device="meta")
    num = z_BCTHW.shape[2]
    chunk = {"": None, "auto": None, "whole": num}.get(case.chunk, case.chunk)
    size = None if chunk is None else int(chunk)
    flop = counted(lambda: deque(meta.stream(z_BCTHW, num), maxlen=0))
    return Part(net, lambda z: net.stream(net.denormalize(z), size), (flop, flop))


def dit_part(case: Case, args: argparse.Namespace) -> Part:
    """Make the denoiser; `run(states)` draws noise and returns the clip's latents."""
    pattern, x_BCTHW = attention.read(case.pattern), noise(case, args)
    has_gates = isinstance(pattern, attention.Vsa)
    config = wan.Config(**dims(case.model, args), gate_compress=has_gates)
    grid = LatentShape(*x_BCTHW.shape[2:]).tokens(config.patch_size)
    layout = attention.plan(pattern, grid, args.device)
    need = place(args) | {"needs_grad": False, "head_dim": config.attention_head_dim}
    inner = attention.choose(case.backend, layout=layout, **need)  # refused before memory is taken
    cross = attention.choose(layout=None, num_keys=args.tokens, **need)
    net = network(lambda: wan.DiT(config), args, wan.KEEP_FLOAT32)
    forward = functools.partial(net, attend=attention.Attention(inner, cross), layout=layout)
    at_sigmas = few_step.Scheduler(spread(args.steps))

    def run(states_BLC: Tensor) -> Tensor:
        velocity = guide(forward, scale=1, cond=net.prepare(wan.Conditioning(states_BLC)))
        start = noise(case, args).to(args.device)
        how = {"num_steps": args.steps, "dtype": getattr(torch, args.dtype)}
        return deque(sample(velocity, at_sigmas, latents=start, **how), maxlen=1).pop().x

    once, dense = dit_flop(config, x_BCTHW, args)
    pairs, needed = (round(n) for n in sparse.pairs(layout, inner))
    length, tiles = grid.num_tokens, layout.tiles.num if layout.tiles else 0
    extra = 4 * config.dim * (pairs - length**2 + tiles**2 * has_gates)
    extra += 2 * length * config.dim**2 * has_gates
    executed = dense + config.num_layers * extra
    facts = {
        "backend": inner.__name__.rpartition(".")[2],
        "kernels": inner.describe(attention.Need(layout, num_keys=length, **need)),
        "executed_share": round(pairs / length**2, 4),
        "executed_over_needed": round(pairs / needed, 3),
    }
    total = (once + args.steps * executed, once + args.steps * dense)
    return Part(net, run, total, forward, (executed, dense), facts)


def dit_flop(config: wan.Config, x_BCTHW: Tensor, args: argparse.Namespace) -> tuple[int, int]:
    """Return the operations done once a clip, and those of a dense forward without gates."""
    plain = dataclasses.replace(config, gate_compress=False)
    meta = weights.build(lambda: wan.DiT(plain))
    x_BCTHW = torch.empty_like(x_BCTHW, device="meta")
    cond = wan.Conditioning(torch.empty(1, args.tokens, config.text_dim, device="meta"))
    once = counted(lambda: meta.prepare(cond))
    cond = meta.prepare(cond)
    return once, counted(lambda: meta(x_BCTHW, torch.empty(1, 1, device="meta"), cond))


def network(make: Callable[[], Any], args: argparse.Namespace, keep: Sequence[str] = ()) -> Any:
    """Build a network with random weights, float32 where a name has a part of `keep`."""
    net, drawn = weights.build(make), {}
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


def place(args: argparse.Namespace) -> dict[str, Any]:
    """Return where and in which type networks run."""
    return {"device": torch.device(args.device), "dtype": getattr(torch, args.dtype)}


def noise(case: Case, args: argparse.Namespace) -> Tensor:
    """Draw starting latents, float32 (1, 16, T, H, W), on the CPU as the pipeline does."""
    width, height, frames = map(int, case.size.split("x"))
    shape = PixelShape(frames, height, width).latent(Compression())
    size = (16, shape.frames, shape.height, shape.width)
    return rng.clip_noise(size, seeds=(0,), purpose="latents")


# Measuring


def checked(
    run: Callable[[], Tensor], blocks: Iterable[nn.Module], case: Case, args: argparse.Namespace
) -> Record:
    """Warm up, and compile: return the seconds of the first calls, and how far the two are apart.

    A profile is made here too. Raises `ValueError` for results that are not numbers.
    """
    began = now(args)
    made = [run().float()]
    record: Record = {"first_s": round(now(args) - began, 2)}
    if case.mode == "compile":
        for block in blocks:
            block.compile(backend=args.compiler, dynamic=False)
        began = now(args)
        made.append(run().float())
        record["compile_s"] = round(now(args) - began, 2)
        record["error"] = round(float((made[1] - made[0]).norm() / made[0].norm()), 5)
    if not all(bool(x.isfinite().all()) for x in made):
        raise ValueError("the result holds numbers that are not finite")
    if args.profile:
        with torch.profiler.profile() as profiler:
            run()
            now(args)
        key = "self_cuda_time_total" if args.device != "cpu" else "self_cpu_time_total"
        lines = profiler.key_averages().table(sort_by=key, row_limit=40)
        path = Path(args.profile) / f"{case.name.replace(' ', '-')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines, encoding="utf-8")
    return record


def counted(run: Callable[[], object]) -> int:
    """Return the floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def now(args: argparse.Namespace) -> float:
    """Return the time in seconds when all that was asked of the device is done."""
    if torch.device(args.device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(
    run: Callable[[], object], args: argparse.Namespace, flop: int = 0, dense_flop: int = 0
) -> Record:
    """Return the seconds of a call, after one to warm up."""

    def once() -> list[float]:
        began = now(args)
        run()
        return [now(args) - began]

    once()
    seconds = [s for (s,) in repeated(once, args)]
    return summary(seconds, args, flop, dense_flop)


def repeated(run: Callable[[], list[float]], args: argparse.Namespace) -> list[list[float]]:
    """Return the seconds of each repeat; the last of them is the whole of it."""
    rows: list[list[float]] = []
    while len(rows) < args.repeats and (len(rows) < 3 or sum(r[-1] for r in rows) < args.stage_s):
        rows.append(run())
    return rows


def summary(
    seconds: Sequence[float], args: argparse.Namespace, flop: int = 0, dense_flop: int = 0
) -> Record:
    """Return the median with its range, work, and rates of the executed work."""
    median = statistics.median(seconds)
    record: Record = {"s": round(median, 7), "n": len(seconds)}
    record["range"] = [round(f(seconds), 7) for f in (min, max)]
    if flop:
        rate = flop / median / 1e12
        record |= {"tflop": round(flop / 1e12, 4), "tflop_per_s": round(rate, 3)}
        record["dense_tflop"] = round((dense_flop or flop) / 1e12, 4)
        known = torch.cuda.get_device_name() if args.device != "cpu" else "CPU"
        peaks = [p for name, p in PEAK_TFLOPS.items() if name in known and args.dtype != "float32"]
        record["mfu"] = round(rate / peaks[0], 3) if peaks else None
    return record
