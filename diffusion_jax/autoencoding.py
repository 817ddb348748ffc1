"""Training losses of autoencoders, one number an example.

  L    = sum |x - x'| / e^s + s  +  w KL(q(z | x) || N(0, I))   Rombach et al. 2022
  ELBO = E[-log p(x | z)] + beta KL(q(z | x) || N(0, I))        Eq. 3, Kingma and
                                                                Welling 2013

The first is `reconstruction` and `kl`: sums over pixels and channels, in the authors'
convention, for which their weight w is 1e-6; a mean over 196,608 of them would want
5e-12. The second is `elbo`, in bits/dim over 256 values a pixel as the bounds of
diffusion models are (`likelihood.bound`). Moments are mean and log variance of
q(z | x), what the encoder of `nets.autoencoder` puts out.

And what a discriminator of patches adds (Esser et al. 2021): `hinge` is its own loss,
`adversarial` the decoder's, weighed by `adaptive_weight`; `perceptual` is an error in
the features of any network.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax import losses
from diffusion_jax.errors import raise_unknown
from diffusion_jax.schedule import real_data

ERRORS = ("l1", "l2")
Of = tuple[jax.Array, jax.Array]
"""Mean and log variance of q(z | x), [B, ...] each."""


class Elbo(NamedTuple):
    """The negative evidence lower bound of B examples and its terms, [B], bits/dim."""

    total: jax.Array
    """The sum of both, the KL times beta: a bound on -log p(x) where that is 1."""
    reconstruction: jax.Array
    """-log p(x | z)."""
    kl: jax.Array
    """KL(q(z | x) || N(0, I)), spread over the dimensions of x."""


def reconstruction(
    x: jax.Array,
    guess: jax.Array,
    log_variance: ArrayLike = 0.0,
    *,
    kind: str = "l1",
    mean: bool = False,
) -> jax.Array:
    """Returns the sum of |x - guess|^p / e^s + s over pixels and channels, [B].

    The authors' convention, with a learned scalar s that begins at 0. For "l2" half of
    it is -log N(x; guess, e^s), but for log(2 pi) / 2 a dimension; for "l1" it is that
    of a Laplace distribution of scale e^s, but for log 2.

    Args:
      x: images, [B, ...].
      guess: decoded ones, as x.
      log_variance: s, a scalar, or broadcasts against x.
      kind: "l1" (p = 1) or "l2" (p = 2).
      mean: whether to divide by the number of pixels and channels.

    Raises:
      ValueError: an unknown kind, or images of whole numbers.

    >>> x = jnp.zeros([1, 2, 2, 3])
    >>> print(reconstruction(x, x + 0.5), reconstruction(x, x + 0.5, kind="l2"))
    [6.] [3.]
    """
    if kind not in ERRORS:
        raise_unknown("kind", kind, ERRORS)
    off = real_data(x) - real_data(guess)
    error = jnp.abs(off) if kind == "l1" else jnp.square(off)
    s = jnp.asarray(log_variance, error.dtype)
    s = s.reshape((1,) * (error.ndim - s.ndim) + s.shape)
    total = _sum(error * jnp.exp(-s) + s)
    return total / _dimensions(x) if mean else total


def kl(moments: Of, *, free: float = 0.0) -> jax.Array:
    """Returns KL(q(z | x) || N(0, I)), [B], in nats.

    With free bits (App. C.8, Kingma et al. 2016) a channel of the latents whose mean
    over the batch is below `free` counts as that, without a gradient: it costs nothing
    to use it so far.

    Args:
      moments: of q(z | x), [B, ..., z].
      free: nats a channel.

    >>> print(kl((jnp.ones([2, 4]), jnp.zeros([2, 4]))))
    [2. 2.]
    """
    mean, log_variance = moments
    terms = losses.normal_kl(
        mean, log_variance, jnp.zeros_like(mean), jnp.zeros_like(mean)
    )
    if not free:
        return _sum(terms)
    channels = terms.sum(axis=tuple(range(1, terms.ndim - 1)))
    enough = channels.mean(axis=0, keepdims=True) >= free
    return jnp.where(enough, channels, free).sum(axis=1)


def elbo(
    x0: jax.Array,
    guess: jax.Array,
    log_variance: ArrayLike,
    moments: Of,
    *,
    beta: float = 1.0,
    free: float = 0.0,
) -> Elbo:
    """Returns the negative ELBO from one draw of z, in bits/dim.

    p(x | z) is the decoder of the diffusion bound (`losses.decoder`): a normal
    distribution around the guess, over the 256 values of each pixel.

    Args:
      x0: data on the grid of 256 values, scaled to [-1, 1], [B, ...].
      guess: decoded from one draw of q(z | x0), as x0.
      log_variance: of p(x | z), a scalar, or broadcasts against x0; learned.
      moments: of q(z | x0), [B, ..., z].
      beta: of the KL divergence (Higgins et al. 2017); not of the term returned.
      free: as in `kl`.

    Raises:
      ValueError: images that are not float32 or float64.

    >>> x0, flat = jnp.zeros([1, 2, 2, 1]) + 1 / 255, jnp.zeros([1, 2])
    >>> print(elbo(x0, x0, math.log(0.3**2), (flat, flat)).total.round(2))
    [6.58]
    """
    losses.check_values(x0)
    x0, guess = real_data(x0), real_data(guess)
    s = jnp.asarray(log_variance, x0.dtype)
    s = s.reshape((1,) * (x0.ndim - s.ndim) + s.shape)
    scale = 1 / (math.log(2) * _dimensions(x0))
    distortion = scale * _sum(losses.decoder(x0, guess, s))
    rate = scale * kl(moments, free=free)
    return Elbo(distortion + beta * rate, distortion, rate)


def hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Returns a discriminator's loss, [B] (Lim and Ye 2017).

    Half the means of max(0, 1 - real) and max(0, 1 + fake) over the patches.

    Args:
      real: its scores of patches of images, [B, ...].
      fake: of decoded ones.

    >>> print(hinge(jnp.array([[2.0], [0.0]]), jnp.array([[-3.0], [1.0]])))
    [0.  1.5]
    """
    return 0.5 * (_mean(jax.nn.relu(1 - real)) + _mean(jax.nn.relu(1 + fake)))


