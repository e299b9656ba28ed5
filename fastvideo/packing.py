"""A stage's state as plain tensors and JSON, to be stored or sent to another process.

tensors, text = pack(state)  # a dict of plain CPU tensors (safetensors takes it) and JSON
state = unpack(tensors, text, device="cuda")

num_bytes = write(state, descriptor)  # both in one file, such as shared memory
state = read(descriptor)              # maps it: nothing is copied on a CPU
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvideo.sampling import SamplingParams
from fastvideo.stages import State

_ALIGNMENT, _SIZE_BYTES = 64, 8  # of tensors in a file; of the size of its JSON
# Types are named in the JSON; these packages hold nothing but what a model is made of.
_TRUSTED = ("fastvideo.models.", "fastvideo.schedulers", "fastvideo.stages")


def pack(state: State) -> tuple[dict[str, Tensor], str]:
    """Split a state into tensors by dotted name and the JSON that puts them together again."""
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    return tensors, json.dumps(tree)


def unpack(tensors: Mapping[str, Tensor], text: str, *, device: Any = "cpu") -> State:
    """Build the state that `pack` split; `ValueError` if the JSON names a type that is not ours."""
    state = _unpack(json.loads(text), tensors, torch.device(device))
    if not isinstance(state, State):
        raise ValueError(f"packed value is a {type(state).__name__}, not a State")
    return state


def write(state: State, descriptor: int) -> int:
    """Write a state to a file that is empty, and return its number of bytes."""
    tensors, text = pack(state)
    offset, index = 0, {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        index[name] = (dtype, tuple(tensor.shape), offset)
        offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    head = json.dumps({"text": text, "tensors": index}).encode()
    start = -(-(_SIZE_BYTES + len(head)) // _ALIGNMENT) * _ALIGNMENT
    with os.fdopen(os.dup(descriptor), "r+b", buffering=0) as file:
        file.truncate(start + offset)
        file.write(len(head).to_bytes(_SIZE_BYTES, "little") + head)
        for name, tensor in tensors.items():
            file.seek(start + index[name][2])
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return start + offset


def read(descriptor: int, *, device: Any = "cpu") -> State:
    """Read what `write` wrote; the file may be closed while its tensors live on."""
    data = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    size = int.from_bytes(data[:_SIZE_BYTES], "little")
    head = json.loads(data[_SIZE_BYTES : _SIZE_BYTES + size])
    start = -(-(_SIZE_BYTES + size) // _ALIGNMENT) * _ALIGNMENT
    flat, tensors = torch.frombuffer(data, dtype=torch.uint8), {}
    for name, (kind, shape, offset) in head["tensors"].items():
        dtype = getattr(torch, kind)
        end = start + offset + dtype.itemsize * math.prod(shape)
        tensors[name] = flat[start + offset : end].view(dtype).reshape(shape)
    return unpack(tensors, head["text"], device=device)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(np.ascontiguousarray(value))
        return {"array": name}
    if isinstance(value, SamplingParams):
        return {"params": value.model_dump()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"type": kind, "fields": _pack_items(fields, name, tensors)}
    if isinstance(value, dict):
        return {"dict": _pack_items(value, name, tensors)}
    if isinstance(value, tuple | list):
        items = [_pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
        return {type(value).__name__: items}
    assert value is None or isinstance(value, int | float | str), f"{name}: {type(value)}"
    return value


def _pack_items(values: Mapping[str, Any], name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {k: _pack(v, f"{name}.{k}".lstrip("."), tensors) for k, v in values.items()}


def _unpack(tree: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    match tree:
        case {"tensor": name}:
            return tensors[name].to(device)
        case {"array": name}:
            return tensors[name].numpy()
        case {"params": values}:
            return SamplingParams.model_validate(values)
        case {"type": kind, "fields": fields}:
            values = {k: _unpack(v, tensors, device) for k, v in fields.items()}
            return _trusted(kind)(**values)
        case {"dict": items}:
            return {k: _unpack(v, tensors, device) for k, v in items.items()}
        case {"tuple": items}:
            return tuple(_unpack(v, tensors, device) for v in items)
        case {"list": items}:
            return [_unpack(v, tensors, device) for v in items]
        case _:
            return tree


def _trusted(kind: str) -> Any:
    module, _, name = kind.partition(":")
    if not module.startswith(_TRUSTED):
        raise ValueError(f"packed state names the type {kind}, which is not part of a model")
    found = getattr(import_module(module), name)
    if not dataclasses.is_dataclass(found):
        raise ValueError(f"packed state names {kind}, which is not a dataclass")
    return found
