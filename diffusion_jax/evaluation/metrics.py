"""How far samples are from data: numbers from features and class probabilities.

On the host, in float64, whatever the features came in; what is drawn at random is drawn
from the seed alone. The features are the caller's. Only with those of the 2015
Inception network, on 50,000 samples, are the numbers what papers call FID, IS and KID.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from diffusion_jax.evaluation import moments


class Manifold(NamedTuple):
    """How two sets of features cover each other; see `precision_recall`."""

    precision: float
    """Share of the samples that lie among the data: fidelity, in [0, 1]."""
    recall: float
    """Share of the data that lie among the samples: diversity, in [0, 1]."""
    density: float
    """How many data a sample lies by, over what is expected: fidelity, at least 0."""
    coverage: float
    """Share of the data that have a sample by them: diversity, in [0, 1]."""


def frechet_distance(
    mean1: ArrayLike, covariance1: ArrayLike, mean2: ArrayLike, covariance2: ArrayLike
) -> float:
    """Returns the squared Frechet distance of two Gaussians; FID, for Inception's.

        |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

    Eq. 6, Heusel et al. 2017. With C = R R^T, the last trace is the sum of the singular
    values of R1^T R2: these are the square roots of the eigenvalues of C1^(1/2) C2
    C1^(1/2), but come without the square root of their rounding error, so covariances
    of fewer features than dimensions lose nothing. What rounding puts below 0 is 0.

    Args:
      mean1: [D], as all of `moments.finish` or `moments.load_reference`.
      covariance1: [D, D], symmetric and positive semi-definite.
      mean2: [D].
      covariance2: [D, D].

    Raises:
      ValueError: other shapes, numbers that are not finite, or no covariances.

    >>> frechet_distance([0.0, 0.0], np.eye(2), [3.0, 0.0], 4 * np.eye(2))
    11.0
    """
    mean1, covariance1 = moments.as_moments(mean1, covariance1, "1")
    mean2, covariance2 = moments.as_moments(mean2, covariance2, "2")
    if mean1.shape != mean2.shape:
        raise ValueError(
            "the two means must be of the same features; got "
            f"{len(mean1)} and {len(mean2)} of them. Use the same extractor for both."
        )
    product = _root(covariance1, "1").T @ _root(covariance2, "2")
    overlap = np.linalg.svd(product, compute_uv=False).sum()
    spread = np.trace(covariance1) + np.trace(covariance2) - 2 * overlap
    return max(0.0, float(np.sum((mean1 - mean2) ** 2) + spread))


def inception_score(
    logits: ArrayLike, *, splits: int = 10, seed: int | None = None
) -> tuple[float, float]:
    """Returns `(mean, standard deviation)` over the splits of exp(E KL(p(y|x), p(y))).

    Sec. 4, Salimans et al. 2016; E KL = H(E p) - E H(p), with H the entropy in nats.
    From 1 to the number of classes. Published scores are of the 1008 outputs of the
    2015 network before their bias is added.

    Args:
      logits: [N, C].
      splits: parts of the samples, each scored for itself, in the order of the file.
      seed: shuffles the samples first; without, a file sorted by class scores low.

    Raises:
      ValueError: fewer samples than splits, or no logits.

    >>> mean, std = inception_score(99 * np.eye(4), splits=1)
    >>> print(f"{mean:.3f} {std:.3f}")
    4.000 0.000
    """
    logits = moments.as_features(logits, "logits")
    count = len(logits)
    if not 1 <= splits <= count:
        raise ValueError(
            f"splits must be between 1 and the number of samples, {count}; got "
            f"{splits}. Draw more samples, or pass splits=1."
        )
    order = np.arange(count)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(count)
    scores = []
    for i in range(splits):
        # The same parts as the original code's where splits do not divide the count.
        part = logits[order[i * count // splits : (i + 1) * count // splits]]
        p = part.astype(np.float64)
        p = np.exp(p - p.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        scores.append(np.exp(_entropy(p.mean(axis=0)) - _entropy(p).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kid(
    features1: ArrayLike,
    features2: ArrayLike,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns `(mean, standard deviation)` over random subsets of the squared MMD.

    For subsets x and y of m features of D numbers each,

        sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 mean k(x_i, y_j)
        k(a, b) = (a . b / D + 1)^3

    The kernel inception distance of Binkowski et al. 2018. Unbiased however few the
    features are, so it may be below 0. The standard deviation is that of one subset,
    not the error of the mean.

    Args:
      features1: [N1, D].
      features2: [N2, D].
      subsets: how many subsets are drawn.
      subset_size: m; drawn without replacement.
      seed: of the draw.

    Raises:
      ValueError: other shapes, fewer features than a subset takes, or not finite ones.

    >>> kid(np.zeros([10, 4]), np.ones([10, 4]), subset_size=5)
    (7.0, 0.0)
    """
    features1, features2 = _pair(features1, features2, ("features1", "features2"), 2)
    if subsets < 1:
        raise ValueError(
            f"subsets must be at least 1; got {subsets}. The usual number is 100."
        )
    least = min(len(features1), len(features2))
    if not 2 <= subset_size <= least:
        raise ValueError(
            f"subset_size must be between 2 and the smaller number of features, "
            f"{least}; got {subset_size}. Extract more features, or pass "
            f"subset_size={least}."
        )
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            f[rng.choice(len(f), subset_size, replace=False)].astype(np.float64)
            for f in (features1, features2)
        )
        within = _off_diagonal_mean(_kernel(x, x)) + _off_diagonal_mean(_kernel(y, y))
        values.append(within - 2 * _kernel(x, y).mean())
    return float(np.mean(values)), float(np.std(values))


