"""LSUN church at 256x256 (Sec. 4 and App. B, Ho et al. 2020).

Command   make train EXP=lsun_church256
          with the images in data/lsun_church256 (any size; cropped)
Hardware  8 TPU cores or GPUs with 80 GB in all
Time      152 hours on a TPU v3-8 (1.2 million steps at 2.2 a second by the paper); not
          measured here
Expected  the paper's FID 7.89 for 50,000 samples
"""

from dataclasses import replace

from diffusion_jax.lab.schema.config import Data, Train
from experiments.configs import celebahq256

CONFIG = replace(
    celebahq256.CONFIG,
    name="lsun_church256",
    data=Data(
        source="folder:data/lsun_church256", image_size=256, channels=3, flip=True
    ),
    train=Train(steps=1_200_000, batch_size=64),
)
