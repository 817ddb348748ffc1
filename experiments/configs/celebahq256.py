"""CelebA-HQ at 256x256 (Sec. 4 and App. B, Ho et al. 2020).

Command   make train EXP=celebahq256
          with the 30,000 images in data/celebahq256, or prepared by
          tensorflow-datasets: ARGS="--data.source tfds:celeb_a_hq/256"
Hardware  8 TPU cores or GPUs with 80 GB in all
Time      63 hours on a TPU v3-8 (0.5 million steps at 2.2 a second by the
          paper); not measured here
Expected  samples as in Fig. 1 of the paper, which gives no FID for them
"""

from dataclasses import replace

from diffusion_jax.lab.schema.config import Data, Diffusion, Optimizer, Sample, Train
from experiments.configs import cifar10

CONFIG = replace(
    cifar10.CONFIG,
    name="celebahq256",
    data=Data(source="folder:data/celebahq256", image_size=256, channels=3, flip=True),
    # The 256x256 networks were trained and sampled with the small variance.
    diffusion=Diffusion(variance="small"),
    net=replace(cifar10.CONFIG.net, multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0),
    optimizer=Optimizer(learning_rate=2e-5, warmup=5000),
    train=Train(steps=500_000, batch_size=64),
    sample=Sample(every=10_000, count=16),
)
