"""Looks up the autoencoder of a latent run, and encodes its images once.

The latents of a whole set stay in <output>/.cache/latents/, in a file that is named
after the autoencoder and the images.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import latents
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError, counted
from diffusion_jax.lab.process import hosts, progress
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import latents as kinds
from diffusion_jax.lab.schema.autoencoder import Autoencoder
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.trained import space, weights
from diffusion_jax.lab.wiring import autoencoders, latent_space
from diffusion_jax.lab.wiring.latent_space import LatentSpace
from diffusion_jax.nets.autoencoder import Moments
from diffusion_jax.storage import archives, files, trees

BATCH = 64
"""Images that are encoded at a time."""
FEW = 2048
"""Images that the width of p(x | z) is fitted to, at most, where none was trained."""


def resolved(config: Config) -> Config:
    """Returns the configuration of a latent run, with its autoencoder looked up.

    A run that has begun keeps its own where what is named is gone.

    Raises:
      ConfigError: data.latent is no autoencoder, or one of other images.
    """
    if config.data.latent is None:
        return config
    run = runs.of(config)
    own = None
    if space.path_of(run).is_file() and run.config.is_file():
        own = runs.read_config(run)
    try:
        source = _source(config)
    except ConfigError:
        if own is None or own.data.latent is None:
            raise
        return _with(config, own.autoencoder, own.data.latent)
    found = runs.read_config(source)
    if found.autoencoder.kind == "none":
        raise ConfigError(
            f"data.latent must be an autoencoder; got {config.data.latent}, of "
            "diffusion. Train one: make train EXP=digits_autoencoder."
        )
    if found.data.channels != config.data.channels:
        raise ConfigError(
            f"data.latent must be of images with {config.data.channels} channels; got "
            f"{found.data.channels}. Change --data.channels, or name another."
        )
    place = source.folder if source.network is None else source.network.path
    same = (
        own is not None and own.data.latent and _digest(source) == _stored_digest(run)
    )
    where = own.data.latent if own is not None and same else str(place.resolve())
    return _with(config, found.autoencoder, where)


def _with(config: Config, known: Autoencoder, where: str | None) -> Config:
    if config.autoencoder not in (Autoencoder(), known):
        raise ConfigError(
            "autoencoder must be left out with data.latent, which says what it is; got "
            f"{config.autoencoder}. Leave out its flags."
        )
    data = dataclasses.replace(config.data, latent=where)
    return dataclasses.replace(config, data=data, autoencoder=known)


def _source(config: Config) -> runs.Run:
    try:
        return runs.find(config.data.latent, config.output)
    except ConfigError as error:
        raise ConfigError(
            f"{str(error).replace('RUN must', 'data.latent must', 1)} An autoencoder "
            "is trained by, say, make train EXP=digits_autoencoder."
        ) from None


def _weights(source: runs.Run) -> Any:
    """Returns the weights of an autoencoder, or of that of a latent run."""
    found = runs.read_config(source)
    if kinds.is_latent(found):
        return space.load(found, source).params
    return jax.tree.map(np.asarray, weights.load(found, source, weights.Weights())[0])


def _digest(source: runs.Run) -> str:
    return trees.digest(_weights(source)["net"])


def _stored_digest(run: runs.Run) -> str:
    return trees.digest(trees.read(space.path_of(run)).params["net"])


def begin(config: Config, run: runs.Run, images: Any) -> LatentSpace | None:
    """Returns the autoencoder of a run that is trained; None without data.latent.

    At the run's first start it is copied, and its scale fitted to the training images.

    Raises:
      ConfigError: the run has begun with another one, or the latents are not finite.
    """
    if not kinds.is_latent(config):
        return None
    if runs.has_checkpoint(run):
        own = space.load(config, run)
        try:
            other = _digest(_source(config)) != trees.digest(own.params["net"])
        except ConfigError:
            other = False  # it is gone; the copy stays
        if other:
            raise ConfigError(
                f"the autoencoder must be the one that {run.folder} began with; got "
                f"other weights in {config.data.latent}. Start another run with --name "
                "NAME, or name the old one with --data.latent."
            )
        return own
    params = _weights(_source(config))
    moments = encoded(config, params, images)
    means, log_variances = np.split(moments[:, 0], 2, axis=-1)
    scale = latents.fit([(means, log_variances)])
    scale = latents.Scale(*(np.asarray(part, np.float32) for part in scale))
    if config.autoencoder.kind == "kl":
        params["log_variance"] = _fitted(config, params, images)
    own = LatentSpace(params, scale)
    if hosts.first():
        meta = {"autoencoder": json.dumps(dataclasses.asdict(config.autoencoder))}
        trees.write(space.path_of(run), latent_space.to_tree(own), meta)
    return own


def latent_set(
    config: Config, own: LatentSpace | None, dataset: datasets.Dataset
) -> datasets.Dataset:
    """Returns a data set with scaled moments of the latents in place of images.

    [N, 1, h, w, 2z], or with data.flip [N, 2, h, w, 2z]: `latent_space.draw` has more.
    The images themselves without an autoencoder.
    """
    if own is None:
        return dataset
    moments = encoded(config, own.params, dataset.images)
    mean, log_variance = np.split(moments, 2, axis=-1)
    shift, scale = (np.asarray(part, np.float32) for part in own.scale)
    mean, log_variance = (mean - shift) * scale, log_variance + 2 * np.log(scale)
    both: Any = np.concatenate([mean, log_variance], axis=-1)
    return dataset._replace(images=both)


def encoded(config: Config, params: Any, images: Any) -> np.ndarray:
    """Returns mean and log variance of the latents, not scaled, [N, flips, h, w, 2z].

    From the cache where they are there.
    """
    about = {
        "autoencoder": trees.digest(params["net"]),
        "images": _images_digest(config, images),
        "flip": config.data.flip,
    }
    path = Path(config.output) / ".cache" / "latents" / f"{runs.name_by(about)}.npz"
    try:
        return archives.read_npz(path, lambda _: ("moments",))["moments"]
    except (OSError, archives.ArchiveError):
        pass  # not there, or cut off: computed again
    made = _encode(config, params, images)
    if hosts.first():
        with files.replacing(path) as file:
            np.savez(file, moments=made)
    return made


def _encode(config: Config, params: Any, images: Any) -> np.ndarray:
    @jax.jit
    def run(params: Any, images: jax.Array) -> jax.Array:
        x = images.astype(jnp.float32) / 127.5 - 1
        turned = [x, x[:, :, ::-1]] if config.data.flip else [x]
        each = [autoencoders.apply(config, params, y, "encode") for y in turned]
        return jnp.stack([jnp.concatenate(m, axis=-1) for m in each], axis=1)

    found, said = [], f"encoding {counted(len(images), 'image')}"
    with progress.clock(said, total=len(images), shown=hosts.first()) as bar:
        for first in range(0, len(images), BATCH):
            index = np.minimum(np.arange(first, first + BATCH), len(images) - 1)
            part = np.asarray(run(params, np.asarray(images[index])))
            found.append(part[: len(images) - first])
            bar.update(len(found[-1]))
    made = np.concatenate(found)
    if np.isnan(made).any():
        raise ConfigError(
            f"the latents of images must be numbers; got NaN by {config.data.latent}. "
            "Train the autoencoder anew, at a lower rate."
        )
    return made


def _fitted(config: Config, params: Any, images: Any) -> np.ndarray:
    """Returns the log variance of p(x | z), [1]: of drawn latents the squared error."""
    chosen = np.linspace(0, len(images) - 1, min(FEW, len(images))).astype(int)

    @jax.jit
    def run(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        x = images.astype(jnp.float32) / 127.5 - 1
        moments: Moments = autoencoders.apply(config, params, x, "encode")
        again = autoencoders.apply(config, params, moments.sample(key), "decode")
        return jnp.square(x - again).mean(axis=(1, 2, 3))

    errors = []
    for first in range(0, len(chosen), BATCH):
        few = chosen[first : first + BATCH]
        few, kept = np.pad(few, (0, BATCH - len(few)), mode="edge"), len(few)
        key = jax.random.fold_in(jax.random.key(0), first)
        errors.append(np.asarray(run(params, np.asarray(images[few]), key))[:kept])
    mean = np.concatenate(errors).mean(dtype=np.float64, keepdims=True)
    return np.log(mean).astype(np.float32)


def _images_digest(config: Config, images: Any) -> str:
    """Returns a sha256 of images in memory; of those on disk, of some of them."""
    if isinstance(images, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    some = np.linspace(0, len(images) - 1, min(256, len(images))).astype(int)
    few = hashlib.sha256(np.ascontiguousarray(images[some]).tobytes()).hexdigest()
    return f"{config.data.source} {len(images)} {few}"
