"""Fashion-MNIST, padded to 32x32, with the layout of the CIFAR-10 network at width 32.

Command   make train EXP=fashion_mnist
          with Debian's package dataset-fashion-mnist installed, or the four
          official files in a folder: ARGS="--data.path FOLDER"
Hardware  one GPU
Time      one H100: 15,000 steps of 256 in five minutes and a half, with
          ARGS="--train.batch-size 256 --optimizer.learning-rate 5e-4
          --optimizer.warmup 500" 2 CPU cores: 16 images take about 0.4 s, and
          the loss can be seen falling within a minute: ARGS="--train.steps 50
          --train.batch-size 16 --optimizer.warmup 10"
Expected  clothes (docs/fashion_mnist.png, after 15,156 steps on the H100)
"""

from dataclasses import replace

from diffusion_jax.lab.schema.config import Config, Data, Optimizer, Sample, Train
from experiments.configs import cifar10

CONFIG = Config(
    name="fashion_mnist",
    data=Data(source="fashion_mnist", image_size=32, channels=1, flip=False),
    net=replace(cifar10.CONFIG.net, channels=32),
    optimizer=Optimizer(preset="modern", learning_rate=1e-3, warmup=100),
    train=Train(steps=20_000, batch_size=64, checkpoint_every=1000),
    sample=Sample(every=1000, count=64, steps=250),
)
