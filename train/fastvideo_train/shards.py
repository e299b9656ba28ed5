"""Tensors that are cut over processes, on disk: each writes its own, any number reads them again.

A state is a tree of mappings, as strategies return it. Its `DTensor` leaves go through
torch.distributed.checkpoint into a folder of their own, under their paths; in the tree that is
stored beside it their places hold what tells shape and type alone, a tensor on "meta". Both parts
of torch are imported where they are needed: they take longer than all else that a run imports.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FOLDER = "shards"


def is_cut(leaf: Any) -> bool:
    """Whether a leaf is a tensor of which every process holds a part."""
    module = sys.modules.get("torch.distributed.tensor")  # without it nobody made one
    return module is not None and isinstance(leaf, module.DTensor)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree of mappings with their paths, such as student/masters/w."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}" if path else str(key))
    else:
        yield path, tree


def replaced(tree: Any, new: Callable[[str, Any], Any], path: str = "") -> Any:
    """Return a tree with `new(path, leaf)` for every leaf."""
    if isinstance(tree, Mapping):
        return {k: replaced(v, new, f"{path}/{k}" if path else str(k)) for k, v in tree.items()}
    return new(path, tree)


def split(tree: Any) -> tuple[Any, dict[str, DTensor]]:
    """Return the tree to store in one file, and the tensors that every process writes itself."""
    cut = {path: leaf for path, leaf in leaves(tree) if is_cut(leaf)}
    return replaced(tree, lambda path, leaf: _outline(leaf) if path in cut else leaf), cut


def write(cut: Mapping[str, DTensor], folder: Path) -> None:
    """Write this process's parts; all processes together. `RuntimeError` on all if one fails."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(cut), checkpoint_id=str(folder))
    except CheckpointException as error:  # no Exception, so that nothing would catch it
        raise RuntimeError(f"a process cannot write its part: {error}") from error


def filled(tree: Any, folder: Path, like: Any = None) -> Any:
    """Return a stored tree with its tensors read from `folder`.

    They go in place into the cut tensors that `like`, the live state, has under the same paths and
    in the same shape; what it lacks stays an outline. A state without any, or none at all, gets
    whole tensors on the CPU. Raises `ValueError` if the files are damaged.
    """
    live = {path: leaf for path, leaf in leaves(like or {}) if is_cut(leaf)}
    wanted: dict[str, Tensor] = {}
    for path, leaf in leaves(tree):
        if not (isinstance(leaf, Tensor) and leaf.is_meta):
            continue
        if not live:
            wanted[path] = torch.empty_like(leaf, device="cpu")
        elif path in live and live[path].shape == leaf.shape:
            wanted[path] = live[path]
    fill(wanted, folder)
    return replaced(tree, lambda path, leaf: wanted.get(path, leaf))


def fill(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Read what is stored under the tensors' paths into them; a cut one takes its part.

    Raises `ValueError` if the files are damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():  # that a single process reads is what was asked for
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(dict(tensors), checkpoint_id=str(folder), no_dist=True)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise ValueError(f"checkpoint {folder} cannot be read: {error}") from None


def _outline(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
