"""The experiments: command, hardware, hours and expected result of each.

A file has one experiment, its CONFIG, or a family that belongs together, its CONFIGS.
"""

from types import ModuleType

from diffusion_jax.lab.schema.config import Experiment
from experiments.configs import (
    celebahq256,
    cifar10,
    cifar10_conditional,
    cifar10_cosine_hybrid,
    cifar10_edm,
    cifar10_flow,
    cifar10_official,
    cifar10_vdm,
    cifar10_vp_continuous,
    digits,
    digits_family,
    fashion_mnist,
    lsun_bedroom256,
    lsun_bedroom256_large,
    lsun_cat256,
    lsun_church256,
    table2,
)


def _in_file(module: ModuleType) -> dict[str, Experiment]:
    family = getattr(module, "CONFIGS", None) or {module.CONFIG.name: module.CONFIG}
    return {n: Experiment(config, module.__doc__ or "") for n, config in family.items()}


EXPERIMENTS: dict[str, Experiment] = {
    name: experiment
    for module in (
        digits,
        digits_family,
        fashion_mnist,
        cifar10,
        cifar10_official,
        table2,
        cifar10_cosine_hybrid,
        cifar10_vdm,
        cifar10_edm,
        cifar10_vp_continuous,
        cifar10_flow,
        cifar10_conditional,
        celebahq256,
        lsun_church256,
        lsun_cat256,
        lsun_bedroom256,
        lsun_bedroom256_large,
    )
    for name, experiment in _in_file(module).items()
}
