"""Values and shared memory between two processes of a machine, over a Unix socket.

send(socket, value, segment)       # the segment's descriptor travels, its bytes do not
value, segment = receive(socket)   # EOFError if the other end is gone

Shared memory has no name: the kernel frees it with its last descriptor and mapping, so that
processes that are killed leave nothing behind.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import tempfile
from typing import Any

_HEAD = struct.Struct("<Q")


class Segment:
    """Shared memory, closed when nothing refers to it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def new(cls) -> Segment:
        """Make one without bytes."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("fastvideo"))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def __del__(self) -> None:
        """Close it here; other processes may still have it."""
        os.close(self.descriptor)


def send(
    stream: socket.socket, value: Any, segment: Segment | None = None, *, wait: bool = True
) -> None:
    """Send a value, with shared memory if there is some.

    `OSError` if the other end is gone; unless it may `wait`, also if that does not read.
    """
    data, flags = pickle.dumps(value), 0 if wait else socket.MSG_DONTWAIT
    descriptors = [] if segment is None else [segment.descriptor]
    socket.send_fds(stream, [_HEAD.pack(len(data))], descriptors, flags)
    stream.sendall(data, flags)


def receive(stream: socket.socket) -> tuple[Any, Segment | None]:
    """Wait for a value; `EOFError` at the end of the stream."""
    head, descriptors, _, _ = socket.recv_fds(stream, _HEAD.size, 1)
    segment = Segment(descriptors[0]) if descriptors else None
    head += _exactly(stream, _HEAD.size - len(head))
    return pickle.loads(_exactly(stream, _HEAD.unpack(head)[0])), segment


def _exactly(stream: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = stream.recv(size - len(data))
        if not more:
            raise EOFError("the other end is closed")
        data += more
    return bytes(data)