def precision_recall(
    real: ArrayLike, fake: ArrayLike, *, k: int = 3, batch: int = 1024
) -> Manifold:
    """Returns the precision, recall, density and coverage of samples.

    The ball of a point reaches to its k-th neighbour in its own set, itself not
    counted. Precision is the share of fake points in the ball of any real one, recall
    that of real points in the ball of any fake one (Eq. 2, Kynkaanniemi et al. 2019).
    Density is the mean number of real balls that a fake point is in, over k; coverage
    the share of real balls with a fake point in them (Naeem et al. 2020, who take
    k = 5). On the rim is inside.

    Args:
      real: features of the data, [N, D].
      fake: features of the samples, [M, D]. For the first two numbers, N and M should
        be alike: they depend on both.
      k: which neighbour.
      batch: points in a block; batch^2 distances are in memory at a time.

    Raises:
      ValueError: other shapes, not finite features, or k of a set or more.

    >>> line = np.arange(10.0).reshape(10, 1)
    >>> precision_recall(line, line[:5] + 0.25, k=1)
    Manifold(precision=1.0, recall=0.6, density=2.0, coverage=0.6)
    """
    if k < 1 or batch < 1:
        raise ValueError(
            f"k and batch must be at least 1; got {k} and {batch}. The usual k is 3."
        )
    real, fake = _pair(real, fake, ("real", "fake"), k + 1)
    # Distances keep more digits near the origin.
    origin = real.mean(axis=0, dtype=np.float64)
    real_radius = _radii(real, origin, k, batch)
    fake_radius = _radii(fake, origin, k, batch)
    in_real = np.zeros(len(fake), np.int64)
    in_fake, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, x in _blocks(real, origin, batch):
        for columns, y in _blocks(fake, origin, batch):
            distance = _squared_distances(x, y)
            inside = distance <= real_radius[rows, None]
            in_real[columns] += inside.sum(axis=0)
            covered[rows] |= inside.any(axis=1)
            in_fake[rows] |= (distance <= fake_radius[columns]).any(axis=1)
    return Manifold(
        precision=float(np.mean(in_real > 0)),
        recall=float(np.mean(in_fake)),
        density=float(np.mean(in_real) / k),
        coverage=float(np.mean(covered)),
    )


