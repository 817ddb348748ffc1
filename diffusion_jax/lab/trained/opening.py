"""Opens a trained network for a command: its run, configuration, weights, and extras.

Those are what sampling needs beside the weights: the analytic variance, a classifier.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import analytic
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import hosts, progress
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import latents, sampling
from diffusion_jax.lab.schema.checks import with_data, with_sampling
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.trained import space, weights
from diffusion_jax.lab.wiring import build, chains, guides, latent_space
from diffusion_jax.lab.wiring.chains import Drawable
from diffusion_jax.training import parallel


def opened(
    name: str | None,
    options: Any,
    *,
    which: Weights | None = None,
    how: Sampling | None = None,
    data: str | None = None,
    autoencoder: bool | None = False,
) -> tuple[runs.Run, Config]:
    """Returns a trained network's run and configuration, checked on all hosts.

    The run is named as `runs.find` takes it, and the options are the same on all hosts.
    The way to sample and the data stand in place of the run's. `autoencoder` says
    whether the run must be one of an autoencoder, or of diffusion; None, either.

    Raises:
      ConfigError: there is no such run, it has no such weights, is of the other kind,
        or a value does not fit; or hosts differ.
      ValueError: a file that holds no network.
    """
    run = runs.find(name)
    weights.check_alone(run, which or Weights())
    hosts.check_same("the options", repr(options))
    hosts.check_shared(run.folder)
    config = with_data(runs.read_config(run), data)
    if autoencoder not in (None, latents.is_autoencoder(config)):
        kinds = "diffusion", "an autoencoder"
        raise ConfigError(
            f"RUN must be of {kinds[autoencoder]}; got {run.folder}, of "
            f"{kinds[not autoencoder]}. Name another run, or use this one by python -m "
            f"experiments.{'sample' if autoencoder else 'eval_autoencoder'}."
        )
    if how is not None:
        config = with_sampling(config, how)
    parallel.persistent_cache(run.cache)
    return run, config


IMAGES, BATCH = 256, 64
"""Images that the analytic variance is estimated from, and how many at a time."""


def load(
    config: Config, run: runs.Run, which: Weights, *, variance: str | None = None
) -> tuple[Drawable, int | None, str]:
    """Returns weights with what `complete` adds, their step, and their name.

    The variance is of the reverse steps of a bound, which clips and is not guided;
    without it, what `config.sample` needs is added.

    Raises:
      ConfigError, CheckpointError: as `weights.load`; or there is no classifier.
    """
    params, step, words = weights.load(config, run, which)
    return complete(config, run, params, variance=variance), step, words


def complete(
    config: Config, run: runs.Run, params: Any, *, variance: str | None = None
) -> Drawable:
    """Returns the weights with what sampling needs beside them, as `load`."""
    drawable = Drawable(params)
    if latents.is_latent(config):
        drawable = drawable._replace(space=space.load(config, run))
    if (variance or config.sample.variance) == "analytic":
        how = sampling.resolve(config.sample, config.diffusion.num_steps)
        clip = how["clip"] or (variance is not None and drawable.space is None)
        table = x0_variance(config, run, drawable, clip=clip)
        drawable = drawable._replace(x0_variance=table)
    if config.sample.classifier_guidance and variance is None:
        path = guides.path_of(run.folder)
        guide = guides.load(path)
        guides.check(guide, config)
        label = config.sample.label
        if label is not None and label >= guide.num_classes:
            raise ConfigError(
                f"label must be below {guide.num_classes}, the number of classes of "
                f"{path}; got {label}. Change it with --label."
            )
        drawable = drawable._replace(classifier=guide.params)
    return drawable


def x0_variance(
    config: Config, run: runs.Run, drawable: Drawable, *, clip: bool
) -> np.ndarray:
    """Returns Var[x0 | x_t] for t = 0..T, [T + 1], estimated from training images.

    It is the squared error of the network, and so optimal for its predicted mean. It is
    cached in the run's folder.
    """
    about = {"weights": drawable.sha256, "images": IMAGES, "clip": clip}
    path = run.folder / "eval" / "x0_variance.json"
    known = runs.recalled(path, {"about": about}, lambda table: np.array(table, float))
    if known is not None:
        return known
    if jax.process_count() > 1:
        raise ConfigError(
            "variance must be small, large, learned or range on several hosts, where "
            "none has estimated another yet; got analytic. Estimate it on one host "
            "first: experiments.sample RUN --variance analytic."
        )
    dataset = build.load_data(config)
    rng = np.random.default_rng(0)
    count = min(IMAGES, len(dataset.images) // BATCH * BATCH) or len(dataset.images)
    chosen = np.sort(rng.choice(len(dataset.images), count, replace=False))

    @jax.jit
    def estimate(weights: Any, key: jax.Array, image: Any, label: Any) -> jax.Array:
        levels = build.chain_schedule(config, weights.params)
        denoise = chains.given_labels(config, weights, levels, label, clip=clip)
        x = image.astype(jnp.float32) / 127.5 - 1
        x0 = latent_space.of_images(config, weights.space, x)
        return analytic.x0_variance(key, denoise, levels, x0, estimator="error")

    tables = []
    starts = range(0, count, BATCH)
    label = "variance of x0"
    with progress.clock(label, total=len(starts), unit="batches") as bar:
        for first in starts:
            batch = datasets.batch_at(dataset, chosen[first : first + BATCH])
            labels = batch["label"] if config.net.classes else None
            key = jax.random.fold_in(jax.random.key(0), first)
            tables.append(np.asarray(estimate(drawable, key, batch["image"], labels)))
            bar.update()
    mean = np.mean(tables, axis=0, dtype=np.float64)
    levels = build.chain_schedule(config, drawable.params)
    table = np.asarray(analytic.bounded(mean, levels), np.float64)
    runs.write_json(path, {"about": about, "table": table.tolist()})
    return table
