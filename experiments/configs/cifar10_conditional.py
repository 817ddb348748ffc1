"""CIFAR-10 with labels, some of them dropped (Ho and Salimans 2022).

Command   make train EXP=cifar10_conditional
          python -m experiments.sample cifar10_conditional --label 3 --guidance 2
Hardware  one large GPU, or 8 TPU cores
Time      as cifar10
Expected  not measured here

One network for p(x | label) and p(x): a tenth of the labels are left out in training.
--guidance 1 samples the class, more exaggerates it; --guidance-interval 0.3 3 guides
only where it helps.
"""

from dataclasses import replace

from experiments.configs import cifar10

CONFIG = replace(
    cifar10.CONFIG,
    name="cifar10_conditional",
    net=replace(cifar10.CONFIG.net, classes=10, label_dropout=0.1),
)
