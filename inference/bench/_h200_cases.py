"""What `h200.py` measures: a kind of case is a function that makes its networks and times them."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _h200_cold import cold
from _h200_parts import (
    Part,
    attention_facts,
    bundle,
    dims,
    dit_part,
    dit_work,
    inputs,
    noise,
    num_steps,
    place,
    text_part,
    tiny_part,
    vae_part,
)
from _h200_peer import peer
from _h200_timing import (
    checked,
    compile_each,
    estimated,
    kernels,
    now,
    repeated,
    rows_of,
    timed,
)
from torch import Tensor

from fastvideo import attention, media, weights
from fastvideo.attention import sparse
from fastvideo.attention.layout import Layout, Lists, Tiles
from fastvideo.models.dit import wan
from fastvideo.stages.decode import to_uint8
from fastvideo.stages.denoise import with_attention

if TYPE_CHECKING:
    from h200 import Case, Record

FPS = 16.0


def ceiling(case: Case, args: argparse.Namespace) -> Record:
    """Measure what this device reaches at best: a product of random matrices, and a copy."""
    side = dims("ceiling", args)["side"]
    a, b = (torch.randn(side, side, **place(args)) for _ in range(2))
    large = torch.randn(16 * side, side, **place(args))
    new = torch.empty_like(large)
    copy = timed(lambda: new.copy_(large), args)
    copy["tb_per_s"] = round(2 * large.nbytes / copy["s"] / 1e12, 3)
    stages = {"product": timed(lambda: a @ b, args, (2 * side**3,) * 2), "copy": copy}
    return {"stages": stages, "kernels": kernels(lambda: a @ b, case, args)}


def kernel(case: Case, args: argparse.Namespace) -> Record:
    """Measure one layer's self-attention, and of a sparse one the kernel without the selection."""
    pattern, x_BCTHW = attention.read(case.pattern), noise(case, args)
    is_vsa = isinstance(pattern, attention.Vsa)
    config = wan.Config(**dims(case.model, args), gate_compress=is_vsa)
    model = bundle(args, dit=weights.build(lambda: wan.DiT(config)))
    forward: Any = with_attention(model, x_BCTHW, case.backend, pattern=pattern)
    layout, attend = forward.layout, forward.attend
    length, tiles = layout.grid.num_tokens, layout.tiles
    shape = (1, length, config.num_attention_heads, config.attention_head_dim)
    q, k, v, gate = (torch.randn(shape, **place(args)) for _ in range(4))
    run = functools.partial(attend, q, k, v, layout=layout, gate_BLHD=gate if is_vsa else None)
    dense = 4 * config.dim * length**2
    if tiles is None:
        stages = {"attention": timed(run, args, (dense, dense))}
    else:
        fine, lists = attend.self_backend.fine, layout.lists or selected(q, k, v, layout)
        seen = dataclasses.replace(layout, lists=lists)
        pairs = round(sparse.pairs(seen, attend.self_backend)[0])
        coarse = 4 * config.dim * tiles.num**2 * is_vsa
        stages = {
            "kernel": timed(
                lambda: fine(q, k, v, tiles, lists), args, (4 * config.dim * pairs, dense)
            ),
            "attention": timed(run, args, (4 * config.dim * pairs + coarse, dense)),
        }
    facts = attention_facts(config, forward, args)
    return {"stages": stages, "attention": facts, "kernels": kernels(run, case, args)}


