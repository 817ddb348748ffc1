"""Loads, trains and samples networks in a notebook: `lab.load`, `lab.train`."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax import gaussian
from diffusion_jax import schedule as schedules
from diffusion_jax.errors import ConfigError, raise_unknown
from diffusion_jax.lab import given
from diffusion_jax.lab.autoencoder import TrainedAutoencoder
from diffusion_jax.lab.drawing import draws
from diffusion_jax.lab.measure import bound
from diffusion_jax.lab.network_files import hub
from diffusion_jax.lab.process import entry, stopping
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import checks, latents
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.few import DISTILLED, Method
from diffusion_jax.lab.schema.sampling import Sampling, Variance
from diffusion_jax.lab.schema.students import student
from diffusion_jax.lab.trained import opening, space, weights
from diffusion_jax.lab.trained.weights import Weights
from diffusion_jax.lab.training import initial, loop
from diffusion_jax.lab.wiring import build, chains, latent_space
from diffusion_jax.latents import Scale


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trained:
    """A trained network: its weights and its configuration."""

    config: Config
    """What the network is, what it was trained on, and the default way to sample."""
    params: Any
    """The weights, a tree of arrays on all devices."""
    step: int | None
    """Training steps of the weights, where known."""
    kind: str
    """Which weights, such as "averaged"."""
    run: runs.Run
    """The run's folder."""

    def __repr__(self) -> str:
        """Returns name, shape, size and kind of weights in one line."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        shape = "x".join(map(str, self.config.data.shape))
        said = weights.describe(self.kind, self.step)
        return f"<{self.config.name}: images of {shape}, {count:,} weights; {said}>"

    @functools.cached_property
    def schedule(self) -> schedules.Schedule:
        """Returns the noise schedule of its chains: t in {0, ..., T} -> NoiseLevel."""
        return build.chain_schedule(self.config, self.params)

    @functools.cached_property
    def autoencoder(self) -> TrainedAutoencoder:
        """Returns the autoencoder of a network of latents.

        What it encodes to is what `denoise` takes, once it has noise.

        Raises:
          ConfigError: the network is one of images.
        """
        if not latents.is_latent(self.config):
            raise ConfigError(
                f"cannot take an autoencoder out of {self.config.name}: it learns the "
                "images themselves. Load a run with data.latent."
            )
        own = jax.device_put(space.load(self.config, self.run))
        return TrainedAutoencoder(self.config, own, None, "its autoencoder's", self.run)

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
        given.check_key(key)
        count = given.whole("count", count)
        batch_size = given.whole("batch_size", batch_size)
        with given.in_python():
            chosen = given.options(how, Sampling)
            config = checks.with_sampling(self.config, chosen)
            drawable = opening.complete(config, self.run, self.params)
            parts = draws.in_batches(config, drawable, key, count, batch_size)
            return np.concatenate(list(parts))

    def denoise(
        self, x_t: jax.Array, t: ArrayLike, *, label: ArrayLike | None = None
    ) -> gaussian.Prediction:
        """Returns the network's prediction for noisy images: x0 and the noise in them.

        A pure function: it may be differentiated, and passed through `jit` or `vmap`.

        Args:
          x_t: images scaled to [-1, 1] with the noise of time t, [B, H, W, C]:
            `gaussian.q_sample(x0, noise, trained.schedule(t))`.
          t: times in {0, ..., T}, [B] or one for all.
          label: classes, [B] or one for all, of a network with classes; no label
            when not given, which needs a network trained with net.label_dropout.

        Raises:
          ConfigError: images of another shape, or a label without classes.
        """
        noisy, times = given.noisy(self.config, x_t, t)
        self.schedule(t)  # checks a concrete t, which the jitted function cannot
        each = given.label_of(self.config.net, label, len(noisy))
        return _denoise(self.config, self.params, noisy, times, each)

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

        One draw of x_t for each of the T steps, T network evaluations an image (Eq. 5,
        Ho et al. 2020): `experiments.eval_nll` reports the mean.

        Args:
          images: uint8, [N, H, W, C] or [N, H, W].
          labels: whole numbers, [N], for a network with classes.
          variance: of the reverse steps; the configured one when not given.
          batch_size: images at a time.
          seed: of the noise.

        Raises:
          ConfigError, DataError: images or labels that do not fit.
        """
        dataset = given.dataset(images, labels, self.config)
        given.check_shape(self.config, dataset.images.shape[1:], "images")
        used = variance or self.config.diffusion.variance
        with given.in_python():
            checks.of_denoiser(self.config)
            build.check_labels(self.config, dataset)
            drawable = opening.complete(
                self.config, self.run, self.params, variance=used
            )
            sums = bound.evaluate(
                self.config,
                drawable,
                dataset,
                np.arange(len(dataset.images)),
                variance=variance,
                batch_size=given.whole("batch_size", batch_size),
                seed=given.whole("seed", seed, least=0),
            )
        return np.asarray(sums.totals)


