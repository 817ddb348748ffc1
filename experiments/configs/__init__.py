"""The experiments: command, hardware, hours and expected result of each.

A file has one experiment, its CONFIG, or a family that belongs together, its CONFIGS.
"""

import importlib
import os
import textwrap

from diffusion_jax.lab.schema.config import Config, Experiment

FILES = {
    "digits": "written digits: the default",
    "digits_family": "the objectives of those below",
    "fashion_mnist": "clothes, with a small network",
    "cifar10": "DDPM, the main experiment",
    "cifar10_official": "the arithmetic of the authors",
    "table2": "Table 2 of the paper",
    "cifar10_cosine_hybrid": "cosine, learned variance",
    "cifar10_vdm": "VDM, for the likelihood",
    "cifar10_edm": "EDM",
    "cifar10_vp_continuous": "the SDE, in continuous time",
    "cifar10_flow": "rectified flow",
    "cifar10_conditional": "with labels, for guidance",
    "few_steps": "one or two steps a sample",
    "celebahq256": "faces",
    "lsun256": "scenes",
    "latent": "autoencoders, latent diffusion",
}
"""What the experiments of each file are, in a few words."""


def _in_file(file: str) -> dict[str, Experiment]:
    module = importlib.import_module(f"experiments.configs.{file}")
    doc = module.__doc__ or ""
    family: dict[str, Config] = getattr(module, "CONFIGS", {})
    configs = family or {module.CONFIG.name: module.CONFIG}
    return {name: Experiment(config, doc) for name, config in configs.items()}


_BY_FILE = {file: _in_file(file) for file in FILES}
EXPERIMENTS: dict[str, Experiment] = {
    name: experiment
    for found in _BY_FILE.values()
    for name, experiment in found.items()
}


def table() -> str:
    """Returns the experiments as a table in 80 columns; a family is one row."""
    row = "{:<25}{:<15}{:<9}{}".format
    lines = [row("experiment", "data", "size", "what it is")]
    for file, found in _BY_FILE.items():
        said, by_source = FILES[file], dict[str, list[str]]()
        for name, made in found.items():
            source = made.config.data.source.partition(":")[0]
            by_source.setdefault(source, []).append(name)
        for source, names in by_source.items():
            start = os.path.commonprefix(names)  # noqa: RUF071 (of letters, indeed)
            name = start if len(names) == 1 else f"{start}*"
            size = "{}x{}".format(*found[names[0]].config.data.shape)
            lines.append(row(f"  {name}", source, size, said))
            said = "the same"
        if len(found) > 1 and len(by_source) == 1:
            ends = "* is " + ", ".join(name.removeprefix(start) for name in found)
            lines.append("    " + textwrap.shorten(ends, 76, placeholder=" ..."))
    return "\n".join(lines)
