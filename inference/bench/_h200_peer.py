"""diffusers' networks on our weights, in turn with ours in one process, for `h200.py`.

Only networks are the peer's: noise, steps, bytes and the copy to the host are ours on both sides,
so that a ratio says nothing of pipelines. Before any timing, results have to agree: in float32 on a
small clip, where a single wrong weight shows, and at full size as far as rounding lets them.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from _h200_parts import Part, dit_part, inputs, noise, num_steps, place, spread, text_part, vae_part
from _h200_timing import (
    apart,
    checked,
    compile_each,
    forget_peak,
    kernels,
    now,
    repeated,
    rows_of,
)
from torch import Tensor, nn
from torch.func import functional_call

from fastvideo import timing, weights
from fastvideo.models.dit import wan
from fastvideo.sample import sample
from fastvideo.schedulers import few_step
from fastvideo.stages.decode import to_uint8

if TYPE_CHECKING:
    from h200 import Case, Record

LARGEST_APART = {"float32": 1e-3, "rounded": 0.1}
"""Of results, as a share of their size. Thirty layers in bfloat16 are 0.01 to 0.03 apart."""
OURS, PEER = "ours", "diffusers"


@dataclass(frozen=True)
class Side:
    """One way to make a clip: ids to text states, these to latents, and these to frames.

    `forward` and `decode` leave on the device what is compared; `says` is for the record. `small`
    does the same in float32 on little, name by name.
    """

    text: Callable[[], Tensor]
    forward: Callable[[], Tensor]
    steps: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    frames: Callable[[Tensor], Any]
    compiled: Callable[[], object]
    small: Mapping[str, Callable[[], Tensor]]
    says: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Given:
    """Our networks, and what a forward takes."""

    text: Part
    dit: Part
    vae: Part
    x_BCTHW: Tensor
    t_BT: Tensor
    cond: wan.Conditioning

    @classmethod
    def of(cls, case: Case, args: argparse.Namespace) -> Given:
        """Make them."""
        dit = dit_part(dataclasses.replace(case, backend="auto"), args)  # it names the peer's
        return cls(text_part(args), dit, vae_part(case, args), *inputs(dit.net, case, args))

    @property
    def few(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of three frames, a time, and text states, all in float32."""
        return self.x_BCTHW[:, :, :3, :8, :8].float(), self.t_BT, self.cond.text_BLC.float()


def peer(case: Case, args: argparse.Namespace) -> Record:
    """Measure both sides round by round; raises `ImportError` without diffusers."""
    kinds = classes()
    given = Given.of(case, args)
    sides = {OURS: our_side(given, args), PEER: peer_side(kinds, given, case, args)}
    found = compared(sides[OURS], sides[PEER], noise(case, args).to(args.device))
    forget_peak(args)  # of the comparison
    checks = {who: checked(s.forward, s.compiled, case, args) for who, s in sides.items()}
    steps = f"{num_steps(case, args)} steps"
    record: Record = {"apart": found, "peer": dict(sides[PEER].says), **merged(checks)}
    record |= {"attention": given.dit.attention, "stages": raced(sides, given, steps, args)}
    for who, side in sides.items():
        once = functools.partial(one_clip, side, steps, args)
        name = "kernels" if who == OURS else f"kernels_{who}"
        record[name] = kernels(once, case, args, f"-{who}")
    return record


def classes() -> tuple[Any, Any]:
    """Return diffusers' transformer and autoencoder."""
    try:
        from diffusers import AutoencoderKLWan, WanTransformer3DModel
    except RuntimeError as error:  # what its lazy modules make of an import that failed
        raise ImportError(str(error)) from error
    return WanTransformer3DModel, AutoencoderKLWan


def compared(ours: Side, theirs: Side, z_BCTHW: Tensor) -> dict[str, dict[str, float]]:
    """Return how far results are apart; raises `ValueError` where that is more than rounding."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = {"float32": {n: apart(ours.small[n](), f()) for n, f in theirs.small.items()}}
    found["rounded"] = {
        "text": apart(ours.text(), theirs.text()),
        "forward": apart(ours.forward(), theirs.forward()),
        "decode": apart(ours.decode(z_BCTHW), theirs.decode(z_BCTHW)),
    }
    for kind, limit in LARGEST_APART.items():
        wrong = {name: x for name, x in found[kind].items() if not x <= limit}
        if wrong:
            raise ValueError(f"diffusers and we do not compute the same, {kind}: {wrong}")
    return found


def widely(net: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a network as if its weights were float32; they go again with the call."""
    return functional_call(net, {n: x.float() for n, x in net.named_parameters()}, args, kwargs)


