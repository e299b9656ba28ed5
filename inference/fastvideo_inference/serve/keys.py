"""API keys: who asks, and how much each key may ask for."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request

from fastvideo_inference.engine.config import KeyConfig
from fastvideo_inference.serve import guard
from fastvideo_inference.serve.errors import ApiError


class Keys:
    """The keys of a config. Without any, everybody is the owner "".

    `locks` holds one for each owner, from the check of a creation to its job.
    """

    def __init__(self, keys: tuple[KeyConfig, ...]) -> None:
        self._keys = {key.name: key for key in keys}
        self._streams: Counter[str] = Counter()
        self._due_s: defaultdict[str, float] = defaultdict(float)
        self.locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def owner(self, request: Request) -> str:
        """Return the name of a request's key; 401 if it has none or an unknown one."""
        if not self._keys:
            return ""
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(secret.strip().encode()).hexdigest()
        # all of them, so that the time says nothing about any
        found = [key.name for key in self._keys.values() if hmac.compare_digest(digest, key.sha256)]
        if scheme.lower() != "bearer" or not found:
            text = "send a valid API key as the header 'Authorization: Bearer KEY'"
            raise ApiError(401, text, code="invalid_api_key")
        return found[0]

    def check(self, owner: str, *, running: int, clips: int = 1) -> None:
        """Raise 429 if a key that has `running` jobs may not ask for `clips` more now."""
        key = self._keys.get(owner)
        if key and key.running is not None and running + clips > key.running:
            text = f"key {owner!r} has {running} unfinished jobs; its limit is {key.running}"
            raise ApiError(429, text, code="running_limit", retry_after_s=1)
        if key and key.rate is not None:
            # a minute's jobs may come at once, and a request that asks for more of an idle key
            burst_s = max(0.0, 60 - clips * 60 / key.rate)
            wait_s = self._due_s[owner] - burst_s - time.monotonic()
            if wait_s > 0:
                text = f"key {owner!r} may ask for {key.rate:g} clips a minute"
                raise ApiError(429, text, code="rate_limit_exceeded", retry_after_s=wait_s)

    def count(self, owner: str, *, clips: int = 1) -> None:
        """Count accepted clips against the rate of its key."""
        key = self._keys.get(owner)
        if key and key.rate is not None:
            self._due_s[owner] = max(self._due_s[owner], time.monotonic()) + clips * 60 / key.rate

    @contextmanager
    def stream(self, owner: str, *, limit: int) -> Iterator[None]:
        """Hold one of the event streams that an owner may have open at once; 429 if it has all.

        All owners have half of the server's requests, so that others are answered.
        """
        most = guard.MAX_OPEN // 2
        if self._streams[owner] >= limit or self._streams.total() >= most:
            limit = min(limit, most)
            text = f"{limit} event streams are open; poll instead, or close one"
            raise ApiError(429, text, code="too_many_streams", retry_after_s=1)
        self._streams[owner] += 1
        try:
            yield
        finally:
            self._streams[owner] -= 1
