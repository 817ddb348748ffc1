"""What a decoder has to know beside the network: the profile of a run.

Times, variances and constants that `fitting.fit` found on training images. Those who
decode compute none of them again: all are in the file as float64. Two chains of times
are in it, one for each layout, from the times of least noise (place 0) up:

  x_{i} = c0_i x0_hat(x_{i+1}) + ct_i x_{i+1} + sd_i z        i = n - 1, ..., 0

with z ~ N(0, 1), and x_n ~ N(0, 1) to begin with.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.errors import DataError
from diffusion_jax.storage import tensor_files

FORMAT = "diffusion_jax codec profile 1"
LAYOUTS = ("progressive", "archive")
MOST_STEPS, MOST_BITS = 1000, 16
MOST_DIMENSIONS = 2**24
TEXTURES = 32


class Chain(NamedTuple):
    """The times of a layout, and what belongs to them; n steps, D dimensions."""

    times: np.ndarray
    """int64 [n + 1], of the network, rising: times[0] is where pixels are coded."""
    alpha: np.ndarray
    """float64 [n + 1], of x_t = alpha x0 + sigma eps."""
    sigma: np.ndarray
    """float64 [n + 1]."""
    c0: np.ndarray
    """float64 [n], of the mean of step i."""
    ct: np.ndarray
    """float64 [n]."""
    small: np.ndarray
    """float64 [n], the variance of q(x_i | x_{i+1}, x0)."""
    sd: np.ndarray
    """float64 [n, D], deviation of p(x_i | x_{i+1})."""
    pixel_sd: np.ndarray
    """float64 [D], deviation of x0 - x0_hat(x_0) where `texture` is 1."""
    texture: np.ndarray
    """float64 [TEXTURES], factors of it by how uneven x0_hat is, see `bins.texture`."""
    delta_bits: np.ndarray
    """int64 [n + 1]: in an archive x_i is a multiple of 2^-delta_bits."""
    chunk: np.ndarray
    """int64 [n, D], which symbol of step i a dimension belongs to."""
    bits: np.ndarray
    """int64 [n], of each symbol of step i."""

    @property
    def steps(self) -> int:
        """Returns n."""
        return len(self.c0)

    @property
    def chunks(self) -> np.ndarray:
        """Returns the number of symbols of each step, int64 [n]."""
        return np.asarray(self.chunk.max(axis=1) + 1)


class Profile(NamedTuple):
    """What `fitting.fit` found, of images in D = H W C dimensions."""

    shape: tuple[int, int, int]
    """H, W and C."""
    alphabet: np.ndarray
    """uint8 [A], the values that pixels have, rising."""
    seed: int
    """Of the noise that symbols choose from."""
    progressive: Chain
    archive: Chain
    about: dict[str, str]
    """In words: "name" of the run, "weights" (sha256), "predicted_progressive" and
    "predicted_archive" (bits an image)."""

    def chain(self, layout: str) -> Chain:
        """Returns the times of one of LAYOUTS."""
        return self.archive if layout == "archive" else self.progressive

    @property
    def levels(self) -> np.ndarray:
        """Returns the alphabet in [-1, 1], float64 [A]."""
        return self.alphabet / 127.5 - 1

    @property
    def middles(self) -> np.ndarray:
        """Returns what is between two neighbours of it, float64 [A - 1]."""
        levels = self.levels
        return 0.5 * (levels[1:] + levels[:-1])

    @property
    def identity(self) -> bytes:
        """Returns 8 bytes that stand in each file made with it."""
        digest = hashlib.sha256(json.dumps(_words(self), sort_keys=True).encode())
        for name, array in sorted(_arrays(self).items()):
            digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.digest()[:8]


def save(profile: Profile, path: Path) -> None:
    """Writes the profile to a safetensors file.

    Raises:
      OSError: the disk refuses.
    """
    tensor_files.write_safetensors(path, _arrays(profile), _words(profile))


def load(path: Path) -> Profile:
    """Returns the profile of a file.

    Raises:
      DataError: no such file, or no profile.
    """
    found = tensor_files.read(path)
    try:
        return _checked(found.arrays, found.meta)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(
            f"{path} must be a profile of this version; got {error or 'something else'}"
            ". Make it again: python -m experiments.codec fit RUN."
        ) from error


def _arrays(profile: Profile) -> dict[str, np.ndarray]:
    arrays = {"alphabet": profile.alphabet}
    for layout in LAYOUTS:
        chain = profile.chain(layout)._asdict()
        if np.all(chain["texture"] == 1):  # as files of the first version have it
            del chain["texture"]
        arrays |= {f"{layout}.{name}": array for name, array in chain.items()}
    return arrays


def _words(profile: Profile) -> dict[str, str]:
    shape = ",".join(map(str, profile.shape))
    return {
        **profile.about,
        "format": FORMAT,
        "shape": shape,
        "seed": str(profile.seed),
    }


def _checked(arrays: dict[str, np.ndarray], words: dict[str, str]) -> Profile:
    """Returns a profile of what a file holds; an error says what is wrong with it."""
    about = dict(words)
    if about.pop("format") != FORMAT:
        raise ValueError("another format")
    shape = tuple(int(side) for side in about.pop("shape").split(","))
    size, alphabet = int(np.prod(shape)), arrays["alphabet"]
    if len(shape) != 3 or min(shape) < 1 or size > MOST_DIMENSIONS:
        raise ValueError(f"images of {shape}")
    if not len(alphabet) or not np.array_equal(alphabet, np.unique(alphabet)):
        raise ValueError("an alphabet out of order")
    if alphabet.dtype != np.uint8:
        raise ValueError("an alphabet of other than bytes")
    chains = {layout: _chain(arrays, layout, size) for layout in LAYOUTS}
    seed = int(about.pop("seed"))
    return Profile(shape, alphabet, seed, **chains, about=about)


def _chain(arrays: dict[str, np.ndarray], layout: str, size: int) -> Chain:
    arrays = {f"{layout}.texture": np.ones(TEXTURES)} | arrays
    values = {name: arrays[f"{layout}.{name}"] for name in Chain._fields}
    chain = Chain(**values)
    n = len(chain.c0)
    longer, wide = (n + 1,), (n, size)
    shapes: dict[str, Any] = dict.fromkeys(Chain._fields, (n,))
    shapes |= dict.fromkeys(("times", "alpha", "sigma", "delta_bits"), longer)
    shapes |= {"sd": wide, "chunk": wide, "pixel_sd": (size,), "texture": (TEXTURES,)}
    whole = ("times", "delta_bits", "chunk", "bits")
    for name, array in values.items():
        kind = np.int64 if name in whole else np.float64
        if array.shape != shapes[name] or array.dtype != kind:
            raise ValueError(f"{layout}.{name} of {array.dtype}{array.shape}")
        if not np.isfinite(array).all() or array.min() < 0:
            raise ValueError(f"{layout}.{name} outside its range")
    if not 1 <= n <= MOST_STEPS:
        raise ValueError(f"{n} steps")
    counts = [len(np.unique(row)) for row in chain.chunk]
    if chain.bits.max() > MOST_BITS or np.any(chain.chunks != counts):
        raise ValueError(f"symbols of {layout} that are none")
    if chain.delta_bits.max() > 16:
        raise ValueError(f"{layout}.delta_bits outside its range")
    for name in ("alpha", "sigma", "small", "sd", "pixel_sd", "texture"):
        if values[name].min() <= 0:
            raise ValueError(f"{layout}.{name} outside its range")
    return chain
