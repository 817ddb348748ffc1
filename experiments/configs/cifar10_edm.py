"""CIFAR-10 with EDM's preconditioning, noise and weights (Karras et al. 2022).

Command   make train EXP=cifar10_edm
Hardware  8 GPUs with 80 GB in all
Time      not measured here; 390,625 steps of 512 images
Expected  the paper's FID is 1.97 with its own network and its augmentation,
          which are not here: mirrored images, and the U-Net of DDPM

Averages of two lengths are kept with snapshots, from which an average of any length
can be made afterwards.
"""

from dataclasses import replace

from diffusion_jax.lab.schema.config import Diffusion, Optimizer, Sample, Train
from experiments.configs import cifar10

CONFIG = replace(
    cifar10.CONFIG,
    name="cifar10_edm",
    diffusion=Diffusion(
        schedule="ve",
        sigma_min=0.002,
        sigma_max=80.0,
        prediction="edm",
        loss="edm",
        variance="small",
        density="log_normal",
    ),
    net=replace(cifar10.CONFIG.net, dropout=0.13),
    optimizer=Optimizer(
        learning_rate=1e-3,
        warmup=19_500,
        # Half of the weight is on the last 500,000 images.
        ema_decay=(0.9993,),
        ema_lengths=(0.05, 0.1),
        ema_snapshots=8000,
    ),
    train=Train(steps=390_625, batch_size=512),
    sample=Sample(sampler="heun", every=10_000, count=64, clip=False),
)
