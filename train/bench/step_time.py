"""Seconds of a training step: our loop as it is, with one thing changed, and with diffusers' model.

All variants run in turn in one process, after a warm-up, on the same random latents and captions:
forward, backward, optimizer, average. A ratio is paired: the variant's seconds over ours in the
same round, median with the range of the rounds. One JSON line a run is appended to `--out`.

    python train/bench/step_time.py --frames 1 6 21 --batch 16 16 4 --repeats 5
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fastvideo_train import loop, optim, recipe
from fastvideo_train.batches import stream
from fastvideo_train.optim import Muon
from fastvideo_train.strategies.single import Strategy
from torch import Tensor, nn

from fastvideo import timing
from fastvideo.config import merge, parse

RECIPE = "configs/train/nano/dit-image.toml"
SIZE = 16  # latent height and width: 128 pixels


@dataclass(frozen=True)
class Variant:
    """What differs from our step: recipe keys, the student's network, a patched name, autocast."""

    says: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    network: Callable[[Any], nn.Module] = lambda net: net
    patch: tuple[Any, str, Any] | None = None
    autocast: bool = False


def main() -> None:
    """Run the comparison at each size, print the tables, append the JSON lines."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    for frames, batch in zip(args.frames, args.batch, strict=True):
        names = [n for n in VARIANTS if not args.only or n in args.only or n == "ours"]
        steps = {name: prepare(VARIANTS[name], frames, batch, args.threads) for name in names}
        for step in steps.values():
            for _ in range(args.warmup):
                step()
        rounds = []
        for i in range(args.repeats):
            rounds.append({name: timing.timed(steps[name]) for name in timing.in_turn(names, i)})
        record = timing.record(
            settings={"frames": frames, "batch": batch, "threads": args.threads},
            variants={name: summary(name, rounds, batch) for name in names},
        )
        report(record)
        timing.append(args.out, record)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 6, 21], help="latent frames")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 16, 4], help="one for each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), help="beside ours")
    parser.add_argument("--out", default="", help="JSON lines file to append to")
    args = parser.parse_args()
    if len(args.frames) != len(args.batch):
        parser.error("--frames and --batch need as many numbers as each other")
    return args


def prepare(variant: Variant, frames: int, batch: int, threads: int) -> Callable[[], object]:
    """Build a run of the variant and return one step of it, always on the same batch."""
    tree = recipe.load(RECIPE).model_dump(by_alias=True, exclude_none=True)
    data = {"name": "synthetic", "frames": frames, "height": SIZE, "width": SIZE}
    run = {"batch": batch, "threads": threads, "steps": 1_000_000}
    tree = merge(tree | {"data": data, "validate": {}}, {"run": run})
    plan = parse(recipe.Recipe, merge(tree, dict(variant.keys)), source=RECIPE)
    with active(variant), tempfile.TemporaryDirectory() as folder:
        job = loop.Job.open(plan, Path(folder))
    student = job.roles["student"]
    net = variant.network(student.net)
    if net is not student.net:
        job.roles = {**job.roles, "student": replace(student, net=net)}
        job.strategy = Strategy(plan)
        job.strategy.prepare(job.roles)
    with stream(plan, start=0) as batches:
        one = next(batches)

    def step() -> None:
        with active(variant):
            loop._one_step(job, [one])

    return step


@contextmanager
def active(variant: Variant) -> Iterator[None]:
    """Apply a variant's patch and autocast."""
    with ExitStack() as stack:
        if variant.patch is not None:
            stack.enter_context(mock.patch.object(*variant.patch))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=variant.autocast))
        yield


