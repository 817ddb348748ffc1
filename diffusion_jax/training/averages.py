"""Averages of the weights (EMA): profiles to track, and any other length afterwards.

A profile is the decay of an average as a function of the step. Training does

  average <- decay(step) average + (1 - decay(step)) params

where step is the number of updates before this one, 0 for the first.

The power-function average of Karras et al. 2024 (Sec. 3.1, "Analyzing and improving
the training dynamics of diffusion models") forgets in proportion to how long training
has gone on. With p = gamma + 1, after n updates the weights of update k or earlier have

  (1)  P(k) = (k / n)^p                     the running sum of the profile
  (2)  sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))

and sigma, the standard deviation of the profile in units of n, is the average's
relative length. (1) is exact, not a limit of many updates: the product of the decays
(1 - 1/n)^p telescopes to it. So the formulas of `solve`, in continuous time, hold for
any number of updates.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import first_of
from diffusion_jax.storage import tensor_files, trees

PyTree = Any
Profile = Callable[[jax.Array], jax.Array]

LONGEST = 0.28
"""Relative length near that of the plain mean of all weights, 1 / sqrt(12)."""

FORMAT = "diffusion_jax.average"
VERSION = 1
# Whatever JSON of another kind leads to, such as endless nesting or an infinite number.
_DAMAGE = (
    *(ValueError, KeyError, TypeError),
    *(AttributeError, OverflowError, RecursionError),
)


class Snapshot(NamedTuple):
    """The step and the length of an average."""

    step: int
    """Number of updates made."""
    length: float
    """Relative length of the power-function average."""


def exponential(decay: float, *, ramp: bool = False) -> Profile:
    """Returns the profile of a moving average of constant decay.

    Args:
      decay: of the average a step.
      ramp: whether the decay rises from 0.1 as (1 + step) / (10 + step) until it
        reaches `decay`. Without, the average after the first update is a copy of the
        weights, as in the official code of DDPM.

    Raises:
      ValueError: a decay outside [0, 1).

    >>> print(exponential(0.999)(0), exponential(0.999, ramp=True)(0))
    0.0 0.1
    """
    if not 0 <= decay < 1:
        raise ValueError(
            f"decay must be at least 0 and below 1; got {decay}. The larger it is, the "
            "longer the average: 0.9999 spans 10,000 steps."
        )

    # Its result is weakly typed, so that an average keeps the type of its weights.
    def profile(step: jax.Array) -> jax.Array:
        if ramp:
            return jnp.minimum(decay, (1.0 + step) / (10.0 + step))
        return jnp.where(step < 1, 0.0, decay)

    return profile


def power(length: float) -> Profile:
    """Returns the profile of the power-function average of a relative length.

    decay = (1 - 1/n)^(gamma + 1) at update n = step + 1 (Sec. 3.1, Karras et al. 2024).

    Args:
      length: standard deviation of the profile in units of the time trained so far;
        0.05 and 0.10 are the paper's.

    Raises:
      ValueError: a length outside (0, 0.28].

    >>> print([f"{power(0.05)(step):.4f}" for step in (0, 99, 9999)])
    ['0.0000', '0.8347', '0.9982']
    """
    exponent = gamma(length) + 1

    def profile(step: jax.Array) -> jax.Array:
        return jnp.exp(exponent * jnp.log1p(-1.0 / (1.0 + step)))

    return profile


def gamma(length: float) -> float:
    """Returns the exponent of the power-function profile of a relative length.

    The largest root of gamma^3 + 7 gamma^2 + (16 - s) gamma + 12 - s = 0 with
    s = 1 / length^2, which is equation (2).

    Raises:
      ValueError: a length outside (0, 0.28].

    >>> print([round(gamma(length), 2) for length in (0.05, 0.10)])
    [16.97, 6.94]
    """
    if not 0 < length <= LONGEST:
        raise ValueError(
            f"length must be above 0 and at most {LONGEST}; got {length}. It is a "
            "share of the training so far: 0.05 and 0.10 are usual."
        )
    s = length**-2.0
    roots = np.roots([1.0, 7.0, 16 - s, 12 - s])
    return float(roots.real.max())


def solve(
    snapshots: Sequence[tuple[int, float]], step: int, length: float
) -> np.ndarray:
    """Returns the weights whose sum of snapshots is closest to an average not tracked.

    With the running sums P_i of equation (1), which are 1 after t_i:

      minimise  int_0^step (sum_i w_i P_i(t) - P(t))^2 dt   where  sum_i w_i = 1

    This differs from Sec. 3.2 of Karras et al. 2024 in two ways. Their App. C.3
    compares the profiles, not their running sums: right for weights that are noise
    about a fixed point, where this is right for a random walk. And only with a sum of 1
    is the average of equal weights the same.

    Args:
      snapshots: (step, length) of averages that were tracked; the more steps, the
        closer. See `expected_error`.
      step: number of updates of the average sought; there must be a snapshot of it, and
        none later.
      length: its relative length.

    Returns:
      The weights, float64, [len(snapshots)]; some are negative.

    Raises:
      ValueError: no or equal snapshots, a length outside (0, 0.28], or steps that do
        not end at `step`.

    >>> tracked = [(step, length) for step in (50, 75, 100) for length in (0.05, 0.1)]
    >>> weights = solve(tracked, 100, 0.08)
    >>> print(weights.round(3), f"{expected_error(tracked, weights, 100, 0.08):.4f}")
    [-0.002 -0.    -0.002 -0.032  0.274  0.763] 0.0104
    """
    _check(snapshots, step, length)
    products, targets, _ = _system(snapshots, step, length)
    # Profiles are scaled to norm 1; the constraint is one more row and column, of a
    # Lagrange multiplier, scaled to the same size.
    scale = 1 / np.sqrt(np.diag(products))
    count = len(scale)
    matrix = np.zeros((count + 1, count + 1))
    matrix[:count, :count] = products * scale * scale[:, None]
    matrix[count, :count] = matrix[:count, count] = scale / scale.max()
    right = np.append(targets * scale, 1 / scale.max())
    # Profiles that are close to each other make this nearly singular.
    solution = np.linalg.lstsq(matrix, right, rcond=None)[0][:count]
    return solution * scale


def expected_error(
    snapshots: Sequence[tuple[int, float]],
    weights: np.ndarray,
    step: int,
    length: float,
) -> float:
    """Returns the expected error of a reconstruction, for weights in a random walk.

    It is relative to the distance between the average and the last weights, both as the
    root of the mean square where updates are independent and alike:

      sqrt( int (sum_i w_i P_i - P)^2 dt / int P^2 dt )

    Args:
      snapshots: (step, length) of what was tracked.
      weights: from `solve`.
      step: number of updates of the average.
      length: its relative length.

    Raises:
      ValueError: as `solve`.
    """
    _check(snapshots, step, length)
    products, targets, itself = _system(snapshots, step, length)
    square = weights @ products @ weights - 2 * weights @ targets + itself
    # Rounding may make the sum of the three terms negative.
    return float(np.sqrt(max(square, 0.0) * (2 * gamma(length) + 3)))


def reconstruct(trees: Iterable[PyTree], weights: Sequence[float]) -> PyTree:
    """Returns the weighted sum of trees, summed in float64 on the host.

    Args:
      trees: parameters of one structure; of a generator, one is in memory at a time.
      weights: one number a tree.

    Returns:
      A tree of NumPy arrays, of the types of the first.

    Raises:
      ValueError: other than one tree a weight.

    >>> print(reconstruct(({"w": np.array([x])} for x in (1.0, 2.0)), [-1.0, 2.0]))
    {'w': array([3.])}
    """
    total, like, count = None, None, 0
    for count, tree in enumerate(trees, start=1):
        if count > len(weights):
            break
        factor = weights[count - 1]
        if total is None:
            like = jax.tree.map(lambda x: x.dtype, tree)
            total = jax.tree.map(lambda x: np.zeros(x.shape, np.float64), tree)
        jax.tree.map(lambda sum_, x, f=factor: _add(sum_, x, f), total, tree)
    if total is None or count != len(weights):
        raise ValueError(
            f"trees must be as many as the {len(weights)} weights, and at least one; "
            f"got {'more' if count > len(weights) else count}. Give one a weight."
        )
    return jax.tree.map(lambda x, dtype: x.astype(dtype), total, like)


def save(path: Path, params: PyTree, step: int, length: float) -> Path:
    """Returns the path of a snapshot that it writes, safetensors of float32.

    Args:
      path: the file; its folder is made.
      params: the average, a tree of float32.
      step: number of updates made.
      length: relative length of the average.

    Raises:
      ValueError: leaves that are not float32, or names that come out alike.
      OSError: the disk refuses.
    """
    for name, x in trees.by_path(params).items():
        if x.dtype != np.float32:
            raise ValueError(
                f"the weights of a snapshot must be float32; got {x.dtype} for {name}. "
                "Keep the parameters in float32, whatever the type of activations."
            )
    about = {"version": VERSION, "step": int(step), "length": float(length)}
    trees.write(path, params, {FORMAT: json.dumps(about)})
    return path


def header(path: Path) -> Snapshot:
    """Returns the step and the length of a snapshot, without reading its weights.

    Raises:
      ValueError: it is damaged or not a snapshot of this version.
    """
    try:
        about = json.loads(tensor_files.read_meta(path)[FORMAT])
        if about.get("version") != VERSION:
            raise ValueError(f"version {about.get('version')}")
        return Snapshot(int(about["step"]), float(about["length"]))
    except _DAMAGE as error:
        raise ValueError(
            f"{path} must be a whole snapshot, {FORMAT} version {VERSION}; got "
            f"{type(error).__name__}: {error}. Delete it: the average is made of the "
            "others, a little less closely."
        ) from error


def load(path: Path, like: PyTree) -> PyTree:
    """Returns the weights of a snapshot, a tree of NumPy arrays.

    Args:
      path: a file that `save` wrote.
      like: a tree of arrays or `jax.ShapeDtypeStruct` of the same structure.

    Raises:
      ValueError: it is damaged, not a snapshot, or does not fit `like`.
    """
    header(path)
    stored, wanted = tensor_files.read(path).arrays, trees.by_path(like, ".")
    if wrong := trees.misfits(stored, wanted):
        raise ValueError(
            f"{path} must fit the network of this configuration; got "
            f"{first_of(wrong)}. Use the configuration that wrote it, or delete "
            "the file: the average is made of the others, a little less closely."
        )
    return jax.tree.unflatten(jax.tree.structure(like), [stored[n] for n in wanted])


def _check(snapshots: Sequence[tuple[int, float]], step: int, length: float) -> None:
    gamma(length)
    if len(set(map(tuple, snapshots))) != len(snapshots):
        raise ValueError(
            f"snapshots must differ in step or length; got {_some(snapshots)}. Give "
            "each of them once."
        )
    steps = [one for one, _ in snapshots]
    if not steps or min(steps) < 1 or max(steps) != step:
        raise ValueError(
            f"snapshots must be of steps from 1 to {step} and the last of them of "
            f"{step} itself; got {_some(snapshots)}. Ask for the average at a step "
            "that has a snapshot, and leave out what is later."
        )


def _some(snapshots: Sequence[tuple[int, float]]) -> str:
    last = ", ".join(f"{s} of length {length}" for s, length in snapshots[-4:])
    return f"{len(snapshots)}{' ending with ' * bool(last)}{last}"


def _system(
    snapshots: Sequence[tuple[int, float]], step: int, length: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns the inner products of the profiles, with the one sought, of that itself.

    They are of 1 - P_i, which is 0 after t_i; with weights of sum 1 it is the same.
    """
    t = np.array([s for s, _ in snapshots], np.float64) / step
    p = np.array([gamma(one) + 1 for _, one in snapshots])
    sought = gamma(length) + 1
    products = _inner(t[:, None], p[:, None], t[None], p[None])
    return products, _inner(t, p, 1.0, sought), float(_inner(1.0, sought, 1.0, sought))


def _inner(t_a: Any, p_a: Any, t_b: Any, p_b: Any) -> np.ndarray:
    """Returns the integral of (1 - P_a) (1 - P_b) up to t, the earlier of the two ends.

    With r = (t / t_later)^q, q the exponent of the later:
    t (1 - 1 / (p + 1) - r / (q + 1) + r / (p + q + 1)).
    """
    early = t_a <= t_b
    t, late = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    p, q = np.where(early, p_a, p_b), np.where(early, p_b, p_a)
    r = (t / late) ** q
    return t * (1 - 1 / (p + 1) - r / (q + 1) + r / (p + q + 1))


def _add(total: np.ndarray, leaf: Any, factor: float) -> None:
    total += np.multiply(np.asarray(leaf), factor, dtype=np.float64)
