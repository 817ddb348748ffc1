"""Files of many images without loss, of the size of the bound: bits-back.

A symbol that is drawn from a distribution gives back the bits that it takes to code.
For each image, on a stack of symbols (`rans`), in the order of Bit-Swap (Kingma,
Abbeel, Ho 2019):

  pop   x_0 ~ q(x_0 | x0)            push  x0     with P(x0 | x_0)
  pop   x_1 ~ q(x_1 | x_0)           push  x_0    with p(x_0 | x_1)
  ...                                push  x_n    with N(0, 1)

which takes sum_i KL_i + L_T - log2 P(x0 | x_0) bits in the mean. The x_i lie on grids
of powers of two that are finer than the noise. What is popped first is there from the
start: it is in the file. So the first images go through the chain one by one, and the
more are on the stack, the more go at once. A stack can only be read whole.
"""

import math

import numpy as np

from diffusion_jax.codec import container, rans, steps
from diffusion_jax.codec.bins import Grid, Pixels
from diffusion_jax.codec.certified import NONE, Denoise64, joined
from diffusion_jax.codec.container import Decoded
from diffusion_jax.codec.profile import Profile
from diffusion_jax.codec.rans import Stack
from diffusion_jax.codec.steps import Tick, View

_PAID = 6
"""Images on a stack that pay for what another pops first."""
_OF_LANE, _MOST_LANES = 1024, {1: 1024, 2: 64}
"""Pixel values that there are for a head, which costs 6 bytes; and heads at most in a
file of each version."""


def encode(
    profile: Profile,
    denoise: Denoise64,
    images: np.ndarray,
    *,
    tick: Tick = steps.silent,
) -> bytes:
    """Returns the file of some images.

    Args:
      profile: of the network.
      denoise: the network, in float64.
      images: uint8 [N, H, W, C].
      tick: called with the number of images after each evaluation.

    Raises:
      DataError: images of another shape or type, or none.
      ValueError: a network that is not in float64.
    """
    chain, parts = profile.archive, steps.split(profile, images)
    most, batches = batches_of(len(images))
    view = View(profile, chain, denoise, most, found=[], tick=tick)
    stack = rans.start(_lanes(parts.symbols.size))
    for these in batches:
        symbols = parts.symbols[these]
        k = _pop(stack, _first(profile, symbols))
        _push(stack, symbols, _seen(view, k, these))
        for i in range(chain.steps):
            above = _pop(stack, _forward(profile, i, k))
            _push(stack, k, _reverse(view, i, above, these))
            k = above
        _push(stack, k, _prior(profile, len(these)))
    words = stack.words[stack.least : stack.size]
    payload = stack.heads.astype("<u8").tobytes() + words.astype("<u4").tobytes()
    listed = joined(view.found or [NONE])
    return container.packed("archive", profile, images, parts, listed, payload)


def decode(
    profile: Profile, denoise: Denoise64, data: bytes, *, tick: Tick = steps.silent
) -> Decoded:
    """Returns the images of a file.

    Args:
      profile: that the file was made with.
      denoise: its network, in float64.
      data: the file.
      tick: called with the number of images after each evaluation.

    Raises:
      DataError: no such file, another profile's, not whole, or damaged.
      ValueError: a network that is not in float64.
    """
    file = container.opened(data, profile)
    if file.layout != "archive":
        return container.other("archive", file, profile)
    chain, stack = profile.archive, stack_of(file, profile)
    most, batches = batches_of(file.number)
    view = View(profile, chain, denoise, most, file.listed, tick=tick)
    symbols = np.zeros((file.number, int(np.prod(profile.shape))), np.uint8)
    for these in reversed(batches):
        k = _pop(stack, _prior(profile, len(these)))
        for i in reversed(range(chain.steps)):
            below = _pop(stack, _reverse(view, i, k, these))
            _push(stack, k, _forward(profile, i, below))
            k = below
        found = _pop(stack, _seen(view, k, these))
        _push(stack, k, _first(profile, found))
        symbols[these] = found
    parts = steps.Split(symbols, file.place, file.value)
    return container.checked(steps.put_together(profile, parts), file)


