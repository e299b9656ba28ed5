"""One command in the several processes of a launcher: they join, and the first error ends all.

with init_distributed(torch.device("cuda")) as own:
    ...  # all processes, each with its own device
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from fastvideo import env, errors
from fastvideo.errors import RefusedError, Terminated, one_line
from fastvideo.parallel import mesh
from fastvideo.parallel.agree import is_first_to_fail

_GONE = ("closed by peer", "reset by peer", "remote process exit", "communicator was aborted")
"""What gloo, then NCCL, say of a process that is gone."""


@contextmanager
def init_distributed(device: torch.device) -> Iterator[torch.device]:
    """Join the others for the time of a block; yields this process's own device.

    An error ends the process at once; only the first failing rank reports, as the errors of the
    others are that it left. Alone, nobody is joined and errors pass through.
    """
    with mesh.joined(device) as own:
        try:
            yield own
        except (Exception, KeyboardInterrupt, Terminated) as error:
            if env.world_size() == 1:
                raise
            _end(error)


def _end(error: BaseException) -> NoReturn:
    """Tell the error if it is the first, and leave without a word to the others.

    A farewell could wait for them for ever; their launcher ends them when this process is gone.
    """
    if is_first_to_fail():
        if env.log_level() == "DEBUG":
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.write(_words(error) + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_code(error))


def _words(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, Terminated):
        return "terminated"
    is_gone = any(word in str(error) for word in _GONE)
    whose = "another process of the run died: " if is_gone else ""
    return f"error: {whose}{one_line(error)} (rank {env.rank()})"


def _code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return errors.INTERRUPTED
    if isinstance(error, Terminated):
        return errors.TERMINATED
    return errors.USAGE if isinstance(error, RefusedError) else errors.FAILED
