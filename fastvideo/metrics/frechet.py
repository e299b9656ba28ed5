"""Fréchet distance between two sets of features, each taken as a Gaussian."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Features = npt.ArrayLike


def frechet(features_NF: Features, reference_MF: Features) -> float:
    """Return |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), 0 for equal sets (Dowson and Landau 1982).

    With centred sets X = QR and X' = Q'R', C = X^T X / (n - 1), the last trace is the sum of the
    singular values of R R'^T, so that no square root of a matrix is taken. The distance of finite
    sets is above that of their distributions: compare it with the one of two true sets of as many.
    Raises `ValueError` unless both sets have more samples than features.
    """
    sets = [np.asarray(x, np.float64) for x in (features_NF, reference_MF)]
    if any(x.ndim != 2 for x in sets) or sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"features to compare have shapes {sets[0].shape} and {sets[1].shape}")
    least = sets[0].shape[1] + 1
    for x in sets:
        if len(x) < least:
            raise ValueError(
                f"{len(x)} samples of {least - 1} features are too few for a covariance;"
                f" {least} are the least"
            )
    means = [x.mean(0) for x in sets]
    roots = [_root(x - m) for x, m in zip(sets, means, strict=True)]
    spread = sum(float(np.square(r).sum()) for r in roots)  # both traces
    shared = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    return max(0.0, float(np.square(means[0] - means[1]).sum()) + spread - 2 * shared)


def _root(centred_NF: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return R (F, F) with R^T R the covariance."""
    root = np.asarray(np.linalg.qr(centred_NF, mode="r"), np.float64)
    scaled: npt.NDArray[np.float64] = root / np.sqrt(len(centred_NF) - 1)
    return scaled
