"""CIFAR-10, the main experiment of Ho et al. 2020, in the fast form.

Command   make train EXP=cifar10
Hardware  one large GPU, or 8 TPU cores as in the paper
Time      3.3 hours on one H200, at 14.8 ms a step as measured
          (docs/performance.md); 10.6 hours on a TPU v3-8 by the paper
Expected  the paper's FID 3.17 and Inception score 9.46 for 50,000 samples
          against the training set; bound at most 3.75 bits/dim

Activations are in bfloat16, the gradient is clipped as a whole, and the average of the
weights has a ramp. The authors' own arithmetic is cifar10_official, or --official.
"""

from diffusion_jax.lab.schema.config import (
    Config,
    Data,
    Diffusion,
    Net,
    Optimizer,
    Sample,
    Train,
)

CONFIG = Config(
    name="cifar10",
    data=Data(source="cifar10", image_size=32, channels=3, flip=True),
    diffusion=Diffusion(
        schedule="linear",
        num_steps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        prediction="eps",
        loss="eps",
        variance="large",
    ),
    net=Net(
        channels=128,
        multipliers=(1, 2, 2, 2),
        blocks=2,
        attention=(16,),
        dropout=0.1,
        groups=32,
        dtype="bfloat16",
    ),
    optimizer=Optimizer(
        learning_rate=2e-4,
        warmup=5000,
        clip_norm=1.0,
        ema_decay=(0.9999,),
    ),
    train=Train(steps=800_000, batch_size=128),
    sample=Sample(every=10_000, count=64, clip=True),
)
