"""One run in the several processes of a launcher: they join, and the first error ends all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from fastvideo import env
from fastvideo.cli import FAILED, INTERRUPTED, USAGE, RefusedError, one_line

if TYPE_CHECKING:
    from fastvideo.parallel.degrees import Degrees
    from fastvideo_train.world import World

_GONE = ("closed by peer", "reset by peer")


@contextmanager
def together(device: str, degrees: Degrees) -> Iterator[World]:
    """Join the others for the time of a block; alone, joins nobody."""
    import torch

    from fastvideo.parallel import mesh
    from fastvideo_train.world import World

    with mesh.joined(torch.device(device)) as own:
        try:
            yield World(mesh.build(degrees, own))
        except (Exception, KeyboardInterrupt) as error:
            if degrees.world_size == 1:
                raise
            _end(error)


def _end(error: BaseException) -> NoReturn:
    """Tell the error if it is the run's first, and leave without a word to the others.

    A farewell could wait for them for ever; their launcher ends them when this process is gone.
    """
    from fastvideo.parallel.agree import is_first_to_fail

    if is_first_to_fail():
        if env.log_level() == "DEBUG":
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.write(f"{_words(error)} (rank {env.rank()})\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_code(error))


def _words(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    is_gone = any(word in str(error) for word in _GONE)
    return f"error: {'another process of the run died: ' if is_gone else ''}{one_line(error)}"


def _code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return USAGE if isinstance(error, RefusedError) else FAILED
