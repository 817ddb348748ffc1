"""Guidance: moves conditional predictions further away from unconditional ones.

Both ways give back what they were given, a network or a denoiser, so that every
sampler, edit and bound takes a guided one. With y the label and w the scale:

  (1)  eps_w = eps(x_t) + w (eps(x_t, y) - eps(x_t))       Ho and Salimans 2022
  (2)  eps_w = eps(x_t) - w sigma_t grad log p(y | x_t)    Dhariwal and Nichol 2021

They are the same for exact networks, as eps = -sigma_t grad log p(x_t) and Bayes' rule
say, and are then the score of p(x_t) p(y | x_t)^w. The scale 1 is the conditional
model, 0 the unconditional one. Ho and Salimans count from there: their w is scale - 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax import gaussian
from diffusion_jax.continuous import counts_steps
from diffusion_jax.schedule import Schedule, real_data, widened

Network = Callable[[jax.Array, jax.Array], jax.Array]
LabelledNetwork = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def classifier_free(
    network: LabelledNetwork,
    label: ArrayLike,
    null: ArrayLike,
    *,
    scale: ArrayLike,
    active: Callable[[jax.Array], jax.Array] | None = None,
    channels: int | None = None,
) -> Network:
    """Returns a network with classifier-free guidance (Eq. 6, Ho and Salimans 2022).

    out_w = out(x_t, t, label) + (scale - 1) (out(x_t, t, label) - out(x_t, t, null)),
    equation (1) whatever the output stands for: every prediction is a linear function
    of the output whose constant depends on x_t and t alone, and the weights sum to 1.
    `gaussian.denoiser` then clips what was combined, as Saharia et al. 2022 do.

    Both halves are one call of a batch of 2 B, an example beside its own unconditional
    twin. Where no example of a batch is active, it is one call of B.

    Args:
      network: a function of x_t [B, ...], t [B] and labels [B, ...].
      label: what to condition on: a label an example, [B, ...], or one for all, a
        scalar. A rule that takes examples one by one, such as `ode`, needs the latter.
      null: the label that stands for none, a scalar or the shape of one label.
      scale: 1 for no guidance; a scalar, or one an example, [B].
      active: from times [B] as the network gets them to where there is guidance, [B];
        the scale is 1 elsewhere. Everywhere when not given. See `within`.
      channels: how many channels are guided, the first ones; all when not given. The
        others, such as a learned variance, are those of the conditional network.

    Returns:
      A function of x_t [B, ...] and t [B], for `gaussian.denoiser`.

    Raises:
      ValueError: labels or scales that do not fit the batch, or channels that the
        output does not have; when it is called.

    >>> network = lambda x, t, label: 0 * x + label[:, None]
    >>> guided = classifier_free(network, 3.0, 1.0, scale=2.0)
    >>> print(guided(jnp.zeros([1, 2]), jnp.zeros([1])))
    [[5. 5.]]
    """

    def apply(x_t: jax.Array, t: jax.Array) -> jax.Array:
        x_t, t = real_data(x_t), jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
        labels = _each("label", jnp.asarray(label), x_t)
        nulls = jnp.broadcast_to(jnp.asarray(null, labels.dtype), labels.shape)
        extra = _each("scale", jnp.asarray(scale, x_t.dtype), x_t) - 1
        if active is not None:
            extra = jnp.where(active(t), extra, 0)

        def guided() -> jax.Array:
            pair = network(_beside(x_t, x_t), _beside(t, t), _beside(labels, nulls))
            # Guidance multiplies errors: it is done in the precision of x_t.
            pair = pair.astype(x_t.dtype).reshape(len(x_t), 2, *pair.shape[1:])
            return _combined(pair[:, 0], pair[:, 1], extra, channels)

        def alone() -> jax.Array:
            return network(x_t, t, labels).astype(x_t.dtype)

        if active is None:
            return guided()
        return jax.lax.cond(jnp.any(extra != 0), guided, alone)

    return apply


def within(
    schedule: Schedule, low: float, high: float, *, time_shift: int | None = None
) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that tells at which times low < sigma / alpha <= high.

    Guidance harms where there is much noise and does nothing where there is little
    (Kynkaanniemi et al. 2024); sigma / alpha is their sigma.

    Args:
      schedule: the noise schedule.
      low: at least 0.
      high: above low; infinity for no end.
      time_shift: what was subtracted from t on the way to the network: the same as for
        `gaussian.denoiser`.

    Returns:
      A function of times as the network gets them, for `classifier_free`.

    Raises:
      ValueError: an empty interval, or no time_shift and a schedule that does not say
        what its times are.

    >>> from diffusion_jax import schedule
    >>> print(within(schedule.linear(), 0.3, 3.0)(jnp.array([0, 300, 999])))
    [False  True False]
    """
    if not 0 <= low < high:
        raise ValueError(
            f"low must be at least 0 and below high; got {low} and {high}. They are "
            "values of sigma / alpha, such as 0.3 and 3."
        )
    if time_shift is None:
        time_shift = 1 if counts_steps(schedule) else 0

    def active(t: jax.Array) -> jax.Array:
        noise = jnp.exp(-0.5 * schedule(t + time_shift).logsnr)
        return (low < noise) & (noise <= high)

    return active


