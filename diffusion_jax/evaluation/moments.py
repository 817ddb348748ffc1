"""Mean and covariance of features, in one pass over batches of any size.

What is carried is small (33.6 MB for 2048 features, however many images) and adds up
over hosts.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from diffusion_jax.storage import archives, files


class Statistics(NamedTuple):
    """Sums over the features so far, in float64."""

    number: int
    """How many features were seen."""
    mean: np.ndarray
    """[D]."""
    scatter: np.ndarray
    """Sum of (x - mean) (x - mean)^T over the features x, [D, D]."""


def init(dimension: int) -> Statistics:
    """Returns the statistics of no features at all, each of `dimension` numbers.

    >>> init(3).scatter.shape
    (3, 3)
    """
    if dimension < 1:
        raise ValueError(
            f"dimension must be at least 1; got {dimension}. It is the number of "
            "features of an image, 2048 for Inception's last pooling."
        )
    return Statistics(0, np.zeros(dimension), np.zeros((dimension, dimension)))


def update(stats: Statistics, features: ArrayLike) -> Statistics:
    """Returns the statistics after one more batch.

    Args:
      stats: those before it.
      features: [B, D], of any type; summed in float64.

    Raises:
      ValueError: another shape, or a feature that is not finite.

    >>> stats = update(init(1), [[1.0], [3.0]])
    >>> stats.number, stats.mean
    (2, array([2.]))
    """
    features = as_features(features, least=0, dimension=len(stats.mean))
    if len(features) == 0:
        return stats
    x = features.astype(np.float64)
    mean = x.mean(axis=0)
    x -= mean
    return merge(stats, Statistics(len(x), mean, x.T @ x))


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Returns the statistics of the features of a and b together.

    With d = mean_b - mean_a and n = n_a + n_b, the mean is mean_a + d n_b / n and the
    scatter S_a + S_b + d d^T n_a n_b / n: Chan, Golub and LeVeque 1983. Unlike sums of
    x and x x^T, this subtracts no large numbers where the mean is far from 0.

    >>> finish(merge(update(init(1), [[1.0], [3.0]]), update(init(1), [[8.0]])))
    (array([4.]), array([[13.]]))
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"statistics to merge must be of the same features; got {len(a.mean)} and "
            f"{len(b.mean)} of them. Use the same extractor for both."
        )
    number = a.number + b.number
    if number == 0:
        return a
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.number / number)
    between = np.outer(delta, delta) * (a.number * b.number / number)
    return Statistics(number, mean, a.scatter + b.scatter + between)


def finish(stats: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(mean [D], covariance [D, D])`, the covariance over number - 1.

    Raises:
      ValueError: of fewer than two features.

    >>> finish(update(init(2), [[0.0, 1.0], [2.0, 5.0]]))[1]
    array([[2., 4.],
           [4., 8.]])
    """
    if stats.number < 2:
        raise ValueError(
            f"a covariance must be of at least 2 features; got {stats.number}. Give "
            "more batches to update."
        )
    return stats.mean, stats.scatter / (stats.number - 1)


def save(stats: Statistics, path: str | os.PathLike[str]) -> Path:
    """Writes mean and covariance to an .npz file, whole or not at all.

    The arrays are `mu` and `sigma`, as other tools call reference statistics, and
    `number`. Returns the path.

    Raises:
      ValueError: of fewer than two features.
    """
    path = Path(path)
    mean, covariance = finish(stats)
    with files.replacing(path) as file:
        np.savez(file, number=stats.number, mu=mean, sigma=covariance)
    return path


def load_reference(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(mean [D], covariance [D, D])` of an .npz file with `mu` and `sigma`.

    That is the form in which the statistics of data sets are passed around, and part
    of what `save` writes. Pickles in the file are never opened.

    Raises:
      ValueError: a file without them, or a damaged one.
      FileNotFoundError: no such file.
    """
    try:
        arrays = archives.read_npz(path, lambda _: ("mu", "sigma"))
    except archives.ArchiveError as error:
        raise ValueError(
            f"{path} must be an .npz file of plain arrays mu and sigma; got {error}. "
            "Write it with moments.save."
        ) from error
    return as_moments(arrays["mu"], arrays["sigma"], f"in {path}")


def as_features(
    features: ArrayLike,
    name: str = "features",
    *,
    least: int = 1,
    dimension: int | None = None,
) -> np.ndarray:
    """Returns features as an array [N, D], after checking that they are finite.

    Args:
      features: [N, D].
      name: what an error calls them.
      least: smallest N that will do.
      dimension: the D they must have; any when not given.
    """
    features = np.asarray(features)
    columns = features.shape[1] if features.ndim == 2 else 0
    if columns == 0 or columns != (dimension or columns):
        raise ValueError(
            f"{name} must be of shape [N, {dimension or 'D'}]; got "
            f"{list(features.shape)}. Flatten what an image gives to one row, and use "
            "the same extractor throughout."
        )
    if len(features) < least:
        raise ValueError(
            f"{name} must be of at least {least} images; got {len(features)}. Extract "
            "them from more images."
        )
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{name} must be finite; got {len(finite) - finite.sum()} rows that are "
            f"not, the first at {finite.argmin()}. Look at that image, and leave out "
            "rows that are padding."
        )
    return features


def as_moments(
    mean: ArrayLike, matrix: ArrayLike, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a mean [D] and a symmetric matrix [D, D] in float64, checked.

    `name` is what an error calls them. The matrix may be off symmetry by 1e-5 of its
    largest entry, as those summed in float32 are; what is returned is its symmetric
    part.
    """
    kinds = {np.asarray(array).dtype.kind for array in (mean, matrix)}
    if not kinds <= set("fiu"):
        raise ValueError(
            f"mean and covariance {name} must be of real numbers; got arrays of other "
            "types. Make them with moments.finish."
        )
    mean, matrix = np.asarray(mean, np.float64), np.asarray(matrix, np.float64)
    if mean.ndim != 1 or not mean.size or matrix.shape != 2 * mean.shape:
        raise ValueError(
            f"mean and covariance {name} must be of shapes [D] and [D, D]; got "
            f"{list(mean.shape)} and {list(matrix.shape)}. Make them with "
            "moments.finish."
        )
    if not (np.isfinite(mean).all() and np.isfinite(matrix).all()):
        raise ValueError(
            f"mean and covariance {name} must be finite; got some that are not. Make "
            "them from finite features, with moments.finish."
        )
    # What others computed may be below 0 by rounding, for a feature that is constant.
    if matrix.diagonal().min() < -1e-5 * np.abs(matrix).max():
        raise ValueError(
            f"covariance {name} must have variances of at least 0 on its diagonal; got "
            f"{matrix.diagonal().min():.3g}. Make it with moments.finish."
        )
    skew = np.abs(matrix - matrix.T).max()
    if skew > 1e-5 * np.abs(matrix).max():
        raise ValueError(
            f"covariance {name} must be symmetric; got entries {skew:.3g} apart. Make "
            "it with moments.finish, or np.cov(features, rowvar=False)."
        )
    return mean, matrix if skew == 0 else (matrix + matrix.T) / 2
