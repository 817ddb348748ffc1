"""scikit-learn's 1,797 hand-written digits, 8x8: the default, for two CPU cores.

Command   make train
Hardware  2 CPU cores
Time      under 4 minutes, compiling included
Expected  a classifier that was fitted on half of the real digits is sure of
          the samples at least 0.9 times as often as of the other half (make
          legibility); measured 0.97, with every class between 6% and 13% of
          500 samples, and no copies

A tenth of the images is held out, in place of the test images that this data
set does not have. The network predicts v under the cosine schedule, the
learning rate falls to 0 over the run, and a chain takes 250 steps.
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
    name="digits",
    data=Data(source="digits", image_size=8, channels=1, flip=False, hold_out=0.1),
    diffusion=Diffusion(schedule="cosine", prediction="v", loss="v", variance="small"),
    net=Net(
        channels=16,
        multipliers=(1, 2),
        blocks=2,
        attention=(4,),
        dropout=0.0,
        groups=8,
    ),
    optimizer=Optimizer(
        preset="modern",
        learning_rate=2e-3,
        warmup=200,
        decay="cosine",
        b2=0.99,
        ema_decay=(0.999,),
    ),
    train=Train(steps=5000, batch_size=64, checkpoint_every=1000, log_every=50),
    sample=Sample(every=1000, count=64, steps=250),
)