def classifier(
    denoise: gaussian.Denoiser,
    log_prob: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Schedule,
    *,
    scale: ArrayLike = 1.0,
    clip: bool = False,
) -> gaussian.Denoiser:
    """Returns a denoiser with classifier guidance (Eq. 14, Dhariwal and Nichol 2021).

    eps_w = eps - scale sigma_t grad, grad = grad_x log p(y | x_t), equation (2), and
    x0_w = x0 + scale sigma_t^2 / alpha_t grad, so that x_t = alpha x0 + sigma eps still
    holds. This is Algorithm 2, and for deterministic rules the only form. In `ddpm` it
    moves the mean of a step by scale (alpha_s / alpha_t) var_large grad: Algorithm 1
    with the variance beta_t, but for the factor 1 / sqrt(1 - beta_t), which is 1 for
    small steps. What else the prediction holds is left as it is.

    Args:
      denoise: the prediction without guidance. If it clips x0, it does so before the
        guidance, as the official code does.
      log_prob: log p(y | x_t), [B], a function of x_t [B, ...] and t [B] in the unit
        of the schedule. An example's value may depend on that example alone.
      schedule: the noise schedule.
      scale: 1 for Bayes' rule, more for more of the label; a scalar, or one an
        example, [B].
      clip: whether x0 is clipped to [-1, 1] after the guidance, and eps made to agree.

    Returns:
      A function of x_t [B, ...] and t, [B] or scalar.

    Raises:
      ValueError: log_prob gives another shape, or scales do not fit the batch; when it
        is called.

    >>> from diffusion_jax import schedule
    >>> lin = schedule.linear()
    >>> plain = gaussian.denoiser(lambda x, t: 0 * x, lin, "eps")
    >>> guided = classifier(plain, lambda x, t: x.sum(axis=1), lin, scale=2.0)
    >>> print(guided(jnp.zeros([1, 2]), 1000).eps.round(3))
    [[-2. -2.]]
    """

    def guided(x_t: jax.Array, t: jax.Array) -> gaussian.Prediction:
        x_t, t = real_data(x_t), jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
        scales = _each("scale", jnp.asarray(scale, x_t.dtype), x_t)

        def total(x: jax.Array) -> jax.Array:
            logp = log_prob(x, t)
            if logp.shape != x.shape[:1]:
                raise ValueError(
                    f"log_prob must give one number an example, {x.shape[:1]}; got "
                    f"{logp.shape}. Take the log-probability of the label."
                )
            return logp.sum()

        pred = denoise(x_t, t)
        level = schedule(t).like(x_t)
        push = widened(scales, x_t) * level.sigma * jax.grad(total)(x_t)
        x0 = pred.x0 + jnp.exp(-0.5 * level.logsnr) * push
        if not clip:
            return pred._replace(x0=x0, eps=pred.eps - push)
        x0 = jnp.clip(x0, -1, 1)
        return pred._replace(x0=x0, eps=(x_t - level.alpha * x0) / level.sigma)

    return guided


def _combined(
    out: jax.Array, base: jax.Array, extra: jax.Array, channels: int | None
) -> jax.Array:
    """Returns out + extra (out - base), in the first channels only."""
    count = out.shape[-1] if channels is None else channels
    if not 1 <= count <= out.shape[-1]:
        raise ValueError(
            f"channels must be from 1 to the {out.shape[-1]} of the output; got "
            f"{count}. They are those of the image."
        )
    first, rest = out[..., :count], out[..., count:]
    # In this form the scale 1 is the conditional output to the last bit.
    first = first + widened(extra, first) * (first - base[..., :count])
    return jnp.concatenate([first, rest], axis=-1)


def _beside(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a[0], b[0], a[1], b[1], ...: a pair stays on its example's device."""
    return jnp.stack([a, b], axis=1).reshape(2 * len(a), *a.shape[1:])


def _each(name: str, value: jax.Array, x_t: jax.Array) -> jax.Array:
    """Returns one value for each example, [B], from [B] or from a scalar."""
    if value.ndim == 0:
        return jnp.broadcast_to(value, x_t.shape[:1])
    if len(value) != len(x_t):
        raise ValueError(
            f"{name} must be one, or one for each of {len(x_t)} examples; got shape "
            f"{value.shape}. A rule that takes examples one by one needs a scalar."
        )
    return value
