"""The learned schedule of variational diffusion models (Kingma et al. 2021).

A monotone network says how log-SNR falls from one end to the other, t in [0, 1]:

  (1)  logsnr(t) = logsnr_max - span r(t),  r(0) = 0,  r(1) = 1         App. H
  (2)  r(t) = (g(t) - g(0)) / (g(1) - g(0))
  (3)  g(t) = t + sum_k a_k sigmoid(b_k t + c_k),  a_k, b_k > 0

(3) is their l1(t) + l3(sigmoid(l2(l1(t)))) without what (2) or l2 takes up: the scale
and the offset of l1. r has a hundredth of a straight line mixed in, so that log-SNR
falls at every time whatever the weights.

The continuous-time bound depends on the two ends alone, its estimate's variance on all
that is between (Sec. 5.1): the ends are trained to lower the bound, the interior to
lower the variance. `minimise_variance` does both in one backward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.schedule import NoiseLevel, Timed, preserving, real_time

# The share of r that is a straight line, and the steepness of a unit to start with.
STRAIGHT, STEEPNESS = 0.01, 8.0


class Ends(NamedTuple):
    """The two ends of the schedule, on which the bound depends."""

    logsnr_max: jax.Array
    """The log-SNR at t = 0, in nats."""
    span: jax.Array
    """Its softplus is logsnr_max - logsnr_min: nearly the span itself."""


class Interior(NamedTuple):
    """The curve between the ends: W hidden units, of any real numbers."""

    weight: jax.Array
    """a_k = softplus(weight) / W, [W]."""
    steepness: jax.Array
    """b_k = softplus(steepness), [W]."""
    offset: jax.Array
    """c_k, [W]."""


class Params(NamedTuple):
    """Parameters of a learned schedule, in two parts with two objectives."""

    ends: Ends
    interior: Interior


def init(
    key: jax.Array,
    *,
    logsnr_min: float = -5.0,
    logsnr_max: float = 13.3,
    width: int = 64,
) -> Params:
    """Returns parameters with which log-SNR falls nearly in a straight line.

    Args:
      key: for where the hidden units bend.
      logsnr_min: at t = 1.
      logsnr_max: at t = 0, which still has that noise.
      width: W, the number of hidden units (1024 in the paper).

    Raises:
      ValueError: logsnr_min is not below logsnr_max, or width is not a whole number
        above 0.

    >>> params = init(jax.random.key(0))
    >>> print(params.ends.logsnr_max, params.interior.weight.shape)
    13.3 (64,)
    """
    if not logsnr_min < logsnr_max:
        raise ValueError(
            "logsnr_min must be below logsnr_max; got "
            f"{logsnr_min} and {logsnr_max}. The paper starts from -5 and 13.3."
        )
    if not isinstance(width, int | np.integer) or width < 1:
        raise ValueError(
            f"width must be a whole number of at least 1; got {width!r}. 64 is enough "
            "for a curve without corners."
        )
    real = jnp.result_type(float)
    # One bend in each of W equal stretches of [0, 1].
    bends = (jnp.arange(width) + jax.random.uniform(key, (width,), real)) / width
    ends = (logsnr_max, _inverse_softplus(logsnr_max - logsnr_min))
    return Params(
        Ends(*(jnp.asarray(end, real) for end in ends)),
        Interior(
            jnp.full(width, _inverse_softplus(1.0), real),
            jnp.full(width, _inverse_softplus(STEEPNESS), real),
            -STEEPNESS * bends,
        ),
    )


def schedule(params: Params) -> Timed:
    """Returns the continuous variance-preserving schedule of these parameters.

    By equations (1) to (3). A pytree over the parameters: it passes through `jit` as
    an argument, and is differentiable in them. Chains of steps are made of it by
    `continuous.discretize(schedule(params), T, clean=True)`.

    >>> made = schedule(init(jax.random.key(0)))
    >>> print(made(jnp.array([0.0, 1.0])).logsnr.round(3))
    [13.3 -5. ]
    """
    return Timed(_level, (params,))


def minimise_variance(
    params: Params,
    t: jax.Array,
    each: Callable[[NoiseLevel, jax.Array], Any],
    *,
    has_aux: bool = False,
) -> Any:
    """Returns each(level, slope), [B], with another gradient for the interior.

    Backwards, a cotangent c_i of loss_i reaches the ends, and all that `each` uses, as
    it would. The interior gets that of loss_i^2: c_i 2 loss_i d loss_i. Of the mean of
    the losses therefore the ends, and the network, get the gradient of the mean, and
    the interior that of the mean square. Since the expectation of the continuous-time
    loss does not depend on the interior, the latter is the gradient of its variance
    (App. I.2, Kingma et al. 2021). One pass forward and one backward through `each`.

    Add what depends on the ends alone (the prior, the decoder) to the losses outside.

    Args:
      params: of the schedule.
      t: times in [0, 1], one an example, [B].
      each: from the level at t and its slope d logsnr / dt, both [B], to the losses
        [B]. Loss i may use entry i of both only. It may close over anything. The
        loss of the paper is -slope / 2 ||eps - eps_hat||^2.
      has_aux: whether `each` returns (losses, anything else); then so does this.

    Raises:
      ValueError: there is not one loss for each time.

    >>> params, t = init(jax.random.key(0)), jnp.array([0.2, 0.7])
    >>> def total(params):
    ...     each = lambda level, slope: -slope * level.sigma
    ...     return minimise_variance(params, t, each).mean()
    >>> jax.grad(total)(params).interior.offset.shape
    (64,)
    """
    ends, interior = params
    still = jax.lax.stop_gradient
    # The same numbers twice, so that each part of the parameters has its own way back.
    ours = _with_slope(Params(still(ends), interior), still(t))
    theirs = _with_slope(Params(ends, still(interior)), t)
    (logsnr, slope), carrier = _split(ours, theirs)
    out = each(preserving(logsnr), slope)
    losses, aux = out if has_aux else (out, None)
    if losses.shape != logsnr.shape:
        raise ValueError(
            f"each must return one loss for each time, of shape {logsnr.shape}; got "
            f"{losses.shape}. Average over pixels, not over examples."
        )
    losses = _remember(losses, carrier)
    return (losses, aux) if has_aux else losses


def _level(params: Params, t: ArrayLike) -> NoiseLevel:
    t = real_time(t)
    share = jnp.vectorize(lambda u: _share(params.interior, u))(t)
    return preserving(
        params.ends.logsnr_max - jax.nn.softplus(params.ends.span) * share
    )


def _share(interior: Interior, t: jax.Array) -> jax.Array:
    """Returns r(t) for one t."""
    weight = jax.nn.softplus(interior.weight) / len(interior.weight)
    steepness = jax.nn.softplus(interior.steepness)

    def units(u: ArrayLike) -> jax.Array:
        return jax.nn.sigmoid(steepness * u + interior.offset)

    # Risen so far and still to rise, each exactly 0 at its end.
    now = units(t)
    before = t + jnp.sum(weight * (now - units(0.0)))
    after = 1 - t + jnp.sum(weight * (units(1.0) - now))
    share = before / (before + after)
    return share + STRAIGHT * (t - share)


def _with_slope(params: Params, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    def logsnr(u: jax.Array) -> jax.Array:
        return _level(params, u).logsnr

    t = real_time(t)
    return jax.jvp(logsnr, (t,), (jnp.ones_like(t),))


Pair = tuple[jax.Array, jax.Array]


# The two ends of the detour. Backwards, `_remember` comes first and sends the losses
# themselves along the carrier, whose value means nothing, to `_split`, where the
# cotangents of the levels pass by on their way to the parameters.
@jax.custom_vjp
def _split(ours: Pair, theirs: Pair) -> tuple[Pair, jax.Array]:
    return theirs, theirs[0]


def _split_forward(ours: Pair, theirs: Pair) -> tuple[tuple[Pair, jax.Array], None]:
    return (theirs, theirs[0]), None


def _split_backward(_: None, back: tuple[Pair, jax.Array]) -> tuple[Pair, Pair]:
    (logsnr, slope), losses = back
    return (2 * losses * logsnr, 2 * losses * slope), (logsnr, slope)


@jax.custom_vjp
def _remember(losses: jax.Array, carrier: jax.Array) -> jax.Array:
    return losses


def _remember_forward(
    losses: jax.Array, carrier: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return losses, losses.astype(carrier.dtype)


def _remember_backward(
    losses: jax.Array, back: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return back, losses


_split.defvjp(_split_forward, _split_backward)
_remember.defvjp(_remember_forward, _remember_backward)


def _inverse_softplus(x: float) -> float:
    return x + float(np.log(-np.expm1(-x)))