# Sides


def our_side(given: Given, args: argparse.Namespace) -> Side:
    """Return our way; the text's keys and values are made once a clip."""
    text, dit, vae = given.text, given.dit, given.vae
    prepared, (x, t, states) = dit.net.prepare(given.cond), given.few
    assert vae.frames, "a decoder makes frames"
    return Side(
        text=text.run,
        forward=lambda: dit.forward(given.x_BCTHW, given.t_BT, prepared),
        steps=dit.run,
        decode=lambda z: torch.cat(list(vae.run(z)), dim=2),
        frames=vae.frames,
        compiled=lambda: compile_each(dit.net.blocks, args),
        small={
            "text": lambda: widely(text.net, *text.given),
            "forward": lambda: widely(dit.net, x, t, wan.Conditioning(states)),
            "decode": lambda: copy.deepcopy(vae.net).float().decode(x),
        },
    )


def peer_side(kinds: tuple[Any, Any], given: Given, case: Case, args: argparse.Namespace) -> Side:
    """Return diffusers' way, with networks that share the weights of ours."""
    net, vae = peer_transformer(kinds[0], given.dit.net), peer_vae(kinds[1], given.vae.net)
    net.set_attention_backend(case.backend)  # also "native": the last one asked for stays
    text, small_text, whose = peer_text(given.text)
    x_small, t, states = given.few
    num, dtype = num_steps(case, args), place(args)["dtype"]

    def velocity(x: Tensor, t_BT: Tensor, states_BLC: Tensor) -> Tensor:
        out: Tensor = net(x, t_BT[:, 0], states_BLC, return_dict=False)[0]
        return out

    def steps(states_BLC: Tensor) -> Tensor:
        bound = functools.partial(velocity, states_BLC=states_BLC)
        start, at_sigmas = noise(case, args).to(args.device), few_step.Scheduler(spread(num))
        found = sample(bound, at_sigmas, latents=start, num_steps=num, dtype=dtype)
        return deque(found, maxlen=1).pop().x

    def decode(z_BCTHW: Tensor) -> Tensor:
        raw = given.vae.net.denormalize(z_BCTHW.float()).to(dtype)
        pixels: Tensor = vae.decode(raw, return_dict=False)[0]
        return pixels

    def compiled() -> None:
        net.compile_repeated_blocks(backend=args.compiler, fullgraph=True)
        if args.compile_peer_vae:
            vae.decoder.compile(backend=args.compiler, dynamic=False)

    def small_forward() -> Tensor:
        net.set_attention_backend("native")  # cuDNN's takes no float32
        out: Tensor = widely(net, x_small, t[:, 0], states, return_dict=False)[0]
        net.set_attention_backend(case.backend)
        return out

    small = {
        "forward": small_forward,
        "decode": lambda: copy.deepcopy(vae).float().decode(x_small, return_dict=False)[0],
    }
    return Side(
        text=text,
        forward=lambda: velocity(given.x_BCTHW, given.t_BT, given.cond.text_BLC),
        steps=steps,
        decode=decode,
        frames=lambda z: to_uint8(decode(z)[0]),
        compiled=compiled,
        small=small_text | small,
        says=words(whose, case, args),
    )


def words(text: str, case: Case, args: argparse.Namespace) -> dict[str, str]:
    """Return what the record says of the peer's settings."""
    compiled = "blocks, fullgraph" + ", and the VAE's decoder" * args.compile_peer_vae
    return {
        "attention": case.backend,
        "compiled": compiled if case.mode == "compile" else "nothing",
        "text": f"{text}, eager",
        "decode": "AutoencoderKLWan, frame by frame as it does, neither tiled nor sliced",
        "shared": "weights, noise, steps, conversion to bytes, copy",
    }


def peer_transformer(kind: Any, ours: Any) -> Any:
    """Return diffusers' transformer of our dims and weights."""
    c = ours.config
    net = weights.build(lambda: kind(**{k: v for k, v in vars(c).items() if k != "gate_compress"}))
    # its tables of angles are no weights: on the meta device they would have no values
    net.rope = type(net.rope)(c.attention_head_dim, c.patch_size, c.rope_max_seq_len)
    net.rope.to(ours.proj_out.weight.device)
    return sharing(net, ours)


