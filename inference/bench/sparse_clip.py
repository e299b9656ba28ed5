"""Denoising of a clip by two models in turn in one run, each under its own attention.

The same noise, prompt, steps and guidance (the first model's defaults); seconds are those of all
denoising steps, a ratio is the first model's over the second's of the same round. `matmul` is the
speed of a bf16 product on so many threads: virtual cores may share one core's arithmetic.

    python inference/bench/sparse_clip.py wan-nano wan-nano-vsa --threads 2 --repeats 5
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable

import torch

from fastvideo import hub, model, stages, timing
from fastvideo.resolve import resolve
from fastvideo.sampling import GenerateRequest
from fastvideo.stages import State

PROMPT = "a red ball moves left over the sea"


def main() -> None:
    """Time both models and print, and append, one record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs=2, help="the one compared with, then the faster one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="fewer, for a smoke run")
    parser.add_argument("--out", default="", help="JSON lines file to append to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    calls = {name: denoising(name, args.models[0], args.steps) for name in args.models}
    for call in calls.values():
        call()
    rounds = [
        {name: timing.timed(calls[name]) for name in timing.in_turn(args.models, i)}
        for i in range(args.repeats)
    ]
    first, second = args.models
    line = timing.record(
        denoise={name: timing.middle([r[name] for r in rounds]) for name in calls},
        speedup=timing.ratio(rounds, first, over=second),
        matmul_gflops=round(matmul_gflops()),
    )
    print(line)
    timing.append(args.out, line)


def denoising(name: str, like: str, steps: int | None) -> Callable[[], object]:
    """Return a call that denoises one clip with a model, at the sizes of another's defaults."""
    loaded = model.load(name, device="cpu", dtype="bfloat16")
    given = hub.open_spec(like)[0].defaults.model_dump(exclude={"max_text_tokens"})
    own = {"num_inference_steps": steps} if steps else {}
    asked = GenerateRequest.model_validate({"prompt": PROMPT, "seed": 0, **given, **own})
    state = State((resolve(asked, loaded.spec),))
    before = deque(stages.run(("encode_text", "prepare_latents"), loaded, state), maxlen=1).pop()
    return lambda: deque(stages.run(("denoise",), loaded, before.state), maxlen=0)


def matmul_gflops(rows: int = 1344, width: int = 768, count: int = 400) -> float:
    """Return the speed of (rows x width) (width x width) products in bf16."""
    a, b = torch.randn(rows, width).bfloat16(), torch.randn(width, width).bfloat16()

    def products() -> None:
        for _ in range(count):
            a @ b

    products()
    return 2e-9 * count * rows * width * width / timing.timed(products)


if __name__ == "__main__":
    main()
