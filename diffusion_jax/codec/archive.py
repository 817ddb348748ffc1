"""Files of many images without loss, of the size of the bound: bits-back.

A symbol that is drawn from a distribution gives back the bits that it takes to code.
For each image, on a stack of symbols (`rans`), in the order of Bit-Swap (Kingma,
Abbeel, Ho 2019):

  pop   x_0 ~ q(x_0 | x0)            push  x0     with P(x0 | x_0)
  pop   x_1 ~ q(x_1 | x_0)           push  x_0    with p(x_0 | x_1)
  ...                                push  x_n    with N(0, 1)

which takes sum_i KL_i + L_T - log2 P(x0 | x_0) bits in the mean. The x_i lie on grids
of powers of two that are finer than the noise. What is popped first is there from the
start: it is in the file. A stack can only be read whole; each of the groups of images
has its own, so that the network is given one image of each at once.
"""

import numpy as np

from diffusion_jax.codec import container, rans, steps
from diffusion_jax.codec.bins import Grid, Pixels
from diffusion_jax.codec.certified import NONE, ONE, Denoise64, joined
from diffusion_jax.codec.profile import Profile
from diffusion_jax.codec.rans import Stacks
from diffusion_jax.codec.steps import Tick, View
from diffusion_jax.errors import DataError

GROUP = 256
"""Images of a group at least, where there are several; each costs some 150 bytes."""
MOST_GROUPS = 64
_MOST_LANES = 32


