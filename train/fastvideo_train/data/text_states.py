"""Text states that `fastvideo data encode` stored, in the place of the text encoder of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fastvideo import weights
from fastvideo_train.data._manifest import VideoManifest, num_shards, read_manifest
from fastvideo_train.data._stores import shard_name


class StoredText(nn.Module):
    """Answers as the encoder would, for the prompts whose states a folder of latents holds.

    They are found by their token ids. Files are mapped. Raises `ValueError` for a folder without
    text states.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # tells the device
        self._rows: dict[bytes, tuple[Tensor, int, int]] = {}
        for path in text_shards(self.folder):
            shard = weights.Checkpoint(path)
            ids, states = shard.tensor("ids"), shard.tensor("states")
            stops = shard.tensor("lengths").cumsum(0).tolist()
            for start, stop in zip([0, *stops], stops, strict=False):
                self._rows[_key(ids[start:stop])] = states, start, stop

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the states (B, L, C) of prompts, zero after each prompt's end."""
        found = [self._find(ids[mask.bool()]) for ids, mask in zip(ids_BL, mask_BL, strict=True)]
        out_BLC = found[0].new_zeros(*ids_BL.shape, found[0].shape[1])
        for row_LC, states_LC in zip(out_BLC, found, strict=True):
            row_LC[: len(states_LC)] = states_LC
        return out_BLC.to(self.place.device)

    def _find(self, ids_L: Tensor) -> Tensor:
        key = _key(ids_L)
        if key not in self._rows:
            raise ValueError(
                f"a prompt of {len(ids_L)} tokens has no state in {self.folder}; it holds those of"
                " its captions and of --prompt"
            )
        states, start, stop = self._rows[key]
        return states[start:stop]


def text_shards(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder's text states; `ValueError` if it has none."""
    manifest = read_manifest(folder)
    if not isinstance(manifest, VideoManifest):
        raise ValueError(f"{folder} holds no text states: it was encoded from a world")
    for i in range(num_shards(manifest.text.count, manifest.shard_size)):
        yield folder / shard_name("text", i)


def stored_prompts(folder: Path) -> set[str]:
    """Return the prompts whose states a folder holds."""
    texts = (weights.read_metadata(path)["text"] for path in text_shards(folder))
    return {prompt for text in texts for prompt in json.loads(text)}


def _key(ids_L: Tensor) -> bytes:
    return ids_L.to("cpu", torch.int32).numpy().tobytes()
