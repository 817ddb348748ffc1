"""Fashion-MNIST, padded to 32x32, with the layout of the CIFAR-10 network at width 32.

Command   make train EXP=fashion_mnist
          with Debian's package dataset-fashion-mnist installed, or the four
          official files in a folder: ARGS="--data.path FOLDER"
Hardware  one GPU
Time      one H200: four minutes and a half, compiling included. 2 CPU cores:
          16 images take about 0.4 s, and the loss can be seen falling within
          a minute: ARGS="--train.steps 50 --train.batch-size 16
          --optimizer.warmup 10"
Expected  clothes (docs/fashion_mnist.png); bound 2.60 +- 0.04 bits/dim; Frechet
          distance of 2,000 samples by our classifier 1.49 (make eval)
"""

from dataclasses import replace

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
    name="fashion_mnist",
    data=Data(source="fashion_mnist", image_size=32, channels=1, flip=False),
    diffusion=Diffusion(schedule="cosine", prediction="v", loss="v", variance="small"),
    net=replace(cifar10.CONFIG.net, channels=32, dropout=0.0),
    optimizer=Optimizer(
        preset="modern",
        learning_rate=1e-3,
        warmup=500,
        decay="cosine",
        ema_decay=(0.9995,),
    ),
    train=Train(steps=20_000, batch_size=256, checkpoint_every=5000),
    sample=Sample(every=10_000, count=64, steps=250),
)
