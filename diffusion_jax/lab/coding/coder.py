"""A run as a codec: its network in float64 and its profile, which belong together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.codec import fitting
from diffusion_jax.codec import profile as profiles
from diffusion_jax.codec.certified import Denoise64
from diffusion_jax.codec.profile import Profile
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError, DataError
from diffusion_jax.lab.process import progress
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import checks, latents
from diffusion_jax.lab.schema.config import Config, replace
from diffusion_jax.lab.trained import exact, opening, weights
from diffusion_jax.lab.trained.weights import Weights
from diffusion_jax.lab.wiring import build, chains
from diffusion_jax.lab.wiring.chains import Drawable

NAME = "codec.safetensors"
"""Of the profile, in the folder of a run."""


class Network(NamedTuple):
    """A trained network whose images can be compressed."""

    run: runs.Run
    config: Config
    drawable: Drawable
    told: str
    """What its weights are, in words."""


class Coder(NamedTuple):
    """What `codec.progressive` and `codec.archive` take, and where it is from."""

    network: Network
    profile: Profile
    denoise: Denoise64


def opened(name: str | None, options: Any, which: Weights) -> Network:
    """Returns the network of a run, named as `runs.find` takes it.

    Raises:
      ConfigError: there is no such run, or it is of another kind.
    """
    run, config = opening.opened(name, options, which=which)
    checks.of_denoiser(config)
    if latents.is_latent(config):
        raise ConfigError(
            f"cannot compress with {run.folder}: of latents a decoder makes an image "
            "with an error, so nothing is lossless. Name a run trained on images."
        )
    learned = config.diffusion.schedule == "learned"
    if config.net.classes or learned:
        kind = "a learned schedule" if learned else f"{config.net.classes} classes"
        raise ConfigError(
            "the run must have no classes, and a schedule that is not learned; got "
            f"{kind}. In training, set --net.classes 0 and --diffusion.schedule cosine."
        )
    params, step, kind = weights.load(config, run, which)
    told = weights.describe(kind, step)
    return Network(run, config, Drawable(params), told)


def fit(network: Network, *, count: int = fitting.IMAGES, seed: int = 0) -> Coder:
    """Returns the network with a profile, which is written into the run's folder.

    It is measured on so many training images at most, drawn at random.

    Raises:
      DataError: its schedule is of another kind.
    """
    config, run = network.config, network.run
    dataset = build.load_data(config)
    images = np.asarray(
        dataset.images[datasets.choose(len(dataset.images), count, seed)]
    )
    about = {"name": config.name, "weights": network.drawable.sha256}
    levels = build.chain_schedule(config, network.drawable.params)
    with bar("measuring", len(images) * fitting.SCANNED) as tick:
        profile = fitting.fit(
            _in_float32(network), levels, images, about=about, seed=seed, tick=tick
        )
    path = run.folder / NAME
    if path.is_file() and (was := profiles.load(path).identity) != profile.identity:
        # Files made with it are read by it for ever.
        path.replace(_earlier(run.folder, was))
    profiles.save(profile, path)
    return Coder(network, profile, exact.denoise64(config, network.drawable))


def path_of(folder: Path, identity: bytes | None = None) -> Path:
    """Returns the file of a run's profile: an earlier one, if it has the identity."""
    if identity is not None and _earlier(folder, identity).is_file():
        return _earlier(folder, identity)
    return folder / NAME


def _earlier(folder: Path, identity: bytes) -> Path:
    stem, _, ending = NAME.partition(".")
    return folder / f"{stem}_{identity.hex()}.{ending}"


def load(network: Network, identity: bytes | None = None) -> Coder:
    """Returns the network with the profile that `fit` wrote, the newest or a named one.

    Raises:
      ConfigError: there is none, or it was made with other weights.
      DataError: its file is damaged.
    """
    path = path_of(network.run.folder, identity)
    if not path.is_file():
        raise ConfigError(
            f"the run must have a profile, {path}; got none. Make it: python -m "
            f"experiments.codec fit {network.run.folder}."
        )
    profile = profiles.load(path)
    made, now = profile.about.get("weights", ""), network.drawable.sha256
    if made != now or profile.shape != network.config.data.shape:
        raise ConfigError(
            f"{path} must be of the weights that are used, {now[:8]}; got those of "
            f"{made[:8]}. Choose them with --step, --average or --raw, or fit again."
        )
    return Coder(network, profile, exact.denoise64(network.config, network.drawable))


def of_profile(identity: bytes, output: str = "runs") -> str:
    """Returns the run in a folder of runs whose profile has an identity.

    Raises:
      ConfigError: no run there has the profile.
    """
    stem, _, ending = NAME.partition(".")
    for known in sorted(Path(output).glob(f"*/{stem}*.{ending}")):
        try:
            if profiles.load(known).identity == identity:
                return str(known.parent)
        except DataError:
            continue
    raise ConfigError(
        f"the run that the file was made with must be in {output}/; got none with the "
        f"profile {identity.hex()}. Name it with --run."
    )


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """Gives a function that moves a bar of images by so many."""
    with progress.clock(title, total=total, unit="units", unit_scale=True) as shown:
        yield shown.update


def _in_float32(network: Network) -> Callable[[np.ndarray, float], np.ndarray]:
    """Returns the network in float32: enough to measure with, and faster."""
    config = replace(network.config, "net", dtype="float32")

    @jax.jit
    def see(drawable: Drawable, x: jax.Array, t: jax.Array) -> jax.Array:
        return chains.make_denoiser(config, drawable)(x, t).x0

    def denoise(x: np.ndarray, t: float) -> np.ndarray:
        times = jnp.full(len(x), int(t))
        return np.asarray(see(network.drawable, jnp.asarray(x, jnp.float32), times))

    return denoise
