"""The digits in 32 numbers: an autoencoder (f2), and the same one as a VAE.

Command   make train EXP=digits_autoencoder
          make train EXP=digits_vae
          python -m experiments.eval_autoencoder runs/digits_autoencoder
Hardware  2 CPU cores
Time      see docs/latent.md
Expected  see docs/latent.md

4x4 latents of 2 channels. The first has hardly any weight on the KL divergence, for
latent diffusion (digits_latent); the second trains the variational bound, in bits/dim
over 256 values a pixel.
"""

from dataclasses import replace

from diffusion_jax.lab.schema.autoencoder import Autoencoder
from diffusion_jax.lab.schema.config import Config, Optimizer, Sample, Train
from experiments.configs import digits

CONFIG = Config(
    name="digits_autoencoder",
    data=digits.CONFIG.data,
    autoencoder=Autoencoder(
        kind="kl", channels=16, multipliers=(1, 2), blocks=1, latent=2, groups=8
    ),
    optimizer=Optimizer(
        learning_rate=2e-3, warmup=200, decay="cosine", b2=0.99, ema_decay=(0.999,)
    ),
    train=Train(steps=5000, batch_size=64, checkpoint_every=1000, log_every=50),
    sample=Sample(every=1000, count=64),
)
CONFIGS = {
    "digits_autoencoder": CONFIG,
    "digits_vae": replace(
        CONFIG, name="digits_vae", autoencoder=replace(CONFIG.autoencoder, kind="vae")
    ),
}