def nearest(points: np.ndarray, among: np.ndarray, *, batch: int = 1024) -> np.ndarray:
    """Returns which of some vectors is nearest to each point, int [N].

    Args:
      points: [N, D], of any type; N * batch distances are in memory at a time.
      among: [M, D]. Of equally near ones the first counts.
      batch: vectors in a block.

    >>> nearest(np.array([[0.9], [5.0]]), np.array([[0], [1], [2], [2]])).tolist()
    [1, 2]
    """
    origin = among.mean(axis=0, dtype=np.float64)
    best, found = np.full(len(points), np.inf), np.zeros(len(points), np.int64)
    for rows, block in _blocks(among, origin, batch):
        distance = _squared_distances(points - origin, block)
        place = distance.argmin(axis=1)
        least = distance[np.arange(len(points)), place]
        found = np.where(least < best, rows.start + place, found)
        best = np.minimum(best, least)
    return found


def _root(covariance: np.ndarray, name: str) -> np.ndarray:
    """Returns R [D, rank] with R R^T the covariance."""
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -1e-5 * values[-1]:
        raise ValueError(
            f"covariance {name} must have no eigenvalue below 0; got {values[0]:.3g}, "
            f"the largest being {values[-1]:.3g}. Make it with moments.finish."
        )
    # An eigenvalue of 0 comes out as rounding error, the root of which would count.
    rounding = len(values) * np.finfo(np.float64).eps * values[-1]
    kept = values > rounding
    return vectors[:, kept] * np.sqrt(values[kept])


def _entropy(p: np.ndarray) -> np.ndarray:
    """Returns -sum p log p over the last axis, in nats, where 0 log 0 is 0."""
    log = np.log(p, out=np.zeros_like(p), where=p > 0)
    return -np.sum(p * log, axis=-1)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    k = x @ y.T / x.shape[1] + 1
    return k * k * k  # NumPy takes ten times as long for a third power


def _off_diagonal_mean(kernel: np.ndarray) -> float:
    count = len(kernel)
    return (kernel.sum() - np.trace(kernel)) / (count * (count - 1))


def _pair(
    x: ArrayLike, y: ArrayLike, names: tuple[str, str], least: int
) -> tuple[np.ndarray, np.ndarray]:
    x = moments.as_features(x, names[0], least=least)
    return x, moments.as_features(y, names[1], least=least, dimension=x.shape[1])


def _blocks(
    x: np.ndarray, origin: np.ndarray, size: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields where a block of rows is and its float64 values, from the origin."""
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        yield rows, x[rows] - origin


KEPT = 1e-6
"""A squared distance that is a smaller share of its terms has lost too many digits."""


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns |x_i - y_j|^2, [N, M], to nine digits wherever the points lie.

    By |x_i|^2 + |y_j|^2 - 2 x_i . y_j; and once more from the differences themselves
    where that is far smaller than its terms and has lost its digits.
    """
    sizes = np.sum(x * x, axis=1)[:, None] + np.sum(y * y, axis=1)
    squared = sizes - 2 * (x @ y.T)
    near = squared < KEPT * sizes
    for i in np.flatnonzero(near.any(axis=1)):
        squared[i, near[i]] = np.square(y[near[i]] - x[i]).sum(axis=1)
    return squared


def _radii(x: np.ndarray, origin: np.ndarray, k: int, batch: int) -> np.ndarray:
    """Returns the squared distance of each point to its k-th neighbour, [N].

    It is more by the rounding of two distances, so that what is on the rim is inside,
    and equal points are in each other's balls of radius 0.
    """
    rounding = 16 * x.shape[1] * np.finfo(np.float64).eps
    radii = np.empty(len(x))
    for rows, points in _blocks(x, origin, batch):
        nearest = np.full((len(points), k), np.inf)
        for columns, others in _blocks(x, origin, batch):
            distance = _squared_distances(points, others)
            if rows == columns:
                np.fill_diagonal(distance, np.inf)
            known = np.concatenate([nearest, distance], axis=1)
            nearest = np.partition(known, k - 1, axis=1)[:, :k]
        radius = nearest.max(axis=1)
        # As many digits as `_squared_distances` keeps.
        size = np.minimum(np.sum(points**2, axis=1), radius / KEPT)
        radii[rows] = radius + rounding * (size + radius)
    return radii
