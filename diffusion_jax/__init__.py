"""Denoising diffusion probabilistic models as pure JAX functions.

The mathematics, each module resting only on those above it:

  schedule    noise schedules: time -> NoiseLevel(log_alpha, logsnr)
  continuous  continuous schedules; from discrete to continuous time and back
  learned     VDM's schedule, trained with the network
  prediction  what a network predicts, and the variance of the reverse step
  gaussian    q_sample, q_posterior, predict, target, p_sample, denoiser
  timesteps   how t is drawn: spread over a batch, by density, by importance
  weightings  how much the error counts, as a function of log-SNR
  losses      L_simple, the terms of the bound, hybrid: one number an example
  autoencoding  losses of autoencoders: reconstruction, KL, ELBO, of a discriminator
  distillation  losses of few steps: distilled, consistent, mean flow
  guidance    classifier-free and classifier guidance: networks and denoisers again
  analytic    the best reverse variance, estimated from data
  grids       time grids: uniform, quadratic, even in log-SNR, Karras
  sde         continuous time: drift, diffusion, score, probability flow
  samplers    one loop, many rules: ddpm, ddim
  solvers     rules: heun, edm, dpm_solver_pp, unipc
  jumps       rules of one to four steps: consistency, mean_flow
  langevin    rules: predictor_corrector, langevin
  ode         the probability flow solved to a tolerance
  editing     encode, interpolate, vary, inpaint, colorize: with any rule
  likelihood  bits/dim by the whole chain's bound or the flow; rate and distortion
  latents     of an autoencoder: their scale, and the bound of images

Bytes of images, and back, by any network:

  codec        progressive, archive (files without loss), fitting (what they need)

The machinery, which knows nothing of diffusion:

  nets         the networks (Flax): unet, autoencoder, inception, classifier
  data         datasets, and in which order a step sees them
  training     state (the training step), averages, parallel, feed
  checkpoints  checkpoint: saved, verified, restored
  evaluation   metrics (FID and others), moments, pictures (grids, strips and plots)
  storage      files, archives, downloads, tensors by name
  interop      other people's networks

And `lab`, which knows runs and configurations: what commands and notebooks share.
"""

from typing import TYPE_CHECKING

from diffusion_jax._on_demand import on_demand

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffusion_jax import (
        analytic,
        autoencoding,
        continuous,
        distillation,
        editing,
        gaussian,
        grids,
        guidance,
        jumps,
        langevin,
        latents,
        learned,
        likelihood,
        losses,
        ode,
        prediction,
        samplers,
        schedule,
        sde,
        solvers,
        timesteps,
        weightings,
    )

__all__ = [
    "analytic",
    "autoencoding",
    "continuous",
    "distillation",
    "editing",
    "gaussian",
    "grids",
    "guidance",
    "jumps",
    "langevin",
    "latents",
    "learned",
    "likelihood",
    "losses",
    "ode",
    "prediction",
    "samplers",
    "schedule",
    "sde",
    "solvers",
    "timesteps",
    "weightings",
]

# JAX, which all of them import, takes a second.
__getattr__, __dir__ = on_demand(__name__, __all__)
