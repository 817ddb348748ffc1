"""Diffusion in the latents of an autoencoder: their scale, and the bound of images.

A noise schedule is made for data with about unit variance; latents have any (Sec.
4.3.2, Rombach et al. 2022). Their code divides by one standard deviation, that of the
first batch. Here each channel has mean and deviation of the whole set.

  -log p(x) <= E[-log p(x | z)] + E[-log p(z)] - H(q(z | x)),  z from q(z | x)

With the bound of the diffusion model in the place of -log p(z) that is one on images,
in the same bits/dim as any other (Sec. 3, Vahdat et al. 2021).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Scale(NamedTuple):
    """What is subtracted from each channel of latents, and what follows as a factor."""

    shift: ArrayLike
    """[z]."""
    scale: ArrayLike
    """[z], above 0."""

    def apply(self, z: jax.Array) -> jax.Array:
        """Returns (z - shift) scale: latents as the diffusion model sees them.

        >>> print(Scale(jnp.ones(1), 2 * jnp.ones(1)).apply(jnp.zeros([1, 1, 1, 1])))
        [[[[-2.]]]]
        """
        shift, scale = self._like(z)
        return (z - shift) * scale

    def invert(self, z: jax.Array) -> jax.Array:
        """Returns z / scale + shift: latents as the decoder takes them."""
        shift, scale = self._like(z)
        return z / scale + shift

    def log_variance(self, log_variance: jax.Array) -> jax.Array:
        """Returns the log variance that latents of such a one have when applied."""
        return log_variance + 2 * jnp.log(self._like(log_variance)[1])

    def _like(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (1,) * (z.ndim - 1) + np.shape(self.scale)
        dtype = jnp.promote_types(z.dtype, jnp.float32)
        shift, scale = (jnp.asarray(a, dtype).reshape(shape) for a in self)
        return shift, scale


class Bound(NamedTuple):
    """The bound of B images by a model of their latents; its terms, [B], bits/dim."""

    total: jax.Array
    """The bound on -log p(x)."""
    reconstruction: jax.Array
    """-log p(x | z)."""
    rate: jax.Array
    """The bound on -log p(z), less the entropy of q(z | x), spread over the dimensions
    of x: what the latents cost."""


def fit(moments: Iterable[tuple[ArrayLike, ArrayLike]]) -> Scale:
    """Returns the scale with which latents have mean 0 and variance 1 in each channel.

    Those drawn of q(z | x) have the mean of the means, and the variance of the means
    plus the mean of the variances: no noise is drawn. Summed in float64, one batch
    after the other.

    Args:
      moments: means and log variances of batches of any size, [B, h, w, z] each, as
        `AutoencoderKL.encode` returns them.

    Raises:
      ValueError: there are none, one is not finite, or a channel is constant.

    >>> scale = fit([(np.array([[[[0.0]]], [[[2.0]]]]), np.zeros([2, 1, 1, 1]))])
    >>> print(scale.shift, scale.scale.round(4))
    [1.] [0.7071]
    """
    count, mean, scatter = 0, np.zeros(()), np.zeros(())
    for means, log_variances in moments:
        with np.errstate(over="ignore"):
            extra = np.exp(_rows(log_variances))
        x = _rows(means)
        if not (np.isfinite(x).all() and np.isfinite(extra).all()):
            raise ValueError(
                "moments must be finite; got some that are not. Train the autoencoder "
                "for longer or at a lower rate, and look at what it makes of images."
            )
        # Chan, Golub and LeVeque 1983, as in evaluation.moments.
        number, own = len(x), x.mean(axis=0)
        apart, total = own - mean, count + number
        scatter = scatter + np.square(x - own).sum(axis=0) + extra.sum(axis=0)
        scatter = scatter + np.square(apart) * (count * number / total)
        mean, count = mean + apart * (number / total), total
    if not count:
        raise ValueError("moments must be of at least one image; got none. Give some.")
    variance = scatter / count
    if not (variance > 0).all():
        raise ValueError(
            f"every channel of the latents must vary; got {(variance == 0).sum()} that "
            "do not. Train an autoencoder with fewer channels of latents."
        )
    return Scale(mean, 1 / np.sqrt(variance))


def bound(
    reconstruction: jax.Array,
    of_latents: jax.Array,
    log_variance: jax.Array,
    *,
    dimensions: int,
) -> Bound:
    """Returns the bound on -log p(x) of images whose latents a diffusion model knows.

    All of one draw of z an image, on the scale that the diffusion model sees.

    Args:
      reconstruction: -log p(x | z), [B], in bits/dim of the images, as in
        `autoencoding.elbo`.
      of_latents: bound on -log p(z), [B], in bits/dim of the latents:
        `likelihood.bound` or `continuous_bound` with real=True.
      log_variance: of q(z | x) on that scale (`Scale.log_variance`), [B, ...]; where
        it is -inf, as without noise, there is no bound: it is inf.
      dimensions: of an image: height x width x channels.

    >>> zero = jnp.zeros(1)
    >>> of_normal = zero + 0.5 * math.log2(2 * math.pi * math.e)
    >>> print(bound(zero + 5, of_normal, jnp.zeros([1, 2]), dimensions=8).rate)
    [0.]
    """
    axes = tuple(range(1, log_variance.ndim))
    entropy = 0.5 * (math.log(2 * math.pi * math.e) + log_variance).mean(axis=axes)
    share = math.prod(log_variance.shape[1:]) / dimensions
    rate = share * (of_latents - entropy / math.log(2))
    return Bound(reconstruction + rate, reconstruction, rate)


def _rows(array: ArrayLike) -> np.ndarray:
    wide = np.asarray(array, np.float64)
    return wide.reshape(-1, wide.shape[-1])
