"""Converts trained networks: `python -m experiments.convert IN OUT`.

IN is a run (its folder or name), a .safetensors file of ours, a folder of diffusers
with a UNet2DModel, an AutoencoderKL or both, a TensorFlow checkpoint of the authors
(its prefix, such as model.ckpt-790000), an autoencoder of CompVis in .safetensors, or
with --download the name of a network on the hub, such as google/ddpm-cifar10-32. What
it is, is seen from its content.

OUT ends in .safetensors, for a file of ours with the configuration inside, which all
commands take in place of a run; or is the name of a folder, for diffusers.

With --inception IN is the network that FID is measured by: the released graph
(classify_image_graph_def.pb, or inception-2015-12-05.tgz), the PyTorch file of
pytorch-fid (where PyTorch is installed), or safetensors. OUT is then a .safetensors
file, which loads fastest and needs nothing else.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
import tyro

from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError, raise_unknown
from diffusion_jax.interop import inception_weights
from diffusion_jax.lab.network_files import (
    autoencoder_files,
    diffusers_folder,
    hub,
    networks,
    records,
)
from diffusion_jax.lab.network_files.records import About, Network
from diffusion_jax.lab.process import entry, progress
from diffusion_jax.lab.run_folder import changes, results, runs
from diffusion_jax.lab.schema import choices, latents, sampling
from diffusion_jax.lab.schema.checks import with_data
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import UNKNOWN, Config
from diffusion_jax.lab.trained import space, weights
from diffusion_jax.storage import trees
from experiments.configs import EXPERIMENTS


@dataclasses.dataclass(frozen=True)
class Options:
    """From where, to where, and what IN does not say of itself."""

    MAIN: ClassVar = (
        "source out experiment data download inception raw average step overwrite"
    )
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """The network as it is."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The .safetensors file or the folder to write; nothing must be there yet."""
    which: choices.Which = Weights()
    experiment: str | None = None
    """Experiment that a TensorFlow checkpoint was trained in, such as lsun_cat256, from
    which its data are known: the checkpoint itself tells no more than the network."""
    data: str | None = None
    """What the network was trained on, where it does not say itself: cifar10,
    folder:<path>, or what else data.source may be in training."""
    download: bool = False
    """Whether IN is the name of a network on the hub, to be downloaded."""
    inception: bool = False
    """Whether IN is the Inception network of FID."""
    overwrite: bool = False
    """Whether to replace what is at OUT."""


def main(argv: Sequence[str]) -> int:
    """Converts, and prints what was read and written; returns the exit code."""
    options = entry.parse(Options, argv, "convert", __doc__)
    check_out(options)
    if options.inception:
        return convert_inception(options)
    network = read(options)
    count = sum(leaf.size for leaf in jax.tree.leaves(network.params))
    about = network.about
    of_autoencoder = latents.is_autoencoder(network.config)
    print(f"{options.source}: SHA-256 {network.sha256}")
    said = weights.describe(about.weights, about.step)
    print(f"{said}, {count:,} parameters, of {about.origin}")
    if network.space is not None:
        print("with the autoencoder whose latents it learns")
    if network.config.data.source == UNKNOWN:
        print("its training data are unknown: name them with --data to evaluate it")
    if is_file(options.out):
        with progress.clock("writing"):
            written = networks.write_file(options.out, network)
        print(f"{options.out}: SHA-256 {written}")
        quoted = shlex.quote(str(options.out))
        do = "measure it" if of_autoencoder else "draw with it"
        command = "eval_autoencoder" if of_autoencoder else "sample"
        print(f"{do}: python -m experiments.{command} {quoted}")
        return 0
    with progress.clock("writing"):
        written = networks.write_folder(options.out, network)
    if of_autoencoder:
        print(f"{options.out / autoencoder_files.WEIGHTS}: SHA-256 {written}")
    else:
        print(f"{options.out / diffusers_folder.WEIGHTS}: SHA-256 {written}")
    decoder = network.params if network.space is None else network.space.params
    if "log_variance" in decoder:
        print("note: the width of its decoder is left behind: diffusers has none")
    opener = diffusers_folder.opener(network.config)
    if network.config.net.classes:
        print(f"note: {opener} knows no labels; UNet2DModel takes class_labels")
    else:
        print(f"open it: {opener}.from_pretrained({str(options.out)!r})")
    return 0


def check_out(options: Options) -> None:
    """Raises ConfigError where OUT cannot be written, before anything is read."""
    out, suffix = options.out, options.out.suffix.lower()
    if suffix in (".bin", ".ckpt", ".npz", ".pkl", ".pt", ".pth", ".json", ".h5"):
        raise ConfigError(
            "OUT must end in .safetensors, for a file of ours, or have no ending, for "
            f"a folder of diffusers; got {out}. Name it otherwise."
        )
    there = out.exists() or out.is_symlink()
    if there and not options.overwrite:
        raise ConfigError(
            f"cannot write {out}: a {'folder' if out.is_dir() else 'file'} is there. "
            "Name another place, or give --overwrite."
        )
    if not is_file(out):
        diffusers_folder.check_replaceable(out)
    elif out.is_dir():
        raise ConfigError(
            f"{out} must be a file, to be replaced; got a folder. Name another place."
        )


