"""Measures an autoencoder: what is lost of images, and what its latents are like."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import losses
from diffusion_jax.data import datasets
from diffusion_jax.errors import counted, needs
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.process import progress
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import autoencoders
from diffusion_jax.nets.autoencoder import Moments

ACTIVE = 0.01
"""Least variance, over images, of the mean of an active unit (Burda et al. 2016)."""
WINDOW = 11
"""Pixels a side of the window of SSIM (Wang et al. 2004); less in small images."""


class Seen(NamedTuple):
    """What an autoencoder makes of images."""

    images: np.ndarray
    """uint8, [N, H, W, C]."""
    again: np.ndarray
    """Their reconstructions from the mean of the latents, uint8."""
    mean: np.ndarray
    """Of the latents, [N, h, w, z]."""
    kl: np.ndarray
    """Of the latents from N(0, I), in nats, [N]; inf without noise."""
    bits: np.ndarray
    """-log2 p(x | z) by the decoder of a vae, a draw of z an image, a dimension; [N];
    nan of other kinds."""


def see(
    config: Config,
    params: Any,
    dataset: datasets.Dataset,
    chosen: np.ndarray,
    **how: Any,
) -> Seen:
    """Returns what an autoencoder makes of chosen images of a data set.

    Args:
      config: of its run.
      params: its weights.
      dataset: the images.
      chosen: indices of those to see.
      how: batch_size, images at a time, and seed, of the noise.
    """
    parts = list(_parts(config, params, dataset, chosen, **how))
    return Seen(*map(np.concatenate, zip(*parts, strict=True)))


def _parts(
    config: Config,
    params: Any,
    dataset: datasets.Dataset,
    chosen: np.ndarray,
    *,
    batch_size: int,
    seed: int,
) -> Iterator[Seen]:
    vae = config.autoencoder.kind == "vae"

    @jax.jit
    def run(params: Any, images: jax.Array, keys: jax.Array) -> Any:
        apply = partial(autoencoders.apply, config, params)
        x = images.astype(jnp.float32) / 127.5 - 1
        moments: Any = apply(x, "encode")
        bits = jnp.full(len(x), jnp.nan)
        if vae:
            drawn: Any = apply(jax.vmap(Moments.sample)(moments, keys), "decode")
            spread = params["log_variance"].reshape(1, 1, 1, 1)
            nats = losses.decoder(x, drawn, spread, exact=True)
            bits = nats.mean(axis=(1, 2, 3)) / jnp.log(2.0)
        again = apply(moments.mode(), "decode")
        return again, moments.mean, moments.kl(), bits

    size, root = min(batch_size, len(chosen)), jax.random.key(seed)
    said = f"encoding and decoding {counted(len(chosen), 'image')}"
    with progress.clock(said, total=len(chosen)) as bar:
        for first in range(0, len(chosen), size):
            part = chosen[first : first + size]
            padded = np.pad(part, (0, size - len(part)), mode="edge")
            images = datasets.batch_at(dataset, padded)["image"]
            keys = jax.vmap(jax.random.fold_in, (None, 0))(
                root, first + np.arange(size)
            )
            again, *rest = run(params, images, keys)
            found = images, pictures.to_uint8(np.asarray(again)), *map(np.asarray, rest)
            yield Seen(*(array[: len(part)] for array in found))
            bar.update(len(part))


def fidelity(seen: Seen) -> dict[str, float]:
    """Returns PSNR, SSIM and L1 of reconstructions, rounded to uint8 as images are.

    psnr is the mean over images, as papers have it, in dB; psnr_of_all that of the mean
    squared error, which is less. l1 is of 255.
    """
    needs("dm_pix", "compute SSIM", "autoencoder")
    import dm_pix

    off = seen.again.astype(float) - seen.images
    # At least that of one pixel off by one: equal images have no finite PSNR.
    error = np.maximum(np.square(off).mean(axis=(1, 2, 3)), 1 / off[0].size)
    each = 10 * np.log10(255**2 / error)
    side = min(seen.images.shape[1:3])
    window = min(WINDOW, side - (side + 1) % 2)
    similar = jax.jit(partial(dm_pix.ssim, filter_size=window))
    found = [
        np.asarray(similar(a / np.float32(255), b / np.float32(255)))
        for a, b in zip(*(_cut(x) for x in seen[:2]), strict=True)
    ]
    return {
        "psnr": float(each.mean()),
        "psnr_of_all": float(10 * np.log10(255**2 / error.mean())),
        "ssim": float(np.concatenate(found).mean()),
        "ssim_window": window,
        "l1": float(np.abs(off).mean()),
    }


def _cut(images: np.ndarray) -> list[np.ndarray]:
    return np.array_split(images, -(-len(images) // 64))


def latents(seen: Seen) -> dict[str, Any]:
    """Returns statistics of latents: active units, and of each channel its moments."""
    mean = seen.mean.astype(float)
    variances = mean.var(axis=0)
    rows = mean.reshape(-1, mean.shape[-1])
    off = rows - rows.mean(axis=0)
    spread = off.std(axis=0)
    kurtosis = (off**4).mean(axis=0) / np.maximum(spread, 1e-30) ** 4 - 3
    return {
        "units": int(variances.size),
        "active_units": int((variances > ACTIVE).sum()),
        "channel_mean": rows.mean(axis=0).tolist(),
        "channel_std": spread.tolist(),
        "channel_excess_kurtosis": kurtosis.tolist(),
    }


def bits_per_dim(seen: Seen) -> np.ndarray:
    """Returns the bound (ELBO) of each image by a vae, in bits/dim, [N]."""
    return seen.bits + seen.kl / seen.images[0].size / np.log(2)


def bound(seen: Seen) -> dict[str, float]:
    """Returns the mean bound of a vae and its terms, in bits/dim."""
    total = bits_per_dim(seen)
    return {
        "bits_per_dim": float(total.mean()),
        "reconstruction": float(seen.bits.mean()),
        "rate": float((total - seen.bits).mean()),
        "standard_error": float(total.std(ddof=1) / np.sqrt(len(total))),
    }
