"""Fréchet distance between features, from moments that are merged in one pass."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from fvjax import _validate

_FEATURES_AT_ONCE = 1024  # examples between two merges, which cost k^2 each, as one example does


class FeatureMoments(NamedTuple):
    """Mean and scatter of `count` feature vectors, float64 on the host; mergeable, see `merge_feature_moments`.

    Attributes:
        count: number of examples.
        mean: [k].
        scatter: [k, k], the sum over examples of (f - mean)(f - mean)^T; the covariance is scatter / (count - 1).
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody wants of moments
    mean: np.ndarray
    scatter: np.ndarray

    def covariance(self) -> np.ndarray:
        """Unbiased covariance (ddof = 1, as FID is computed everywhere), [k, k]; needs at least 2 examples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 examples, got {self.count}")
        return self.scatter / (self.count - 1)


def feature_moments(batches: Iterable[Any]) -> FeatureMoments:
    """Moments of features that arrive in batches, in one pass; it does not matter how they are cut.

    Every 1024 examples are centred at their own mean and merged into the rest: no squares of uncentred values, which
    would cancel. Memory: 3 [k, k] matrices, whatever the number of examples.

    Args:
        batches: arrays [n_i, k], real numbers, such as `features(images)`; batches of 0 examples are skipped.

    Returns:
        FeatureMoments(count, mean [k], scatter [k, k]).

    Raises:
        ValueError: if there is no example, or a batch is not [n, k] with one common k, or not finite.

    Source: Chan, Golub, LeVeque 1979 (the merge).
    """
    total: FeatureMoments | None = None
    waiting: list[np.ndarray] = []
    dimension = None
    for index, batch in enumerate(batches):
        features = np.asarray(batch, np.float64)
        if features.ndim != 2 or features.shape[1] != (features.shape[1] if dimension is None else dimension):
            expected = "k" if dimension is None else dimension
            raise ValueError(f"batch {index} of features must have shape [n, {expected}], got {features.shape}")
        dimension = features.shape[1]
        _validate.finite(f"batch {index} of features", features)
        waiting.append(features)
        if sum(map(len, waiting)) >= _FEATURES_AT_ONCE:
            total, waiting = _merged_with(total, waiting), []
    total = _merged_with(total, waiting)
    if total is None:
        raise ValueError("features must hold at least one example, got 0")
    return total


def merge_feature_moments(a: FeatureMoments, b: FeatureMoments) -> FeatureMoments:
    """Moments of both sets of examples together; associative and commutative up to rounding.

    With n = n_a + n_b and d = mean_b - mean_a:

        mean = mean_a + d n_b / n,   scatter = scatter_a + scatter_b + d d^T n_a n_b / n.

    Args:
        a: moments of n_a >= 0 examples.
        b: moments of n_b >= 0 others, of the same k.

    Returns:
        FeatureMoments of n_a + n_b examples.

    Raises:
        ValueError: if the numbers of features differ.

    Source: Chan, Golub, LeVeque 1979.
    """
    _validate.same_shape("a.mean", a.mean, "b.mean", b.mean)
    count = a.count + b.count
    if count == 0:
        return a
    difference = b.mean - a.mean
    scatter = a.scatter + b.scatter
    scatter += np.outer(difference * (a.count * b.count / count), difference)
    return FeatureMoments(count, a.mean + difference * (b.count / count), scatter)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    r"""Squared Fréchet distance (squared Wasserstein-2) between the Gaussians of two sets of features.

        |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2}),   S unbiased (ddof = 1).

    Between Inception features this is the FID. It is biased upwards by a finite number of examples (by about
    (1/n_a + 1/n_b) times a constant of the features), so compare only distances with equal numbers of them.

    With S = R R^T the last trace is the sum of the singular values of R_a^T R_b: the eigenvalues of S_a S_b, or of
    S_a^{1/2} S_b S_a^{1/2}, are their squares. Taken that way nothing becomes complex, and a singular S (fewer examples
    than features) is no special case. R comes from the symmetric eigendecomposition; eigenvalues below k epsilon times
    the largest are rounding and count as 0.

    =================================  ==========================================
    a = b                              0 up to rounding; a negative rounding is 0
    k = 1                              (m_a - m_b)^2 + (s_a - s_b)^2
    S_a S_b = S_b S_a                  |m_a - m_b|^2 + |S_a^{1/2} - S_b^{1/2}|_F^2
    =================================  ==========================================

    Args:
        a: moments of at least 2 examples.
        b: moments of at least 2 examples, of the same k.

    Returns:
        The distance, >= 0, in squared units of the features, from float64 (k = 2048: about 10 s on 2 idle cores).

    Raises:
        ValueError: if the numbers of features differ, a set has fewer than 2 examples, or a moment is not finite.

    Source: Dowson and Landau 1982; Heusel et al. 2017 (FID).
    """
    for name, moments in (("a", a), ("b", b)):
        if moments.count < 2:
            raise ValueError(f"{name} must hold at least 2 examples, got {moments.count}")
        _validate.finite(f"{name}.mean", moments.mean)
        _validate.finite(f"{name}.scatter", moments.scatter)
    _validate.same_shape("a.mean", a.mean, "b.mean", b.mean)
    root_a, root_b = _factor(a.covariance()), _factor(b.covariance())
    overlap = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum()
    shift = float(np.sum((a.mean - b.mean) ** 2))
    return max(shift + float(np.sum(root_a**2) + np.sum(root_b**2) - 2 * overlap), 0.0)


def _merged_with(total: FeatureMoments | None, parts: list[np.ndarray]) -> FeatureMoments | None:
    """`total` and the features in `parts`, which may be none."""
    if not sum(map(len, parts)):
        return total
    features = np.concatenate(parts)
    mean = features.mean(axis=0)
    centred = features - mean
    moments = FeatureMoments(len(features), mean, centred.T @ centred)
    return moments if total is None else merge_feature_moments(total, moments)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """R [k, r] with R R^T = covariance, of its numerical rank r."""
    eigenvalues, vectors = np.linalg.eigh(covariance)
    kept = eigenvalues > len(covariance) * np.finfo(np.float64).eps * np.max(np.abs(eigenvalues), initial=0.0)
    return vectors[:, kept] * np.sqrt(eigenvalues[kept])
