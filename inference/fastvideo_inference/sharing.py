"""How processes share a clip: read, and checked against a request before any weights are read.

degrees = read("ulysses=2,guidance=2", world_size=4)
check(degrees, params, spec)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fastvideo import attention as patterns
from fastvideo.parallel import rules
from fastvideo.parallel.degrees import AXES, ParallelConfig, parse
from fastvideo.sampling import SamplingParams
from fastvideo.spec import Spec


def read(
    text: str | None,
    *,
    world_size: int,
    origin: str = "parallel",
    is_legal: Callable[[ParallelConfig], bool] = lambda _: True,
) -> ParallelConfig:
    """Return the degrees in "ulysses=2,guidance=2"; None is one process.

    Raises `ValueError` for another number of processes than there are, for a `shard`, and for None
    where a launcher started several: then it names choices for which `is_legal` holds.
    """
    if text is None:
        if world_size == 1:
            return ParallelConfig()
        choices = list(filter(is_legal, _choices(world_size)))[:2]
        raise ValueError(
            f"{origin}: the product of degrees must equal the world size {world_size}: "
            + (" or ".join(map(write, choices)) or "this request can only be made by one")
        )
    degrees = parse(text)
    if degrees.shard > 1:
        raise ValueError(
            f"{origin} {text} has shard={degrees.shard}, which cuts the weights of a training;"
            " a clip is made by processes with whole weights each: ulysses, ring, guidance"
        )
    try:
        degrees.check(world_size)
    except ValueError as error:
        hint = f" (torchrun --nproc-per-node {degrees.world_size})" if world_size == 1 else ""
        raise ValueError(f"{error}{hint} (from {origin})") from None
    return degrees


def check(
    degrees: ParallelConfig, params: SamplingParams, spec: Spec, *, has_small_decoder: bool = False
) -> None:
    """Raise `ValueError` if a clip cannot be made by so many processes; torch-free."""
    if degrees.guidance > 1 and params.guidance_scale == 1:
        raise ValueError(
            f"parallel guidance={degrees.guidance} has no second forward to run: guidance_scale is"
            f" 1; nearest: ulysses={degrees.guidance * degrees.ulysses} without guidance"
        )
    rules.check(degrees, patterns.read(params.attention))
    shape = spec.latent_shape(frames=params.num_frames, height=params.height, width=params.width)
    num_tokens = shape.tokens(spec.compression.patch).num_tokens
    rules.check_tokens(num_tokens, degrees.ulysses * degrees.ring)
    if not has_small_decoder:  # it decodes on every process
        rules.check_rows(shape.height, degrees.of("sample"))


def warn_of_idle(degrees: ParallelConfig, spec: Spec) -> None:
    """Log a warning if there are more ways to split the heads than heads."""
    num_heads = spec.dit.config.get("num_attention_heads")
    rules.check(ParallelConfig(ulysses=degrees.ulysses), patterns.Dense(), num_heads=num_heads)


def write(degrees: ParallelConfig) -> str:
    """Return the text that `read` takes; one process is the empty one."""
    sizes = {axis: degrees.of(axis) for axis in AXES}
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)


def _choices(world_size: int) -> Iterator[ParallelConfig]:
    yield ParallelConfig(ulysses=world_size)
    if world_size == 2:
        yield ParallelConfig(guidance=2)
    elif world_size % 2 == 0:
        yield ParallelConfig(guidance=2, ulysses=world_size // 2)
    yield ParallelConfig(ring=world_size)
    yield ParallelConfig(data=world_size)
