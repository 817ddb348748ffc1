"""CIFAR-10 in continuous time: the variance-preserving SDE (Song et al. 2021).

Command   make train EXP=cifar10_vp_continuous
Hardware  8 GPUs with 80 GB in all
Time      not measured here; 1.3 million steps of 128 images
Expected  3.21 bits/dim by the probability flow: the paper's "DDPM cont. (VP)"

The network learns at real times; samples and bounds are made on a chain of 1000 steps,
and by the flow: --sampler ode, and eval_nll --ode.
"""

from diffusion_jax.lab.schema.config import (
    Config,
    Data,
    Diffusion,
    Optimizer,
    Sample,
    Train,
)
from experiments.configs import cifar10

CONFIG = Config(
    name="cifar10_vp_continuous",
    data=Data(source="cifar10", image_size=32, channels=3, flip=True),
    diffusion=Diffusion(schedule="vp", prediction="eps", loss="eps"),
    net=cifar10.CONFIG.net,
    optimizer=Optimizer(
        preset="modern", learning_rate=2e-4, warmup=5000, ema_decay=(0.9999,)
    ),
    train=Train(steps=1_300_000, batch_size=128),
    sample=Sample(every=10_000, count=64),
)
