"""Images of which every pixel is the same on every machine: drawn in whole numbers.

A step of ddpm or of ddim is a x0 + b x_t + c z, with three numbers that only its times
decide. x_t and the noise z are in units of 2^-20, x0 of 2^-12, a, b and c of 2^-32; so
nothing is left to rounding but x0 as the network sees it, for which see
`codec.certified`, and the three numbers. Both are in a file beside the picture, by
which another machine draws the same for certain. Without it, it draws the same but
once in 2^21 values.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import gaussian
from diffusion_jax.codec import certified, noise
from diffusion_jax.codec.certified import NONE, Listed
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.trained.exact import Denoise64
from diffusion_jax.lab.wiring import chains
from diffusion_jax.lab.wiring.chains import Drawable

BITS = 32
"""A unit of a step's numbers is 2^-32."""
UNIT = 2.0**-noise.BITS
LARGEST = 5 * noise.ONE
"""Beyond all noise of deviation 1."""


class Walk(NamedTuple):
    """All that decides how noise becomes an image, beside the network."""

    times: np.ndarray
    """Before each step, int64 [n]."""
    steps: np.ndarray
    """a, b and c of each step, int64 [n, 3]."""
    start: int
    """Deviation of the noise at the start, in units of 2^-20."""


def check(config: Config) -> None:
    """Raises ConfigError where the way to sample is not exact."""
    if latents.is_latent(config):
        raise ConfigError(
            "cannot draw exactly from latents: the decoder computes in float32, which "
            "differs between machines. Leave out --exact."
        )
    how = chains.describe_sampling(config)
    rule, change = how["sampler"], "Leave out --exact, or give"
    if rule not in ("ddpm", "ddim"):
        raise ConfigError(
            f"cannot draw exactly by {rule}: a step in whole numbers is there for ddpm "
            f"and ddim alone. {change} --sampler ddim."
        )
    if how.get("variance", "small") not in ("small", "large"):
        raise ConfigError(
            f"cannot draw exactly with the variance {how['variance']}: it is a "
            f"network's or an estimate, and differs between machines. {change} "
            "--variance small or large."
        )
    if config.sample.classifier_guidance:
        raise ConfigError(
            "cannot draw exactly with a classifier's guidance: its gradient is in "
            f"float32, which differs between machines. {change} --guidance."
        )
    if not how["clip"]:
        raise ConfigError(
            "cannot draw exactly without the clip of x0 to [-1, 1]: exact arithmetic "
            "has a range. Leave out --exact; the run says sample.clip false."
        )


def walk_of(config: Config, drawable: Drawable) -> Walk:
    """Returns the walk of the configuration's chain, as this machine computes it.

    The numbers of a step are what the rule makes of x0 = 1, of x_t = 1, and of noise.

    Raises:
      ConfigError: a way to sample that is not exact.
    """
    check(config)
    grid, std = chains.make_grid(config), chains.start_std(config)
    count = len(grid) - 1

    @jax.jit
    def of(params: Any, key: jax.Array, x0: jax.Array, x_t: jax.Array) -> jax.Array:
        levels = chains.sampling_schedule(config, params)

        def denoise(x: jax.Array, t: jax.Array) -> gaussian.Prediction:
            return gaussian.predict("x0", jnp.full_like(x, x0), x, levels(t))

        rule = chains.make_rule(config, denoise, levels)
        t, s = jnp.asarray(grid[:-1]), jnp.asarray(grid[1:])
        return rule.step(key, jnp.full((count, 1), x_t, float), (), t, s).x

    with jax.enable_x64(True):
        key = jax.random.split(jax.random.key(0), count)
        units = ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0))
        by_x0, by_x_t, by_noise = (
            np.asarray(of(drawable.params, key, *u)) for u in units
        )
        z = np.asarray(gaussian.normal(key, (count, 1)))
    parts = (by_x0 - by_noise, by_x_t - by_noise, by_noise / z)
    numbers = np.concatenate(parts, axis=1)
    steps = np.rint(numbers * 2**BITS).astype(np.int64)
    return Walk(np.asarray(grid[:-1], np.int64), steps, round(std / UNIT))


def batch(
    denoise: Denoise64,
    walk: Walk,
    shape: tuple[int, ...],
    *,
    seed: int,
    first: int,
    known: Listed = NONE,
) -> tuple[np.ndarray, Listed]:
    """Returns images, uint8 [B, H, W, C], and the values of x0 that were in doubt.

    Image i depends on (seed, first + i) alone. Values are counted by image, step and
    pixel, in that order.

    Args:
      denoise: the network.
      walk: how to go.
      shape: [B, H, W, C].
      seed: of the noise.
      first: number of the first image.
      known: what was in doubt elsewhere.

    Raises:
      ConfigError: noise so large that it is beyond 64 bits.
    """
    count, size, found = shape[0], int(np.prod(shape[1:])), [NONE]

    def drawn(step: int) -> np.ndarray:
        rows = noise.rows(seed, step, 0, first, count, size)
        return rows.astype(np.int64).reshape(shape)

    numbers, length = first + np.arange(count), len(walk.times)
    _check_range(walk.start * LARGEST)
    x = walk.start * drawn(0) >> noise.BITS
    for i, (t, (a, b, c)) in enumerate(
        zip(walk.times, walk.steps.tolist(), strict=True)
    ):
        most = int(np.abs(x).max())
        _check_range(abs(a) * noise.ONE + abs(b) * most + abs(c) * LARGEST)
        starts = (numbers * length + i) * size
        grid, near = certified.predict(
            lambda x, t: denoise(x, int(t), first), x * UNIT, t
        )
        grid = certified.settled(grid, starts, known)
        found.append(certified.listed(grid, near, starts))
        x = a * (grid << noise.BITS - certified.BITS) + b * x + (1 << BITS - 1)
        if c:
            x += c * drawn(i + 1)
        x >>= BITS
    return pictures.to_uint8(x * UNIT), certified.joined(found)


def _check_range(most: int) -> None:
    if most >= 2**62:
        raise ConfigError(
            "cannot draw exactly: the noise of this schedule is too large for whole "
            "numbers of 64 bits. Leave out --exact."
        )
