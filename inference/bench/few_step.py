"""A three-step student against its teacher: ours, and diffusers with either, from prompt to mp4.

Three contenders in turn in one process, after a warm-up, the order rotated every round: ours with
the student's own steps; `diffusers.WanPipeline` with the teacher's steps and guidance; and with the
student's. Models are loaded before; every one's frames are written by the same encoder. diffusers
has no video sparse attention: of a student with its gates it runs the other weights, densely, which
is the same three steps and another clip. A ratio is the peer's seconds over ours of the same round,
median with range. `--cold` times whole processes of `fastvideo generate`. One JSON line a run is
appended to `--out`.

    python inference/bench/few_step.py --student fastwan-nano --teacher wan-nano --repeats 5
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvideo import timing

PROMPT = "a big red ball moving left at night"
OURS, TEACHER, STUDENT = "ours", "diffusers, teacher", "diffusers, student"
STAND_IN = {"sigmas": [1.0, 0.909091, 0.714286], "renoise": False}

Stages = dict[str, float]


def main() -> None:
    """Run the comparison, print the table, append the JSON line."""
    args = parse_arguments()
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        student = args.student
        if args.stand_in:
            student = str(stand_in(args.teacher, Path(folder) / "student"))
        calls = contenders(student, args, Path(folder))
        for call in calls.values():  # warm-up: allocator, thread pools, oneDNN primitives
            call()
        rounds: list[dict[str, Stages]] = []
        for i in range(args.repeats):
            rounds.append({name: calls[name]() for name in timing.in_turn(list(calls), i)})
        cold = [
            cold_start(student, args, Path(folder) / f"{i}.mp4")
            for i in range(args.cold and args.cold + 1)
        ]
        is_same = same_network(student)
        files = [Path(folder) / file_of(name) for name in (OURS, STUDENT)]
        apart = frames_apart(*files) if is_same else None
    record = timing.record(
        settings=vars(args),
        contenders={name: summary([r[name] for r in rounds]) for name in calls},
        ratios={peer: ratios(rounds, peer) for peer in calls if peer != OURS},
        grey_levels_apart=apart,  # ours and diffusers with the student; None if it has no such
        cold=summary(cold[1:]) if args.cold else None,  # the first one fills the page cache
    )
    report(record)
    timing.append(args.out, record)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", default="fastwan-nano", help="bundled name or folder")
    parser.add_argument("--teacher", default="wan-nano", help="bundled name or folder")
    parser.add_argument("--teacher-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=0.0, help="0: the teacher's default")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", type=int, default=5, help="processes of generate; 0 for none")
    parser.add_argument(
        "--stand-in", action="store_true", help="three steps of the teacher's weights as student"
    )
    parser.add_argument("--note", default="", help="kept in the record: what else was running")
    parser.add_argument("--out", default="", help="JSON lines file to append to")
    return parser.parse_args()


def stand_in(teacher: str, folder: Path) -> Path:
    """Write the teacher's weights as a student: its speed, whatever it makes."""
    from fastvideo.formats import diffusers as layout
    from fastvideo.model import load
    from fastvideo.spec import Scheduler

    model = load(teacher, dtype="bfloat16")
    few = {"num_inference_steps": len(STAND_IN["sigmas"]), "guidance_scale": 1.0}
    changes = {
        "name": "stand-in",
        "scheduler": Scheduler(name="few_step", args=STAND_IN),
        "defaults": model.spec.defaults.model_copy(update=few),
    }
    spec = model.spec.model_copy(update=changes)
    return layout.save(dataclasses.replace(model, spec=spec), folder)


def contenders(
    student_name: str, args: argparse.Namespace, folder: Path
) -> dict[str, Callable[[], Stages]]:
    """Load all three, and return a call of each that makes a file and tells its stages' seconds."""
    from fastvideo import VideoPipeline, rng
    from fastvideo.hub import open_spec

    ours = VideoPipeline.from_pretrained(student_name, device="cpu", dtype=args.dtype)
    student, teacher = ours.model.spec, open_spec(args.teacher)[0]
    if student.scheduler.name != "few_step":
        raise SystemExit(f"{student_name} is no model of few steps; --stand-in makes one")
    d = student.defaults
    grid = student.latent_shape(frames=d.num_frames, height=d.height, width=d.width)
    shape = (1, ours.model.vae.config.z_dim, grid.frames, grid.height, grid.width)
    latents = rng.noise(shape, seed=0, purpose="bench")
    args.guidance = args.guidance or teacher.defaults.guidance_scale
    plain = student_name if same_network(student_name) else str(ungated(ours.model, folder))
    size = {"height": d.height, "width": d.width, "num_frames": d.num_frames, "latents": latents}

    def mine() -> Stages:
        began = time.perf_counter()
        video = ours(PROMPT, latents=latents)
        total = save(video.frames, folder / file_of(OURS), d.fps, began)
        return {**video.timings, **total}

    def peer(title: str, name: str, steps: int, guidance: float, spec: Any) -> Callable[[], Stages]:
        pipe, path = load_peer(name, args.dtype), folder / file_of(title)
        asked = {**size, "num_inference_steps": steps, "guidance_scale": guidance}
        asked |= {"negative_prompt": spec.defaults.negative_prompt}
        limit = spec.defaults.max_text_tokens
        return lambda: staged(pipe, path, d.fps, max_sequence_length=limit, **asked)

    return {
        OURS: mine,
        TEACHER: peer(TEACHER, args.teacher, args.teacher_steps, args.guidance, teacher),
        STUDENT: peer(STUDENT, plain, d.num_inference_steps, d.guidance_scale, student),
    }


