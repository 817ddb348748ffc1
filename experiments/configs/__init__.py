"""The experiments: command, hardware, hours and expected result of each.

A file has one experiment, its CONFIG, or a family that belongs together, its CONFIGS.
"""

import importlib

from diffusion_jax.lab.schema.config import Config, Experiment

FILES = (
    "digits",
    "digits_family",
    "fashion_mnist",
    "cifar10",
    "cifar10_official",
    "table2",
    "cifar10_cosine_hybrid",
    "cifar10_vdm",
    "cifar10_edm",
    "cifar10_vp_continuous",
    "cifar10_flow",
    "cifar10_conditional",
    "celebahq256",
    "lsun256",
)


def _in_file(name: str) -> dict[str, Experiment]:
    module = importlib.import_module(f"experiments.configs.{name}")
    doc = module.__doc__ or ""
    family: dict[str, Config] = getattr(module, "CONFIGS", {})
    configs = family or {module.CONFIG.name: module.CONFIG}
    return {name: Experiment(config, doc) for name, config in configs.items()}


EXPERIMENTS: dict[str, Experiment] = {
    name: experiment for file in FILES for name, experiment in _in_file(file).items()
}
