"""LSUN at 256x256: bedroom, cat and church (Sec. 4 and App. B, Ho et al. 2020).

Command   make train EXP=lsun_bedroom256
          make train EXP=lsun_bedroom256_large
          make train EXP=lsun_cat256
          make train EXP=lsun_church256
          each with the images in a folder (any size: cropped and resized):
          data/lsun_bedroom256, data/lsun_cat256 or data/lsun_church256
Hardware  8 TPU cores or GPUs with 80 GB in all; for the large network with
          160 GB
Time      hours on a TPU v3-8 by the paper, at 2.2 steps a second; not
          measured here
Expected  the paper's FID for 50,000 samples:

                              steps        hours       FID
          church              1,200,000    152         7.89
          cat                 1,800,000    227         19.75
          bedroom             2,400,000    303         6.36
          bedroom, large      1,150,000    over 145    4.90

Bedrooms are not mirrored, as the paper says; the default of the official code mirrors.
Cats are, at random, as the paper says; a comment in the official code runs it without.
For the large network the paper says "approximately 256 million parameters" by more
filters; width 192 gives 255,677,955.
"""

from dataclasses import replace

from diffusion_jax.lab.schema.config import Config, Train
from experiments.configs import celebahq256


def _lsun(name: str, steps: int, *, channels: int = 128) -> Config:
    base, scenes = celebahq256.CONFIG, name.removesuffix("_large")
    return replace(
        base,
        name=name,
        data=replace(
            base.data, source=f"folder:data/{scenes}", flip="bedroom" not in name
        ),
        net=replace(base.net, channels=channels),
        train=Train(steps=steps, batch_size=64),
    )


CONFIGS: dict[str, Config] = {
    config.name: config
    for config in (
        _lsun("lsun_church256", 1_200_000),
        _lsun("lsun_cat256", 1_800_000),
        _lsun("lsun_bedroom256", 2_400_000),
        _lsun("lsun_bedroom256_large", 1_150_000, channels=192),
    )
}