def peer_vae(kind: Any, ours: Any) -> Any:
    """Return diffusers' autoencoder of our dims and weights."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(ours.config).items()}
    return sharing(weights.build(lambda: kind(**values)), ours)


def peer_text(
    ours: Part,
) -> tuple[Callable[[], Tensor], dict[str, Callable[[], Tensor]], str]:
    """Return transformers' encoder on our ids and weights, or ours without it, and whose it is."""
    try:
        from transformers import UMT5Config, UMT5EncoderModel
    except (ImportError, RuntimeError) as error:
        return ours.run, {}, f"ours on both sides: {error}"
    config = UMT5Config(**vars(ours.net.config), feed_forward_proj="gated-gelu", dropout_rate=0.0)
    aliases = {"encoder.embed_tokens.weight": "shared.weight"}
    net = sharing(weights.build(lambda: UMT5EncoderModel(config)), ours.net, aliases)
    ids_BL, mask_BL = ours.given

    def run(call: Callable[..., Any] = net) -> Tensor:
        states_BLC: Tensor = call(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return states_BLC

    small = {"text": lambda: run(functools.partial(widely, net))}
    return run, small, "UMT5EncoderModel of transformers"


def sharing(net: nn.Module, ours: nn.Module, aliases: Mapping[str, str] | None = None) -> Any:
    """Give a network of the meta device the very tensors of ours, name by name."""
    state, slots = ours.state_dict(), net.state_dict()
    state |= {new: state[old] for new, old in (aliases or {}).items() if new in slots}
    net.load_state_dict(state, strict=True, assign=True)
    left = [n for n, x in (*net.named_parameters(), *net.named_buffers()) if x.is_meta]
    assert not left, f"without values: {left}"
    return net.eval().requires_grad_(False)


# Rounds


def one_clip(side: Side, steps: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of a clip's stages, from ids to frames in host memory."""
    began = now(args)
    states_BLC = side.text()
    encoded = now(args)
    z_BCTHW = side.steps(states_BLC)
    denoised = now(args)
    side.frames(z_BCTHW)
    ended = now(args)
    found = {"text": encoded - began, steps: denoised - encoded}
    return found | {"decode and copy": ended - denoised, "end to end": ended - began}


def one_forward(side: Side, args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of a forward."""
    began = now(args)
    side.forward()
    return {"forward": now(args) - began}


def raced(
    sides: Mapping[str, Side], given: Given, steps: str, args: argparse.Namespace
) -> dict[str, Record]:
    """Time both sides in turn: forwards, then clips; the peer's rows have ratios of each round."""
    text, dit, vae = given.text, given.dit, given.vae
    flops = {"forward": dit.forward_flop, "text": text.flop, steps: dit.flop}
    flops["decode and copy"] = vae.flop
    stages: dict[str, Record] = {}
    clip = functools.partial(one_clip, steps=steps, args=args)
    for run in (functools.partial(one_forward, args=args), clip):
        for side in sides.values():
            run(side)
        rounds = repeated(functools.partial(one_round, run, sides), args)
        rows = {w: rows_of([r[w] for r in rounds], args, flops if w == OURS else {}) for w in sides}
        for name in rows[OURS]:
            pairs = [{who: r[who][name] for who in sides} for r in rounds]
            paired = timing.ratio(pairs, PEER, over=OURS)
            stages[name] = rows[OURS][name]
            over = {"over_ours": paired["ratio"], "over_ours_range": paired["range"]}
            stages[f"{name}, {PEER}"] = rows[PEER][name] | over
    return stages


def one_round(
    run: Callable[[Side], dict[str, float]], sides: Mapping[str, Side], index: int
) -> dict[str, dict[str, float]]:
    """Run each side once, the first one another every round."""
    return {who: run(sides[who]) for who in timing.in_turn(list(sides), index)}


def merged(checks: Mapping[str, Record]) -> Record:
    """Put both sides' checks into one record: seconds of each, and the larger error."""
    record: Record = {}
    for who, found in checks.items():
        record |= {k if who == OURS else f"{k}_{who}": v for k, v in found.items() if k != "error"}
    errors = [found["error"] for found in checks.values() if "error" in found]
    return record | ({"error": max(errors)} if errors else {})
