"""Images of which every pixel is the same on every machine: drawn in whole numbers.

A step of ddpm or of ddim is a x0 + b x_t + c z, with three numbers that only its times
decide. x_t and the noise z are in units of 2^-20, x0 of 2^-12, a, b and c of 2^-32; so
nothing is left to rounding but x0 as the network sees it, for which see
`codec.certified`, and the three numbers. Both are in a file beside the picture, by
which another machine draws the same for certain. Without it, it draws the same but
once in 2^21 values.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import gaussian
from diffusion_jax.codec import certified, noise
from diffusion_jax.codec.certified import NONE, Listed
from diffusion_jax.errors import ConfigError, counted
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.process import progress, replaceable
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import json_fields, latents
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.trained.exact import Denoise64, denoise64
from diffusion_jax.lab.wiring import chains
from diffusion_jax.lab.wiring.chains import Drawable

BITS = 32
"""A unit of a step's numbers is 2^-32."""
UNIT = 2.0**-noise.BITS
LARGEST = 5 * noise.ONE
"""Beyond all noise of deviation 1."""


class Walk(NamedTuple):
    """All that decides how noise becomes an image, beside the network."""

    times: np.ndarray
    """Before each step, int64 [n]."""
    steps: np.ndarray
    """a, b and c of each step, int64 [n, 3]."""
    start: int
    """Deviation of the noise at the start, in units of 2^-20."""


def check(config: Config) -> None:
    """Raises ConfigError where the way to sample is not exact."""
    if latents.is_latent(config):
        raise ConfigError(
            "cannot draw exactly from latents: the decoder computes in float32, which "
            "differs between machines. Leave out --exact."
        )
    how = chains.describe_sampling(config)
    rule, change = how["sampler"], "Leave out --exact, or give"
    if rule not in ("ddpm", "ddim"):
        raise ConfigError(
            f"cannot draw exactly by {rule}: a step in whole numbers is there for ddpm "
            f"and ddim alone. {change} --sampler ddim."
        )
    if how.get("variance", "small") not in ("small", "large"):
        raise ConfigError(
            f"cannot draw exactly with the variance {how['variance']}: it is a "
            f"network's or an estimate, and differs between machines. {change} "
            "--variance small or large."
        )
    if config.sample.classifier_guidance:
        raise ConfigError(
            "cannot draw exactly with a classifier's guidance: its gradient is in "
            f"float32, which differs between machines. {change} --guidance."
        )
    if not how["clip"]:
        raise ConfigError(
            "cannot draw exactly without the clip of x0 to [-1, 1]: exact arithmetic "
            "has a range. Leave out --exact; the run says sample.clip false."
        )


def walk_of(config: Config, drawable: Drawable) -> Walk:
    """Returns the walk of the configuration's chain, as this machine computes it.

    The numbers of a step are what the rule makes of x0 = 1, of x_t = 1, and of noise.
    The configuration must be one that `check` passes.
    """
    grid, std = chains.make_grid(config), chains.start_std(config)
    count = len(grid) - 1

    @jax.jit
    def of(params: Any, key: jax.Array, x0: jax.Array, x_t: jax.Array) -> jax.Array:
        levels = chains.sampling_schedule(config, params)

        def denoise(x: jax.Array, t: jax.Array) -> gaussian.Prediction:
            return gaussian.predict("x0", jnp.full_like(x, x0), x, levels(t))

        rule = chains.make_rule(config, denoise, levels)
        t, s = jnp.asarray(grid[:-1]), jnp.asarray(grid[1:])
        return rule.step(key, jnp.full((count, 1), x_t, float), (), t, s).x

    with jax.enable_x64(True):
        key = jax.random.split(jax.random.key(0), count)
        units = ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0))
        by_x0, by_x_t, by_noise = (
            np.asarray(of(drawable.params, key, *u)) for u in units
        )
        z = np.asarray(gaussian.normal(key, (count, 1)))
    parts = (by_x0 - by_noise, by_x_t - by_noise, by_noise / z)
    numbers = np.concatenate(parts, axis=1)
    steps = np.rint(numbers * 2**BITS).astype(np.int64)
    return Walk(np.asarray(grid[:-1], np.int64), steps, round(std / UNIT))


