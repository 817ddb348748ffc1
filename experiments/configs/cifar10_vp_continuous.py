"""CIFAR-10 in continuous time: the variance-preserving SDE (Song et al. 2021).

Command   make train EXP=cifar10_vp_continuous
Hardware  8 GPUs with 80 GB in all
Time      not measured here; 1.3 million steps of 128 images
Expected  3.21 bits/dim by the probability flow: the paper's "DDPM cont. (VP)"

The network learns at real times; samples and bounds are made on a chain of 1000 steps,
and by the flow: --sampler ode, and eval_nll --ode.
"""

from dataclasses import replace

from diffusion_jax.lab.schema.config import Diffusion, Train
from experiments.configs import cifar10

CONFIG = replace(
    cifar10.CONFIG,
    name="cifar10_vp_continuous",
    diffusion=Diffusion(schedule="vp"),
    train=Train(steps=1_300_000, batch_size=128),
)
