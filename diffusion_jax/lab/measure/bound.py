"""Computes bits/dim of images: by the bound, or by the probability flow ODE."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import autoencoding, continuous, likelihood, ode
from diffusion_jax import latents as of_images
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import progress
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.sampling import Variance
from diffusion_jax.lab.wiring import build, chains, latent_space
from diffusion_jax.lab.wiring.chains import Drawable
from diffusion_jax.nets.autoencoder import Moments
from diffusion_jax.schedule import is_discrete
from diffusion_jax.training import parallel

Trace = Literal["rademacher", "gaussian", "exact"]


class Seen(NamedTuple):
    """The bound of B images, and of latents what it is made of beside theirs."""

    total: jax.Array
    """The bound on the negative log-likelihood, [B], in bits/dim of the images."""
    of_network: likelihood.Bound
    """That of what the network learns, in bits/dim of that."""
    reconstruction: jax.Array
    """-log p(x | z) of latents, [B], in bits/dim of the images; 0 without."""


class Sums:
    """Sums of the bound's terms over images, in float64."""

    def __init__(self, num_steps: int) -> None:
        """Starts empty."""
        self.totals: list[float] = []
        self.prior, self.reconstruction = 0.0, 0.0
        self.terms, self.mse = np.zeros(num_steps), np.zeros(num_steps)

    def add(self, seen: Seen, count: int) -> None:
        """Adds the first `count` images of a batch; the rest is padding."""
        whole = jax.tree.map(lambda x: np.asarray(x, np.float64), seen)
        host = whole.of_network
        self.totals += whole.total[:count].tolist()
        self.reconstruction += whole.reconstruction[:count].sum()
        self.prior += host.prior[:count].sum()
        self.terms += host.terms[:, :count].sum(axis=1)
        self.mse += host.mse[:, :count].sum(axis=1)


def mean(totals: np.ndarray) -> tuple[float, float | None]:
    """Returns the mean and its standard error; None where there is one image."""
    count = len(totals)
    error = float(np.std(totals, ddof=1) / np.sqrt(count)) if count > 1 else None
    return float(totals.mean()), error


def evaluate(
    config: Config,
    drawable: Drawable,
    dataset: datasets.Dataset,
    chosen: np.ndarray,
    *,
    variance: Variance | None = None,
    batch_size: int = 64,
    chunk: int = 1,
    seed: int = 0,
) -> Sums:
    """Returns the bound of the chosen images, with a progress bar.

    They are those at the indices `chosen`, so many at a time over all devices, and
    `chunk` diffusion steps at a time. The drawable has what the variance needs
    (`opening.complete`), which is the configured one when not given.
    """
    check(config, drawable)
    steps = config.diffusion.num_steps
    compiled = make_bound(config, variance=variance, chunk=chunk, seed=seed)
    sums = Sums(steps)
    walk = batches(config, dataset, chosen, batch_size, each=steps, unit=" evaluations")
    for batch, count in walk:
        sums.add(compiled(drawable, batch), count)
    return sums


def check(config: Config, drawable: Drawable) -> None:
    """Raises ConfigError for latents of an autoencoder that has no likelihood."""
    if config.autoencoder.kind == "ae":
        raise ConfigError(
            "cannot bound a likelihood: an autoencoder without noise has none. Train "
            "the latents of one of kind kl or vae."
        )
    space = drawable.space
    if space is not None and "log_variance" not in space.params:
        raise ConfigError(
            "cannot bound a likelihood: a folder of diffusers does not say how far "
            "decoded images are off. Name the run, or a .safetensors file of ours."
        )


