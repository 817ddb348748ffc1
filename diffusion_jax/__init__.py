"""Denoising diffusion probabilistic models as pure JAX functions.

The mathematics, each module resting only on those above it:

  schedule    noise schedules: time -> NoiseLevel(log_alpha, logsnr)
  continuous  continuous schedules; from discrete to continuous time and back
  gaussian    q_sample, q_posterior, predict, target, p_sample, denoiser
  losses      L_simple and the terms of the variational bound, one number an example
  grids       time grids: uniform, quadratic, even in log-SNR, Karras
  sde         continuous time: drift, diffusion, score, probability flow
  samplers    one loop, many rules: ddpm, ddim
  solvers     rules: heun, edm, dpm_solver_pp, unipc
  langevin    rules: predictor_corrector, langevin
  ode         the probability flow solved to a tolerance
  editing     encode, interpolate, vary, inpaint, colorize: with any rule
  likelihood  bits/dim by the whole chain's bound or the flow; rate and distortion

The machinery, which knows nothing of diffusion:

  nets        the networks (Flax): unet, inception, classifier
  training    state (the training step), parallel, data, checkpoint
  evaluation  metrics (FID and others), moments, images (grids, strips and plots)
"""

from diffusion_jax import (
    continuous,
    editing,
    gaussian,
    grids,
    langevin,
    likelihood,
    losses,
    ode,
    samplers,
    schedule,
    sde,
    solvers,
)

__all__ = [
    "continuous",
    "editing",
    "gaussian",
    "grids",
    "langevin",
    "likelihood",
    "losses",
    "ode",
    "samplers",
    "schedule",
    "sde",
    "solvers",
]