def same_network(name: str) -> bool:
    """Tell whether diffusers has the attention of a model."""
    from fastvideo.hub import open_spec

    return open_spec(name)[0].attention.pattern == "dense"


def ungated(model: Any, folder: Path) -> Path:
    """Write a sparse model without its gates, as diffusers can read and run it."""
    import torch

    from fastvideo.formats import diffusers as layout
    from fastvideo.spec import Attention, Network

    config = dataclasses.replace(model.dit.config, gate_compress=False)
    weights = {n: w for n, w in model.dit.state_dict().items() if "to_gate_compress" not in n}
    with torch.device("meta"):
        dit = type(model.dit)(config)
    dit.load_state_dict(weights, assign=True)
    changes = {"attention": Attention(), "dit": Network(family=model.spec.dit.family)}
    spec = model.spec.model_copy(update=changes)
    return layout.save(dataclasses.replace(model, spec=spec, dit=dit), folder / "ungated")


def load_peer(name: str, dtype: str) -> Any:
    """Load `diffusers.WanPipeline` on a folder, every part in the same dtype."""
    import torch
    from diffusers import WanPipeline

    from fastvideo.hub import open_spec

    pipe = WanPipeline.from_pretrained(open_spec(name)[1], dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    marks: dict[str, float] = {}
    encode, decode = pipe.encode_prompt, pipe.vae.decode

    def encoded(*values: Any, **named: Any) -> Any:
        states = encode(*values, **named)
        marks["encoded"] = time.perf_counter()
        return states

    def decoded(*values: Any, **named: Any) -> Any:
        marks["denoised"] = time.perf_counter()
        return decode(*values, **named)

    # What lies between the two is its denoising: latents are given, so nothing is drawn there.
    pipe.encode_prompt, pipe.vae.decode, pipe.marks = encoded, decoded, marks
    return pipe


def staged(pipe: Any, path: Path, fps: int, **asked: Any) -> Stages:
    """Make a clip with diffusers and write it; return the seconds of its stages."""
    began = time.perf_counter()
    (frames,) = pipe(PROMPT, output_type="np", **asked).frames
    ended = time.perf_counter()
    total = save((frames * 255).round().astype("uint8"), path, fps, began)
    marks = pipe.marks
    return {
        "encode_text": marks["encoded"] - began,
        "denoise": marks["denoised"] - marks["encoded"],
        "decode": ended - marks["denoised"],
        **total,
    }


def save(frames: Any, path: Path, fps: int, began: float) -> Stages:
    """Write frames with our encoder, and return its seconds and those since `began`."""
    from fastvideo import media

    start = time.perf_counter()
    media.write_video(path, [frames], fps=fps, overwrite=True)
    end = time.perf_counter()
    return {"save": end - start, "end to end": end - began}


def file_of(contender: str) -> str:
    """Return the name of a contender's file."""
    return contender.replace(", ", "-") + ".mp4"


def frames_apart(one: Path, other: Path) -> float:
    """Return how far two clips are apart, in mean grey levels."""
    from fastvideo import media

    first, second = (media.read_video(path)[0].astype(int) for path in (one, other))
    return round(float(abs(first - second).mean()), 2)


def cold_start(student: str, args: argparse.Namespace, path: Path) -> Stages:
    """Run `fastvideo generate` in a process of its own, with its own defaults."""
    command = [sys.executable, "-m", "fastvideo", "generate", PROMPT, "--model", student]
    command += ["--seed", "0", "--device", "cpu", "--dtype", args.dtype, "-o", str(path)]
    began = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    threads = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    subprocess.run(command, check=True, env=threads, **quiet)
    total = time.perf_counter() - began
    stages: Stages = json.loads(path.with_suffix(".json").read_text())["timings_s"]
    return {**stages, "process and imports": total - sum(stages.values()), "end to end": total}


def summary(rounds: list[Stages]) -> dict[str, Any]:
    """Return the median and range of every stage."""
    return {stage: timing.middle([r[stage] for r in rounds]) for stage in rounds[0]}


def ratios(rounds: list[dict[str, Stages]], peer: str) -> dict[str, Any]:
    """Return the peer's seconds over ours, paired by round, of denoising and of everything."""
    return {
        stage: timing.ratio([{n: r[n][stage] for n in r} for r in rounds], peer, over=OURS)
        for stage in ("denoise", "decode", "end to end")
    }


def report(record: dict[str, Any]) -> None:
    """Print the record as tables in Markdown."""
    s = record["settings"]
    ours = "the teacher's weights as a stand-in" if s["stand_in"] else s["student"]
    print(
        f"ours: {ours}; teacher: {s['teacher']}, {s['teacher_steps']} steps, guidance"
        f" {s['guidance']:g}; {s['dtype']}, {s['threads']} threads\n"
    )
    rows = {**record["contenders"], **({"ours, cold": record["cold"]} if record["cold"] else {})}
    print("| contender | stage | s | range |\n|---|---|---|---|")
    for name, stages in rows.items():
        for stage, m in stages.items():
            print(
                f"| {name} | {stage} | {m['s']:.3f} | {m['range'][0]:.3f} - {m['range'][1]:.3f} |"
            )
    apart = record["grey_levels_apart"]
    far = "other attention, other clips" if apart is None else f"{apart} grey levels apart"
    print(f"\nours and {STUDENT}: {far} in the files")
    print("\n| ours against | of | ratio | range |\n|---|---|---|---|")
    for peer, found in record["ratios"].items():
        for stage, m in found.items():
            print(f"| {peer} | {stage} | {m['ratio']:.2f} | {m['range'][0]} - {m['range'][1]} |")


if __name__ == "__main__":
    main()
