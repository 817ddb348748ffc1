"""LSUN bedroom at 256x256 (Sec. 4 and App. B, Ho et al. 2020).

Command   make train EXP=lsun_bedroom256
          with the images in data/lsun_bedroom256 (any size; cropped)
Hardware  8 TPU cores or GPUs with 80 GB in all
Time      303 hours on a TPU v3-8 (2.4 million steps at 2.2 a second by the paper); not
          measured here
Expected  the paper's FID 6.36 for 50,000 samples

Not mirrored, as the paper says; the default of the official code mirrors.
"""

from dataclasses import replace

from diffusion_jax.lab.schema.config import Data, Train
from experiments.configs import celebahq256

CONFIG = replace(
    celebahq256.CONFIG,
    name="lsun_bedroom256",
    data=Data(
        source="folder:data/lsun_bedroom256", image_size=256, channels=3, flip=False
    ),
    train=Train(steps=2_400_000, batch_size=64),
)
