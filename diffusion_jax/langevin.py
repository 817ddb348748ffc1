"""Sampling by Langevin dynamics on the score, -eps / sigma, as rules for `sample`.

The algorithm that the paper connects to (Sec. 3.2, Ho et al. 2020): moves along the
score of p_t with noise, which leave p_t as it is but for what the size of the moves
costs.
"""

import jax
import jax.numpy as jnp

from diffusion_jax import errors, gaussian
from diffusion_jax.samplers import Sampler, Step, fold, forgetful
from diffusion_jax.schedule import PURE_NOISE, NoiseLevel, Schedule, real_data

PREDICTORS = ("reverse_diffusion", "ancestral")


def predictor_corrector(
    denoise: gaussian.Denoiser,
    schedule: Schedule,
    *,
    predictor: str = "reverse_diffusion",
    corrections: int = 1,
    snr: float = 0.16,
) -> Sampler:
    """Returns predictor-corrector sampling (Algorithm 1, Song et al. 2021).

    A step of the reverse SDE from t to s, then Langevin moves at s, each of size

      e = 2 (alpha_s / alpha_r)^2 (snr |z| / |score|)^2         Algorithms 4 and 5

    where r is the time after s on an even grid, t - s below it: the paper's alpha_i at
    x_i.

    The authors take norms averaged over the batch; here the score's is each example's
    own, and that of d normal numbers is sqrt(d), so that no example depends on others.
    Norms stand for size only where d is large: with fewer than about 50 numbers an
    example the moves are too long. 1 + corrections evaluations a step, one in the step
    to sigma = 0.

    Args:
      denoise: the network's prediction as a function of (x_t, t).
      schedule: its noise schedule.
      predictor: "reverse_diffusion", the forward process discretised backwards (Eq.
        46), or "ancestral", `samplers.ddpm` with the large variance.
      corrections: Langevin moves after each step; 0 is the predictor alone.
      snr: size of the moves: the paper uses 0.16 where variance explodes or is
        preserved.

    Raises:
      ValueError: an unknown predictor, corrections below 0, or snr not above 0.

    >>> from diffusion_jax import grids, samplers, schedule
    >>> lin = schedule.linear(10)
    >>> denoise = gaussian.denoiser(lambda x, t: 0 * x, lin, "x0")
    >>> rule = predictor_corrector(denoise, lin, predictor="ancestral")
    >>> images = samplers.sample(jax.random.key(0), rule, grids.uniform(lin), (1, 2))
    >>> bool((images == 0).all())
    True
    """
    if predictor not in PREDICTORS:
        errors.raise_unknown("predictor", predictor, PREDICTORS)
    if corrections < 0 or not snr > 0:
        raise ValueError(
            "corrections must be at least 0 and snr above 0; got "
            f"{corrections} and {snr}. The paper uses 1 and 0.16."
        )

    def step(
        keys: jax.Array, x_t: jax.Array, memory: tuple[()], t: jax.Array, s: jax.Array
    ) -> Step:
        pred = denoise(x_t, t)
        level, prev = schedule(t), schedule(s)
        if predictor == "ancestral":
            x_s = gaussian.p_sample(keys, pred, x_t, level, prev, variance="large")
        else:
            x_s = _reverse_diffusion(keys, pred, x_t, level, prev)
        after = schedule(jnp.maximum(2 * s - t, 0))
        share = 2 * snr**2 * jnp.exp(2 * (prev.log_alpha - after.log_alpha))

        def move(index: int, x: jax.Array) -> jax.Array:
            score = -denoise(x, s).eps / prev.sigma
            return _move(fold(keys, index + 1), x, score, share)

        def correct(x: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, corrections, move, x)

        x_s = jax.lax.cond(prev.sigma > 0, correct, lambda x: x, x_s)
        return Step(x_s, memory, pred.x0)

    return Sampler(forgetful(schedule), step)


