"""Autoencoders, a VAE, and diffusion in latents (Rombach et al. 2022).

Command   make train EXP=digits_autoencoder
          make train EXP=digits_vae
          make train EXP=digits_latent
          make train EXP=fashion_mnist_autoencoder
          make train EXP=fashion_mnist_latent
          make train EXP=celebahq256_autoencoder
          make train EXP=celebahq256_latent
          python -m experiments.eval_autoencoder runs/digits_autoencoder
Hardware  digits, fashion_mnist_latent: 2 CPU cores; fashion_mnist_autoencoder: one
          GPU; celebahq256: 8 GPUs
Time      minutes for the digits, an hour for fashion_mnist_latent;
          celebahq256 was not measured
Expected  of held-out digits: PSNR 28.9 dB, and 4.27 bits/dim by digits_vae;
          samples of digits_latent as legible as 0.95 of held-out digits;
          Frechet distance of 2,000 samples of fashion_mnist_latent by our
          classifier 3.67. All in docs/latent.md

Of the digits 4x4 latents of 2 channels (f2), half as many numbers as pixels; of
Fashion-MNIST 8x8 of 4 (f4), a quarter; of CelebA-HQ 64x64 of 3 (f4), a sixteenth. A
latent run needs the autoencoder of its name beside it, or another: --data.latent RUN.
"""

from dataclasses import replace

from diffusion_jax.lab.schema.autoencoder import Autoencoder
from diffusion_jax.lab.schema.config import (
    Config,
    Diffusion,
    Net,
    Optimizer,
    Sample,
    Train,
)
from experiments.configs import celebahq256, digits, fashion_mnist

_SMALL = Autoencoder(
    kind="kl", channels=16, multipliers=(1, 2), blocks=1, latent=2, groups=8
)
_DIGITS = Config(
    name="digits_autoencoder",
    data=digits.CONFIG.data,
    autoencoder=_SMALL,
    optimizer=Optimizer(
        learning_rate=2e-3, warmup=200, decay="cosine", b2=0.99, ema_decay=(0.999,)
    ),
    train=Train(steps=5000, batch_size=64, checkpoint_every=1000, log_every=50),
    sample=Sample(every=1000, count=64),
)
_CLOTHES = replace(
    _DIGITS,
    name="fashion_mnist_autoencoder",
    data=fashion_mnist.CONFIG.data,
    net=Net(dtype="bfloat16"),
    autoencoder=replace(_SMALL, multipliers=(1, 2, 2), latent=4),
    train=Train(steps=20_000, batch_size=128, checkpoint_every=5000),
    sample=Sample(every=5000, count=64),
)
_FACES = replace(
    _CLOTHES,
    name="celebahq256_autoencoder",
    data=celebahq256.CONFIG.data,
    autoencoder=Autoencoder(kind="kl", multipliers=(1, 2, 4), latent=3),
    # 4.5e-6 an image of the batch, by the authors.
    optimizer=Optimizer(learning_rate=1.44e-4, warmup=1000),
    train=Train(steps=175_000, batch_size=32),
    sample=Sample(every=10_000, count=16),
)
_LATENT = Diffusion(schedule="cosine", prediction="v", loss="v", variance="small")


def _latent(base: Config, autoencoder: Config) -> Config:
    """Returns the experiment in the latents of another, with the data of that."""
    return replace(
        base,
        name=autoencoder.name.replace("autoencoder", "latent"),
        data=replace(autoencoder.data, latent=autoencoder.name),
        sample=replace(base.sample, clip=False),
    )


_ALL = (
    _DIGITS,
    replace(_DIGITS, name="digits_vae", autoencoder=replace(_SMALL, kind="vae")),
    replace(
        _latent(digits.CONFIG, _DIGITS), net=replace(digits.CONFIG.net, attention=(2,))
    ),
    _CLOTHES,
    # The network of the digits, which are as large as these latents, twice as wide.
    replace(
        _latent(fashion_mnist.CONFIG, _CLOTHES),
        net=replace(digits.CONFIG.net, channels=32),
        optimizer=Optimizer(
            learning_rate=1.5e-3, warmup=300, decay="cosine", ema_decay=(0.999,)
        ),
        train=Train(steps=15_000, batch_size=128, checkpoint_every=3000),
    ),
    _FACES,
    replace(
        _latent(celebahq256.CONFIG, _FACES),
        diffusion=_LATENT,
        net=Net(
            channels=224,
            multipliers=(1, 2, 3, 4),
            attention=(32, 16, 8),
            dropout=0.0,
            dtype="bfloat16",
        ),
        optimizer=Optimizer(learning_rate=9.6e-5, warmup=5000),
        train=Train(steps=410_000, batch_size=48),
    ),
)
CONFIGS: dict[str, Config] = {config.name: config for config in _ALL}