def convert_inception(options: Options) -> int:
    """Converts the weights of the Inception network; returns the exit code."""
    if not is_file(options.out):
        raise ConfigError(
            f"OUT must end in .safetensors with --inception; got {options.out}. That "
            "is the one format that is written."
        )
    alone = Options(
        options.source, options.out, inception=True, overwrite=options.overwrite
    )
    if options != alone:
        raise ConfigError(
            "--inception must stand without --experiment, --data, --download and a "
            "choice of weights, which are of a diffusion network; got one of them. "
            "Leave them out."
        )
    found = inception_weights.load(Path(options.source))
    print(f"{options.source}: {found.format}, SHA-256 {found.sha256}")
    parameters, statistics = (
        sum(leaf.size for leaf in jax.tree.leaves(found.variables[kind]))
        for kind in ("params", "batch_stats")
    )
    print(f"{parameters:,} parameters, {statistics:,} statistics")
    digest = inception_weights.save(found.variables, options.out)
    print(f"{options.out}: safetensors, SHA-256 {digest}")
    return 0


def is_file(out: Path) -> bool:
    """Returns whether OUT is to be a file of ours, rather than a folder."""
    return out.suffix.lower() == ".safetensors"


def read(options: Options) -> Network:
    """Returns the network that IN is, with what the options say of it."""
    source, origin = options.source, None
    if options.data is not None:
        datasets.check_source(options.data)
    if options.download:
        origin = f"{source}, from the hub"
        found = networks.find(hub.fetch(source))
        if found is None:
            raise ConfigError(
                f"{source} must be a UNet2DModel, a pipeline with one, or an "
                "AutoencoderKL; got none of them. Other families do not fit."
            )
        run = runs.Run(found.path, found)
    else:
        run = runs.find(source)
    kind = "run" if run.network is None else run.network.kind
    if options.experiment is not None and kind != "official":
        raise ConfigError(
            "experiment must be left out with a network that has a configuration; got "
            f"--experiment {options.experiment}. It is for TensorFlow checkpoints."
        )
    if run.network is None:
        network = of_run(run, options.which)
    elif kind == "official":
        network = _official(options, run.network.path)
    else:
        weights.check_alone(run, options.which)
        network = networks.read(run.network, progress=True)
    network = network._replace(config=with_data(network.config, options.data))
    about = network.about._replace(origin=origin or network.about.origin)
    measured = scores(run, trees.digest(network.params), network.config)
    return network._replace(about=about._replace(scores={**about.scores, **measured}))


def of_run(run: runs.Run, which: Weights) -> Network:
    """Returns the network of a run; its digest is of the weights, without a file."""
    config = runs.read_config(run)
    own = space.load(config, run) if latents.is_latent(config) else None
    params, step, words = weights.load(config, run, which)
    params = jax.tree.map(np.asarray, params)
    origin = f"the run {config.name}"
    if config.init_from is not None:
        origin += f", fine-tuned from {Path(config.init_from).name}"
    about = About(words, step, origin, {}, recipe=True)
    if step is not None:
        config = changes.before(run, config, step)
        about = about._replace(changes=changes.in_words(run, step))
    return Network(config, params, about, trees.digest(params), own)


def scores(run: runs.Run, digest: str, config: Config) -> dict[str, dict[str, str]]:
    """Returns what the evaluations in a folder say of just these weights.

    For each number its "value", and "of" what it is.
    """
    found: dict[str, dict[str, str]] = {}
    for name, result in results.read(run, digest):
        try:
            of, numbers = _numbers(name, result, config)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # of another version
        for number, (mean, error) in numbers.items():
            bar = "" if error is None else f" +- {error:.2g}"
            same = found.get(number, {"of": of})["of"] == of
            key = number if same else f"{number} ({of})"
            found[key] = {"value": f"{mean:.4g}{bar}", "of": of}
    return found


def _numbers(
    name: str, result: dict[str, Any], config: Config
) -> tuple[str, dict[str, tuple[float, float | None]]]:
    """Returns what a result is of, and its numbers with their errors.

    Those of commands that measure something else have none.
    """
    if not name.startswith(("fid", "nll")):
        return "", {}
    where = "" if result["data"] == config.data.source else result["data"]
    where = f", {records.public_source(where)}" if where else ""
    if name.startswith("fid"):
        of = f"{result['count']:,} samples, {sampling.describe(result)}{where}"
        return of, {
            number: (value["mean"], value.get("std"))
            for number, value in result["numbers"].items()
            if isinstance(value, dict) and number != "sure"
        }
    of, number = f"{result['images']:,} {result['split']} images{where}", "bits/dim"
    if "variance" in result:
        number, of = f"{number}, bound", f"{of}, variance {result['variance']}"
    else:
        number += " by the flow"
    return of, {number: (result["bits_per_dim"], result["standard_error"])}


def _official(options: Options, path: Path) -> Network:
    """Returns the network of a checkpoint of the authors."""
    which = options.which
    if which.average is not None or which.step is not None:
        raise ConfigError(
            "average and step must be left out with a TensorFlow checkpoint, which has "
            f"one average and one step; got {weights.flags(which)}. Choose the last "
            "weights with --raw."
        )
    config = None
    if options.experiment is not None:
        if options.experiment not in EXPERIMENTS:
            raise_unknown("experiment", options.experiment, tuple(EXPERIMENTS))
        config = EXPERIMENTS[options.experiment].config
    return networks.read_official(path, config, average=not which.raw, progress=True)


if __name__ == "__main__":
    entry.guarded(main)
