"""Converts trained networks: `python -m experiments.convert IN OUT`.

IN is a run (its folder or name), a .safetensors file of ours, a folder of diffusers
with a UNet2DModel, a TensorFlow checkpoint of the authors (its prefix, such as
model.ckpt-790000), or with --download the name of a network on the hub, such as
google/ddpm-cifar10-32. What it is, is seen from its content.

OUT ends in .safetensors, for a file of ours with the configuration inside, which all
commands take in place of a run; or is the name of a folder, for diffusers.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from experiments import arguments, draws, hub, networks, runs, sampling, weights
from experiments.config import UNKNOWN, ConfigError
from experiments.configs import EXPERIMENTS
from experiments.validation import with_data
from experiments.weights import Weights


@dataclasses.dataclass(frozen=True)
class Options:
    """From where, to where, and what IN does not say of itself."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """The network as it is."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The .safetensors file or the folder to write; nothing must be there yet."""
    which: tyro.conf.OmitArgPrefixes[Weights] = dataclasses.field(
        default_factory=Weights
    )
    experiment: str | None = None
    """Experiment that a TensorFlow checkpoint was trained in, such as cifar10: it does
    not say itself."""
    data: str | None = None
    """What the network was trained on, where it does not say itself: cifar10,
    folder:<path>, or what else data.source may be in training."""
    download: bool = False
    """Whether IN is the name of a network on the hub, to be downloaded."""
    overwrite: bool = False
    """Whether to replace what is at OUT."""


def main(argv: Sequence[str]) -> int:
    """Converts, and prints what was read and written; returns the exit code."""
    options = tyro.cli(
        Options, args=argv, prog="python -m experiments.convert", description=__doc__
    )
    check_out(options)
    network = read(options)
    count = sum(leaf.size for leaf in jax.tree.leaves(network.params))
    about = network.about
    print(f"{about.origin}, SHA-256 {network.sha256}")
    print(f"{weights.describe(about.weights, about.step)}: {count:,} parameters")
    if network.config.data.source == UNKNOWN:
        print(
            "trained on data that nobody has named (--data): nothing to evaluate with"
        )
    if options.out.suffix == ".safetensors":
        written = networks.write_file(options.out, network)
        print(f"{options.out}: SHA-256 {written}")
        print(f"draw with it: python -m experiments.sample {options.out}")
        return 0
    written = networks.write_folder(options.out, network)
    file = options.out / "unet" / f"{networks.TENSORS}.safetensors"
    print(f"{file}: SHA-256 {written}")
    if network.config.net.classes:
        print("note: DDPMPipeline knows no labels; UNet2DModel takes class_labels")
    else:
        print(f'open it: DDPMPipeline.from_pretrained("{options.out}")')
    return 0


def check_out(options: Options) -> None:
    """Raises ConfigError where OUT cannot be written, before anything is read."""
    out = options.out
    if out.suffix in (".bin", ".ckpt", ".npz", ".pkl", ".pt", ".pth", ".json", ".h5"):
        raise ConfigError(
            "OUT must end in .safetensors, for a file of ours, or have no ending, for "
            f"a folder of diffusers; got {out}. Name it otherwise."
        )
    if out.exists() and not options.overwrite:
        raise ConfigError(
            f"nothing must be at {out}; got a {'folder' if out.is_dir() else 'file'} "
            "there. Name another place, or give --overwrite."
        )
    if out.is_dir() and not networks.is_export(out):
        raise ConfigError(
            f"{out} must be a folder that this command wrote, to be replaced; got "
            "another. Name another place."
        )


def read(options: Options) -> networks.Network:
    """Returns the network that IN is, with what the options say of it."""
    source = options.source
    if options.download:
        found = networks.find(hub.fetch(source))
        if found is None:
            raise ConfigError(
                f"{source} must be a UNet2DModel or a pipeline with one; got neither. "
                "Other families do not fit this U-Net."
            )
        network = _alone(options, found)
        about = network.about._replace(origin=f"{source}, from the hub")
        network = network._replace(about=about)
    else:
        run = runs.find(source)
        if run.network is None:
            network = of_run(run, options.which)
        elif run.network.kind == "official":
            network = _official(options, run.network.path)
        else:
            network = _alone(options, run.network)
    return network._replace(config=with_data(network.config, options.data))


def of_run(run: runs.Run, which: Weights) -> networks.Network:
    """Returns the network of a run, with what was measured of it."""
    config = runs.read_config(run)
    params, step, words = weights.load(config, run, which)
    params = jax.tree.map(np.asarray, params)
    digest = draws.digest(params)
    about = networks.About(
        words, step, f"the run {config.name}", scores(run, digest, words, step)
    )
    return networks.Network(config, params, about, digest)


def scores(
    run: runs.Run, digest: str, words: str, step: int | None
) -> dict[str, dict[str, str]]:
    """Returns what the evaluations in a run's folder say of just these weights.

    For each number its "value", and "of" what it is.
    """
    found = {}
    for path in sorted((run.folder / "eval").glob("fid*.json")):
        result = _json(path)
        if result.get("weights_sha256") != digest:
            continue
        drawn = f"{result['count']:,} samples, {sampling.describe(result)}"
        for name, value in result["numbers"].items():
            if isinstance(value, dict) and name != "sure":
                bar = f" +- {value['std']:.2g}" if "std" in value else ""
                found[name] = {"value": f"{value['mean']:.4g}{bar}", "of": drawn}
    for path in sorted((run.folder / "eval").glob("nll_*.json")):
        result = _json(path)
        if (result.get("weights"), result.get("training_step")) != (words, step):
            continue
        name = "bits/dim by the flow" if "tolerance" in result else "bits/dim, bound"
        error = result["standard_error"]
        bar = "" if error is None else f" +- {error:.2g}"
        found[f"{name}, {result['split']}"] = {
            "value": f"{result['bits_per_dim']:.4g}{bar}",
            "of": f"{result['images']:,} images",
        }
    return found


def _alone(options: Options, found: networks.Found) -> networks.Network:
    """Returns a network that has one set of weights and its own configuration."""
    given = options.which != Weights() or options.experiment is not None
    if given:
        raise ConfigError(
            "raw, average and step must be left out with a network that has one set "
            "of weights, and experiment with one that has a configuration; got some "
            f"of them with {options.source}. Leave them out."
        )
    return networks.read(found, progress=True)


def _official(options: Options, path: Path) -> networks.Network:
    """Returns the network of a checkpoint of the authors."""
    which, name = options.which, options.experiment
    if which.average is not None or which.step is not None:
        raise ConfigError(
            "average and step must be left out with a TensorFlow checkpoint, which has "
            f"one average and one step; got {which}. Choose the last weights with "
            "--raw."
        )
    if name not in EXPERIMENTS:
        raise ConfigError(
            "experiment must name what a TensorFlow checkpoint was trained in, since "
            f"it does not say; got {name!r}. Give --experiment cifar10, celebahq256, "
            "lsun_church256, lsun_cat256 or lsun_bedroom256."
        )
    config = EXPERIMENTS[name].config
    return networks.read_official(path, config, average=not which.raw, progress=True)


def _json(path: Path) -> dict[str, Any]:
    """Returns what an evaluation wrote; nothing where it is damaged."""
    try:
        values = json.loads(path.read_text())
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


if __name__ == "__main__":
    arguments.guarded(main)
