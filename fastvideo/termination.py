"""SIGTERM as an exception of the main thread, so that clean-ups run; a second one ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fastvideo import env
from fastvideo.errors import TERMINATED, Terminated

PATIENCE_S = 5.0


@contextmanager
def raising() -> Iterator[None]:
    """Raise `Terminated` in a block of the main thread when SIGTERM comes.

    Whoever swallows it (torch does while it imports NumPy) only delays it to the block's end, and
    an error that follows from it is not reported in its place. A thread ends the process if the
    block has not ended `PATIENCE_S` later: the main one may be in a long kernel, where Python
    handles no signals, or wait for a download.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over, asked, (signals, wakeup) = threading.Event(), threading.Event(), os.pipe()

    def terminate(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    os.set_blocking(wakeup, False)
    before = signal.signal(signal.SIGTERM, terminate), signal.set_wakeup_fd(wakeup)
    threading.Thread(target=_watch, args=(signals, over, terminate), daemon=True).start()
    try:
        yield
        if asked.is_set():
            raise Terminated
    except Exception as error:
        if asked.is_set():
            raise Terminated from error
        raise
    finally:
        over.set()
        signal.set_wakeup_fd(before[1])
        signal.signal(signal.SIGTERM, before[0])
        os.close(wakeup)


def clean_up() -> None:
    """Remove the claims and the half-written files of this process, if it wrote any."""
    if files := sys.modules.get("fastvideo.files"):  # `--help` does without it
        files.leave()


def _watch(signals: int, over: threading.Event, terminate: Any) -> None:
    with open(signals, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            # `train` has a handler of its own for a while, which ends after the step
            is_ours = signal.getsignal(signal.SIGTERM) in (terminate, signal.SIG_DFL)
            if number[0] == signal.SIGTERM and is_ours and not over.wait(PATIENCE_S):
                clean_up()
                if env.world_size() == 1:  # others hear it from their launcher
                    sys.stderr.write("terminated\n")
                os._exit(TERMINATED)
