"""CIFAR-10 for its likelihood: variational diffusion (Kingma et al. 2021).

Command   make train EXP=cifar10_vdm
Hardware  8 GPUs with 80 GB in all
Time      not measured here; the paper trains for 10 million steps
Expected  a bound well below the 3.70 bits/dim of DDPM; the paper's network,
          without down-sampling, gets 2.65

The bound in continuous time, with times spread evenly over the batch, and a schedule
that is learned: its ends with the bound, its shape to lower the variance of the loss.
The network sees fine detail as Fourier features. It is the U-Net of DDPM.
"""

from dataclasses import replace

from diffusion_jax.lab.schema.config import Diffusion, Sample, Train
from experiments.configs import cifar10

CONFIG = replace(
    cifar10.CONFIG,
    name="cifar10_vdm",
    data=replace(cifar10.CONFIG.data, flip=False),
    diffusion=Diffusion(
        schedule="learned", loss="vlb", variance="small", spread="low_discrepancy"
    ),
    net=replace(cifar10.CONFIG.net, fourier=(7, 8)),
    train=Train(steps=10_000_000, batch_size=128),
    sample=Sample(every=50_000, count=64),
)
