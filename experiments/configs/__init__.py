"""The experiments, one a file: command, hardware, hours and expected result."""

from types import ModuleType

from experiments.configs import (
    celebahq256,
    cifar10,
    digits,
    fashion_mnist,
    lsun_bedroom256,
    lsun_bedroom256_large,
    lsun_cat256,
    lsun_church256,
)

EXPERIMENTS: dict[str, ModuleType] = {
    module.__name__.rsplit(".", 1)[-1]: module
    for module in (
        digits,
        fashion_mnist,
        cifar10,
        celebahq256,
        lsun_church256,
        lsun_cat256,
        lsun_bedroom256,
        lsun_bedroom256_large,
    )
}
