"""Images whose best codec is known, and its profile: no network, no calibration."""

import numpy as np
from scipy.special import ndtr

from diffusion_jax import schedule
from diffusion_jax.codec import fitting
from diffusion_jax.codec.profile import Profile

SCHEDULE = schedule.cosine(200)
LOG_ALPHA, LOGSNR = (
    np.asarray(table, np.float64) for table in schedule.tables(SCHEDULE)
)
SNR = np.exp(LOGSNR)
ALPHA = np.exp(LOG_ALPHA)
SIGMA = np.exp(LOG_ALPHA - 0.5 * LOGSNR)


def gaussian(scale, times, shape, *, symbol=None, seed=0):
    """Pixels that are independent and N(0, scale^2): a profile and its network.

    The scale is of each dimension or one for all, the times are those of both chains,
    and `symbol` the bits of a symbol in place of those that `fitting` takes.
    """
    size = int(np.prod(shape))
    scale = np.broadcast_to(np.asarray(scale, np.float64), (size,))
    times = np.asarray(times)
    errors = scale**2 / (1 + scale**2 * SNR[times][:, None])
    chain = fitting.chain_of(LOG_ALPHA, LOGSNR, times, errors)
    if symbol is not None:
        chain = chain._replace(bits=np.full_like(chain.bits, symbol))
    alphabet = np.arange(256, dtype=np.uint8)

    def denoise(x, t):
        gain = ALPHA[t] * scale**2 / (ALPHA[t] ** 2 * scale**2 + SIGMA[t] ** 2)
        return x * gain.reshape(shape)

    return Profile(shape, alphabet, seed, chain, chain, {"name": "toy"}), denoise


def gaussian_images(rng, count, scale, shape):
    """Images of such pixels, uint8."""
    x0 = rng.standard_normal((count, *shape)) * np.reshape(
        np.broadcast_to(scale, int(np.prod(shape))), shape
    )
    return np.clip(np.rint((x0 + 1) * 127.5), 0, 255).astype(np.uint8)


VALUES = np.array([0, 40, 90, 180, 255], np.uint8)
SHARES = np.array([0.4, 0.1, 0.2, 0.05, 0.25])


def posterior(x, t):
    """Probabilities of VALUES for pixels of x_t, [..., 5]."""
    levels = VALUES / 127.5 - 1
    apart = (np.asarray(x)[..., None] - ALPHA[t] * levels) / SIGMA[t]
    log = np.log(SHARES) - 0.5 * apart**2
    weights = np.exp(log - log.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def five(times, shape, *, seed=0):
    """Independent pixels of five values: a profile and the exact posterior mean."""
    levels, size = VALUES / 127.5 - 1, int(np.prod(shape))

    def denoise(x, t):
        return posterior(x, t) @ levels

    times, errors = np.asarray(times), []
    for t in times:
        x, weight = quadrature(t)
        apart = (levels[:, None] - denoise(x, t)) ** 2
        errors.append(SHARES @ (apart * weight).sum(axis=1))
    errors = np.repeat(np.array(errors)[:, None], size, axis=1)
    chain = fitting.chain_of(LOG_ALPHA, LOGSNR, times, errors)
    return Profile(shape, VALUES, seed, chain, chain, {"name": "five"}), denoise


def quadrature(t, points=4001):
    """Places x_t and weights for each of VALUES, [5, points] both."""
    z = np.linspace(-8, 8, points)
    weight = np.exp(-0.5 * z**2)
    x = ALPHA[t] * (VALUES / 127.5 - 1)[:, None] + SIGMA[t] * z
    return x, np.broadcast_to(weight / weight.sum(), x.shape)


def five_images(rng, count, shape):
    """Images of such pixels, uint8."""
    return rng.choice(VALUES, (count, *shape), p=SHARES)


def bound_of_five(profile, denoise, chain):
    """Bits of a pixel of each of VALUES on a chain, by quadrature, [5]."""
    levels = VALUES / 127.5 - 1
    last = chain.sigma[-1] ** 2
    mean = (chain.alpha[-1] * levels) ** 2
    total = 0.5 * (mean + last - 1 - np.log(last)) / np.log(2)
    for i in range(chain.steps):
        x, weight = quadrature(chain.times[i + 1])
        seen = denoise(x, chain.times[i + 1])
        apart = chain.c0[i] * (levels[:, None] - seen) / chain.sd[i, 0]
        ratio = chain.small[i] / chain.sd[i, 0] ** 2
        terms = ratio - 1 - np.log(ratio) + apart**2
        total += 0.5 * (terms * weight).sum(axis=1) / np.log(2)
    x, weight = quadrature(chain.times[0])
    seen, sd = denoise(x, chain.times[0]), chain.pixel_sd[0]
    middles = np.concatenate([[-np.inf], profile.middles, [np.inf]])
    upper, lower = (ndtr((m[:, None] - seen) / sd) for m in (middles[1:], middles[:-1]))
    mass = np.maximum(upper - lower, 2.0**-24)
    return total - (np.log2(mass) * weight).sum(axis=1)
