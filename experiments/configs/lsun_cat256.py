"""LSUN cat at 256x256 (Sec. 4 and App. B, Ho et al. 2020).

Command   make train EXP=lsun_cat256
          with the images in data/lsun_cat256 (any size; cropped)
Hardware  8 TPU cores or GPUs with 80 GB in all
Time      227 hours on a TPU v3-8 (1.8 million steps at 2.2 a second by the paper); not
          measured here
Expected  the paper's FID 19.75 for 50,000 samples

Mirrored at random, as the paper says; a comment in the official code runs it without.
"""

from dataclasses import replace

from diffusion_jax.lab.schema.config import Data, Train
from experiments.configs import celebahq256

CONFIG = replace(
    celebahq256.CONFIG,
    name="lsun_cat256",
    data=Data(source="folder:data/lsun_cat256", image_size=256, channels=3, flip=True),
    train=Train(steps=1_800_000, batch_size=64),
)
