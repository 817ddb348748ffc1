"""CIFAR-10 with the arithmetic of the authors' code, to the constant.

Command   make train EXP=cifar10_official
          (of any experiment: ARGS=--official)
Hardware  one large GPU, or 8 TPU cores as in the paper
Time      14 hours on one H200, at 63.9 ms a step as measured; 10.6 hours on a
          TPU v3-8 by the paper
Expected  the paper's FID 3.17 and Inception score 9.46 for 50,000 samples
          against the training set; bound at most 3.75 bits/dim

float32 throughout, TensorFlow's Adam, the gradient of each eighth of the batch clipped
by itself as eight TPU cores did, and an average of the weights without a ramp. On one
device it is more than four times slower than cifar10. For reproducing the paper's
numbers, and for checking another implementation step by step; to train a network take
cifar10.
"""

from dataclasses import replace

from diffusion_jax.lab.schema.config import official
from experiments.configs import cifar10

CONFIG = replace(official(cifar10.CONFIG), name="cifar10_official")