def adversarial(fake: jax.Array) -> jax.Array:
    """Returns the decoder's part of it, minus the mean score of its patches, [B]."""
    return -_mean(fake)


def adaptive_weight(
    of_reconstruction: jax.Array, of_adversarial: jax.Array, *, scale: float = 0.5
) -> jax.Array:
    """Returns the weight of the adversarial loss, a scalar without a gradient.

    scale |grad nll| / (|grad g| + 1e-4), at most 1e4 times the scale (Eq. 7, Esser et
    al. 2021): at the decoder's last layer neither drowns the other.

    Args:
      of_reconstruction: gradient of `reconstruction` by the last kernel.
      of_adversarial: gradient of `adversarial` by it.
      scale: what is left of that.

    >>> print(adaptive_weight(jnp.full([4], 2.0), jnp.full([4], 0.5)).round(3))
    2.0
    """
    sizes = (jnp.sqrt(jnp.square(a).sum()) for a in (of_reconstruction, of_adversarial))
    nll, g = sizes
    return jax.lax.stop_gradient(scale * jnp.clip(nll / (g + 1e-4), 0, 1e4))


def perceptual(features: Sequence[jax.Array], others: Sequence[jax.Array]) -> jax.Array:
    """Returns how far images are apart in the features of a network, [B].

    The sum over layers of the mean over positions of |f - g|^2, where f and g have
    length 1 at each position (Eq. 1, Zhang et al. 2018, with all weights 1).

    Args:
      features: of each layer, [B, h, w, c].
      others: of other images, as features.

    >>> left, right = jnp.array([[[[3.0, 0.0]]]]), jnp.array([[[[0.0, 5.0]]]])
    >>> print(perceptual([left, left], [right, left]))
    [2.]
    """

    def unit(f: jax.Array) -> jax.Array:
        return f * jax.lax.rsqrt(jnp.square(f).sum(axis=-1, keepdims=True) + 1e-10)

    layers = zip(features, others, strict=True)
    each = [jnp.square(unit(f) - unit(g)).sum(axis=-1) for f, g in layers]
    return sum((_mean(apart) for apart in each), jnp.zeros(len(features[0])))


def _sum(x: jax.Array) -> jax.Array:
    return x.sum(axis=tuple(range(1, x.ndim)))


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(axis=tuple(range(1, x.ndim)))


def _dimensions(x: jax.Array) -> int:
    return math.prod(x.shape[1:])