def batches(
    config: Config,
    dataset: datasets.Dataset,
    chosen: np.ndarray,
    batch_size: int,
    *,
    each: int = 1,
    unit: str = " images",
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """Yields batches {"x", "i", "label"} and how many of their images are no padding.

    The progress bar counts `each` units an image.
    """
    mesh = parallel.make_mesh()
    size = -(-min(batch_size, len(chosen)) // mesh.size) * mesh.size
    total = len(chosen) * each
    said = "the bound" if each > 1 else "the flow"
    with progress.clock(said, total=total, unit=unit, unit_scale=each > 1) as bar:
        for begin in range(0, len(chosen), size):
            indices = chosen[begin : begin + size]
            # The last batch is padded with its last image.
            padded = np.pad(indices, (0, size - len(indices)), mode="edge")
            found = datasets.batch_at(dataset, padded)
            index = np.pad(np.arange(begin, begin + len(indices)), (0, size))[:size]
            batch = {"x": found["image"], "i": index}
            if config.net.classes:
                batch["label"] = found["label"]
            yield parallel.shard(batch, mesh), len(indices)
            bar.update(len(indices) * each)


@functools.lru_cache(maxsize=8)
def make_bound(
    config: Config, *, variance: Variance | None = None, chunk: int = 1, seed: int = 0
) -> Callable[[Drawable, dict[str, jax.Array]], Seen]:
    """Returns the compiled bound of a batch of uint8 images.

    Of a latent run that of the images, by one draw of latents an image.
    """
    root, used = jax.random.key(seed), variance or config.diffusion.variance
    of_latents = latents.is_latent(config)

    def network(
        drawable: Drawable, x0: jax.Array, keys: jax.Array, label: jax.Array | None
    ) -> likelihood.Bound:
        levels = build.chain_schedule(config, drawable.params)
        clip = not of_latents
        denoise = chains.given_labels(config, drawable, levels, label, clip=clip)
        last = None
        if build.is_continuous(config) and used in ("small", "large"):
            last = jnp.exp(-levels(1).logsnr)
        return likelihood.bound(
            keys,
            denoise,
            levels,
            x0,
            variance=used,
            decoder_variance=last,
            real=of_latents,
            chunk=chunk,
        )

    def bound(drawable: Drawable, batch: dict[str, jax.Array]) -> Seen:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, batch["i"])
        x, label = batch["x"].astype(jnp.float32) / 127.5 - 1, batch.get("label")
        space = drawable.space
        if space is None:
            found = network(drawable, x, keys, label)
            return Seen(found.total, found, jnp.zeros_like(found.total))
        moments = latent_space.encode(config, space, x)
        # Apart from the keys of the chain, which are folds of these from 0 on.
        draw_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.uint32(2**31))
        z = jax.vmap(Moments.sample)(moments, draw_keys)
        found = network(drawable, z, keys, label)
        again = latent_space.decode(config, space, z)
        scale = space.params["log_variance"]
        error = autoencoding.elbo(x, again, scale, moments).reconstruction
        dims = math.prod(x.shape[1:])
        parts = error, found.total, moments.log_variance
        whole = of_images.bound(*parts, dimensions=dims)
        return Seen(whole.total, found, error)

    return jax.jit(bound)


def evaluate_ode(
    config: Config,
    drawable: Drawable,
    dataset: datasets.Dataset,
    chosen: np.ndarray,
    *,
    trace: Trace = "rademacher",
    probes: int = 1,
    tolerance: float = 1e-5,
    batch_size: int = 64,
    seed: int = 0,
) -> np.ndarray:
    """Returns bits/dim and evaluations of the chosen images, [images, 2].

    As `evaluate`; the divergence is found by random probes, so many an image, or
    exactly. The tolerance of the solver is relative and absolute.

    Raises:
      ConfigError: the solver ran out of steps for an image.
    """
    if latents.is_latent(config):
        raise ConfigError(
            "cannot compute the density of images by the flow of latents, which gives "
            "one of latents. Leave out --ode: the bound is of images."
        )
    root = jax.random.key(seed)

    @jax.jit
    def compiled(drawable: Drawable, batch: dict[str, jax.Array]) -> likelihood.OdeBits:
        levels = build.make_schedule(config, drawable.params)
        if is_discrete(levels):
            levels = continuous.interpolate(levels)

        def one(index: jax.Array, x: jax.Array, label: Any) -> likelihood.OdeBits:
            # One image at a time, since each takes its own steps; without a clip, whose
            # output has no density.
            label = None if label is None else label[None]
            return likelihood.ode_bits_per_dim(
                jax.random.fold_in(root, index)[None],
                chains.given_labels(config, drawable, levels, label, clip=False),
                levels,
                x[None].astype(jnp.float32) / 127.5 - 1,
                trace=trace,
                probes=probes,
                rtol=tolerance,
                atol=tolerance,
            )

        found = jax.vmap(one)(batch["i"], batch["x"], batch.get("label"))
        return jax.tree.map(lambda leaf: leaf[:, 0], found)

    found = []
    for batch, count in batches(config, dataset, chosen, batch_size):
        bits = compiled(drawable, batch)
        rows = np.stack([bits.total, bits.density.evaluations], axis=1)
        found.append(rows[:count].astype(np.float64))
    table = np.concatenate(found)
    lost = int(np.isnan(table[:, 0]).sum())
    if lost:
        raise ConfigError(
            f"every image must be solved within {ode.MAX_STEPS} steps; got {lost} of "
            f"{len(table)} that were not. Give a larger --tolerance than "
            f"{tolerance:g}."
        )
    return table
