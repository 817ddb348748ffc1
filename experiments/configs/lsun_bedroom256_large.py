"""LSUN bedroom at 256x256 with the large network (Sec. 4 and App. B, Ho et al. 2020).

Command   make train EXP=lsun_bedroom256_large
          with the images in data/lsun_bedroom256 (any size: cropped and resized)
Hardware  8 TPU cores or GPUs with 160 GB in all
Time      more than 145 hours on a TPU v3-8 (1.15 million steps); not measured here
Expected  the paper's FID 4.90 for 50,000 samples

The paper says "approximately 256 million parameters" by more filters; width 192 gives
255,677,955.
"""

from dataclasses import replace

from diffusion_jax.lab.schema.config import Train
from experiments.configs import lsun_bedroom256

CONFIG = replace(
    lsun_bedroom256.CONFIG,
    name="lsun_bedroom256_large",
    net=replace(lsun_bedroom256.CONFIG.net, channels=192),
    train=Train(steps=1_150_000, batch_size=64),
)
