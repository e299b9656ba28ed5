"""Exit codes, the errors that callers tell apart, and an error as one line for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

OK, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


class RefusedError(ValueError):
    """What the user asked for is illegal, found out before any work was done: exit code 2."""


class Terminated(BaseException):
    """SIGTERM came: clean up and end."""


class NotFiniteError(ValueError):
    """A clip holds NaN or infinity: it would be black or noise, and is not written."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turn `ValueError` and `OSError` raised while a request is read into `RefusedError`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise RefusedError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """Return an exception's message as one line, with its type where users can only report it."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, ModuleNotFoundError)) and text:
        return text
    hint = "FASTVIDEO_LOG=debug shows where"
    return (
        f"{type(error).__name__}: {text} ({hint})" if text else f"{type(error).__name__} ({hint})"
    )