def load(
    where: str | Path | None = None,
    *,
    average: float | None = None,
    raw: bool = False,
    step: int | None = None,
    download: bool = False,
) -> Trained | TrainedAutoencoder:
    """Returns the trained network, or the autoencoder, at a path.

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
    if not isinstance(where, str | os.PathLike | None):
        raise ConfigError(
            f"where must be a path or a name; got a {type(where).__name__}. Give that "
            "of a run, of a .safetensors file or of a folder of diffusers."
        )
    path = None if where is None else os.fspath(where)
    which = given.options({"average": average, "raw": raw, "step": step}, Weights)
    with given.in_python():
        if download:
            path = str(hub.fetch(path or ""))
        run, config = opening.opened(path, which, which=which, autoencoder=None)
        params, found, kind = weights.load(config, run, which)
    if latents.is_autoencoder(config):
        as_they_are = np.zeros(config.autoencoder.latent, np.float32)
        own = latent_space.LatentSpace(params, Scale(as_they_are, 1 + as_they_are))
        return TrainedAutoencoder(config, own, found, kind, run)
    return Trained(config, params, found, kind, run)


def train(
    config: Config,
    *,
    images: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    strict: bool = False,
    force: bool = False,
) -> Trained | TrainedAutoencoder:
    """Trains a network, or resumes its run, and returns it.

    As `experiments.train`, in the same folder, <output>/<name>: the same call again
    resumes where it stopped. An interrupt stops it after a step, with a checkpoint.

    Args:
      config: the configuration, such as that of another run under another name:
        dataclasses.replace(trained.config, name="mine").
      images: uint8 [N, H, W, C] or [N, H, W], in place of those that config.data
        names; size and channels are then those of the images.
      labels: whole numbers, [N]; needed with config.net.classes, and only there.
      strict, force: as the flags of the command.

    Raises:
      ConfigError: values that do not fit, or another run in the folder.
      DataError: images that do not fit.
      DivergedError: the run was given up.
    """
    config, dataset = given.config_of(config), None
    if images is not None:
        dataset = given.dataset(images, labels, config)
        data = given.data_of(config, dataset.images, images, dataset.labels)
        config = dataclasses.replace(config, data=data)
        with given.in_python():
            build.check_labels(config, dataset)
    elif labels is not None:
        raise ConfigError(
            "labels must come with images; got labels alone. Give both, or neither."
        )
    entry.quiet()
    with given.in_python():
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


def distil(
    where: str | Path | None = None, method: Method = "ect", **changes: Any
) -> Trained:
    """Trains a student that draws in one to four steps, or resumes, and returns it.

    As `experiments.distil`, in a folder of its own, <output>/<name>_<method>.

    Args:
      where: the teacher, as in `load`.
      method: ect, consistency, consistency_training or progressive.
      **changes: fields of `Config` in place of the student's: name, train, few, ...;
        what few leaves out, its method and learn_v, is the student's.

    Raises:
      ConfigError, DivergedError: as `load` and `train`.
      ValueError: no such method or field.
    """
    names = tuple(field.name for field in dataclasses.fields(Config))
    for what, got, known in (
        ("method", {method}, DISTILLED),
        ("the field", changes, names),
    ):
        if unknown := set(got) - set(known):
            raise_unknown(what, min(unknown), known)
    teacher = load(where)
    source = teacher.run.network.path if teacher.run.network else teacher.run.folder
    made = student(teacher.config, method, init_from=str(source))
    if few := changes.get("few"):
        first = few.learn_v or made.few.learn_v
        changes["few"] = dataclasses.replace(few, method=method, learn_v=first)
    return cast(Trained, train(dataclasses.replace(made, **changes)))


@functools.partial(jax.jit, static_argnums=0)
def _denoise(
    config: Config, params: Any, x_t: jax.Array, t: jax.Array, label: jax.Array | None
) -> gaussian.Prediction:
    levels, clip = build.chain_schedule(config, params), config.sample.clip
    drawable = chains.Drawable(params)
    return chains.given_labels(config, drawable, levels, label, clip=clip)(x_t, t)
