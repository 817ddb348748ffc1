"""A trained network in a notebook: loaded, drawn from, asked, or trained there.

>>> from diffusion_jax import lab
>>> lab.train.__name__, lab.load.__name__
('train', 'load')
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax import gaussian
from diffusion_jax import schedule as schedules
from diffusion_jax.data import datasets, formats
from diffusion_jax.errors import ConfigError, raise_unknown
from diffusion_jax.lab.drawing import draws
from diffusion_jax.lab.measure import bound
from diffusion_jax.lab.network_files import hub
from diffusion_jax.lab.process import entry, stopping
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import checks, json_fields
from diffusion_jax.lab.schema.config import GIVEN, Config, Net
from diffusion_jax.lab.schema.sampling import Sampling, Variance
from diffusion_jax.lab.trained import extras, opening, weights
from diffusion_jax.lab.trained.weights import Weights
from diffusion_jax.lab.training import initial, loop
from diffusion_jax.lab.wiring import build, chains


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trained:
    """A trained network: its weights, its configuration, and what one asks of it."""

    config: Config
    """What it is, what it was trained on, and how it draws where nothing is said."""
    params: Any
    """The weights, a tree of arrays on all devices."""
    step: int | None
    """Updates that the weights have seen, where it is known."""
    kind: str
    """Which weights, such as "averaged"."""
    run: runs.Run
    """Where its files are."""

    def __repr__(self) -> str:
        """Returns what it is in one line."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        shape = "x".join(map(str, self.config.data.shape))
        said = weights.describe(self.kind, self.step)
        return f"<{self.config.name}: images of {shape}, {count:,} weights; {said}>"

    @functools.cached_property
    def schedule(self) -> schedules.Schedule:
        """Returns the noise schedule of its chains: t in {0, ..., T} -> NoiseLevel."""
        return build.chain_schedule(self.config, self.params)

    def sample(
        self, key: jax.Array, count: int = 1, *, batch_size: int = 64, **how: Any
    ) -> np.ndarray:
        """Returns images drawn from noise, uint8 [count, H, W, C].

        Args:
          key: one key. Image i depends on (key, i) alone; those of jax.random.key(s)
            are those that `experiments.sample --seed s` draws.
          count: how many.
          batch_size: images at a time.
          **how: fields of `Sampling`, in place of the configuration's: sampler
            (scheduler), steps, grid, eta, order, label, guidance (classifier-free
            guidance), ...

        Raises:
          ConfigError: no such option, a value that does not fit, or no key.
        """
        _check_key(key)
        for name, value in (("count", count), ("batch_size", batch_size)):
            if not json_fields.is_whole(value) or value < 1:
                raise ConfigError(
                    f"{name} must be a whole number above 0; got {value!r}. Give the "
                    "number of images."
                )
        with _in_python():
            config = checks.with_sampling(self.config, _sampling(how))
        drawable = extras.complete(config, self.run, self.params)
        parts = draws.in_batches(config, drawable, key, count, batch_size)
        return np.concatenate(list(parts))

    def denoise(
        self, x_t: jax.Array, t: ArrayLike, *, label: ArrayLike | None = None
    ) -> gaussian.Prediction:
        """Returns what the network believes of noisy images: x0 and the noise in them.

        A pure function: it may be differentiated, and passed through `jit` or `vmap`.

        Args:
          x_t: images scaled to [-1, 1] with the noise of time t, [B, H, W, C]:
            `gaussian.q_sample(x0, noise, trained.schedule(t))`.
          t: times in {0, ..., T}, [B] or one for all.
          label: classes, [B] or one for all, of a network with classes; none, which
            one trained with net.label_dropout knows, when not given.

        Raises:
          ConfigError: images of another shape, or a label without classes.
        """
        _check_shape(self.config, np.shape(x_t)[1:], "x_t")
        self.schedule(t)  # a t that is known is checked here: under jit it is not
        each = _labels(self.config.net, label, len(x_t))
        return _denoise(
            self.config, self.params, jnp.asarray(x_t), jnp.asarray(t), each
        )

    def bits_per_dim(
        self,
        images: ArrayLike,
        *,
        labels: ArrayLike | None = None,
        variance: Variance | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> np.ndarray:
        """Returns the bound on each image's negative log-likelihood, [N] bits/dim.

        By one draw of x_t for each of the T steps, T network evaluations an image
        (Eq. 5, Ho et al. 2020): what `experiments.eval_nll` averages.

        Args:
          images: uint8, [N, H, W, C] or [N, H, W].
          labels: whole numbers, [N], for a network with classes.
          variance: of the reverse steps; the configured one when not given.
          batch_size: images at a time.
          seed: of the noise.

        Raises:
          ConfigError, DataError: images or labels that do not fit.
        """
        dataset = _dataset(images, labels)
        _check_shape(self.config, dataset.images.shape[1:], "images")
        build.check_labels(self.config, dataset)
        used = variance or self.config.diffusion.variance
        drawable = extras.complete(self.config, self.run, self.params, variance=used)
        sums = bound.evaluate(
            self.config,
            drawable,
            dataset,
            np.arange(len(dataset.images)),
            variance=variance,
            batch_size=batch_size,
            seed=seed,
        )
        return np.asarray(sums.totals)


def load(
    where: str | Path | None = None,
    *,
    average: float | None = None,
    raw: bool = False,
    step: int | None = None,
    download: bool = False,
) -> Trained:
    """Returns the trained network at a path.

    Args:
      where: the folder or name of a run; a .safetensors file of ours; a folder of
        diffusers; a TensorFlow checkpoint of the authors; with `download` the name of a
        network on the hub. The newest run in runs/ when not given.
      average: which moving average (EMA) of the weights: see `Weights`.
      raw: the last weights in place of an average.
      step: of the checkpoint; the newest when not given.
      download: whether `where` is the name of a network on the hub, to be fetched.

    Raises:
      ConfigError: nothing of the kind is there, or it has no such weights.
      CheckpointError: no checkpoint can be read.
      ValueError: a damaged file.
    """
    entry.quiet()
    path = None if where is None else str(where)
    if download:
        path = str(hub.fetch(path or ""))
    which = Weights(average=average, raw=raw, step=step)
    run, config = opening.opened(path, which, which=which)
    params, found, kind = weights.load(config, run, which)
    return Trained(config, params, found, kind, run)


def train(
    config: Config,
    *,
    images: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    strict: bool = False,
    force: bool = False,
) -> Trained:
    """Returns the network after training it, or after going on (resume) with its run.

    As `experiments.train` does, in the same folder, <output>/<name>: the same call
    again goes on where it stopped. An interrupt stops it after a step, with a
    checkpoint.

    Args:
      config: the configuration; that of another run, with another name, is a good one
        to begin with: dataclasses.replace(trained.config, name="mine").
      images: uint8 [N, H, W, C] or [N, H, W], in place of those that config.data
        names; its size and channels are then theirs.
      labels: whole numbers, [N]; needed where config.net.classes is not 0.
      strict, force: as the flags of the command.

    Raises:
      ConfigError: values that do not fit, or another run in the folder.
      DataError: images that do not fit.
      DivergedError: the run was given up.
    """
    dataset = None
    if images is not None:
        dataset = _dataset(images, labels)
        config = dataclasses.replace(config, data=_given(config, dataset))
        build.check_labels(config, dataset)
    elif labels is not None:
        raise ConfigError(
            "labels must come with images; got labels alone. Give both, or neither."
        )
    entry.quiet()
    with _in_python():
        config = initial.resolved(config, force=force)
        checks.validate(config)
        checks.of_training(config)
        loop.train(
            config,
            strict=strict,
            force=force,
            dataset=dataset,
            signals=stopping.interrupts,
        )
    return load(runs.of(config).folder)


@functools.partial(jax.jit, static_argnums=0)
def _denoise(
    config: Config, params: Any, x_t: jax.Array, t: jax.Array, label: jax.Array | None
) -> gaussian.Prediction:
    levels, clip = build.chain_schedule(config, params), config.sample.clip
    drawable = chains.Drawable(params)
    return chains.given_labels(config, drawable, levels, label, clip=clip)(x_t, t)


@contextmanager
def _in_python() -> Iterator[None]:
    """Names arguments in the words of errors that name a command's flags."""
    try:
        yield
    except ConfigError as error:
        said = str(error).replace("with --name NAME", "by another name in config")
        said = said.replace("by --force", "by force=True")
        said = re.sub(
            r"Change it with --([\w.-]+)\.$",
            lambda found: f"Change it: {found[1].replace('-', '_')}=...",
            said,
        )
        error.args = (said,)
        raise


def _labels(net: Net, label: ArrayLike | None, count: int) -> jax.Array | None:
    """Returns the classes that a network is told, [count]; None where it has none."""
    if label is None and net.classes and not net.label_dropout:
        raise ConfigError(
            f"label must be given, in 0..{net.classes - 1}; got none, which this "
            "network was never told. Give one for all, or one an image."
        )
    if label is not None and not net.classes:
        raise ConfigError(
            "label must be left out with a network without classes; got "
            f"{label!r}. Train one with net.classes."
        )
    if not net.classes:
        return None
    known = jnp.asarray(net.classes if label is None else label)  # the last row: none
    return jnp.broadcast_to(known, (count,))


def _sampling(how: dict[str, Any]) -> Sampling:
    """Returns the way to sample that options describe, each of its field's type."""
    names = tuple(field.name for field in dataclasses.fields(Sampling))
    for name in how:
        if name not in names:
            raise_unknown("the option", name, names)
    wrong: list[tuple[str, str, str]] = []
    read = json_fields.read(how, Sampling, "", partial=True, wrong=wrong)
    if wrong:
        name, must, got = wrong[0]
        raise ConfigError(f"{name} must be {must}; got {got}. Change it: {name}=...")
    found: Sampling = read
    return found


def _given(config: Config, dataset: datasets.Dataset) -> Any:
    """Returns the fields of data for images that were given in memory."""
    height, width, channels = dataset.images.shape[1:]
    if channels not in (1, 3):
        raise ConfigError(
            f"images must have 1 or 3 channels; got {channels}. Convert them to grey "
            "or RGB."
        )
    digest = hashlib.sha256(np.ascontiguousarray(dataset.images).tobytes())
    if dataset.labels is not None:
        digest.update(dataset.labels.tobytes())
    return dataclasses.replace(
        config.data,
        source=f"{GIVEN}{digest.hexdigest()[:16]}",
        path=None,
        image_size=(height, width),
        channels=channels,
    )


def _dataset(images: ArrayLike, labels: ArrayLike | None) -> datasets.Dataset:
    found = formats.as_images(np.asarray(images), "the call")
    known = None if labels is None else np.asarray(labels)
    return datasets.Dataset(
        found, formats.as_labels(known, len(found), "the call"), "given"
    )


def _check_key(key: Any) -> None:
    if not (
        isinstance(key, jax.Array)
        and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        and key.ndim == 0
    ):
        raise ConfigError(
            f"key must be one key of jax.random; got {key!r}. Give jax.random.key(0)."
        )


def _check_shape(config: Config, shape: tuple[int, ...], name: str) -> None:
    if tuple(shape) != config.data.shape:
        raise ConfigError(
            f"{name} must be of shape [N, {', '.join(map(str, config.data.shape))}], "
            f"what the network was trained on; got [N, {', '.join(map(str, shape))}]. "
            "Resize them, or load another network."
        )
