"""Errors that callers tell apart; all are a `ValueError` with one line for the user."""

from __future__ import annotations


class NotFiniteError(ValueError):
    """A clip holds NaN or infinity: it would be black or noise, and is not written."""
