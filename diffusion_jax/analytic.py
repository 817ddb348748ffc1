"""Estimates Var[x0 | x_t] from data, for the reverse variance of Analytic-DPM.

  V_t = E[Var[x0 | x_t]] / d, so that p(x_s | x_t) has its best variance

      small + c0^2 V_t                          Theorem 1, Bao et al. 2022a

Two estimates of V_t, by what the network says of x_t = alpha x0 + sigma eps:

  "score"   (sigma / alpha)^2 (1 - E||eps_hat||^2 / d)    Theorem 1, Bao et al. 2022a
  "error"   E||x0 - x0_hat||^2 / d                        Sec. 3, Bao et al. 2022b

They agree for a perfect network. For another one only the second is the best that can
be done with its mean. Where noise is large the first takes many more draws: its error
grows as (sigma / alpha)^2, that of the second not at all.

2022a is Analytic-DPM, 2022b Estimating the Optimal Covariance with Imperfect Mean in
Diffusion Probabilistic Models.

    tables = [x0_variance(key, denoise, schedule, x0) for key, x0 in batches]
    table = bounded(sum(tables) / len(tables), schedule)
    rule = samplers.ddpm(attach(denoise, table), schedule, variance="analytic")
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax import errors, gaussian
from diffusion_jax.schedule import Schedule, num_steps, real_data, tables, widened

ESTIMATORS = ("score", "error")


def x0_variance(
    key: jax.Array,
    denoise: gaussian.Denoiser,
    schedule: Schedule,
    x0: jax.Array,
    *,
    estimator: str = "score",
    chunk: int = 1,
) -> jax.Array:
    """Returns an estimate of Var[x0 | x_t] per dimension for t = 0..T, [T + 1].

    The mean over the batch, by one draw of x_t for every t: T evaluations of the
    network an example. Means over batches of one size may be averaged. The noise of
    example i at time t comes from (key i, t) alone.

    Args:
      key: one key, or a key an example, [B].
      denoise: the network's prediction as a function of (x_t, t).
      schedule: its discrete schedule.
      x0: clean data, [B, ...].
      estimator: "score" (Analytic-DPM) or "error" (for an imperfect mean).
      chunk: times evaluated together: memory grows with it.

    Returns:
      The table, in the square of the unit of x0. Entry 0 is 0. An estimate may lie
      outside of what is possible, "score" below 0: see `bounded`.

    Raises:
      ValueError: an unknown estimator, or a continuous schedule.

    >>> from diffusion_jax import schedule
    >>> lin = schedule.linear(10)
    >>> zero = gaussian.denoiser(lambda x, t: 0 * x, lin, "x0")
    >>> x0 = jnp.full([2, 3], 0.5)
    >>> print(x0_variance(jax.random.key(0), zero, lin, x0, estimator="error")[:3])
    [0.   0.25 0.25]
    """
    if estimator not in ESTIMATORS:
        errors.raise_unknown("estimator", estimator, ESTIMATORS)
    total, x0 = num_steps(schedule), real_data(x0)
    one = key.ndim == (0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1)
    keys = jax.random.split(key, len(x0)) if one else key

    def at(t: jax.Array) -> jax.Array:
        times = jnp.full(x0.shape[:1], t)
        level = schedule(times)
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
        eps = gaussian.normal(own, x0.shape)
        pred = denoise(gaussian.q_sample(x0, eps, level), times)
        if estimator == "error":
            return jnp.square(pred.x0 - x0).mean()
        return jnp.exp(-schedule(t).logsnr) * (1 - jnp.square(pred.eps).mean())

    each = jax.lax.map(at, jnp.arange(1, total + 1), batch_size=chunk)
    return jnp.concatenate([jnp.zeros_like(each[:1]), each])


def bounded(
    table: ArrayLike, schedule: Schedule, *, half_range: float = 1.0
) -> jax.Array:
    """Returns the table clipped to what is possible (Theorem 2, Bao et al. 2022a).

    0 <= V_t <= min((sigma / alpha)^2, half_range^2): a variance is not negative, no
    estimate of x0 need be worse than x_t / alpha, and a variable in an interval has at
    most the square of half its length (Popoviciu). Clip after averaging over batches:
    what is clipped before is biased.

    Args:
      table: estimates for t = 0..T, [T + 1].
      schedule: the discrete schedule that they were made with.
      half_range: half the length of the interval that the data lie in: 1 for [-1, 1];
        infinity for data without bounds.

    Raises:
      ValueError: the table is not of the schedule's length, or half_range <= 0.

    >>> from diffusion_jax import schedule
    >>> print(bounded([0.0, 0.5, -0.1, 2.0], schedule.from_betas([0.2, 0.5, 0.9])))
    [0.   0.25 0.   1.  ]
    """
    logsnr = tables(schedule)[1]
    table = jnp.asarray(table, jnp.result_type(float))
    if table.shape != np.shape(logsnr):
        raise ValueError(
            f"table must have one entry for each t in 0..{num_steps(schedule)}; got "
            f"shape {table.shape}. Estimate it with the same schedule."
        )
    errors.check_positive("half_range", half_range, "It is 1 for data in [-1, 1].")
    most = jnp.exp(-jnp.asarray(logsnr, table.dtype))
    return jnp.clip(table, 0, jnp.minimum(most, half_range**2))


def attach(denoise: gaussian.Denoiser, table: ArrayLike) -> gaussian.Denoiser:
    """Returns the denoiser with x0_variance = table[t] in its predictions.

    Args:
      denoise: the network's prediction as a function of (x_t, t).
      table: Var[x0 | x_t] per dimension for t = 0..T, [T + 1].

    Returns:
      A function of x_t [B, ...] and whole t, [B] or scalar.

    Raises:
      ValueError: the table is not a vector, or (from the function) t is not whole.

    >>> from diffusion_jax import schedule
    >>> denoise = gaussian.denoiser(lambda x, t: 0 * x, schedule.linear(2), "x0")
    >>> pred = attach(denoise, [0.0, 0.25, 0.5])(jnp.ones([1, 4]), 2)
    >>> print(pred.x0_variance)
    [[0.5]]
    """
    if np.ndim(table) != 1:
        raise ValueError(
            "table must be a vector, one entry for each t in 0..T; got shape "
            f"{np.shape(table)}. Use x0_variance."
        )

    def attached(x_t: jax.Array, t: jax.Array) -> gaussian.Prediction:
        times = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
        if not jnp.issubdtype(times.dtype, jnp.integer):
            raise ValueError(
                f"t must be a whole number, to be looked up; got dtype {times.dtype}. "
                "Use a discrete schedule, such as continuous.discretize makes."
            )
        # As in a schedule, an index outside reads nan; a negative one would wrap.
        index = jnp.where(times < 0, np.shape(table)[0], times)
        values = jnp.asarray(table, x_t.dtype)
        found = values.at[index].get(mode="fill", fill_value=jnp.nan)
        return denoise(x_t, t)._replace(x0_variance=widened(found, x_t))

    return attached
