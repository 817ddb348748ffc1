"""What files should take: the bits of the bound on the times of a profile."""

from typing import NamedTuple

import numpy as np

from diffusion_jax.codec import steps
from diffusion_jax.codec.certified import Denoise64
from diffusion_jax.codec.fitting import bits_of
from diffusion_jax.codec.profile import LAYOUTS, Profile
from diffusion_jax.codec.steps import Tick, View
from diffusion_jax.errors import raise_unknown


class Sizes(NamedTuple):
    """Bits of each image, [N] or [n, N]: as `likelihood.bound`, of other steps."""

    prior: np.ndarray
    """KL(q(x_n | x0) || N(0, 1)), [N]."""
    rates: np.ndarray
    """KL(q(x_i | x_{i+1}, x0) || p(x_i | x_{i+1})) for i = 0..n-1, [n, N]."""
    pixels: np.ndarray
    """-log2 P(x0 | x_0), over the values that occur, [N]."""

    @property
    def total(self) -> np.ndarray:
        """Returns their sum, [N]."""
        return np.asarray(self.prior + self.rates.sum(axis=0) + self.pixels)


def sizes(
    profile: Profile,
    denoise: Denoise64,
    images: np.ndarray,
    *,
    layout: str = "archive",
    seed: int = 0,
    batch_size: int = 64,
    tick: Tick = steps.silent,
) -> Sizes:
    """Returns the bits that images take, term by term, by one draw of x_t for each.

    An archive takes so many in the mean, and what it costs to begin. In bits/dim after
    division by D they compare with `likelihood.bound`, whose pixels have 256 values.

    Args:
      profile: of the network.
      denoise: the network, in float64.
      images: uint8 [N, H, W, C].
      layout: whose times: "archive" or "progressive".
      seed: of the draws.
      batch_size: images that the network is given at a time.
      tick: called with the number of images after each evaluation.

    Raises:
      DataError: images of another shape or type, or none.
      ValueError: an unknown layout, or a network that is not in float64.
    """
    if layout not in LAYOUTS:
        raise_unknown("layout", layout, LAYOUTS)
    chain, parts = profile.chain(layout), steps.split(profile, images)
    x0 = profile.levels[parts.symbols]
    view = View(profile, chain, denoise, batch_size, tick=tick)
    every = np.arange(len(x0))
    rng = np.random.default_rng(seed)

    def seen(place: int) -> tuple[np.ndarray, np.ndarray]:
        noise = chain.sigma[place] * rng.standard_normal(x0.shape)
        x = chain.alpha[place] * x0 + noise
        return x, view.clean(x, place, every)

    spread = chain.sigma[-1] ** 2
    prior = 0.5 * ((chain.alpha[-1] * x0) ** 2 + spread - 1 - np.log(spread)).sum(1)
    rates = []
    for i in range(chain.steps):
        x, clean = seen(i + 1)
        apart = chain.c0[i] * x0 + chain.ct[i] * x - steps.mean(chain, i, x, clean)
        ratio = chain.small[i] / chain.sd[i] ** 2
        terms = ratio - 1 - np.log(ratio) + (apart / chain.sd[i]) ** 2
        rates.append(0.5 * terms.sum(axis=1) / np.log(2))
    clean = seen(0)[1]
    code = steps.pixels(profile, chain, clean)
    pixels = bits_of(code.interval(parts.symbols)[1]).sum(axis=1)
    return Sizes(prior / np.log(2), np.array(rates), pixels)
