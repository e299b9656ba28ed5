"""API keys: who asks, and how much each key may ask for."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi import Request

from fastvideo_inference.engine.config import KeyConfig
from fastvideo_inference.serve.errors import ApiError


@dataclass
class _Bucket:
    """Tokens of a key: one a request, `rate` of them come back in a minute."""

    tokens: float
    filled_at_s: float
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Keys:
    """The keys of a config. Without any, everybody is the owner "" and has no limits."""

    def __init__(self, keys: tuple[KeyConfig, ...]) -> None:
        self._keys = {key.name: key for key in keys}
        self._streams: Counter[str] = Counter()
        self._buckets = {key.name: _Bucket(_burst(key), time.monotonic()) for key in keys}

    def owner(self, request: Request) -> str:
        """Return the name of a request's key; 401 if it has none or an unknown one."""
        if not self._keys:
            return ""
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(secret.strip().encode()).hexdigest()
        # all of them, so that the time tells nothing about any
        found = [key.name for key in self._keys.values() if hmac.compare_digest(digest, key.sha256)]
        if scheme.lower() != "bearer" or not found:
            text = "send a valid API key as the header 'Authorization: Bearer KEY'"
            raise ApiError(401, text, code="invalid_api_key")
        return found[0]

    @contextmanager
    def stream(self, owner: str, *, limit: int) -> Iterator[None]:
        """Hold one of the event streams that an owner may have open at once; 429 if it has all."""
        if self._streams[owner] >= limit:
            text = f"{limit} event streams are open; poll instead, or close one"
            raise ApiError(429, text, code="too_many_streams", retry_after_s=1)
        self._streams[owner] += 1
        try:
            yield
        finally:
            self._streams[owner] -= 1

    def lock(self, owner: str) -> asyncio.Lock:
        """Return what a creation of this owner holds from its check to its job."""
        return self._buckets[owner].lock if owner else asyncio.Lock()

    def check(self, owner: str, *, running: int) -> None:
        """Raise 429 if a key that has `running` jobs may not ask for another one now."""
        if not owner:
            return
        key, bucket = self._keys[owner], self._buckets[owner]
        if key.running is not None and running >= key.running:
            text = f"key {owner!r} has {running} unfinished jobs; its limit is {key.running}"
            raise ApiError(429, text, code="running_limit", retry_after_s=1)
        if key.rate is None:
            return
        now, each_s = time.monotonic(), 60 / key.rate
        bucket.tokens = min(_burst(key), bucket.tokens + (now - bucket.filled_at_s) / each_s)
        bucket.filled_at_s = now
        if bucket.tokens < 1:
            text = f"key {owner!r} may ask for {key.rate:g} clips a minute"
            wait_s = (1 - bucket.tokens) * each_s
            raise ApiError(429, text, code="rate_limit_exceeded", retry_after_s=wait_s)

    def count(self, owner: str) -> None:
        """Take a token for a job that was accepted."""
        if owner:
            self._buckets[owner].tokens -= 1


def _burst(key: KeyConfig) -> float:
    return max(1.0, key.rate or 1.0)
