"""Likelihoods in bits/dim, by the bound over the whole chain or the probability flow.

  -log p(x0) <= L_T + sum_{t=2..T} L_{t-1} + L_0           Eq. 5, Ho et al. 2020
  -log p(x0) <= L_T + integral of L_t dt - log p(x0 | z_0)  Eq. 11, Kingma et al. 2021
   log p(x0)  = log p_T(x_T) + integral of div field dt    Eq. 39, Song et al. 2021

Every L is a term of `losses`. The sum without L_0 is the rate, L_0 the distortion of a
lossy code (Sec. 4.3). The second is what the first becomes as T grows, but for the step
to data. The third is the density of another model, the deterministic flow of the same
network, at data made continuous by uniform noise: `bound` and `ode_bits_per_dim` do not
measure the same thing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax import continuous, errors, gaussian, losses, ode, samplers, sde
from diffusion_jax.schedule import Schedule, is_discrete, num_steps, real_data

TRACES = ("rademacher", "gaussian", "exact")


class Bound(NamedTuple):
    """The bound of B examples, with its terms; everything but `mse` in bits/dim."""

    total: jax.Array
    """The bound on the negative log-likelihood, [B]."""
    prior: jax.Array
    """L_T, [B]."""
    terms: jax.Array
    """L_{t-1} for t = 1..T, [T, B]; the first, L_0, is the decoder's."""
    mse: jax.Array
    """Mean squared error of the x0 seen from x_t, for t = 1..T, [T, B]."""


class ContinuousBound(NamedTuple):
    """The bound of B examples in continuous time and its terms, each [B], bits/dim."""

    total: jax.Array
    """The bound on the negative log-likelihood."""
    prior: jax.Array
    """KL(q(x_T | x0) || p(x_T)): known exactly."""
    diffusion: jax.Array
    """The integral over time, estimated."""
    reconstruction: jax.Array
    """-log p(x0 | z_0), from one draw of z_0."""


class RateDistortion(NamedTuple):
    """Rate (bits received) and distortion (error of x0) after each reverse step."""

    steps: np.ndarray
    """Reverse steps taken, T - t + 1, from 1 to T, [T]."""
    rate: np.ndarray
    """Bits/dim received until then, [T]."""
    distortion: np.ndarray
    """Root mean squared error of the x0 seen, on the scale of 0..255, [T]."""


class Density(NamedTuple):
    """The log density of B examples by the probability flow, its terms and its cost."""

    logp: jax.Array
    """log p(x) = prior + divergence, in nats, [B]; nan where max_steps was hit."""
    prior: jax.Array
    """log p_T(x_T), in nats, [B]."""
    divergence: jax.Array
    """Integral of the field's divergence from start to T, in nats, [B]."""
    evaluations: jax.Array
    """How often an example needed field and divergence, [B]: each takes the network
    once, and one derivative of it for each probe (each dimension, if exact)."""


class OdeBits(NamedTuple):
    """Bits/dim of B images by the probability flow, and the density behind them."""

    total: jax.Array
    """-log2 of the density on the scale of 0..255 per dimension, [B]."""
    density: Density
    """That of the dequantised images, on the scale of -1..1."""


