"""Denoising diffusion probabilistic models as pure JAX functions.

The mathematics, each module resting only on those above it:

  schedule    noise schedules: time -> NoiseLevel(log_alpha, logsnr)
  gaussian    q_sample, q_posterior, predict, target, p_sample, denoiser
  losses      L_simple and the terms of the variational bound, one number an example
  samplers    one loop, many rules; time grids
  likelihood  the bound over the whole chain in bits/dim; rate and distortion

The machinery, which knows nothing of diffusion:

  nets        the networks (Flax): unet, inception, classifier
  training    state (the training step), parallel, data, checkpoint
  evaluation  metrics (FID and others), moments, images (grids, strips and plots)
"""

from diffusion_jax import gaussian, likelihood, losses, samplers, schedule

__all__ = ["gaussian", "likelihood", "losses", "samplers", "schedule"]
