"""Sampling rules of networks that see the end of the path: one to a few long jumps."""

import jax

from diffusion_jax import gaussian, samplers
from diffusion_jax.prediction import Denoiser, JumpDenoiser
from diffusion_jax.samplers import Sampler, Step
from diffusion_jax.schedule import Schedule


def consistency(denoise: Denoiser, schedule: Schedule) -> Sampler:
    """Returns multistep consistency sampling (Algorithm 1, Song et al. 2023).

    x_s = alpha_s f(x_t) + sigma_s z: from each time to data, and back with fresh noise.
    One step draws from f alone; each further one mends what the jump before it blurred.

    Args:
      denoise: a consistency model: its x0 is the end of the path through x_t.
      schedule: its noise schedule.

    >>> from diffusion_jax import grids, schedule
    >>> lin = schedule.linear(10)
    >>> rule = consistency(gaussian.denoiser(lambda x, t: 0 * x, lin, "x0"), lin)
    >>> images = samplers.sample(jax.random.key(0), rule, grids.uniform(lin, 2), (1, 2))
    >>> bool((images == 0).all())
    True
    """

    def step(
        keys: jax.Array, x_t: jax.Array, memory: tuple[()], t: jax.Array, s: jax.Array
    ) -> Step:
        x0 = denoise(x_t, t).x0
        noise = gaussian.normal(keys, x_t.shape)
        return Step(gaussian.q_sample(x0, noise, schedule(s)), memory, x0)

    return Sampler(samplers.forgetful(schedule), step)


def mean_flow(denoise: JumpDenoiser, schedule: Schedule) -> Sampler:
    """Returns sampling by average velocities (Algorithm 2, Geng et al. 2025).

    x_s = x_t - (t - s) u(x_t, t, s): on the straight paths of `continuous.flow` that is
    alpha_s x0 + sigma_s eps of what the network predicts for the jump.

    Args:
      denoise: the network's prediction as a function of (x_t, t, s).
      schedule: its noise schedule, with straight paths.

    >>> from diffusion_jax import continuous, grids
    >>> flow = continuous.flow()
    >>> ends = lambda x, t, s: gaussian.Prediction(0 * x, x / flow(t).sigma)
    >>> rule = mean_flow(ends, flow)
    >>> grid = grids.uniform(flow, 1)
    >>> images = samplers.sample(jax.random.key(0), rule, grid, (1, 2))
    >>> bool((images == 0).all())
    True
    """

    def step(
        keys: jax.Array, x_t: jax.Array, memory: tuple[()], t: jax.Array, s: jax.Array
    ) -> Step:
        pred = denoise(x_t, t, s)
        x_s = gaussian.q_sample(pred.x0, pred.eps, schedule(s))
        return Step(x_s, memory, pred.x0)

    return Sampler(samplers.forgetful(schedule), step)