def batch(
    denoise: Denoise64,
    walk: Walk,
    shape: tuple[int, ...],
    *,
    seed: int,
    first: int,
    known: Listed = NONE,
) -> tuple[np.ndarray, Listed]:
    """Returns images, uint8 [B, H, W, C], and the values of x0 that were in doubt.

    Image i depends on (seed, first + i) alone. Values are counted by image, step and
    pixel, in that order.

    `first` is the number of the first image, `known` what was in doubt elsewhere.

    Raises:
      ConfigError: noise so large that it is beyond 64 bits.
    """
    count, size, found = shape[0], int(np.prod(shape[1:])), [NONE]

    def drawn(step: int) -> np.ndarray:
        rows = noise.rows(seed, step, 0, first, count, size)
        return rows.astype(np.int64).reshape(shape)

    numbers, length = first + np.arange(count), len(walk.times)
    _check_range(walk.start * LARGEST)
    x = walk.start * drawn(0) >> noise.BITS
    for i, (t, (a, b, c)) in enumerate(
        zip(walk.times, walk.steps.tolist(), strict=True)
    ):
        most = int(np.abs(x).max())
        _check_range(abs(a) * noise.ONE + abs(b) * most + abs(c) * LARGEST)
        starts = (numbers * length + i) * size
        grid, near = certified.predict(
            lambda x, t: denoise(x, int(t), first), x * UNIT, t
        )
        grid = certified.settled(grid, starts, known)
        found.append(certified.listed(grid, near, starts))
        x = a * (grid << noise.BITS - certified.BITS) + b * x + (1 << BITS - 1)
        if c:
            x += c * drawn(i + 1)
        x >>= BITS
    return pictures.to_uint8(x * UNIT), certified.joined(found)


def _check_range(most: int) -> None:
    if most >= 2**62:
        raise ConfigError(
            "cannot draw exactly: the noise of this schedule is too large for whole "
            "numbers of 64 bits. Leave out --exact."
        )


MARK = replaceable.report_of("sample")
"""By which such a file is known."""
FREE = ("command", "network", "weights")
"""What a drawing says of itself that may differ between machines."""
HELP = "Give the .json that sample --exact wrote beside its picture."


class Record(NamedTuple):
    """What a file says of a drawing."""

    walk: Walk
    """The numbers of its steps."""
    listed: Listed
    """The values that were in doubt, as `batch` counts them."""
    images: int
    """How many."""
    sha256: str
    """Of all pixels, image by image."""


