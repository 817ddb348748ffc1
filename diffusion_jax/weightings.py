"""Loss weightings: how much each noise level counts, as functions of its log-SNR.

A weighting multiplies the squared error of eps, so that L_simple is 1 everywhere (Eq.
14, Ho et al. 2020). The errors of all the coordinates follow from that one, since x_t
is given, and so each loss of the literature is a weighting:

  |x0 error|^2        = |eps error|^2 / SNR
  |v error|^2         = |eps error|^2 / alpha^2                alpha^2 + sigma^2 = 1
  |velocity error|^2  = |eps error|^2 (1 + sigma / alpha)^2    velocity = eps - x0

Most are for the times that they are used with, uniform steps as a rule. Some papers
give a weight w per log-SNR instead, so that it does not depend on the schedule:

  L_w = 1/2 integral w(logsnr) E|eps error|^2 dlogsnr          Kingma and Gao 2023

of which t uniform in [0, 1] makes 1/2 E[w(logsnr) slope(t) |eps error|^2], with
`slope` the derivative -dlogsnr/dt. With w = `simple()` that is the variational bound
in continuous time, in nats; `sigmoid` is such a w. `edm` goes with the times of
`timesteps.log_normal`, and without a slope.

All are finite and above 0 in float32 for log-SNR from -40 to 40.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.continuous import last_time
from diffusion_jax.errors import check_positive
from diffusion_jax.schedule import Schedule, check_range, is_discrete, tables

Weighting = Callable[[jax.Array], jax.Array]


def simple() -> Weighting:
    """Returns the weight 1, that of L_simple (Eq. 14, Ho et al. 2020).

    >>> print(simple()(jnp.array([-2.0, jnp.inf])))
    [1. 1.]
    """
    return jnp.ones_like


def min_snr(*, gamma: float = 5.0) -> Weighting:
    """Returns min(1, gamma / SNR) (Sec. 3.4, Hang et al. 2023).

    It is the paper's min(SNR, gamma) on the error of x0. Data without noise get 0.

    Args:
      gamma: the SNR above which an error of x0 counts no more.

    Raises:
      ValueError: gamma is not above 0.

    >>> print(min_snr()(jnp.log(jnp.array([1.0, 5.0, 20.0]))).round(4))
    [1.   1.   0.25]
    """
    check_positive("gamma", gamma, "The usual value is 5.")
    return lambda logsnr: jnp.exp(jnp.minimum(math.log(gamma) - logsnr, 0))


def p2(*, gamma: float = 1.0, k: float = 1.0) -> Weighting:
    """Returns 1 / (k + SNR)^gamma (Eq. 8, Choi et al. 2022), relative to L_simple.

    Data without noise get 0.

    Args:
      gamma: how much the levels of little noise lose; the paper uses 0.5 and 1.
      k: keeps the weight finite where there is no signal.

    Raises:
      ValueError: gamma or k is not above 0.

    >>> print(p2()(jnp.log(jnp.array([1.0, 3.0]))).round(4))
    [0.5  0.25]
    """
    check_positive("gamma", gamma, "The usual value is 1.")
    check_positive("k", k, "The usual value is 1.")
    return lambda logsnr: jnp.exp(-gamma * jnp.logaddexp(math.log(k), logsnr))


def sigmoid(*, bias: float = -3.0) -> Weighting:
    """Returns the logistic weight, per log-SNR (Kingma and Gao 2023).

    sigmoid(bias - logsnr), which on the error of x0 is e^bias sigmoid(logsnr - bias)
    (Hoogeboom et al. 2024). Multiply it by 1/2 `slope` where t is uniform. Data
    without noise get 0.

    Args:
      bias: the log-SNR at which the weight is one half, smaller for larger images.

    >>> print(sigmoid(bias=-3.0)(jnp.array([-3.0])))
    [0.5]
    """
    return lambda logsnr: jax.nn.sigmoid(bias - logsnr)


def edm(*, sigma_data: float = 0.5) -> Weighting:
    """Returns 1 + sigma^2 / sigma_data^2, sigma that of data of scale 1 (alpha = 1).

    It is (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the error of x0 (Table 1,
    Karras et al. 2022), where sigma^2 = 1 / SNR.

    Args:
      sigma_data: the standard deviation of the data.

    Raises:
      ValueError: sigma_data is not above 0.

    >>> print(edm()(jnp.array([0.0, jnp.inf])))
    [5. 1.]
    """
    check_positive("sigma_data", sigma_data, "The usual value is 0.5.")
    return lambda logsnr: 1 + jnp.exp(-logsnr - 2 * math.log(sigma_data))


def x0() -> Weighting:
    """Returns 1 / SNR, which turns the squared error of eps into that of x0.

    Data without noise get 0.

    >>> print(x0()(jnp.log(jnp.array([1.0, 4.0]))))
    [1.   0.25]
    """
    return lambda logsnr: jnp.exp(-logsnr)


def v() -> Weighting:
    """Returns 1 + 1 / SNR, which turns the squared error of eps into that of v.

    It is the weight "SNR + 1" of Salimans and Ho 2022 (Sec. 4) on the error of x0.
    For schedules with alpha^2 + sigma^2 = 1; any other has alpha^2 (1 + 1 / SNR)^2.

    >>> print(v()(jnp.log(jnp.array([1.0, 4.0]))))
    [2.   1.25]
    """
    return lambda logsnr: 1 + jnp.exp(-logsnr)


def velocity() -> Weighting:
    """Returns (1 + SNR^-1/2)^2, which turns the error of eps into that of eps - x0.

    That is the loss of flow matching (Lipman et al. 2023), for any schedule.

    >>> print(velocity()(jnp.log(jnp.array([1.0, 4.0]))))
    [4.   2.25]
    """
    return lambda logsnr: jnp.square(1 + jnp.exp(-0.5 * logsnr))


def slope(schedule: Schedule, t: ArrayLike) -> jax.Array:
    """Returns how fast the log-SNR falls, for t as a share of the whole time.

    -dlogsnr/dt of a continuous schedule, by differentiating it; T times that of an
    interpolated one, whose times go up to T. For a discrete schedule the difference
    T (logsnr_{t-1} - logsnr_t), so that the mean over t is an integral over log-SNR.
    Where that is infinite, at t = 1 of a chain whose data have no noise, the slope is
    that of t = 2: the term is the decoder's, and no integral.

    Args:
      schedule: any; a discrete one of at least two steps if its data have no noise.
      t: times with noise, of any shape.

    Raises:
      ValueError: a known t without noise, or no second step to borrow from.

    >>> from diffusion_jax import continuous
    >>> ve = continuous.ve(sigma_min=0.01, sigma_max=1.0)
    >>> print(f"{slope(ve, 0.3):.4f}")  # 2 ln(100)
    9.2103
    """
    if is_discrete(schedule):
        return _difference(schedule, t)
    t = jnp.asarray(t, jnp.result_type(float))
    schedule(t)  # a t that is known is checked here: under jvp it is not
    _, change = jax.jvp(lambda s: schedule(s).logsnr, (t,), (jnp.ones_like(t),))
    known = not isinstance(change, jax.core.Tracer)
    if known and not np.all(np.isfinite(change)):
        raise ValueError(
            "t must be a time with noise; got one where the log-SNR has no finite "
            f"derivative, in {np.asarray(t)}. Begin at 1e-5 of the whole time."
        )
    return -last_time(schedule) * change


def _difference(schedule: Schedule, t: ArrayLike) -> jax.Array:
    schedule(t)  # checks the type of t
    _, logsnr = tables(schedule)
    # From the table in double precision, where it is known: of two float32 neighbours
    # the difference has four digits left.
    known = not isinstance(logsnr, jax.core.Tracer)
    falls = -np.diff(np.asarray(logsnr)) if known else -jnp.diff(logsnr)
    num_steps = len(falls)
    if known and not np.isfinite(falls[min(1, num_steps - 1)]):
        raise ValueError(
            "schedule must have two steps where its data have no noise; got one of "
            f"{num_steps}. Give it more steps."
        )
    xp = np if known else jnp
    falls = xp.where(xp.isfinite(falls), falls, falls[min(1, num_steps - 1)])
    check_range("t", t, 1, num_steps, "t = 0 is data, from which no step begins.")
    t = jnp.asarray(t)
    # As in a schedule: a traced t outside reads nan. Negative ones would wrap around.
    index = jnp.where(t < 1, num_steps, t.astype(int) - 1)
    table = jnp.asarray(num_steps * falls, jnp.result_type(float))
    return table.at[index].get(mode="fill", fill_value=jnp.nan)