def batches_of(count: int) -> tuple[int, list[np.ndarray]]:
    """Returns how many images are coded at once at most, and the numbers of each batch.

    >>> most, batches = batches_of(100)
    >>> most, [len(these) for these in batches][:9]
    (5, [1, 1, 1, 1, 1, 1, 1, 1, 1])
    """
    most, first, found = max(1, math.isqrt(count) // 2), 0, []
    while first < count:
        stop = min(first + min(most, max(1, first // _PAID)), count)
        found.append(np.arange(first, stop))
        first = stop
    return most, found


def stack_of(file: container.File, profile: Profile) -> Stack:
    """Returns the stack of a file as it was after all images.

    Raises:
      DataError: the file is cut or damaged.
    """
    if not file.whole:
        raise container.cut_whole("an archive", file)
    data, size = file.payload, int(np.prod(profile.shape))
    lanes = _lanes(file.number * size, file.version)
    if len(data) < 8 * lanes or len(data) % 4:
        raise container.damaged(f"a payload of {len(data):,} bytes")
    heads = np.frombuffer(data, "<u8", lanes).astype(np.uint64)
    words = np.frombuffer(data, "<u4", offset=heads.nbytes).astype(np.uint32)
    passes = sum(-(-len(these) * size // lanes) for these in batches_of(file.number)[1])
    return rans.opened(heads, words, passes * (2 * profile.archive.steps + 3))


def _lanes(values: int, version: int = container.VERSION) -> int:
    """Returns how many heads the stack of so many pixel values has."""
    return min(_MOST_LANES[version], 1 << max(0, (values // _OF_LANE).bit_length() - 1))


def _parts(stack: Stack, size: int) -> list[slice]:
    """Returns what goes onto the heads at once, as one comes to it."""
    lanes = len(stack.heads)
    parts = [slice(k, min(k + lanes, size)) for k in range(0, size, lanes)]
    return parts[::-1] if stack.rng is None else parts


def _pop(stack: Stack, code: Grid | Pixels) -> np.ndarray:
    mean, found = code.mean.ravel(), np.zeros(code.mean.size, np.int64)
    sd = np.broadcast_to(code.sd, code.mean.shape).ravel()
    for part in _parts(stack, len(mean)):
        here = code._replace(mean=mean[part], sd=sd[part])
        found[part] = rans.pop(stack, part.stop - part.start, here.find)
    return found.reshape(code.mean.shape)


def _push(stack: Stack, symbols: np.ndarray, code: Grid | Pixels) -> None:
    start, freq = (each.ravel() for each in code.interval(symbols))
    for part in _parts(stack, symbols.size):
        rans.push(stack, start[part], freq[part])


def _first(profile: Profile, symbols: np.ndarray) -> Grid:
    """Returns q(x_0 | x0)."""
    chain = profile.archive
    mean = np.multiply(profile.levels[symbols], chain.alpha[0])
    return Grid(mean, chain.sigma[:1], _delta(profile, 0), False)


def _forward(profile: Profile, i: int, k: np.ndarray) -> Grid:
    """Returns q(x_{i + 1} | x_i) where x_i is k times its unit."""
    chain, below = profile.archive, _delta(profile, i)
    mean = np.multiply(np.multiply(k, below), chain.alpha[i + 1] / chain.alpha[i])
    kept = np.sqrt(chain.small[i : i + 1]) / chain.sigma[i]
    return Grid(mean, kept * chain.sigma[i + 1], _delta(profile, i + 1), False)


def _reverse(view: View, i: int, k: np.ndarray, these: np.ndarray) -> Grid:
    """Returns p(x_i | x_{i + 1}) where x_{i + 1} is k times its unit."""
    profile, chain = view.profile, view.chain
    x = np.multiply(k, _delta(profile, i + 1))
    mean = steps.mean(chain, i, x, view.clean(x, i + 1, these))
    return Grid(mean, chain.sd[i], _delta(profile, i), True)


def _prior(profile: Profile, count: int) -> Grid:
    """Returns p(x_n)."""
    mean = np.zeros((count, int(np.prod(profile.shape))))
    return Grid(mean, np.ones(1), _delta(profile, profile.archive.steps), True)


def _seen(view: View, k: np.ndarray, these: np.ndarray) -> Pixels:
    """Returns P(x0 | x_0) where x_0 is k times its unit."""
    profile, chain = view.profile, view.chain
    clean = view.clean(np.multiply(k, _delta(profile, 0)), 0, these)
    return steps.pixels(profile, chain, clean)


def _delta(profile: Profile, i: int) -> float:
    """Returns the distance of two values of x_i."""
    return 2.0 ** -int(profile.archive.delta_bits[i])
