"""CIFAR-10 along straight lines: rectified flow (Liu et al. 2022).

Command   make train EXP=cifar10_flow
Hardware  one large GPU
Time      not measured here; 800,000 steps of 128 images
Expected  the paper's FID of the first flow, before straightening, is 2.58 by
          an adaptive solver and its own network

x_t = (1 - t) x0 + t eps; the network predicts eps - x0. Any rule samples from it; ddim
on the uniform grid is Euler's method.
"""

from dataclasses import replace

from diffusion_jax.lab.schema.config import Diffusion, Sample
from experiments.configs import cifar10

CONFIG = replace(
    cifar10.CONFIG,
    name="cifar10_flow",
    diffusion=Diffusion(
        schedule="flow", prediction="velocity", loss="velocity", variance="small"
    ),
    sample=Sample(sampler="heun", grid="uniform", steps=50, every=10_000, count=64),
)
