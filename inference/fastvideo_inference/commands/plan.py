"""`fastvideo plan`: a profile and a promise in; placements, a plot and a server's config out."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fastvideo import files, sampling
from fastvideo.errors import OK, refusing
from fastvideo.resolve import resolve
from fastvideo.sampling import SamplingParams
from fastvideo_inference.goodput import plan as planning
from fastvideo_inference.goodput import plot, predict
from fastvideo_inference.goodput import profile as profiles
from fastvideo_inference.goodput.bench import SCALES
from fastvideo_inference.goodput.plan import Placement, Slo
from fastvideo_inference.goodput.profile import Profile

_SHARES = (0.25, 0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)  # of the goodput, for the plot
_DRAWN = 4  # and the monolith
FILES = ("plan.json", "plan.svg", "serve.toml")


def plan(
    profile: Annotated[
        str,
        Argument(help=f"JSON of `fastvideo profile`, or {', '.join(predict.DEVICES)}: predicted."),
    ],
    devices: Annotated[int, Option(help="Devices of the fleet; on a CPU its cores.")],
    slo: Annotated[float, Option(help="Seconds from POST to the last byte at the client.")],
    shape: Annotated[
        str | None, Option(help=f"Of a predicted profile: {' or '.join(predict.SHAPES)}.")
    ] = None,
    target: Annotated[float, Option(help="The share of requests that must meet it.")] = 0.9,
    memory: Annotated[float | None, Option(help="GiB of weights a worker. [no limit]")] = None,
    delivery: Annotated[float, Option(help="Seconds that a client adds: half a poll.")] = 0.05,
    size: Annotated[str | None, Option(help="WIDTHxHEIGHT. [the model's]")] = None,
    frames: Annotated[int | None, Option(help=sampling.FRAMES.help)] = None,
    steps: Annotated[int | None, Option(help=sampling.STEPS.help)] = None,
    attention: Annotated[str | None, Option(help=sampling.ATTENTION.help)] = None,
    decoder: Annotated[str, Option(help="A small decoder of the profile.")] = "",
    output: Annotated[
        Path, Option("--output", "-o", help=f"Folder for {', '.join(FILES)}.")
    ] = Path("plan"),
) -> int:
    """Simulate placements of workers on devices, and rank them by goodput per device."""
    with refusing():
        made = _profile(profile, shape)
        asked = {"size": size, "frames": frames, "steps": steps, "attention": attention}
        given = {k: v for k, v in asked.items() if v is not None}
        request = sampling.read_layers(("the command", {"prompt": "plan", "seed": 0, **given}))
        params = resolve(request, made.spec)
        for name in FILES:
            if (output / name).exists():
                raise FileExistsError(f"{output / name} exists; choose another folder")
        promise = planning.Slo(deadline_s=slo, target=target, delivery_s=delivery)
        found = planning.plan(
            made, params, devices=devices, slo=promise, memory_gib=memory, decoder=decoder
        )
    print(_table(found, promise, made))
    output.mkdir(parents=True, exist_ok=True)
    facts = {
        "slo": asdict(promise),
        "profile": made.model_dump(include={"source", "model", "fingerprint", "device", "date"}),
        "request": params.model_dump(exclude={"prompt", "seed"}) | {"decoder": decoder},
        "placements": [
            asdict(one) | {"goodput": one.goodput, "is_monolith": one.is_monolith} for one in found
        ],
    }
    files.write_text(output / "plan.json", json.dumps(facts, indent=1) + "\n")
    path = None if profile in predict.DEVICES else Path(profile).absolute()
    config = planning.serve_toml(found[0], made, promise, profile_path=path, decoder=decoder)
    files.write_text(output / "serve.toml", config)
    drawn = [*found[:_DRAWN], *(one for one in found[_DRAWN:] if one.is_monolith)][: _DRAWN + 1]
    files.write_text(output / "plan.svg", _plot(drawn, made, params, promise, decoder))
    print(f"\nfastvideo serve --config {output / 'serve.toml'}")
    return OK


def _profile(given: str, shape: str | None) -> Profile:
    if given in predict.DEVICES:
        if shape is None:
            raise ValueError(f"--shape: {given} needs one of {', '.join(predict.SHAPES)}")
        return predict.predicted(given, shape)
    if shape is not None:
        known = ", ".join(predict.DEVICES)
        raise ValueError(f"--shape is of a predicted profile ({known}); {given} has its own model")
    return profiles.read(given)


def name(placement: Placement) -> str:
    """Return a placement in a few words: how many workers of which stages."""
    short = {"encode_text": "text", "prepare_latents": ""}
    words = []
    for group in placement.groups:
        stages = "+".join(filter(None, (short.get(s, s) for s in group.stages)))
        words.append(f"{group.count} x {stages}" + f" ({group.parallel})" * bool(group.parallel))
    return ", ".join(words) + ", monolith" * placement.is_monolith


def _table(found: list[Placement], slo: Slo, profile: Profile) -> str:
    never = ", never measured" * (profile.source == "predicted")
    head = (
        f"{slo.target:.0%} of requests within {slo.deadline_s:g} s; seconds are {profile.source}"
        f" ({profile.device.name}){never}\n"
        f"{'per device/min':>14}{'rate/min':>10}{'bursty':>8}{'devices':>9}{'clip s':>8}  workers"
    )
    rows = [
        f"{60 * one.goodput:14.2f}{60 * one.rate:10.2f}{60 * one.bursty_rate:8.2f}{one.devices:9d}"
        f"{one.clip_s:8.2f}  {name(one)}"
        for one in found
    ]
    return "\n".join([head, *rows])


def _plot(
    found: list[Placement], profile: Profile, params: SamplingParams, slo: Slo, decoder: str
) -> str:
    by_rate, by_scale = {}, {}
    for one in found:
        pools = [planning.pool_of(group, profile, params, decoder=decoder) for group in one.groups]
        rates = [share * one.rate for share in _SHARES if one.rate]
        by_rate[name(one)] = [(60 * rate, planning.attainment(pools, slo, rate)) for rate in rates]
        by_scale[name(one)] = [
            (s, planning.attainment(pools, replace(slo, deadline_s=s * slo.deadline_s), one.rate))
            for s in SCALES
            if one.rate and s * slo.deadline_s > slo.delivery_s
        ]
    source = profile.source
    panels = {f"requests/min ({source})": by_rate, f"SLO scale ({source})": by_scale}
    return plot.svg(panels, target=slo.target)