def bound(
    key: jax.Array,
    denoise: gaussian.Denoiser,
    schedule: Schedule,
    x0: jax.Array,
    *,
    variance: str = "large",
    decoder_variance: ArrayLike | None = None,
    real: bool = False,
    chunk: int = 1,
) -> Bound:
    """Returns the variational bound, one x_t drawn for every t (Eq. 5, Ho et al. 2020).

    Takes T evaluations of the network an example. The noise of example i at time t
    comes from (key i, t) alone.

    Args:
      key: one key, or a key an example, [B].
      denoise: the network's prediction. The paper's evaluation clips x0.
      schedule: its discrete schedule.
      x0: data on the grid of 256 values, scaled to [-1, 1], [B, ...].
      variance: of the reverse steps, one of gaussian.VARIANCES.
      decoder_variance: of p(x0 | x_1), as in `losses.vlb`.
      real: whether x0 are real numbers, as latents on their scale are, and the bound is
        that of their density: see `latents.bound`.
      chunk: times evaluated together: memory grows with it.

    >>> from diffusion_jax import schedule
    >>> lin, x0 = schedule.linear(10), jnp.zeros([2, 3])
    >>> perfect = gaussian.denoiser(lambda x, t: 0 * x, lin, "x0")
    >>> bits = bound(jax.random.key(0), perfect, lin, x0)
    >>> print(bits.terms.shape, float(jnp.abs(bits.mse).max()))
    (10, 2) 0.0
    """
    losses.check_values(x0)
    total, keys, x0 = (
        num_steps(schedule),
        samplers.each_key(key, len(x0)),
        real_data(x0),
    )

    def at(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        times = jnp.full(x0.shape[:1], t)
        eps = gaussian.normal(samplers.fold(keys, t), x0.shape)
        x_t = gaussian.q_sample(x0, eps, schedule(times))
        pred = denoise(x_t, times)
        term = losses.vlb(
            pred,
            x0,
            x_t,
            schedule,
            times,
            variance=variance,
            decoder_variance=decoder_variance,
            real=real,
        )
        error = jnp.square(pred.x0 - x0).mean(axis=tuple(range(1, x0.ndim)))
        return term, error

    terms, mse = jax.lax.map(at, jnp.arange(1, total + 1), batch_size=chunk)
    prior = losses.prior(x0, schedule(total))
    return Bound(prior + terms.sum(axis=0), prior, terms, mse)


def continuous_bound(
    key: jax.Array,
    denoise: gaussian.Denoiser,
    schedule: Schedule,
    x0: jax.Array,
    *,
    draws: int = 128,
    real: bool = False,
    chunk: int = 1,
) -> ContinuousBound:
    """Returns an estimate of the bound for T = infinity (Eq. 11, Kingma et al. 2021).

    L_T + E_t[L_t] - log p(x0 | z_0), at the times t_j = (u + j / draws) mod 1 with one
    u an example: each is uniform, so that nothing is biased, and together they leave no
    gap. Takes `draws` evaluations of the network an example, whose u and noise come
    from its key.

    Args:
      key: one key, or a key an example, [B].
      denoise: the network's prediction as a function of (x_t, t), t real.
      schedule: its continuous schedule, with finite log-SNR at t = 0.
      x0: data on the grid of 256 values, scaled to [-1, 1], [B, ...].
      draws: times an example.
      real: as in `bound`.
      chunk: times evaluated together: memory grows with it.

    Raises:
      ValueError: the schedule is discrete or has no noise at t = 0, or draws below 1.

    >>> ve, x0 = continuous.ve(sigma_max=1), jnp.zeros([2, 3])
    >>> denoise = gaussian.denoiser(lambda x, t: 0 * x, ve, "x0")
    >>> bits = continuous_bound(jax.random.key(0), denoise, ve, x0)
    >>> print(bits.diffusion.round(6), bits.total.shape)  # x0 is zero, and known
    [0. 0.] (2,)
    """
    _check_continuous(schedule, draws)
    losses.check_values(x0)
    keys, x0 = samplers.each_key(key, len(x0)), real_data(x0)
    begin = jax.vmap(lambda k: jax.random.uniform(k, ()))(samplers.fold(keys, 0))

    def at(j: jax.Array) -> jax.Array:
        t = (begin + j / draws) % 1
        level, slope = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
        eps = gaussian.normal(samplers.fold(keys, 2 + j), x0.shape)
        pred = denoise(gaussian.q_sample(x0, eps, level), t)
        return losses.diffusion(pred, eps, -slope.logsnr)

    terms = jax.lax.map(at, jnp.arange(draws), batch_size=chunk)
    first, final = schedule(0.0), schedule(1.0)
    noise = gaussian.normal(samplers.fold(keys, 1), x0.shape)
    z0 = gaussian.q_sample(x0, noise, first)
    parts = (
        losses.prior(x0, final),
        terms.mean(axis=0),
        losses.reconstruction(x0, z0, first, real=real),
    )
    return ContinuousBound(sum(parts[1:], parts[0]), *parts)


def rate_distortion(
    prior: np.ndarray, terms: np.ndarray, mse: np.ndarray
) -> RateDistortion:
    """Returns rate and distortion over the reverse steps (Table 4, Ho et al. 2020).

    At time t the terms L_T and L_t, ..., L_{T-1} have been received, and x0 is
    estimated from x_t; after the first step that is L_T alone.

    Args:
      prior: L_T in bits/dim, mean over the data, a scalar.
      terms: L_{t-1} for t = 1..T in bits/dim, mean over the data, [T].
      mse: mean squared error of the x0 seen from x_t, over the data, [T].

    >>> code = rate_distortion(np.float64(0), np.array([2.0, 1.0, 0.5]), np.ones(3))
    >>> print(code.rate, code.distortion)
    [0.  0.5 1.5] [127.5 127.5 127.5]
    """
    terms = np.asarray(terms, np.float64)
    above = np.concatenate([[0.0], np.cumsum(terms[:0:-1])])
    distortion = 127.5 * np.sqrt(np.asarray(mse, np.float64)[::-1])
    return RateDistortion(np.arange(1, len(terms) + 1), prior + above, distortion)


def ode_bits_per_dim(
    key: jax.Array,
    denoise: gaussian.Denoiser,
    schedule: Schedule,
    x0: jax.Array,
    **options: Any,
) -> OdeBits:
    """Returns bits/dim of images by the probability flow (Eq. 39, Song et al. 2021).

    Uniform noise as wide as a bin and centred on its value makes the images
    continuous; with it the mean is at least the bits/dim of the images themselves
    (Theis et al. 2016). -log2 p / dimensions + log2(127.5), the width of a bin being
    1 / 127.5.

    Args:
      key: one key, or a key an example, [B]: all noise of an example comes from its.
      denoise, schedule: as in `log_density`.
      x0: data on the grid of 256 values, scaled to [-1, 1], [B, ...].
      options: trace, probes, start, rtol, atol and max_steps, of `log_density`.

    Raises:
      ValueError: as `log_density`, or images that are not float32 or float64.

    >>> vp, x0 = continuous.vp(), jnp.zeros([2, 3])
    >>> normal = gaussian.denoiser(lambda x, t: vp(t).like(x).sigma * x, vp, "eps")
    >>> bits = ode_bits_per_dim(jax.random.key(0), normal, vp, x0)
    >>> print(f"{bits.total[0]:.2f}")  # of a unit normal: log2(127.5 sqrt(2 pi))
    8.32
    """
    losses.check_values(x0)
    keys, x0 = samplers.each_key(key, len(x0)), real_data(x0)
    draw = jax.vmap(lambda k: jax.random.uniform(k, x0.shape[1:], x0.dtype))
    noise = (draw(samplers.fold(keys, 0)) - 0.5) / 127.5
    density = log_density(
        samplers.fold(keys, 1), denoise, schedule, x0 + noise, **options
    )
    bits = -density.logp / (np.prod(x0.shape[1:]) * np.log(2)) + np.log2(127.5)
    return OdeBits(bits, density)


def log_density(
    key: jax.Array,
    denoise: gaussian.Denoiser,
    schedule: Schedule,
    x: jax.Array,
    *,
    trace: str = "rademacher",
    probes: int = 1,
    start: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = ode.MAX_STEPS,
) -> Density:
    """Returns the log density of the probability flow in nats (Eq. 39).

    log p(x) = log p_T(x_T) + integral of div f dt along the flow from x at `start`
    (Song et al. 2021), x and the integral solved together, each example with its own
    steps. The divergence is the mean of v . (df/dx) v over probes v of unit variance
    (Hutchinson's), which stay the same over the whole solve, or exact. Field and
    v . (df/dx) come from one reverse pass.

    Args:
      key: one key, or a key an example, [B]; only for the probes.
      denoise: the network's prediction as a function of (x_t, t), without a clip. It
        is called at real times; see `ode.ode`.
      schedule: its noise schedule; a discrete one is interpolated.
      x: data, [B, ...].
      trace: "rademacher" or "gaussian" probes, or "exact": as many as dimensions.
      probes: number of probes.
      start: time at which x is given, at which sigma is above 0; when not given, 1
        where times count steps, else 1e-5.
      rtol, atol, max_steps: as in `ode.integrate`.

    Raises:
      ValueError: an unknown trace, probes or start out of range; and as
        `ode.integrate`.

    >>> vp, x = continuous.vp(), jnp.zeros([1, 2])
    >>> normal = gaussian.denoiser(lambda x, t: vp(t).like(x).sigma * x, vp, "eps")
    >>> density = log_density(jax.random.key(0), normal, vp, x, trace="exact")
    >>> print(f"{density.logp[0]:.3f}")  # -log(2 pi)
    -1.838
    """
    real = continuous.interpolate(schedule) if is_discrete(schedule) else schedule
    last = continuous.last_time(real)
    begin = start
    if begin is None:
        begin = 1.0 if continuous.counts_steps(real) else 1e-5
    _check(trace, probes, begin, last)
    x = real_data(x)
    directions = _probes(samplers.each_key(key, len(x)), x, trace, probes)
    joint = _with_divergence(sde.flow(denoise, real))
    state = x, jnp.zeros(len(x), x.dtype)
    options = {"rtol": rtol, "atol": atol, "max_steps": max_steps}
    (end, divergence), evaluations = ode.follow(
        joint, real, state, begin, last, directions, **options
    )
    prior = sde.prior_logp(end, real(last))
    return Density(prior + divergence, prior, divergence, evaluations)


def _with_divergence(field: sde.Field) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The field of (x, log density) from the field of x, given probes [B, n, ...]."""

    def joint(
        state: tuple[jax.Array, jax.Array], t: jax.Array, probes: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def along(probe: jax.Array) -> tuple[jax.Array, jax.Array]:
            # Backwards, v^T J v is the same, and a network need have no forward
            # derivative.
            speed, back = jax.vjp(lambda x: field(x, t), state[0])
            (change,) = back(probe)
            return speed, (probe * change).sum(axis=tuple(range(1, probe.ndim)))

        # The speed is the same for all probes, and computed once.
        speed, traces = jax.vmap(along, 1, (None, 1))(probes)
        return speed, traces.mean(axis=1)

    return joint


def _probes(keys: jax.Array, x: jax.Array, trace: str, count: int) -> jax.Array:
    shape = x.shape[1:]
    if trace == "exact":
        size = int(np.prod(shape))
        # Scaled so that the mean over probes is the sum over dimensions.
        basis = jnp.sqrt(size) * jnp.eye(size, dtype=x.dtype).reshape(size, *shape)
        return jnp.broadcast_to(basis, (len(x), *basis.shape))
    make = jax.random.rademacher if trace == "rademacher" else jax.random.normal
    return jax.vmap(lambda key: make(key, (count, *shape), x.dtype))(keys)


def _check(trace: str, probes: int, start: float, last: float) -> None:
    if trace not in TRACES:
        errors.raise_unknown("trace", trace, TRACES)
    if probes < 1:
        raise ValueError(
            f"probes must be at least 1; got {probes}. More give less noise for more "
            "derivatives of the network."
        )
    if not 0 < start < last:
        raise ValueError(
            f"start must be above 0 and below {last}, the time of pure noise; got "
            f"{start}. The usual one is 1 where times count steps, else 1e-5."
        )


def _check_continuous(schedule: Schedule, draws: int) -> None:
    if draws < 1:
        raise ValueError(
            f"draws must be at least 1; got {draws}. More give less noise for more "
            "evaluations of the network."
        )
    if is_discrete(schedule):
        raise ValueError(
            f"schedule must be continuous; got one of {num_steps(schedule)} whole "
            "steps. Use `bound`, or the schedule that it was made from."
        )
    # What is known is known inside a trace too; only a traced schedule is not.
    with jax.ensure_compile_time_eval():
        logsnr = schedule(0.0).logsnr
    if not isinstance(logsnr, jax.core.Tracer) and not np.isfinite(logsnr):
        raise ValueError(
            "the schedule must have noise at t = 0, where z_0 is decoded; got a "
            f"log-SNR of {logsnr} there. Take one with a largest log-SNR, such as ve, "
            "or `bound` on its discretization."
        )