def peer_model(c: Any) -> Any:
    """Return diffusers' transformer of our dims, its weights in float32."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=c.patch_size,
        num_attention_heads=c.num_attention_heads,
        attention_head_dim=c.attention_head_dim,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
        cross_attn_norm=c.cross_attn_norm,
        qk_norm=c.qk_norm,
        eps=c.eps,
    )


class Peer(nn.Module):
    """diffusers' transformer with our weights, called as our method calls a student."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.model = peer_model(ours.config)
        self.model.load_state_dict({n: p.float() for n, p in ours.state_dict().items()})

    def forward(self, x: Tensor, t_BT: Tensor, cond: Any, **_: Any) -> Tensor:
        """Return the velocity."""
        out: Tensor = self.model(x, t_BT[:, 0], cond.text_BLC, return_dict=False)[0]
        return out


def one_product(net: Any) -> Any:
    """Let each self-attention make queries, keys and values with one matrix product.

    The weights stay three parameters, as checkpoints and Muon have them, and are joined each step.
    """
    for block in net.blocks:
        attn = block.attn1
        attn.queries, attn.keys_values = _joined(attn)
    return net


def _joined(attn: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    parts: list[Tensor] = []

    def queries(x_BLC: Tensor, turn: Tensor) -> Tensor:
        maps = (attn.to_q, attn.to_k, attn.to_v)
        weight, bias = (torch.cat([getattr(m, n) for m in maps]) for n in ("weight", "bias"))
        q, *rest = nn.functional.linear(x_BLC, weight, bias).chunk(3, dim=-1)
        parts[:] = rest
        return attn._heads(q, attn.norm_q, turn)

    def keys_values(_: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        k, v = parts
        return attn._heads(k, attn.norm_k, turn), v.unflatten(-1, (attn.heads, -1))

    return queries, keys_values


class Unstacked:
    """Muon matrix by matrix."""

    def __init__(self, params: Mapping[str, Tensor], spec: Any) -> None:
        self.each = [Muon({name: param}, spec) for name, param in params.items()]

    def step(self, factor: float) -> None:
        """Update one after another."""
        for one in self.each:
            one.step(factor)


VARIANTS: dict[str, Variant] = {
    "ours": Variant("as the recipes run it"),
    "compiled": Variant("`run.compile`", {"run": {"compile": True}}),
    "sdpa": Variant(
        "PyTorch's attention", {"roles": {"student": {"attention": {"backend": "sdpa"}}}}
    ),
    "one qkv": Variant("q, k, v in one product, weights joined each step", network=one_product),
    "unstacked": Variant("Muon matrix by matrix", patch=(optim, "Muon", Unstacked)),
    "adamw": Variant("AdamW alone", {"optim": {"muon": None}}),
    "long text": Variant("128 text tokens, not 32", {"method": {"args": {"max_text_tokens": 128}}}),
    "float32": Variant("no bf16 copies of the weights", {"run": {"dtype": "float32"}}),
    "autocast": Variant(
        "float32 weights, autocast instead", {"run": {"dtype": "float32"}}, autocast=True
    ),
    "diffusers": Variant("diffusers' model in our loop", network=Peer),
    "diffusers, autocast": Variant(
        "its weights in float32 under autocast",
        {"run": {"dtype": "float32"}},
        network=Peer,
        autocast=True,
    ),
}


def summary(name: str, rounds: list[dict[str, float]], batch: int) -> dict[str, Any]:
    """Return a variant's median, and its seconds over ours, paired by round."""
    median = statistics.median(seconds[name] for seconds in rounds)
    return {
        "says": VARIANTS[name].says,
        "step_s": round(median, 4),
        "sample_ms": round(1e3 * median / batch, 2),
        **timing.ratio(rounds, name, over="ours", digits=3),
    }


def report(record: Mapping[str, Any]) -> None:
    """Print a record as a table in Markdown."""
    s = record["settings"]
    print(f"\n{s['frames']} latent frames, batch {s['batch']}, {s['threads']} threads")
    print("| variant | | ms a sample | seconds over ours | range |\n|---|---|---|---|---|")
    for name, v in record["variants"].items():
        low, high = v["range"]
        row = f"{v['sample_ms']:.1f} | {v['ratio']:.2f} | {low:.2f} - {high:.2f}"
        print(f"| {name} | {v['says']} | {row} |")


if __name__ == "__main__":
    main()
