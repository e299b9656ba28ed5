"""Diversity: how far apart clips of one prompt are, in features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def diversity(groups: Sequence[npt.ArrayLike]) -> float:
    """Return the mean Euclidean distance of two features of a group, averaged over the groups.

    Each group (n, F) holds the features of clips of one prompt; 0 if all of a group are the same.
    Raises `ValueError` without groups or for one of fewer than two clips.
    """
    if not groups:
        raise ValueError("diversity needs at least one group of clips")
    return float(np.mean([_spread(np.asarray(group, np.float64)) for group in groups]))


def _spread(x_NF: npt.NDArray[np.float64]) -> float:
    if x_NF.ndim != 2 or len(x_NF) < 2:
        raise ValueError(f"a group of shape {x_NF.shape} has no two features (n, F) to compare")
    first, second = np.triu_indices(len(x_NF), k=1)
    return float(np.linalg.norm(x_NF[first] - x_NF[second], axis=1).mean())