def encode(
    profile: Profile,
    denoise: Denoise64,
    images: np.ndarray,
    *,
    seed: int = 0,
    tick: Tick = steps.silent,
) -> bytes:
    """Returns the file of some images.

    Args:
      profile: of the network.
      denoise: the network, in float64.
      images: uint8 [N, H, W, C].
      seed: of the bits that are there from the start.
      tick: called with the number of images after each evaluation.

    Raises:
      DataError: images of another shape or type, or none.
      ValueError: a network that is not in float64.
    """
    chain, parts = profile.archive, steps.split(profile, images)
    count, size = parts.symbols.shape
    groups = min(max(1, count // GROUP), MOST_GROUPS)
    lanes = _lanes(size)
    view = View(profile, chain, denoise, groups, found=[], tick=tick)
    # More than 24 bits a value is never popped.
    stacks = rans.start(
        groups, lanes, 24 * size * (chain.steps + 1) // 32 + lanes, seed
    )
    for these in _rows(count, groups):
        symbols = parts.symbols[these]
        k = _pop(stacks, _first(profile, symbols))
        _push(stacks, symbols, _seen(view, k, these))
        for i in range(chain.steps):
            above = _pop(stacks, _forward(profile, i, k))
            _push(stacks, k, _reverse(view, i, above, these))
            k = above
        _push(stacks, k, _prior(profile, k.shape))
    heads, words = rans.written(stacks)
    payload = container.varint(groups)
    payload += b"".join(container.varint(len(each)) for each in words)
    payload += heads.astype("<u8").tobytes()
    payload += b"".join(each.astype("<u4").tobytes() for each in words)
    listed = joined(view.found or [NONE])
    return container.packed("archive", profile, images, parts, listed, payload)


def decode(
    profile: Profile, denoise: Denoise64, data: bytes, *, tick: Tick = steps.silent
) -> np.ndarray:
    """Returns the images of a file, uint8 [N, H, W, C].

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
    if file.layout == "raw":
        return container.raw(file, profile)
    if file.layout != "archive":
        raise DataError(
            f"an archive must have the layout archive; got {file.layout}. Read it "
            "with progressive.decode."
        )
    if not file.whole:
        raise container.cut_whole("an archive", file)
    chain, size = profile.archive, int(np.prod(profile.shape))
    stacks = stacks_of(file, profile)
    view = View(profile, chain, denoise, len(stacks.heads), file.listed, tick=tick)
    symbols = np.zeros((file.number, size), np.uint8)
    for these in reversed(list(_rows(file.number, len(stacks.heads)))):
        k = _pop(stacks, _prior(profile, (len(these), size)))
        for i in reversed(range(chain.steps)):
            below = _pop(stacks, _reverse(view, i, k, these))
            _push(stacks, k, _forward(profile, i, below))
            k = below
        found = _pop(stacks, _seen(view, k, these))
        _push(stacks, k, _first(profile, found))
        symbols[these] = found
    parts = steps.Split(symbols, file.place, file.value)
    return container.check(steps.put_together(profile, parts), file)


def _lanes(size: int) -> int:
    """Returns how many heads a stack has: each costs 8 bytes a file."""
    return min(_MOST_LANES, 1 << max(0, (size // 4).bit_length() - 1))


def _rows(count: int, groups: int) -> list[np.ndarray]:
    """Returns numbers of images that are coded at once, one of each group."""
    return [np.arange(k, min(k + groups, count)) for k in range(0, count, groups)]


def _parts(stacks: Stacks, size: int) -> list[slice]:
    """Returns the columns that go onto the heads at once, as one comes to them."""
    lanes = stacks.heads.shape[1]
    parts = [slice(k, min(k + lanes, size)) for k in range(0, size, lanes)]
    return parts[::-1] if stacks.reading else parts


def _pop(stacks: Stacks, code: Grid | Pixels) -> np.ndarray:
    rows, size = code.mean.shape
    found = np.zeros((rows, size), np.int64)
    for part in _parts(stacks, size):
        found[:, part] = rans.pop(
            stacks, rows, part.stop - part.start, code.part(part).find
        )
    return found


def _push(stacks: Stacks, symbols: np.ndarray, code: Grid | Pixels) -> None:
    start, freq = code.interval(symbols)
    for part in _parts(stacks, symbols.shape[1]):
        rans.push(stacks, start[:, part], freq[:, part])


def _first(profile: Profile, symbols: np.ndarray) -> Grid:
    """Returns q(x_0 | x0)."""
    chain = profile.archive
    mean = np.multiply(profile.levels[symbols], chain.alpha[0])
    return Grid(mean, chain.inverse_sigma, _delta(profile, 0), False)


def _forward(profile: Profile, i: int, k: np.ndarray) -> Grid:
    """Returns q(x_{i + 1} | x_i) where x_i is k times its unit."""
    chain = profile.archive
    mean = np.multiply(np.multiply(k, _delta(profile, i)), chain.forward[i])
    return Grid(
        mean, chain.inverse_forward_sd[i : i + 1], _delta(profile, i + 1), False
    )


def _reverse(view: View, i: int, k: np.ndarray, these: np.ndarray) -> Grid:
    """Returns p(x_i | x_{i + 1}) where x_{i + 1} is k times its unit."""
    profile, chain = view.profile, view.chain
    x = np.multiply(k, _delta(profile, i + 1))
    mean = steps.mean(chain, i, x, view.clean(x, i + 1, these))
    return Grid(mean, chain.inverse_sd[i], _delta(profile, i), True)


def _prior(profile: Profile, shape: tuple[int, ...]) -> Grid:
    """Returns p(x_n)."""
    last = _delta(profile, profile.archive.steps)
    return Grid(np.zeros(shape), np.ones(1), last, True)


def _seen(view: View, k: np.ndarray, these: np.ndarray) -> Pixels:
    """Returns P(x0 | x_0) where x_0 is k times its unit."""
    profile, chain = view.profile, view.chain
    clean = view.clean(np.multiply(k, _delta(profile, 0)), 0, these)
    mean = np.multiply(clean, 1 / ONE)
    return Pixels(mean, chain.inverse_pixel_sd, profile.middles)


def _delta(profile: Profile, i: int) -> float:
    """Returns the distance of two values of x_i."""
    return 2.0 ** -int(profile.archive.delta_bits[i])


def stacks_of(file: container.File, profile: Profile) -> Stacks:
    """Returns the stacks of a file as they were after all images."""
    data, chain = file.payload, profile.archive
    size = int(np.prod(profile.shape))
    lanes = _lanes(size)
    groups, place = container.number_at(data, 0)
    if not 1 <= groups <= min(file.number, MOST_GROUPS):
        raise _damaged(f"{groups} groups of {file.number:,} images")
    lengths = []
    for _ in range(groups):
        length, place = container.number_at(data, place)
        lengths.append(length)
    wanted = place + 8 * groups * lanes + 4 * sum(lengths)
    if wanted != len(data):
        raise _damaged(f"{len(data):,} bytes where its groups have {wanted:,}")
    heads = np.frombuffer(data, "<u8", groups * lanes, place).reshape(groups, lanes)
    every = np.frombuffer(data, "<u4", sum(lengths), place + heads.nbytes)
    words = np.split(every, np.cumsum(lengths)[:-1])
    passes = -(-size // lanes)
    rows = -(-file.number // groups)
    count = rows * passes * (2 * chain.steps + 3)
    return rans.opened(heads.astype(np.uint64), words, count)


def _damaged(what: str) -> DataError:
    return DataError(
        f"an archive must be as it was written; got {what}. It is damaged: copy it "
        "again from where it was made."
    )
