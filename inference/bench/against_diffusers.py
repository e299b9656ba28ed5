"""Our pipeline against diffusers' on the same folder, prompt, latents, steps, dtype and threads.

Both run in turn in one process, after a warm-up, and every ratio is paired: peer seconds over our
seconds of the same round, median with the range of the rounds. Import time and peak memory are
measured in processes of their own. One JSON line a run is appended to `--out`.

    python inference/bench/against_diffusers.py --model wan-nano --repeats 5
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvideo import timing

PROMPT = "a big red ball moving left at night"

Pair = tuple[Callable[[], Any], Callable[[], Any]]  # ours, the peer's


def main() -> None:
    """Run the comparison, print the table, append the JSON line."""
    args = parse_arguments()
    import torch

    torch.set_num_threads(args.threads)
    stages = build_stages(args)
    for ours, peer in stages.values():  # warm-up: allocator, thread pools, oneDNN primitives
        ours()
        peer()
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in stages}
    for i in range(args.repeats):
        for name, (ours, peer) in stages.items():
            calls = {"ours": ours, "diffusers": peer}
            turn = timing.in_turn(list(calls), i)
            seconds[name].append({who: timing.timed(calls[who]) for who in turn})
    record = timing.record(
        settings=vars(args),
        stages={name: summary(rounds) for name, rounds in seconds.items()},
        import_s={who: import_seconds(code) for who, code in IMPORTS.items()},
        help_s=help_seconds(),
        peak_mib={who: peak_mib(who, args) for who in ("ours", "diffusers")},
    )
    report(record)
    timing.append(args.out, record)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wan-nano", help="bundled name or diffusers folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="", help="JSON lines file to append to")
    parser.add_argument("--only", choices=["ours", "diffusers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        one_clip(args)
        raise SystemExit
    return args


def load_ours(args: argparse.Namespace) -> Any:
    """Load our pipeline."""
    from fastvideo import VideoPipeline

    return VideoPipeline.from_pretrained(args.model, device="cpu", dtype=args.dtype)


def load_peer(args: argparse.Namespace) -> Any:
    """Load `diffusers.WanPipeline` on the same folder, the VAE in the same dtype."""
    import torch
    from diffusers import WanPipeline

    from fastvideo.hub import open_spec

    _, folder = open_spec(args.model)
    pipe = WanPipeline.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_stages(args: argparse.Namespace) -> dict[str, Pair]:
    """Return name -> (ours, peer) for text, one denoiser forward, VAE decode and the whole clip."""
    import torch

    from fastvideo import rng
    from fastvideo.stages.decode import decode
    from fastvideo.stages.denoise import with_attention
    from fastvideo.stages.encode_text import encode

    pipe, peer = load_ours(args), load_peer(args)
    model, spec = pipe.model, pipe.model.spec
    dtype = getattr(torch, args.dtype)
    d = spec.defaults
    shape = spec.latent_shape(frames=d.num_frames, height=d.height, width=d.width)
    channels = peer.transformer.config.in_channels
    size = (1, channels, shape.frames, shape.height, shape.width)
    latents = rng.noise(size, seed=0, purpose="bench")
    cond = encode(model, [PROMPT])
    states = peer.encode_prompt(PROMPT, None, False, max_sequence_length=d.max_text_tokens)[0]
    times = torch.full((1, 1), 500.0)
    with torch.inference_mode():  # as the stage does: once a clip, not once a step
        denoiser, prepared = with_attention(model, latents), model.dit.prepare(cond)

    def clip_ours() -> None:
        pipe(PROMPT, num_inference_steps=args.steps, guidance_scale=args.guidance, latents=latents)

    def clip_peer() -> None:
        peer(
            PROMPT,
            negative_prompt=d.negative_prompt,
            height=d.height,
            width=d.width,
            num_frames=d.num_frames,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            latents=latents.clone(),
            max_sequence_length=d.max_text_tokens,
        )

    no_grad: Any = torch.inference_mode()
    return {
        "text": (
            no_grad(lambda: encode(model, [PROMPT])),
            no_grad(  # one prompt, as ours
                lambda: peer.encode_prompt(
                    PROMPT, None, False, max_sequence_length=d.max_text_tokens
                )
            ),
        ),
        "denoiser forward": (
            no_grad(lambda: denoiser(latents.to(dtype), times, prepared)),
            no_grad(lambda: peer.transformer(latents.to(dtype), times[0], states)),
        ),
        "VAE decode": (
            no_grad(lambda: list(decode(model, latents))),
            no_grad(lambda: peer.vae.decode(latents.to(dtype))),
        ),
        "end to end": (clip_ours, clip_peer),
    }


def one_clip(args: argparse.Namespace) -> None:
    """Make one default clip and print the peak resident memory of this process in MiB."""
    import torch

    from fastvideo.hub import open_spec

    torch.set_num_threads(args.threads)
    if args.only == "ours":
        load_ours(args)(PROMPT, num_inference_steps=args.steps, guidance_scale=args.guidance)
    else:
        d = open_spec(args.model)[0].defaults  # without our networks beside the peer's
        load_peer(args)(
            PROMPT,
            height=d.height,
            width=d.width,
            num_frames=d.num_frames,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            max_sequence_length=d.max_text_tokens,
        )
    # not getrusage: its maximum is inherited from the process that started this one
    status = Path("/proc/self/status").read_text(encoding="utf-8").split()
    sys.stdout.write(f"{int(status[status.index('VmHWM:') + 1]) / 1024:.0f}\n")


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Return medians in seconds, and the paired ratio with its range."""
    medians = {f"{who}_s": timing.middle([r[who] for r in rounds])["s"] for who in rounds[0]}
    return {**medians, **timing.ratio(rounds, "diffusers", over="ours")}


IMPORTS = {
    "fastvideo": "import fastvideo",
    "fastvideo.VideoPipeline": "from fastvideo import VideoPipeline",
    "diffusers.WanPipeline": "from diffusers import WanPipeline",
}


def import_seconds(code: str) -> float:
    """Return the median seconds of three fresh interpreters that run `code`, less an empty one."""

    def run(source: str) -> float:
        return timing.timed(lambda: subprocess.run([sys.executable, "-c", source], check=True))

    return round(statistics.median(run(code) - run("pass") for _ in range(3)), 3)


def help_seconds() -> float:
    """Return the median seconds of `fastvideo --help`, interpreter included."""
    command = [sys.executable, "-m", "fastvideo", "--help"]

    def run() -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    return round(statistics.median(timing.timed(run) for _ in range(5)), 3)


def peak_mib(who: str, args: argparse.Namespace) -> int:
    """Return the peak memory of one clip in a process of its own."""
    command = [sys.executable, __file__, "--only", who, "--model", args.model]
    command += ["--dtype", args.dtype, "--steps", "2", "--guidance", str(args.guidance)]
    command += ["--threads", str(args.threads)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(found.stdout.split()[-1])


def report(record: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{'stage':<18}{'ours':>10}{'diffusers':>12}{'ratio':>8}   range")
    for name, s in record["stages"].items():
        low, high = s["range"]
        print(
            f"{name:<18}{s['ours_s']:>9.3f}s{s['diffusers_s']:>11.3f}s{s['ratio']:>8.2f}"
            f"   {low:.2f}-{high:.2f}"
        )
    print("import:", record["import_s"], "fastvideo --help:", record["help_s"])
    print("peak MiB:", record["peak_mib"])


if __name__ == "__main__":
    main()