def selected(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Lists:
    """Return the lists that VSA selects for these tokens."""
    kept: list[Lists] = []

    def keep(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, tiles: Tiles, lists: Lists) -> Tensor:
        kept.append(lists)
        return q_BLHD

    sparse.attend(keep, q, k, v, layout)
    return kept[0]


def text(case: Case, args: argparse.Namespace) -> Record:
    """Measure the text encoder."""
    part = text_part(args)
    compiled = functools.partial(compile_each, part.net.encoder.block, args)
    checks = checked(part.run, compiled, case, args)
    stages = {"text": timed(part.run, args, part.flop)}
    return {"stages": stages, **checks, "kernels": kernels(part.run, case, args)}


def decode(case: Case, args: argparse.Namespace) -> Record:
    """Measure the autoencoder's decoder, its pixels left on the device; it is never compiled."""
    return decoded(vae_part(case, args), case, args)


def tiny(case: Case, args: argparse.Namespace) -> Record:
    """Measure the tiny decoder as `decode` does the other."""
    return decoded(tiny_part(case, args), case, args)


def decoded(part: Part, case: Case, args: argparse.Namespace) -> Record:
    """Time a decoder."""
    run = functools.partial(joined, part, noise(case, args).to(args.device))
    checks = checked(run, lambda: None, case, args)
    stages = {"decode": timed(run, args, part.flop)}
    return {"stages": stages, **checks, "kernels": kernels(run, case, args)}


def joined(part: Part, z_BCTHW: Tensor) -> Tensor:
    """Return a decoder's pixels (1, 3, T, H, W), on the device."""
    return torch.cat(list(part.run(z_BCTHW)), dim=2)


def denoise(case: Case, args: argparse.Namespace) -> Record:
    """Measure one forward and the few steps; from the forward, estimate fifty with guidance."""
    if case.extent == "one block":
        return one_block(case, args)
    part = dit_part(case, args)
    x_BCTHW, t_BT, cond = inputs(part.net, case, args)
    run = functools.partial(part.forward, x_BCTHW, t_BT, part.net.prepare(cond))
    checks = checked(run, functools.partial(compile_each, part.net.blocks, args), case, args)
    forward = timed(run, args, part.forward_flop)
    steps = timed(lambda: part.run(cond.text_BLC), args, part.flop)
    stages = {
        "forward": forward,
        f"{num_steps(case, args)} steps": steps,
        "50 steps with guidance, estimated: 100 forwards": estimated(
            forward, lambda s: 100 * s, args
        ),
    }
    facts = {"attention": part.attention, "kernels": kernels(run, case, args)}
    return {"stages": stages, **facts, **checks}


def one_block(case: Case, args: argparse.Namespace) -> Record:
    """Measure one layer at full length, and what is around the layers; multiply by their number."""
    num = dims(case.model, args)["num_layers"]
    part = dit_part(case, args, num_layers=1)
    x_BCTHW, t_BT, cond = inputs(part.net, case, args)
    attend, layout = (part.forward.attend, part.forward.layout)
    cond = part.net.prepare(cond)
    embed = functools.partial(part.net.embed, x_BCTHW, t_BT, cond, layout=layout)
    tokens, block = embed(), part.net.blocks[0]

    def run() -> Tensor:
        after: Tensor = block(tokens, attend, cond.keys_values[0]).x_BLC
        return after

    checks = checked(run, functools.partial(compile_each, [block], args), case, args)
    config = wan.Config(**dims(case.model, args), gate_compress=part.net.config.gate_compress)
    whole = dit_work(config, part.forward, x_BCTHW, args)[1:]
    each = [(a - b) // (num - 1) for a, b in zip(whole, part.forward_flop, strict=True)]
    times, steps = timed(run, args, (each[0], each[1])), num_steps(case, args)
    rest = timed(lambda: part.net.head(embed()), args)
    name = f"one block x {num}"
    stages = {
        "one block": times,
        "embedding and head": rest,
        f"{name}, estimated": estimated(
            times, lambda s: num * s, args, (num * each[0], num * each[1])
        ),
        f"forward, estimated: {name}, embedding and head": estimated(
            times, lambda s: num * s + rest["s"], args, whole
        ),
        f"{steps} steps, estimated: {steps} such forwards ({name})": estimated(
            times,
            lambda s: steps * (num * s + rest["s"]),
            args,
            (steps * whole[0], steps * whole[1]),
        ),
    }
    facts = {"attention": part.attention, "kernels": kernels(run, case, args)}
    return {"stages": stages, **facts, **checks}


def clip(case: Case, args: argparse.Namespace) -> Record:
    """Measure from a prompt's ids to frames in host memory, every part resident.

    One denoising serves both decoders: the tiny one's whole is without the other's seconds.
    """
    encoder, part = text_part(args), dit_part(case, args)
    vae, small = vae_part(case, args), tiny_part(case, args)
    assert vae.frames and small.frames, "decoders make frames"
    of_vae, of_small, steps = vae.frames, small.frames, f"{num_steps(case, args)} steps"
    with tempfile.TemporaryDirectory() as folder:
        write, mp4 = mp4_writer(Path(folder), case)

        def run(_: int = 0) -> dict[str, float]:
            began = now(args)
            states_BLC = encoder.run()
            encoded = now(args)
            z_BCTHW = part.run(states_BLC)
            denoised = now(args)
            frames = of_vae(z_BCTHW)
            ended = now(args)
            of_small(z_BCTHW)
            again = now(args)
            assert len(frames) == int(case.size.split("x")[2]), f"{len(frames)} frames"
            found = {"text": encoded - began, steps: denoised - encoded}
            found |= {"decode and copy": ended - denoised, "end to end": ended - began}
            found["decode and copy, tiny decoder"] = again - ended
            found["end to end, tiny decoder"] = denoised - began + again - ended
            if write:
                write(frames)
                found["mp4"] = now(args) - again
                found["end to end with mp4"] = ended - began + found["mp4"]
            return found

        blocks = [*encoder.net.encoder.block, *part.net.blocks]
        compiled = functools.partial(compile_each, blocks, args)
        checks = checked(lambda: part.run(encoder.run()), compiled, case, args)
        run()
        flops = {"text": encoder.flop, steps: part.flop, "decode and copy": vae.flop}
        flops["decode and copy, tiny decoder"] = small.flop
        flops["end to end"] = total(encoder, part, vae)
        flops["end to end, tiny decoder"] = total(encoder, part, small)
        stages = rows_of(repeated(run, args), args, flops)
        z_BCTHW = noise(case, args).to(args.device)
        pixels = joined(vae, z_BCTHW)
        stages["decode alone"] = timed(lambda: joined(vae, z_BCTHW), args, vae.flop)
        stages["copy alone, as bytes"] = timed(lambda: to_uint8(pixels[0]), args)
        facts = {"attention": part.attention, "mp4": mp4, "kernels": kernels(run, case, args)}
    return {"stages": stages, **facts, **checks}


def total(*parts: Part) -> tuple[int, int]:
    """Add operations up."""
    return sum(p.flop[0] for p in parts), sum(p.flop[1] for p in parts)


def mp4_writer(folder: Path, case: Case) -> tuple[Callable[[Any], object] | None, str]:
    """Return what writes frames to a file, and how, or None and why there is no such thing."""
    try:
        import av
        import imageio  # noqa: F401
    except ImportError as error:
        return None, f"left out: {error}"

    def write(frames: Any) -> object:
        return media.write_video(folder / "clip.mp4", [frames], fps=FPS, overwrite=True)

    return write, f"H.264 {media.X264} by av {av.__version__}"


MEASURES = {f.__name__: f for f in (ceiling, kernel, text, decode, tiny, denoise, clip, peer, cold)}