def langevin(
    denoise: gaussian.Denoiser,
    schedule: Schedule,
    *,
    moves: int = 5,
    step_size: float = 0.2,
) -> Sampler:
    """Returns annealed Langevin dynamics (Algorithm 1, Song and Ermon 2019).

    At each level t of the grid, `moves` times

      x <- x + step_size sigma_t^2 score / 2 + sqrt(step_size) sigma_t z

    and on to the next level by its scale, alpha_s / alpha_t x. The step to sigma = 0
    ends in x0 as the network sees it, by one evaluation more (Jolicoeur-Martineau et
    al. 2021).

    Args:
      denoise: the network's prediction as a function of (x_t, t).
      schedule: its noise schedule.
      moves: evaluations at each level; the paper's T, 100 for 10 levels.
      step_size: in units of the variance of the noise; the paper's epsilon / sigma_L^2,
        0.2. Moves of this size leave a variance too large by a factor of up to
        1 / (1 - step_size / 4).

    Raises:
      ValueError: no moves, or a step_size that is not in (0, 2].

    >>> from diffusion_jax import grids, samplers, schedule
    >>> lin = schedule.linear(10)
    >>> rule = langevin(gaussian.denoiser(lambda x, t: 0 * x, lin, "x0"), lin)
    >>> images = samplers.sample(jax.random.key(0), rule, grids.uniform(lin), (1, 2))
    >>> bool((images == 0).all())
    True
    """
    if moves < 1 or not 0 < step_size <= 2:
        raise ValueError(
            "moves must be at least 1 and step_size above 0 and at most 2; got "
            f"{moves} and {step_size}. The usual size is 0.2."
        )

    def step(
        keys: jax.Array, x_t: jax.Array, memory: tuple[()], t: jax.Array, s: jax.Array
    ) -> Step:
        x_t, level, prev = real_data(x_t), schedule(t), schedule(s)

        def move(
            index: int, carry: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            x, _ = carry
            pred = denoise(x, t)
            noise = gaussian.normal(fold(keys, index), x.shape)
            drift = 0.5 * step_size * level.sigma * pred.eps
            x = x - drift + jnp.sqrt(step_size) * level.sigma * noise
            return x, pred.x0

        x, x0 = jax.lax.fori_loop(0, moves, move, (x_t, jnp.zeros_like(x_t)))
        x_s = jax.lax.cond(
            prev.sigma > 0,
            lambda x: _scale(level, prev) * x,
            lambda x: prev.alpha * denoise(x, t).x0,
            x,
        )
        return Step(x_s, memory, x0)

    return Sampler(forgetful(schedule), step)


def _scale(level: NoiseLevel, prev: NoiseLevel) -> jax.Array:
    """Returns x_s / x_t: the ratio of the alphas, or in pure noise of the sigmas."""
    of_noise = prev.sigma / level.sigma
    of_data = jnp.exp(prev.log_alpha - level.log_alpha)
    return jnp.where(level.logsnr < PURE_NOISE, of_noise, of_data)


def _move(
    keys: jax.Array, x: jax.Array, score: jax.Array, share: jax.Array
) -> jax.Array:
    """One Langevin move of size share |z|^2 / |score|^2."""
    # Mean squares: the number of them cancels.
    power = jnp.square(score).mean(axis=tuple(range(1, x.ndim)), keepdims=True)
    size = jnp.where(power > 0, share / power, 0.0)
    noise = gaussian.normal(keys, x.shape)
    return x + size * score + jnp.sqrt(2 * size) * noise


def _reverse_diffusion(
    keys: jax.Array,
    pred: gaussian.Prediction,
    x_t: jax.Array,
    level: NoiseLevel,
    prev: NoiseLevel,
) -> jax.Array:
    """x_s = (2 - a) x_t + b^2 score + b z, for the forward step x_t = a x_s + b z."""
    a = jnp.exp(level.log_alpha - prev.log_alpha)
    b = level.sigma * jnp.sqrt(-jnp.expm1(level.logsnr - prev.logsnr))
    mean = (2 - a) * x_t - b**2 / level.sigma * pred.eps
    noise = gaussian.normal(keys, x_t.shape)
    return mean + jnp.where(prev.sigma > 0, b, 0.0) * noise
