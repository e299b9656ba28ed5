"""What a split asks of a clip and its attention; torch-free, for requests and recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastvideo.attention.pattern import Dense, Pattern, write
from fastvideo.log import logger

if TYPE_CHECKING:
    from fastvideo.parallel.degrees import ParallelConfig


def check(degrees: ParallelConfig, pattern: Pattern, *, num_heads: int | None = None) -> None:
    """Raise `ValueError` if `pattern` cannot be computed on sequences that are split like this.

    A ring never brings a whole sequence to one process, which VSA and STA need. Logs a warning if
    there are fewer heads than ways to split them: that is exact, but some processes idle.
    """
    ring, ulysses = degrees.ring, degrees.ulysses
    if ring > 1 and pattern != Dense():
        raise ValueError(
            f"parallel ring={ring} cuts sequences, which attention {write(pattern)} needs whole;"
            f" nearest: ulysses={ring * ulysses} without ring, or attention dense"
        )
    if num_heads is not None and ulysses > num_heads:
        logger.warning(
            "parallel ulysses=%d has only %d heads to split: %d of its processes take no part in"
            " self-attention",
            ulysses,
            num_heads,
            ulysses - num_heads,
        )


def check_tokens(num_tokens: int, size: int) -> None:
    """Raise `ValueError` for more processes (ulysses x ring) than tokens, of which each has one."""
    if num_tokens < size:
        raise ValueError(
            f"parallel: a clip of {num_tokens} tokens cannot be spread over {size} processes"
            f" (ulysses x ring); nearest: {num_tokens}"
        )


def check_rows(rows: int, size: int) -> None:
    """Raise `ValueError` for more processes than latent rows, of which each decodes some."""
    if size > rows:
        raise ValueError(
            f"parallel: {size} processes cannot decode a clip of {rows} latent rows, as each takes"
            f" one at least; nearest: {rows} processes for a clip"
        )