def in_batches(
    config: Config,
    drawable: Drawable,
    made: dict[str, Any],
    out: Path,
    *,
    count: int,
    batch_size: int,
    given: Path | None = None,
) -> Iterator[np.ndarray]:
    """Returns batches of uint8 images, [B, H, W, C], which write a file at their end.

    The configuration must be one that `check` passes; the seed is that of `made`, from
    `outputs.about`. `out` is the file by which another machine draws the same, `given`
    such a file of another.

    Raises:
      ConfigError: the given file is of something else, or damaged, or the images are
        not those that it is of.
    """
    own, size = walk_of(config, drawable), min(batch_size, count)
    theirs = None if given is None else read(given, own, made, config.data.shape)
    walk, known = (own, NONE) if theirs is None else (theirs.walk, theirs.listed)
    denoise, steps = denoise64(config, drawable), len(walk.times)

    def drawn() -> Iterator[np.ndarray]:
        digest, found = hashlib.sha256(), []
        batches = counted(-(-count // size), "batch", "batches")
        said = f"drawing exactly: {batches} of {counted(steps, 'step')}"
        with progress.clock(said, total=count) as bar:
            for first in range(0, count, size):
                # The last batch is drawn whole: nothing compiles again.
                shape, seed = (size, *config.data.shape), made["seed"]
                images, listed = batch(
                    denoise, walk, shape, seed=seed, first=first, known=known
                )
                found.append(listed)
                digest.update(images[: count - first].tobytes())
                bar.update(len(images[: count - first]))
                yield images[: count - first]
        sha256, whole = digest.hexdigest(), certified.joined(found)
        if theirs is not None and theirs.images == count and theirs.sha256 != sha256:
            raise ConfigError(
                f"the pixels must have the sha256 of {given}, {theirs.sha256[:12]}; "
                f"got {sha256[:12]}. This machine's network differs from that one by "
                f"more than {certified.SURE:.1e}: other weights, or float64 that is "
                "none."
            )
        inside = whole.place < count * steps * int(np.prod(config.data.shape))
        kept = Listed(whole.place[inside], whole.value[inside])
        write(out, Record(walk, kept, count, sha256), made, config.data.shape)
        listed_in_all = counted(len(kept.place), "value")
        print(f"sha256 of the pixels: {sha256}; {listed_in_all} listed")

    return drawn()


def write(
    path: Path, record: Record, made: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """Writes what is to be known of a drawing.

    `made` is as of `outputs.about`, the shape that of an image.
    """
    walk, sizes = record.walk, (record.images, len(record.walk.times), np.prod(shape))
    places = np.unravel_index(record.listed.place, sizes)
    steps = np.concatenate([walk.times[:, None], walk.steps], axis=1)
    listed = np.stack([*places, record.listed.value], axis=1)
    said = {
        "images": record.images,
        "pixels_sha256": record.sha256,
        "start": walk.start,
        "walk": [" ".join(map(str, row)) for row in steps.tolist()],
        "listed": [" ".join(map(str, row)) for row in listed.tolist()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, made | said)


def read(path: Path, own: Walk, made: dict[str, Any], shape: tuple[int, ...]) -> Record:
    """Returns what a file says of a drawing.

    `own` is the walk as this machine computes it; the rest as for `write`.

    Raises:
      ConfigError: it is no such file, or of another network, seed or way to sample.
    """
    try:
        said = json_fields.load(path)
        differ = [name for name in made if name not in FREE]
        differ = [name for name in differ if said.get(name) != made[name]]
        count, sha256, start = said["images"], said["pixels_sha256"], said["start"]
        steps, listed = _table(said["walk"]), _table(said["listed"])
        if not (json_fields.is_whole(count) and 0 < count < 2**32):
            raise ValueError(f"{count!r} images")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}. {HELP}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"cannot read {path}: no record of a drawing ({error}). {HELP}"
        ) from error
    if differ:
        raise ConfigError(
            f"{path} must be of the same drawing; got another {', '.join(differ)}. "
            "Give the flags that it says it was made with."
        )
    here = np.concatenate([own.times[:, None], own.steps], axis=1)
    near = steps.shape == here.shape and np.abs(steps - here).max() <= 1
    sizes = (count, len(here), int(np.prod(shape)))
    inside = (listed[:, :3] >= 0) & (listed[:, :3] < sizes)
    if not (near and start == own.start and inside.all()):
        raise ConfigError(
            f"{path} must be of the steps that this chain has; got others. The file is "
            "damaged, or of another version."
        )
    place = np.ravel_multi_index(tuple(listed[:, :3].T), sizes)
    order = np.argsort(place)
    walk = Walk(own.times, steps[:, 1:], start)
    return Record(walk, Listed(place[order], listed[order, 3]), count, sha256)


def _table(rows: list[str]) -> np.ndarray:
    """Returns rows of four whole numbers of at most 18 digits, int64 [N, 4]."""
    found = [[int(word[:20]) for word in row.split()] for row in rows]
    if any(len(row) != 4 or max(map(abs, row)) >= 10**18 for row in found):
        raise ValueError("rows of other than four whole numbers")
    return np.array(found, np.int64).reshape(-1, 4)
