"""One command in the several processes of a launcher: they join, and the first error ends all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from typer import Exit

from fastvideo import env
from fastvideo.cli import FAILED, INTERRUPTED, one_line
from fastvideo.model import pick_device
from fastvideo.parallel import agree, mesh

T = TypeVar("T")


@contextmanager
def together(device: str) -> Iterator[torch.device]:
    """Join the others for the time of a block; yields this process's own device.

    Only the first one to fail tells why, and does so before it leaves: the errors of the others
    are that it left. `Exit` carries the code.
    """
    with mesh.joined(pick_device(device)) as own:
        try:
            yield own
        except Exit:
            raise
        except (Exception, KeyboardInterrupt) as error:
            is_interrupt = isinstance(error, KeyboardInterrupt)
            if agree.is_first_to_fail():
                if env.log_level() == "DEBUG" and not is_interrupt:
                    raise
                text = f"error: {one_line(error)} (rank {env.rank()})"
                sys.stderr.write(("interrupted" if is_interrupt else text) + "\n")
                sys.stderr.flush()
            raise Exit(INTERRUPTED if is_interrupt else FAILED) from None


def from_first(value: T, device: torch.device) -> T:
    """Return what the first of all processes has."""
    return agree.with_first(value, agree.everybody(), device)
